/* Layer norm and RMS norm over channels, positions side by side in a vector. See steps.h. */

enum { NORM_VECTORS = 32 / LANES < 4 ? 32 / LANES : 4 }; /* positions at a time: 32, which stay in the first cache */

/* `vectors` of them from position `at` on. The mean first, then the squares about it, and what it is wrong by. */
INLINE void NAME(norm_block)(const norm_step_t *s, int64_t at, const int vectors, int64_t ahead) {
    const float *x = s->x + at, *residual = s->residual ? s->residual + at : 0;
    float *y = s->y + at;
    int64_t x_ld = s->x_ld;
    lanes_t sum[NORM_VECTORS], wrong[NORM_VECTORS], squares[NORM_VECTORS], mean[NORM_VECTORS], scale[NORM_VECTORS];
    for (int v = 0; v < vectors; v++) sum[v] = wrong[v] = squares[v] = mean[v] = all(0);
    if (residual) {
        for (int64_t c = 0; c < s->channels; c++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                const lanes_t beside = load(residual + c * s->residual_ld + v * LANES);
                const lanes_t both = add(load(x + c * x_ld + v * LANES), beside);
                store(y + c * s->y_ld + v * LANES, both);
                sum[v] = add(sum[v], both);
            }
        x = y;
        x_ld = s->y_ld;
    } else if (!s->rms) {
        for (int64_t c = 0; c < s->channels; c++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[v] = add(sum[v], load(x + c * x_ld + v * LANES));
    }
    const lanes_t part = all(1.0f / (float)s->channels);
    for (int v = 0; v < vectors && !s->rms; v++) mean[v] = mul(sum[v], part);
    const float *const next = s->x + at + ahead, *const beside = residual ? residual + ahead : next;
    for (int64_t c = 0; c < s->channels; c++) {
        for (int64_t i = 0; i < ahead; i += 16) { /* a line that the caches cannot foresee */
            __builtin_prefetch(next + c * s->x_ld + i, 0, 2);
            if (residual) __builtin_prefetch(beside + c * s->residual_ld + i, 0, 2);
        }
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            const lanes_t away = sub(load(x + c * x_ld + v * LANES), mean[v]);
            wrong[v] = add(wrong[v], away);
            squares[v] = muladd(away, away, squares[v]);
        }
    }
    for (int v = 0; v < vectors && !s->rms; v++) mean[v] = muladd(wrong[v], part, mean[v]);
    for (int v = 0; v < vectors; v++)
        scale[v] = quotient(all(1), root(muladd(squares[v], part, all((float)s->eps))));
    for (int64_t c = 0; c < s->channels; c++) {
        const lanes_t weight = all(s->weight ? s->weight[c] : 1), bias = all(s->bias ? s->bias[c] : 0);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            const lanes_t away = sub(load(x + c * x_ld + v * LANES), mean[v]);
            store(y + c * s->y_ld + v * LANES, muladd(mul(away, scale[v]), weight, bias));
        }
    }
}

typedef struct {
    const norm_step_t *s;
    int64_t chunk; /* positions that a thread takes */
} NAME(norm_t);

TARGET static void NAME(norm_item)(const void *data, int64_t item, int worker) {
    const NAME(norm_t) *job = data;
    const norm_step_t *s = job->s;
    const int64_t block = NORM_VECTORS * LANES, end = (item + 1) * job->chunk;
    const int64_t last = end < s->positions ? end : s->positions;
    int64_t at = item * job->chunk;
    (void)worker;
    for (; at + block < last + LANES; at += block) /* a vector may end in what lies behind the positions */
        NAME(norm_block)(s, at, NORM_VECTORS, at + block < last ? block : 0);
    for (; at < last; at += LANES) NAME(norm_block)(s, at, 1, 0);
}

static int NAME(norm)(const void *step, int threads) {
    const norm_step_t *s = step;
    const int64_t block = NORM_VECTORS * LANES;
    if (s->channels * s->positions < SMALL) threads = 1;
    const NAME(norm_t) job = {s, (s->positions / (4 * threads) / block + 1) * block};
    parallel_for(NAME(norm_item), &job, (s->positions + job.chunk - 1) / job.chunk, threads);
    return 0;
}
