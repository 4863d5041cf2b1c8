/* Steps that go over values number by number: maps, sums, products with a scale, means. See steps.h. */

/* DO(act) with act as a constant, so that it is decided once for a row. */
#define EACH_ACT(act, DO)                               \
    switch (act) {                                      \
        case ACT_RELU: DO(ACT_RELU); break;             \
        case ACT_RELU6: DO(ACT_RELU6); break;           \
        case ACT_SILU: DO(ACT_SILU); break;             \
        case ACT_GELU: DO(ACT_GELU); break;             \
        case ACT_GELU_TANH: DO(ACT_GELU_TANH); break;   \
        case ACT_SIGMOID: DO(ACT_SIGMOID); break;       \
        case ACT_HARDSWISH: DO(ACT_HARDSWISH); break;   \
        case ACT_HARDSIGMOID: DO(ACT_HARDSIGMOID); break; \
        case ACT_TANH: DO(ACT_TANH); break;             \
        default: DO(ACT_NONE);                          \
    }

/* Channels that a thread takes at a time, of `numbers` numbers each. */
static inline int64_t channels_at_a_time(int64_t channels, int64_t numbers, int threads) {
    const int64_t least = SMALL / (numbers + 1) + 1, share = channels / (4 * threads) + 1;
    return least > share ? least : share;
}

typedef struct {
    const void *step;
    int64_t chunk;
} NAME(share_t);

static int NAME(over_channels)(
    void (*body)(const void *, int64_t, int), const void *step, int64_t channels, int64_t numbers, int threads) {
    const NAME(share_t) share = {step, channels_at_a_time(channels, numbers, threads)};
    parallel_for(body, &share, (channels + share.chunk - 1) / share.chunk, threads);
    return 0;
}

#define CHANNELS(type)                                                                            \
    const NAME(share_t) *share = data;                                                            \
    const type *s = share->step;                                                                  \
    const int64_t first = item * share->chunk, end = first + share->chunk;                        \
    const int64_t last = end < s->channels ? end : s->channels;                                   \
    (void)worker

INLINE void NAME(map_rows)(const map_step_t *s, int64_t first, int64_t last, int64_t act) {
    for (int64_t c = first; c < last; c++)
        for (int64_t i = 0; i < s->positions; i += LANES)
            store(s->y + c * s->y_ld + i, activated(act, load(s->x + c * s->x_ld + i)));
}

TARGET static void NAME(map_item)(const void *data, int64_t item, int worker) {
    CHANNELS(map_step_t);
#define DO(act) NAME(map_rows)(s, first, last, act)
    EACH_ACT(s->act, DO)
#undef DO
}

static int NAME(map)(const void *step, int threads) {
    const map_step_t *s = step;
    return NAME(over_channels)(NAME(map_item), s, s->channels, s->positions, threads);
}

INLINE lanes_t NAME(both)(int64_t times, lanes_t a, lanes_t b) { return times ? mul(a, b) : add(a, b); }

INLINE void NAME(add_rows)(const add_step_t *s, int64_t first, int64_t last, int64_t act) {
    const int64_t period = s->b_positions, times = s->times;
    for (int64_t c = first; c < last; c++) {
        const float *a = s->a + c * s->a_ld, *b = s->b + c * s->b_ld;
        float *y = s->y + c * s->y_ld;
        if (period == 1) {
            const lanes_t same = all(*b);
            for (int64_t i = 0; i < s->positions; i += LANES)
                store(y + i, activated(act, NAME(both)(times, load(a + i), same)));
        } else {
            for (int64_t at = 0; at < s->positions; at += period) {
                int64_t i = 0; /* what is written beyond the period is written again, or lies behind the last */
                if (y != a || period >= s->positions)
                    for (; i < period; i += LANES)
                        store(y + at + i, activated(act, NAME(both)(times, load(a + at + i), load(b + i))));
                for (; i < period; i += LANES)
                    store_first(
                        y + at + i, activated(act, NAME(both)(times, load(a + at + i), load(b + i))), period - i);
            }
        }
    }
}

TARGET static void NAME(add_item)(const void *data, int64_t item, int worker) {
    CHANNELS(add_step_t);
#define DO(act) NAME(add_rows)(s, first, last, act)
    EACH_ACT(s->act, DO)
#undef DO
}

static int NAME(add)(const void *step, int threads) {
    const add_step_t *s = step;
    return NAME(over_channels)(NAME(add_item), s, s->channels, s->positions, threads);
}

TARGET static void NAME(scale_item)(const void *data, int64_t item, int worker) {
    CHANNELS(scale_step_t);
    const NAME(bounds_t) bounds = bounds_of(s->act);
    for (int64_t c = first; c < last; c++)
        for (int64_t b = 0; b < s->batch; b++) {
            const float *x = s->x + c * s->x_ld + b * s->places;
            float *y = s->y + c * s->y_ld + b * s->places;
            const lanes_t scale = all(s->scale[c * s->scale_ld + b]);
            int64_t i = 0;
            for (; i + LANES <= s->places; i += LANES) store(y + i, bounded(&bounds, mul(load(x + i), scale)));
            if (i < s->places)
                store_first(y + i, bounded(&bounds, mul(load(x + i), scale)), s->places - i);
        }
}

static int NAME(scale)(const void *step, int threads) {
    const scale_step_t *s = step;
    return NAME(over_channels)(NAME(scale_item), s, s->channels, s->batch * s->places, threads);
}

/* LANES pictures at a time, so that their vectors of sums are added up together. */
TARGET static void NAME(mean_item)(const void *data, int64_t item, int worker) {
    CHANNELS(mean_step_t);
    const NAME(bounds_t) bounds = bounds_of(s->act);
    const lanes_t part = all(1.0f / (float)s->places);
    for (int64_t at = first * s->batch; at < last * s->batch; at += LANES) {
        lanes_t sums[LANES];
        float out[LANES];
        for (int64_t g = 0; g < LANES; g++) {
            const int64_t picture = at + g < last * s->batch ? at + g : at;
            const float *x = s->x + picture / s->batch * s->x_ld + picture % s->batch * s->places;
            lanes_t even = all(0), odd = all(0);
            int64_t i = 0;
            for (; i + 2 * LANES <= s->places; i += 2 * LANES) {
                even = add(even, load(x + i));
                odd = add(odd, load(x + i + LANES));
            }
            for (; i < s->places; i += LANES) even = add(even, load_first(x + i, s->places - i));
            sums[g] = add(even, odd);
        }
        transpose(sums);
        for (int g = 1; g < LANES; g++) sums[0] = add(sums[0], sums[g]);
        store(out, bounded(&bounds, mul(sums[0], part)));
        for (int64_t g = 0; g < LANES && at + g < last * s->batch; g++)
            s->y[(at + g) / s->batch * s->y_ld + (at + g) % s->batch] = out[g];
    }
}

static int NAME(mean)(const void *step, int threads) {
    const mean_step_t *s = step;
    return NAME(over_channels)(NAME(mean_item), s, s->channels, s->batch * s->places, threads);
}
