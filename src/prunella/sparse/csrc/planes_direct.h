/* Depthwise convolution with the filters that networks have (3, 5 or 7 square, stride 1 or 2, no dilation), from planes
 * as they lie in memory: what surrounds them are lanes that are masked, and lines that are left out.
 *
 * Wide planes are read once for each column of the filter, some columns to the side, or, by halves, once. Narrow ones, of
 * which a line fits into one vector, are read once and shifted in registers; two of them share a vector where they fit.
 */

/* Whether this is a case for it; fills in how planes lie. */
static inline int NAME(direct_place)(planes_t *p, int threads) {
    const int64_t *k = p->kernel, *s = p->stride;
    if (k[0] != k[1] || s[0] != s[1] || p->dilation[0] != 1 || p->dilation[1] != 1) return 0;
    if ((k[0] != 3 && k[0] != 5 && (k[0] != 7 || s[0] != 1)) || s[0] > 2 || p->pad[1] >= k[1]) return 0;
    const int64_t after = k[1] - 1 - p->pad[1], margin = p->pad[1] > after ? p->pad[1] : after;
    const int64_t half = (p->width + 1) / 2 > p->out_width ? (p->width + 1) / 2 : p->out_width;
    p->together = 1;
    p->apart = s[0] == 2 ? LANES / 2 : p->width + margin;
    const int64_t size = p->out_width > p->width ? p->out_width : p->width;
    const int fits = s[0] == 1 ? p->apart + size <= LANES : half + (margin + 1) / 2 <= LANES / 2 && p->width <= LANES;
    if (fits && p->rows * p->batch > 1) p->together = 2;
    p->vectors = (p->out_width + LANES - 1) / LANES;
    p->groups = (p->rows * p->batch + p->together - 1) / p->together;
    p->chunk = p->groups / (4 * threads) + 1;
    return 1;
}

/* sum[r] += x weight[i - r stride] for the lines r that read line i. */
#define ADD_LINE(x, weight)                                                                                           \
    _Pragma("GCC unroll 7") for (int r = 0; r < lines; r++)                                                           \
        if (i - r * stride >= 0 && i - r * stride < size) sum[r] = muladd(x, weight[i - r * stride], sum[r])

/* The lines that come next, of which the processor cannot know. */
INLINE void NAME(ahead)(const float *x, int64_t width, const int lines, const int stride) {
#pragma GCC unroll 14
    for (int i = 0; i < lines * stride; i++)
        for (int k = 0; k < stride; k++) __builtin_prefetch(x + i * width + k * LANES);
}

/* Vector v of `lines` lines of a wide plane; its first line reads the lines from `begin` on. Stride 1. */
INLINE void NAME(direct_wide)(
    const planes_t *p, const float *plane, const float *filter, int64_t begin, int64_t v, lanes_t *sum, const int size,
    const int lines) {
    const int64_t width = p->width, height = p->height;
    const int span = lines - 1 + size, stride = 1;
    int64_t column = v * LANES - p->pad[1];
    NAME(ahead)(plane + (begin + span) * width + column, width, lines, 1);
    for (int kx = 0; kx < size; kx++, column++) {
        const mask_t mask = mask_of(-column, width);
        const float *x = plane + begin * width + column;
        lanes_t weight[7];
#pragma GCC unroll 7
        for (int ky = 0; ky < size; ky++) weight[ky] = all(filter[ky * size + kx]);
#pragma GCC unroll 20
        for (int i = 0; i < span; i++, x += width) {
            if ((uint64_t)(begin + i) >= (uint64_t)height) continue;
            const lanes_t here = load_mask(x, mask);
            ADD_LINE(here, weight);
        }
    }
}

/* The same for stride 2: a line is read once, its even and odd columns apart; those to the right of these are the same
 * vectors, shifted, with the first of what follows. */
INLINE void NAME(direct_halved)(
    const planes_t *p, const float *plane, const float *filter, int64_t begin, int64_t v, lanes_t *sum, const int size,
    const int lines) {
    const int64_t width = p->width, height = p->height, column = v * LANES * 2 - p->pad[1];
    const int span = (lines - 1) * 2 + size, stride = 2;
    const mask_t first = mask_of(-column, width), second = mask_of(-column - LANES, width);
    const mask_t third = mask_of(0, width - column - 2 * LANES < 4 ? width - column - 2 * LANES : 4);
    const join_t next = join_by(1, 0), next_odd = join_by(1, 1), last = join_by(2, 0);
    const float *x = plane + begin * width + column;
    NAME(ahead)(x + span * width, width, lines, 2);
#pragma GCC unroll 20
    for (int i = 0; i < span; i++, x += width) {
        if ((uint64_t)(begin + i) >= (uint64_t)height) continue;
        const lanes_t a = load_mask(x, first), b = load_mask(x + LANES, second), c = load_mask(x + 2 * LANES, third);
        const lanes_t even = evens(a, b), odd = odds(a, b);
        lanes_t places[5];
        places[0] = even;
        places[1] = odd;
        places[2] = joined(next, even, c);
        if (size == 5) {
            places[3] = joined(next_odd, odd, c);
            places[4] = joined(last, even, c);
        }
#pragma GCC unroll 5
        for (int kx = 0; kx < size; kx++)
#pragma GCC unroll 7
            for (int r = 0; r < lines; r++)
                if (i - r * stride >= 0 && i - r * stride < size)
                    sum[r] = muladd(places[kx], all(filter[(i - r * stride) * size + kx]), sum[r]);
    }
}

/* Lines of one or two narrow planes. */
INLINE void NAME(direct_narrow)(
    const planes_t *p, const NAME(group_t) *group, const float *const *filters, int64_t begin, lanes_t *sum,
    const int size, const int stride, const int lines) {
    const int64_t width = p->width, height = p->height, pad = p->pad[1];
    const int span = (lines - 1) * stride + size;
    const mask_t first = mask_of(0, width);
    const mask_t other = group->count == 1 ? mask_of(0, 0) : mask_of(stride == 1 ? p->apart : 0, width);
    const mask_t upper = mask_of(p->apart, LANES);
    const float *a = group->x[0] + begin * width;
    const float *b = group->count == 1 ? a : group->x[1] + begin * width - (stride == 1 ? p->apart : 0);
    lanes_t even[20], odd[20];
#pragma GCC unroll 20
    for (int i = 0; i < span; i++, a += width, b += width) {
        even[i] = odd[i] = all(0);
        if ((uint64_t)(begin + i) >= (uint64_t)height) continue;
        const lanes_t x = load_mask(a, first), y = load_mask(b, other);
        even[i] = stride == 1 ? blend(upper, x, y) : evens(x, y);
        if (stride == 2) odd[i] = odds(x, y);
    }
    for (int kx = 0; kx < size; kx++) {
        const int64_t away = kx - pad;
        const shift_t shift = shift_by(stride == 1 ? away : away >> 1);
        lanes_t weight[7];
#pragma GCC unroll 7
        for (int ky = 0; ky < size; ky++)
            weight[ky] = blend(upper, all(filters[0][ky * size + kx]), all(filters[1][ky * size + kx]));
#pragma GCC unroll 20
        for (int i = 0; i < span; i++) {
            if ((uint64_t)(begin + i) >= (uint64_t)height) continue;
            const lanes_t x = shifted(shift, stride == 2 && (away & 1) ? odd[i] : even[i]);
            ADD_LINE(x, weight);
        }
    }
}
#undef ADD_LINE

/* One or two planes. */
INLINE void NAME(direct)(
    const NAME(depthwise_t) *job, const NAME(group_t) *group, const float *const *filters, lanes_t bias, int narrow,
    const int size, const int stride) {
    const planes_t *p = &job->planes;
    int64_t line = 0;
#define LINES(n)                                                                                                      \
    for (; line + n <= p->out_height; line += n)                                                                      \
        for (int64_t v = p->vectors - 1; v >= 0; v--) { /* from the right: see put */                                 \
            const int64_t begin = line * stride - p->pad[0];                                                          \
            lanes_t sum[n];                                                                                           \
            _Pragma("GCC unroll 7") for (int r = 0; r < n; r++) sum[r] = bias;                                        \
            if (narrow)                                                                                               \
                NAME(direct_narrow)(p, group, filters, begin, sum, size, stride, n);                                  \
            else if (stride == 1)                                                                                     \
                NAME(direct_wide)(p, group->x[0], filters[0], begin, v, sum, size, n);                                \
            else                                                                                                      \
                NAME(direct_halved)(p, group->x[0], filters[0], begin, v, sum, size, n);                              \
            NAME(end)(job, group, line, v, sum, n);                                                                   \
        }
    LINES(7)
    LINES(3)
    LINES(1)
#undef LINES
}

TARGET static void NAME(direct_item)(const void *data, int64_t item, int worker) {
    const NAME(depthwise_t) *job = data;
    const planes_t *p = &job->planes;
    const depthwise_step_t *s = job->s;
    const int narrow = p->together == 2 || (p->stride[0] == 1 && p->width <= LANES && p->out_width <= LANES);
    (void)worker;
    NAME(group_t) group;
    for (int64_t number = item * p->chunk; number < (item + 1) * p->chunk && number < p->groups; number++) {
        NAME(group)(p, number, &group);
        const int64_t channel = group.channel[0], last = group.channel[group.count - 1];
        const float *filters[2] = {s->weight + channel * job->places, s->weight + last * job->places};
        const mask_t upper = mask_of(p->apart, LANES);
        const lanes_t bias = s->bias ? blend(upper, all(s->bias[channel]), all(s->bias[last])) : all(0);
        if (p->kernel[0] == 3 && p->stride[0] == 1)
            NAME(direct)(job, &group, filters, bias, narrow, 3, 1);
        else if (p->kernel[0] == 3)
            NAME(direct)(job, &group, filters, bias, narrow, 3, 2);
        else if (p->kernel[0] == 5 && p->stride[0] == 1)
            NAME(direct)(job, &group, filters, bias, narrow, 5, 1);
        else if (p->kernel[0] == 5)
            NAME(direct)(job, &group, filters, bias, narrow, 5, 2);
        else
            NAME(direct)(job, &group, filters, bias, narrow, 7, 1);
    }
}
