/* Planes in a thread's scratch memory, with what surrounds them, so that a window is the same offsets everywhere.
 *
 * Column c of a padded line lies in phase c modulo the stride, at place c / stride of it: neighbours in the output read
 * neighbours. Narrow planes lie side by side, as many as fit into one vector with their output, one margin between two.
 * A band of lines is taken at a time, so that it stays in the first cache.
 */

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

/* A band's floats, about; lines of output that it has a multiple of; how far ahead memory is asked for. */
enum { WINDOW_FLOATS = 6144, WINDOW_LINES = 4, WINDOW_AHEAD = 1024 };

/* Fills in how the planes lie, all of planes_t from `together` on but its memory. */
static inline void NAME(place)(planes_t *p, int threads) {
    const int64_t stride = p->stride[1], reach = (p->kernel[1] - 1) * p->dilation[1];
    const int64_t columns = (p->out_width - 1) * stride + reach + 1; /* of a padded line */
    int64_t apart = columns - p->pad[1] > p->pad[1] + p->width ? columns - p->pad[1] : p->pad[1] + p->width;
    apart = (apart + stride - 1) / stride;
    p->apart = apart > p->out_width ? apart : p->out_width;
    p->together = 1;
    while (p->together < p->rows * p->batch && p->together * p->apart + p->out_width <= LANES) p->together++;
    p->vectors = ((p->together - 1) * p->apart + p->out_width + LANES - 1) / LANES;
    const int64_t read = p->vectors * LANES + reach / stride;
    const int64_t written = (p->together - 1) * p->apart + (p->pad[1] + p->width) / stride + 2 * LANES + 1;
    p->phase = ((read > written ? read : written) + LANES - 1) / LANES * LANES;
    p->line = stride * p->phase;
    p->band = (WINDOW_FLOATS / p->line - (p->kernel[0] - 1) * p->dilation[0] - 1) / p->stride[0] + 1;
    p->band = p->band < WINDOW_LINES ? WINDOW_LINES : p->band - p->band % WINDOW_LINES;
    if (p->band > p->out_height) p->band = p->out_height;
    p->window = ((p->band - 1) * p->stride[0] + (p->kernel[0] - 1) * p->dilation[0] + 1) * p->line;
    p->groups = (p->rows * p->batch + p->together - 1) / p->together;
    p->chunk = p->groups / (4 * threads) + 1;
}

/* Where a window's place (ky, kx) is, from the first place of its line and column on. */
static inline int64_t NAME(offset)(const planes_t *p, int64_t ky, int64_t kx) {
    const int64_t column = kx * p->dilation[1];
    return ky * p->dilation[0] * p->line + column % p->stride[1] * p->phase + column / p->stride[1];
}

/* One line of a plane, from `to` on, the place of its first padded column. What a vector writes too much is written
 * again: by the margin behind it, and by the next plane. */
INLINE void NAME(fill_line)(const planes_t *p, const float *x, float *to) {
    const int64_t width = p->width, pad = p->pad[1];
    const lanes_t outside = all(p->outside);
    if (p->stride[1] == 1) {
        for (int64_t i = 0; i < width; i += LANES) {
            __builtin_prefetch(x + i + WINDOW_AHEAD);
            store(to + pad + i, load(x + i));
        }
        store(to + pad + width, outside);
    } else if (p->stride[1] == 2) {
        float *even = to + pad % 2 * p->phase + pad / 2, *odd = to + (pad + 1) % 2 * p->phase + (pad + 1) / 2;
        for (int64_t i = 0; i < width; i += 2 * LANES) {
            __builtin_prefetch(x + i + WINDOW_AHEAD);
            __builtin_prefetch(x + i + WINDOW_AHEAD + LANES);
            const lanes_t a = load(x + i), b = load(x + i + LANES);
            store(even + i / 2, evens(a, b));
            store(odd + i / 2, odds(a, b));
        }
        store(even + (width + 1) / 2, outside);
        store(odd + width / 2, outside);
    } else {
        const int64_t stride = p->stride[1];
        for (int64_t phase = 0; phase < stride; phase++) { /* padded columns phase, phase + stride, … */
            float *line = to + phase * p->phase;
            const int64_t ahead = phase < pad ? (pad - phase + stride - 1) / stride : 0;
            int64_t j = ahead, column = ahead * stride + phase - pad;
            for (; column < width; column += stride) line[j++] = x[column];
            store(line + j, outside);
        }
    }
}

/* Planes that lie side by side: whose they are, and where each is in memory. */
typedef struct {
    int64_t count;
    int64_t channel[LANES], picture[LANES]; /* of the output */
    const float *x[LANES];
    float *y[LANES];
} NAME(group_t);

INLINE void NAME(group)(const planes_t *p, int64_t number, NAME(group_t) *out) {
    const int64_t plane = number * p->together, left = p->rows * p->batch - plane;
    int64_t channel = p->batch == 1 ? plane : plane / p->batch, picture = plane - channel * p->batch;
    out->count = left < p->together ? left : p->together;
    for (int64_t g = 0; g < out->count; g++) {
        out->channel[g] = channel;
        out->picture[g] = picture;
        out->x[g] = p->x + (p->share == 1 ? channel : channel / p->share) * p->x_ld + picture * p->height * p->width;
        out->y[g] = p->y + channel * p->y_ld + picture * p->out_height * p->out_width;
        if (++picture == p->batch) {
            picture = 0;
            channel++;
        }
    }
}

/* The lines that `lines` lines of output from `first` on read. */
INLINE void NAME(fill)(
    const planes_t *p, const NAME(group_t) *group, int64_t first, int64_t lines, float *window) {
    const int64_t begin = first * p->stride[0] - p->pad[0];
    const int64_t end = begin + (lines - 1) * p->stride[0] + (p->kernel[0] - 1) * p->dilation[0] + 1;
    for (int64_t i = begin; i < end; i++, window += p->line) {
        if (i < 0 || i >= p->height)
            for (int64_t j = 0; j < p->line; j += LANES) store(window + j, all(p->outside));
        else
            for (int64_t g = 0; g < group->count; g++)
                NAME(fill_line)(p, group->x[g] + i * p->width, window + g * p->apart);
    }
}

/* A thread's scratch memory, its margins filled once: nothing else writes left of a line. */
INLINE float *NAME(window)(const planes_t *p, int worker) {
    float *window = p->scratch + worker * p->scratch_size;
    for (int64_t i = 0; i < p->window; i += LANES) store(window + i, all(p->outside));
    return window;
}

/* Vector v of `count` lines of the output from `line` on. As long as the plane goes on, a vector may reach into lines
 * below: these are written later. */
INLINE void NAME(put)(
    const planes_t *p, const NAME(group_t) *group, int64_t line, int64_t v, const lanes_t *value, const int count) {
    const int64_t width = p->out_width, left = width - v * LANES;
    float *y = group->y[0] + line * width + v * LANES;
    if (left >= LANES || (group->count == 1 && (line + count - 1) * width + (v + 1) * LANES <= p->out_height * width)) {
#pragma GCC unroll 7
        for (int r = 0; r < count; r++, y += width) store(y, value[r]);
        return;
    }
#pragma GCC unroll 7
    for (int r = 0; r < count; r++, y += width) store_first(y, value[r], left);
    for (int64_t g = 1; g < group->count; g++) {
        y = group->y[g] + line * width - g * p->apart;
#pragma GCC unroll 7
        for (int r = 0; r < count; r++, y += width) store_part(y, value[r], g * p->apart, width);
    }
}
