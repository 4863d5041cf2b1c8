/* Depthwise convolution: planes as in planes_window.h, some lines of output at once, so that a line that is loaded serves
 * several places of the filter. See steps.h. */

typedef struct {
    planes_t planes;
    const depthwise_step_t *s;
    const int64_t *offsets; /* of the filter's places */
    int64_t places;
} NAME(depthwise_t);

/* `lines` lines of vector v by a square filter without dilation; filter: a vector to a place. */
INLINE void NAME(square)(
    const planes_t *p, const float *from, const float *filter, lanes_t bias, const int size, const int stride,
    const int lines, lanes_t *sum) {
#pragma GCC unroll 7
    for (int r = 0; r < lines; r++) sum[r] = bias;
    for (int kx = 0; kx < size; kx++) {
        const float *column = from + kx % stride * p->phase + kx / stride;
        lanes_t weight[7];
#pragma GCC unroll 7
        for (int ky = 0; ky < size; ky++) weight[ky] = load(filter + (ky * size + kx) * LANES);
#pragma GCC unroll 20
        for (int i = 0; i < (lines - 1) * stride + size; i++) {
            const lanes_t x = load(column + i * p->line);
#pragma GCC unroll 7
            for (int r = 0; r < lines; r++)
                if (i - r * stride >= 0 && i - r * stride < size) sum[r] = muladd(x, weight[i - r * stride], sum[r]);
        }
    }
}

/* The same for any filter. */
INLINE void NAME(any_filter)(
    const NAME(depthwise_t) *job, const float *from, const float *filter, lanes_t bias, const int lines, lanes_t *sum) {
    const int64_t step = job->planes.stride[0] * job->planes.line;
#pragma GCC unroll 7
    for (int r = 0; r < lines; r++) sum[r] = bias;
    for (int64_t k = 0; k < job->places; k++) {
        const lanes_t weight = load(filter + k * LANES);
#pragma GCC unroll 7
        for (int r = 0; r < lines; r++) sum[r] = muladd(load(from + job->offsets[k] + r * step), weight, sum[r]);
    }
}

/* What is added to vector v of a line. */
TARGET static __attribute__((noinline)) lanes_t NAME(residual)(const NAME(depthwise_t) *job, int64_t plane, int64_t count, int64_t line, int64_t v) {
    const planes_t *p = &job->planes;
    lanes_t out = all(0);
    for (int64_t g = 0; g < count; g++) { /* planes side by side have one vector only */
        const int64_t channel = (plane + g) / p->batch, picture = (plane + g) % p->batch;
        const float *from = job->s->residual + channel * job->s->residual_ld + (picture * p->out_height + line) * p->out_width;
        out = g ? add(out, load_part(from - g * p->apart, g * p->apart, p->out_width))
                : load_first(from + v * LANES, p->out_width - v * LANES);
    }
    return out;
}

/* A band of lines. size, stride: those of `square`; 0: any filter. */
INLINE void NAME(band)(
    const NAME(depthwise_t) *job, int64_t plane, int64_t count, int64_t first, int64_t lines, const float *window,
    const float *filter, const int size, const int stride) {
    const planes_t *p = &job->planes;
    const depthwise_step_t *s = job->s;
    const lanes_t bias = load(filter + job->places * LANES);
    const NAME(bounds_t) bounds = bounds_of(s->act);
    const int whole = count == 1 && !s->residual;
    int64_t at = 0;
#define LINES(n)                                                                                         \
    for (; at + n <= lines; at += n)                                                                     \
        for (int64_t v = p->vectors - 1; v >= 0; v--) { /* from the right: see put */                    \
            const float *from = window + at * p->stride[0] * p->line + v * LANES;                        \
            lanes_t sum[n];                                                                              \
            if (size)                                                                                    \
                NAME(square)(p, from, filter, bias, size, stride, n, sum);                               \
            else                                                                                         \
                NAME(any_filter)(job, from, filter, bias, n, sum);                                       \
            _Pragma("GCC unroll 7") for (int r = 0; r < n; r++) {                                        \
                const int64_t line = first + at + r;                                                     \
                lanes_t other = all(0);                                                                  \
                if (s->residual) other = NAME(residual)(job, plane, count, line, v);                     \
                if (!s->residual_last) sum[r] = add(sum[r], other);                                      \
                sum[r] = bounded(&bounds, sum[r]);                                                       \
                if (s->residual_last) sum[r] = add(sum[r], other);                                       \
                NAME(put)(p, plane, count, line, v, whole, sum[r]);                                      \
            }                                                                                            \
        }
    LINES(7)
    LINES(4)
    LINES(2)
    LINES(1)
#undef LINES
}

/* The filter with a vector to a place, and the bias behind it; lanes of side-by-side planes have their channels' own. */
INLINE void NAME(spread)(const NAME(depthwise_t) *job, int64_t plane, int64_t count, float *filter) {
    const planes_t *p = &job->planes;
    const depthwise_step_t *s = job->s;
    for (int64_t k = 0; k <= job->places; k++)
        for (int64_t g = 0; g < count; g++) {
            const int64_t channel = (plane + g) / p->batch;
            if (g && channel == (plane + g - 1) / p->batch) continue;
            const float value = k < job->places ? s->weight[channel * job->places + k] : s->bias ? s->bias[channel] : 0;
            store_part(filter + k * LANES, all(value), g * p->apart, LANES - g * p->apart);
        }
}

TARGET static void NAME(depthwise_item)(const void *data, int64_t item, int worker) {
    const NAME(depthwise_t) *job = data;
    const planes_t *p = &job->planes;
    const int64_t all_planes = p->rows * p->batch, *k = p->kernel;
    float *const window = NAME(window)(p, worker), *const filter = window + p->window;
    const int square = k[0] == k[1] && p->stride[0] == p->stride[1] && p->dilation[0] == 1 && p->dilation[1] == 1;
    int64_t known = -1;
    for (int64_t g = item * p->chunk; g < (item + 1) * p->chunk && g < p->groups; g++) {
        const int64_t plane = g * p->together;
        const int64_t count = all_planes - plane < p->together ? all_planes - plane : p->together;
        const int64_t channel = plane / p->batch, last = (plane + count - 1) / p->batch;
        if (channel != last || channel != known) NAME(spread)(job, plane, count, filter);
        known = channel == last ? channel : -1;
        for (int64_t first = 0; first < p->out_height; first += p->band) {
            const int64_t left = p->out_height - first, lines = left < p->band ? left : p->band;
            NAME(fill)(p, plane, count, first, lines, window);
#define BAND(size, stride) NAME(band)(job, plane, count, first, lines, window, filter, size, stride)
            if (square && k[0] == 3 && p->stride[0] == 1)
                BAND(3, 1);
            else if (square && k[0] == 3 && p->stride[0] == 2)
                BAND(3, 2);
            else if (square && k[0] == 5 && p->stride[0] == 1)
                BAND(5, 1);
            else if (square && k[0] == 5 && p->stride[0] == 2)
                BAND(5, 2);
            else if (square && k[0] == 7 && p->stride[0] == 1)
                BAND(7, 1);
            else
                BAND(0, 0);
#undef BAND
        }
    }
}

static int NAME(depthwise)(const void *step, int threads) {
    const depthwise_step_t *s = step;
    const int64_t places = s->kernel[0] * s->kernel[1];
    NAME(depthwise_t) job = {
        .planes = {.x = s->x, .y = s->y, .x_ld = s->x_ld, .y_ld = s->y_ld, .batch = s->batch, .rows = s->rows,
                   .share = s->rows / s->channels, .height = s->height, .width = s->width,
                   .out_height = s->out_height, .out_width = s->out_width, .kernel = s->kernel, .stride = s->stride,
                   .pad = s->pad, .dilation = s->dilation, .outside = 0},
        .s = s, .places = places,
    };
    if (s->rows * s->batch * s->out_height * s->out_width < SMALL) threads = 1;
    NAME(place)(&job.planes, threads);
    job.planes.scratch_size = (job.planes.window + (places + 1) * LANES + 15) / 16 * 16;
    const int64_t floats = threads * job.planes.scratch_size;
    job.planes.scratch = aligned_alloc(64, ((size_t)floats * sizeof(float) + (size_t)places * sizeof(int64_t) + 63) & ~(size_t)63);
    if (!job.planes.scratch) return -2;
    int64_t *offsets = (int64_t *)(job.planes.scratch + floats);
    for (int64_t k = 0; k < places; k++) offsets[k] = NAME(offset)(&job.planes, k / s->kernel[1], k % s->kernel[1]);
    job.offsets = offsets;
    parallel_for(NAME(depthwise_item), &job, (job.planes.groups + job.planes.chunk - 1) / job.planes.chunk, threads);
    free(job.planes.scratch);
    return 0;
}
