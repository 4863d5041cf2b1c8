/* Values from row-major tensors and back: squares of LANES x LANES numbers are turned in registers. See steps.h. */

INLINE lanes_t NAME(load_kind)(const void *x, int64_t dtype, int64_t at, int64_t n) {
    if (n >= LANES)
        return dtype == F32 ? load((const float *)x + at) : load_16((const uint16_t *)x + at, dtype == BF16);
    float few[LANES] = {0};
    for (int64_t i = 0; i < n; i++) few[i] = load_float(x, (int32_t)dtype, at + i);
    return load(few);
}

INLINE void NAME(store_kind)(void *y, int64_t dtype, int64_t at, int64_t n, lanes_t value) {
    if (dtype == F32) {
        store_first((float *)y + at, value, n);
        return;
    }
    float few[LANES];
    store(few, value);
    if (n > LANES) n = LANES;
    for (int64_t i = 0; i < n; i++) store_float(y, (int32_t)dtype, at + i, few[i]);
}

/* LANES positions, all channels. */
TARGET static void NAME(pack_item)(const void *data, int64_t item, int worker) {
    const pack_step_t *s = data;
    const int64_t first = item * LANES, left = s->positions - first, lines = left < LANES ? left : LANES;
    (void)worker;
    for (int64_t c = 0; c < s->channels; c += LANES) {
        lanes_t square[LANES];
        for (int i = 0; i < LANES; i++)
            square[i] = i >= lines ? all(0)
                                   : NAME(load_kind)(s->x, s->dtype, (first + i) * s->x_stride + c, s->channels - c);
        transpose(square);
        for (int64_t i = 0; i < LANES && c + i < s->channels; i++) store(s->y + (c + i) * s->y_ld + first, square[i]);
    }
}

TARGET static void NAME(unpack_item)(const void *data, int64_t item, int worker) {
    const unpack_step_t *s = data;
    const int64_t first = item * LANES, left = s->positions - first, lines = left < LANES ? left : LANES;
    (void)worker;
    for (int64_t c = 0; c < s->channels; c += LANES) {
        lanes_t square[LANES];
        for (int i = 0; i < LANES; i++)
            square[i] = c + i < s->channels ? load(s->x + (c + i) * s->x_ld + first) : all(0);
        transpose(square);
        for (int64_t i = 0; i < lines; i++)
            NAME(store_kind)(s->y, s->dtype, (first + i) * s->y_stride + c, s->channels - c, square[i]);
    }
}

static int NAME(pack)(const void *step, int threads) {
    const pack_step_t *s = step;
    if (s->channels * s->positions < SMALL) threads = 1;
    parallel_for(NAME(pack_item), s, (s->positions + LANES - 1) / LANES, threads);
    return 0;
}

static int NAME(unpack)(const void *step, int threads) {
    const unpack_step_t *s = step;
    if (s->channels * s->positions < SMALL) threads = 1;
    parallel_for(NAME(unpack_item), s, (s->positions + LANES - 1) / LANES, threads);
    return 0;
}
