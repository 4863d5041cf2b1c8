/* Pools: the largest or the mean of windows, planes as in planes_window.h; lines first, then columns. See steps.h. */

typedef struct {
    planes_t planes;
    const pool_step_t *s;
    const int64_t *offsets; /* of a window's columns */
    int64_t reduced; /* floats of the lines that are left when the windows' columns have been joined */
} NAME(pool_t);

/* How many places of window `at` count along one axis. */
static inline int64_t NAME(places)(const pool_step_t *s, int axis, int64_t size, int64_t at) {
    int64_t begin = at * s->stride[axis] - s->pad[axis], end = begin + s->kernel[axis];
    const int64_t low = s->count_pad ? -s->pad[axis] : 0, high = s->count_pad ? size + s->pad[axis] : size;
    if (begin < low) begin = low;
    if (end > high) end = high;
    return end > begin ? end - begin : 1;
}

INLINE void NAME(pool_band)(
    const NAME(pool_t) *job, const NAME(group_t) *group, int64_t first, int64_t lines, float *window, const int mean) {
    const planes_t *p = &job->planes;
    const pool_step_t *s = job->s;
    const NAME(bounds_t) bounds = bounds_of(s->act);
    float *const reduced = window + p->window, *const columns = reduced + job->reduced;
    const int64_t long_line = p->vectors * LANES, below = p->dilation[0] * long_line;
    const int64_t all_lines = (lines - 1) * p->stride[0] + (p->kernel[0] - 1) * p->dilation[0] + 1;
    float *to = reduced;
    for (int64_t i = 0; i < all_lines; i++)
        for (int64_t v = 0; v < p->vectors; v++, to += LANES) {
            const float *from = window + i * p->line + v * LANES;
            lanes_t value = load(from);
            for (int64_t k = 1; k < p->kernel[1]; k++) {
                const lanes_t other = load(from + job->offsets[k]);
                value = mean ? add(value, other) : largest(value, other);
            }
            store(to, value);
        }
    for (int64_t r = 0; r < lines; r++) {
        const lanes_t counted = all((float)NAME(places)(s, 0, p->height, first + r));
        for (int64_t v = p->vectors - 1; v >= 0; v--) { /* from the right: see put */
            const float *from = reduced + r * p->stride[0] * long_line + v * LANES;
            lanes_t value = load(from);
            for (int64_t k = 1; k < p->kernel[0]; k++)
                value = mean ? add(value, load(from + k * below)) : largest(value, load(from + k * below));
            if (mean) value = quotient(value, mul(counted, load(columns + v * LANES)));
            value = bounded(&bounds, value);
            NAME(put)(p, group, first + r, v, &value, 1);
        }
    }
}

TARGET static void NAME(pool_item)(const void *data, int64_t item, int worker) {
    const NAME(pool_t) *job = data;
    const planes_t *p = &job->planes;
    float *const window = NAME(window)(p, worker), *const columns = window + p->window + job->reduced;
    for (int64_t i = 0; i < p->vectors * LANES; i++)
        columns[i] = (float)NAME(places)(job->s, 1, p->width, i % p->apart);
    NAME(group_t) group;
    for (int64_t number = item * p->chunk; number < (item + 1) * p->chunk && number < p->groups; number++) {
        NAME(group)(p, number, &group);
        for (int64_t first = 0; first < p->out_height; first += p->band) {
            const int64_t left = p->out_height - first, lines = left < p->band ? left : p->band;
            NAME(fill)(p, &group, first, lines, window);
            if (job->s->mean)
                NAME(pool_band)(job, &group, first, lines, window, 1);
            else
                NAME(pool_band)(job, &group, first, lines, window, 0);
        }
    }
}

static int NAME(pool)(const void *step, int threads) {
    const pool_step_t *s = step;
    NAME(pool_t) job = {
        .planes = {.x = s->x, .y = s->y, .x_ld = s->x_ld, .y_ld = s->y_ld, .batch = s->batch, .rows = s->channels,
                   .share = 1, .height = s->height, .width = s->width, .out_height = s->out_height,
                   .out_width = s->out_width, .kernel = s->kernel, .stride = s->stride, .pad = s->pad,
                   .dilation = s->dilation, .outside = s->mean ? 0 : -INFINITY},
        .s = s,
    };
    planes_t *p = &job.planes;
    if (s->channels * s->batch * s->out_height * s->out_width < SMALL) threads = 1;
    NAME(place)(p, threads);
    job.reduced = p->window / p->line * p->vectors * LANES;
    p->scratch_size = (p->window + job.reduced + p->vectors * LANES + 15) / 16 * 16;
    const int64_t floats = threads * p->scratch_size;
    const size_t bytes = (size_t)floats * sizeof(float) + (size_t)p->kernel[1] * sizeof(int64_t);
    p->scratch = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    if (!p->scratch) return -2;
    int64_t *offsets = (int64_t *)(p->scratch + floats);
    for (int64_t k = 0; k < p->kernel[1]; k++) offsets[k] = NAME(offset)(p, 0, k);
    job.offsets = offsets;
    parallel_for(NAME(pool_item), &job, (p->groups + p->chunk - 1) / p->chunk, threads);
    free(p->scratch);
    return 0;
}
