/* Windows on planes (pictures of one channel), for depthwise convolutions and pools: see planes_window.h. */
#ifndef PRUNELLA_PLANES_H
#define PRUNELLA_PLANES_H

#include <stdint.h>

typedef struct {
    /* what the step says */
    const float *x;
    float *y;
    int64_t x_ld, y_ld, batch, rows, share; /* output channels; those that share a channel of x */
    int64_t height, width, out_height, out_width;
    const int64_t *kernel, *stride, *pad, *dilation;
    float outside; /* what surrounds a plane */
    /* how its planes lie in a thread's scratch memory */
    int64_t together, apart; /* planes side by side, and from one to the next */
    int64_t vectors;         /* of a line of output */
    int64_t phase, line;     /* floats: columns of one remainder modulo the stride; a whole line, all remainders */
    int64_t band, groups, chunk; /* lines of output at a time; of planes side by side; those that a thread takes */
    float *scratch;
    int64_t scratch_size, window; /* a thread's floats; those of them that hold planes */
} planes_t;

#endif
