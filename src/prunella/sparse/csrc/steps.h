/* The steps of a plan: a network's forward pass for inputs of one shape, as steps.py describes it (its ctypes
 * structures are these, field by field).
 *
 * Values are float32 and channel-major: channel c begins at `data + c * ld` and its positions follow one another: (batch,
 * token) of a text, (batch, y, x) of pictures. ld is at least the positions rounded up to 16; what lies between the two
 * is anything, and steps may read and overwrite it. 64 floats behind a value's last channel may be read too.
 */
#ifndef PRUNELLA_STEPS_H
#define PRUNELLA_STEPS_H

#include <stdint.h>

enum {
    STEP_PRODUCT,
    STEP_CONV,
    STEP_DEPTHWISE,
    STEP_POOL,
    STEP_MEAN,
    STEP_SCALE,
    STEP_ADD,
    STEP_MAP,
    STEP_NORM,
    STEP_ATTEND,
    STEP_PACK,
    STEP_UNPACK,
    STEPS
};

/* What a step does to its results at the end: y = act(y + residual), or act(y) + residual where the step says so. */
enum {
    ACT_NONE,
    ACT_RELU,
    ACT_RELU6,
    ACT_SILU,
    ACT_GELU,      /* x/2 (1 + erf(x / sqrt 2)) */
    ACT_GELU_TANH, /* x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) */
    ACT_SIGMOID,
    ACT_HARDSWISH,
    ACT_HARDSIGMOID,
    ACT_TANH,
    ACTS
};

typedef struct {
    int64_t kind;
} step_t;

/* A pruned weight (rows, columns), made for products with many positions: its columns in strips of at most 256, so that the
 * inputs of a strip stay in the first cache while all rows use them. Row r keeps in strip s the values number
 * starts[r * (strips + 1) + s] up to starts[r * (strips + 1) + s + 1], in the columns `index` counted from the first of the
 * strip; the next row goes on where this one ends. The columns of a convolution's group are those of `strip / places`
 * channels, one place in its kernel after the other, and then those of the next channels. */
typedef struct {
    int64_t rows, columns, strip, strips;
    const float *values;
    const uint8_t *index;
    const int32_t *starts; /* (rows, strips + 1) */
    const struct code *code; /* (blocks of CODE_ROWS rows of a group, strips), and where the last ends; NULL: as above */
    int64_t ends; /* of the code: what is done then already */
} striped_t;

/* Instructions made for one weight: see generate.c. For a block of rows and a strip of columns, and 16 positions: y (CODE_ROWS,
 * 16), `stride` bytes from a row to the next, becomes bias + W x in the first strip and gets + W x in the others. x (columns,
 * 16) lies together, or (CODE_APART) `apart` bytes from a column to the next. The last strip does what is among `ends`. */
enum { CODE_ROWS = 28, CODE_SUMS = 128 };
enum { CODE_RELU = 1, CODE_RELU6 = 2, CODE_RESIDUAL = 4 /* as y, before the activation */, CODE_APART = 8 };
typedef struct code {
    void (*run)(
        const float *x, float *y, const float *values, const float *bias, int64_t stride, const float *residual,
        int64_t apart);
    const float *values;
} code_t;

/* y (rows, positions) = W x (columns, positions). */
typedef struct {
    int64_t kind;
    const striped_t *weight;
    const float *scale, *bias; /* (rows), or NULL: scale (W x) + bias */
    const float *x;
    int64_t x_ld;
    float *y;
    int64_t y_ld;
    const float *residual; /* as y, or NULL */
    int64_t residual_ld, residual_last; /* last: added after the activation */
    int64_t act, positions;
} product_step_t;

/* y (rows, batch, out_height, out_width): a convolution of x (channels, batch, height, width). Here nothing beyond the
 * positions is read or written. */
typedef struct {
    int64_t kind;
    const striped_t *weight; /* the rows of one group after those of the other; columns: of one group */
    const float *scale, *bias;
    const float *x;
    int64_t x_ld;
    float *y;
    int64_t y_ld;
    const float *residual;
    int64_t residual_ld, residual_last;
    int64_t x_batch, y_batch, residual_batch; /* from a picture to the next: height * width, or channels * ld in NCHW */
    int64_t act, batch, channels, height, width, rows, out_height, out_width;
    int64_t kernel[2], stride[2], pad[2], dilation[2], groups; /* pad: zeros above and to the left */
} conv_step_t;

/* The same with one filter to a channel (or `rows / channels` of them), dense. y does not overlap x, nor does it in a
 * pool. */
typedef struct {
    int64_t kind;
    const float *weight; /* (rows, kernel[0], kernel[1]) */
    const float *bias;
    const float *x;
    int64_t x_ld;
    float *y;
    int64_t y_ld;
    const float *residual;
    int64_t residual_ld, residual_last;
    int64_t act, batch, channels, height, width, rows, out_height, out_width;
    int64_t kernel[2], stride[2], pad[2], dilation[2];
} depthwise_step_t;

/* y (channels, batch, out_height, out_width): the largest, or the mean, of windows of x. */
typedef struct {
    int64_t kind;
    const float *x;
    int64_t x_ld;
    float *y;
    int64_t y_ld;
    int64_t act, batch, channels, height, width, out_height, out_width;
    int64_t kernel[2], stride[2], pad[2], dilation[2];
    int64_t mean, count_pad; /* mean: 1, else the largest; count_pad: the zeros around count as places of a window */
} pool_step_t;

/* y (channels, batch) = the mean over the `places` of each picture of x (channels, batch, places). */
typedef struct {
    int64_t kind;
    const float *x;
    int64_t x_ld;
    float *y;
    int64_t y_ld;
    int64_t act, batch, channels, places;
} mean_step_t;

/* y = x scale, x (channels, batch, places), scale (channels, batch). */
typedef struct {
    int64_t kind;
    const float *x;
    int64_t x_ld;
    const float *scale;
    int64_t scale_ld;
    float *y;
    int64_t y_ld;
    int64_t act, batch, channels, places;
} scale_step_t;

/* y = act(a + b), or act(a b) where `times`, each (channels, positions); b has b_positions, which repeat: a number of
 * positions that divides theirs. */
typedef struct {
    int64_t kind;
    const float *a;
    int64_t a_ld;
    const float *b;
    int64_t b_ld;
    float *y;
    int64_t y_ld;
    int64_t act, channels, positions, b_positions, times;
} add_step_t;

/* y = act(x). */
typedef struct {
    int64_t kind;
    const float *x;
    int64_t x_ld;
    float *y;
    int64_t y_ld;
    int64_t act, channels, positions;
} map_step_t;

/* y = (x - mean) / sqrt(variance + eps) * weight + bias over the channels of each position; x + residual in place of x
 * where there is one. rms: without the mean. */
typedef struct {
    int64_t kind;
    const float *x;
    int64_t x_ld;
    const float *residual;
    int64_t residual_ld;
    const float *weight, *bias; /* (channels), or NULL */
    float *y;
    int64_t y_ld;
    int64_t channels, positions, rms;
    double eps;
} norm_step_t;

/* Per batch and head: y (dim_v, queries) = v softmax(scale k^T q + mask), channel head * dim + d of q and k, head * dim_v + d
 * of v and y; position batch * queries + t of q and y, batch * keys + t of k and v. */
typedef struct {
    int64_t kind;
    const float *q;
    int64_t q_ld;
    const float *k;
    int64_t k_ld;
    const float *v;
    int64_t v_ld;
    float *y;
    int64_t y_ld;
    const void *mask; /* floats, which are added, or, where mask_boolean, bytes: 0 where a query does not see a key. NULL: none */
    int64_t mask_stride[4]; /* of batch, head, query, key, in elements; 0 where it is the same for all */
    int64_t batch, heads, kv_heads, dim, dim_v, queries, keys;
    int64_t causal;                  /* query t sees the keys up to t */
    int64_t mask_boolean, empty_nan; /* empty_nan: NaN for a query that sees no key, as softmax has it; else 0 */
    double scale;
} attend_step_t;

/* y (channels, positions), channel-major, of x (positions, channels) row-major, `x_stride` elements from a position to the
 * next; dtype: F32, BF16 or F16 of internal.h. STEP_UNPACK: the other way round. */
typedef struct {
    int64_t kind;
    const void *x;
    int64_t x_stride, dtype;
    float *y;
    int64_t y_ld;
    int64_t channels, positions;
} pack_step_t;

typedef struct {
    int64_t kind;
    const float *x;
    int64_t x_ld;
    void *y;
    int64_t y_stride, dtype;
    int64_t channels, positions;
} unpack_step_t;

/* 0, or -1: what is asked for makes no sense, or -2: out of memory. */
typedef int (*step_run_t)(const void *step, int threads);

/* What runs each kind of step, by instruction set. */
extern const step_run_t avx512_steps[STEPS], avx2_steps[STEPS], portable_steps[STEPS];

#endif
