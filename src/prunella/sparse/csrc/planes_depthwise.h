/* Depthwise convolution, some lines of output at once: planes as in planes_window.h for any filter, or as they lie in
 * memory (planes_direct.h). See steps.h. */

typedef struct {
    planes_t planes;
    const depthwise_step_t *s;
    const int64_t *offsets; /* of the filter's places */
    int64_t places;
    float low, high; /* bounds of what comes out */
    int finish;      /* an activation that is more than bounds, or a residual */
} NAME(depthwise_t);

/* `lines` lines of a vector; filter: a vector to a place. */
INLINE void NAME(any_filter)(
    const NAME(depthwise_t) *job, const float *from, const float *filter, lanes_t bias, const int lines, lanes_t *sum) {
    const int64_t step = job->planes.stride[0] * job->planes.line;
#pragma GCC unroll 7
    for (int r = 0; r < lines; r++) sum[r] = bias;
    for (int64_t k = 0; k < job->places; k++, filter += LANES) {
        const lanes_t weight = load(filter);
        const float *x = from + job->offsets[k];
#pragma GCC unroll 7
        for (int r = 0; r < lines; r++, x += step) sum[r] = muladd(load(x), weight, sum[r]);
    }
}

/* Activations and residuals that are not only bounds: `lines` vectors v from `line` on. */
TARGET static __attribute__((noinline)) void NAME(finish)(
    const NAME(depthwise_t) *job, const NAME(group_t) *group, int64_t line, int64_t v, int lines, lanes_t *sum) {
    const planes_t *p = &job->planes;
    const depthwise_step_t *s = job->s;
    for (int r = 0; r < lines; r++) {
        lanes_t other = all(0);
        for (int64_t g = 0; s->residual && g < group->count; g++) { /* planes side by side have one vector only */
            const float *from = s->residual + group->channel[g] * s->residual_ld +
                                (group->picture[g] * p->out_height + line + r) * p->out_width;
            other = g ? add(other, load_part(from - g * p->apart, g * p->apart, p->out_width))
                      : load_first(from + v * LANES, p->out_width - v * LANES);
        }
        sum[r] = s->residual_last ? add(activated(s->act, sum[r]), other) : activated(s->act, add(sum[r], other));
    }
}

/* `lines` vectors v from `line` on: activated, and out. */
INLINE void NAME(end)(
    const NAME(depthwise_t) *job, const NAME(group_t) *group, int64_t line, int64_t v, lanes_t *sum, const int lines) {
    const lanes_t low = all(job->low), high = all(job->high);
    if (job->finish) {
        lanes_t copy[7];
#pragma GCC unroll 7
        for (int r = 0; r < lines; r++) copy[r] = sum[r];
        NAME(finish)(job, group, line, v, lines, copy);
#pragma GCC unroll 7
        for (int r = 0; r < lines; r++) sum[r] = copy[r];
    }
#pragma GCC unroll 7
    for (int r = 0; r < lines; r++) sum[r] = smaller(high, larger(low, sum[r]));
    NAME(put)(&job->planes, group, line, v, sum, lines);
}

/* The filter with a vector to a place, and the bias behind it; lanes of planes side by side have their channels'. */
TARGET static void NAME(spread)(const NAME(depthwise_t) *job, const NAME(group_t) *group, float *filter) {
    const planes_t *p = &job->planes;
    const depthwise_step_t *s = job->s;
    for (int64_t g = 0; g < group->count; g++) {
        const int64_t channel = group->channel[g];
        if (g && channel == group->channel[g - 1]) continue;
        for (int64_t k = 0; k <= job->places; k++) {
            const float bias = s->bias ? s->bias[channel] : 0;
            const lanes_t value = all(k < job->places ? s->weight[channel * job->places + k] : bias);
            if (g)
                store_part(filter + k * LANES, value, g * p->apart, LANES - g * p->apart);
            else
                store(filter + k * LANES, value);
        }
    }
}

/* Planes in scratch memory, in bands. */
TARGET static void NAME(depthwise_item)(const void *data, int64_t item, int worker) {
    const NAME(depthwise_t) *job = data;
    const planes_t *p = &job->planes;
    float *const window = NAME(window)(p, worker), *const filter = window + p->window;
    int64_t known = -1;
    NAME(group_t) group;
    for (int64_t number = item * p->chunk; number < (item + 1) * p->chunk && number < p->groups; number++) {
        NAME(group)(p, number, &group);
        const int64_t channel = group.channel[0], last = group.channel[group.count - 1];
        if (channel != last || channel != known) NAME(spread)(job, &group, filter);
        known = channel == last ? channel : -1;
        const lanes_t bias = load(filter + job->places * LANES);
        for (int64_t first = 0; first < p->out_height; first += p->band) {
            const int64_t left = p->out_height - first, lines = left < p->band ? left : p->band;
            NAME(fill)(p, &group, first, lines, window);
            int64_t at = 0;
#define LINES(n)                                                                                                     \
    for (; at + n <= lines; at += n)                                                                                 \
        for (int64_t v = p->vectors - 1; v >= 0; v--) { /* from the right: see put */                                \
            lanes_t sum[n];                                                                                          \
            NAME(any_filter)(job, window + at * p->stride[0] * p->line + v * LANES, filter, bias, n, sum);           \
            NAME(end)(job, &group, first + at, v, sum, n);                                                           \
        }
            LINES(4)
            LINES(1)
#undef LINES
        }
    }
}

#ifdef HAS_MASKS
#include "planes_direct.h"
#endif

static int NAME(depthwise)(const void *step, int threads) {
    const depthwise_step_t *s = step;
    const int64_t places = s->kernel[0] * s->kernel[1];
    NAME(depthwise_t) job = {
        .planes = {.x = s->x, .y = s->y, .x_ld = s->x_ld, .y_ld = s->y_ld, .batch = s->batch, .rows = s->rows,
                   .share = s->rows / s->channels, .height = s->height, .width = s->width,
                   .out_height = s->out_height, .out_width = s->out_width, .kernel = s->kernel, .stride = s->stride,
                   .pad = s->pad, .dilation = s->dilation, .outside = 0},
        .s = s, .places = places, .finish = s->residual || s->act > ACT_RELU6,
        .low = -INFINITY, .high = INFINITY,
    };
    if (!job.finish && s->act != ACT_NONE) job.low = 0;
    if (!job.finish && s->act == ACT_RELU6) job.high = 6;
    if (s->rows * s->batch * s->out_height * s->out_width < SMALL) threads = 1;
#ifdef HAS_MASKS
    if (NAME(direct_place)(&job.planes, threads)) {
        parallel_for(
            NAME(direct_item), &job, (job.planes.groups + job.planes.chunk - 1) / job.planes.chunk, threads);
        return 0;
    }
#endif
    NAME(place)(&job.planes, threads);
    job.planes.scratch_size = (job.planes.window + (places + 1) * LANES + 15) / 16 * 16;
    const int64_t floats = threads * job.planes.scratch_size;
    const size_t bytes = (size_t)floats * sizeof(float) + (size_t)places * sizeof(int64_t);
    job.planes.scratch = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    if (!job.planes.scratch) return -2;
    int64_t *offsets = (int64_t *)(job.planes.scratch + floats);
    for (int64_t k = 0; k < places; k++) offsets[k] = NAME(offset)(&job.planes, k / s->kernel[1], k % s->kernel[1]);
    job.offsets = offsets;
    parallel_for(NAME(depthwise_item), &job, (job.planes.groups + job.planes.chunk - 1) / job.planes.chunk, threads);
    free(job.planes.scratch);
    return 0;
}
