/* Attention, channel-major: queries side by side in a vector, so that the softmax over keys needs no sums across one,
 * and both products are of broadcast numbers with vectors, sums kept in registers. See attend_step_t in steps.h.
 *
 * A thread takes a block of queries of one head at a time; its scores S (keys, block) stay in the second cache.
 */

enum {
    ATTEND_VECTORS = REGISTERS == 32 ? 4 : 2,    /* vectors of queries whose sums are in registers at once */
    ATTEND_QUERIES = 64, /* a block: lines of S are 64 numbers long */
};

typedef struct {
    const attend_step_t *s;
    int64_t blocks; /* of queries */
    float *scratch;
    int64_t scratch_size;
} NAME(attend_t);

/* The tile sum[r][v] = sum over n of a[r row + i column] b[i][v]; lines of b are ATTEND_QUERIES long. */
INLINE void NAME(tile)(
    const float *a, int64_t row, int64_t column, const float *b, int64_t n, const int rows, const int vectors,
    lanes_t (*sum)[ATTEND_VECTORS]) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[r][v] = all(0);
    for (int64_t i = 0; i < n; i++, a += column, b += ATTEND_QUERIES) {
        lanes_t line[ATTEND_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) line[v] = load(b + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const lanes_t same = all(a[r * row]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[r][v] = muladd(same, line[v], sum[r][v]);
        }
    }
}

/* Scores of `rows` keys, and the largest so far. bias: what is added, a number to a key, or, where `wide`, a line to a
 * key, `wide` floats from one to the next. */
INLINE void NAME(score_tile)(
    const float *k, int64_t k_ld, const float *q, int64_t dim, const float *bias, int64_t wide, float *scores,
    float *most, const int rows, const int vectors) {
    lanes_t sum[6][ATTEND_VECTORS];
    NAME(tile)(k, 1, k_ld, q, dim, rows, vectors, sum);
    if (bias)
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sum[r][v] = add(sum[r][v], wide ? load(bias + r * wide + v * LANES) : all(bias[r]));
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        lanes_t largest_yet = load(most + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            store(scores + r * ATTEND_QUERIES + v * LANES, sum[r][v]);
            largest_yet = larger(largest_yet, sum[r][v]); /* a NaN may be lost here: the sum of the softmax has it */
        }
        store(most + v * LANES, largest_yet);
    }
}

/* Lines of y: `rows` dimensions of v with the weights of all keys, times `scale`. So many queries are left. */
INLINE void NAME(value_tile)(
    const float *values, int64_t v_ld, const float *weights, int64_t keys, const float *scale, float *y, int64_t y_ld,
    int64_t queries, const int rows, const int vectors) {
    lanes_t sum[6][ATTEND_VECTORS];
    NAME(tile)(values, v_ld, 1, weights, keys, rows, vectors, sum);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        const lanes_t part = load(scale + v * LANES);
        const int64_t left = queries - v * LANES;
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const lanes_t out = mul(sum[r][v], part);
            if (left >= LANES)
                store(y + r * y_ld + v * LANES, out);
            else
                store_first(y + r * y_ld + v * LANES, out, left);
        }
    }
}

INLINE void NAME(all_scores)(
    const float *k, int64_t k_ld, const float *q, int64_t dim, const float *bias, int64_t wide, float *scores,
    float *most, int64_t keys, const int vectors) {
    const int64_t step = wide ? wide : 1;
    int64_t i = 0;
#define ROWS(n)                                                                                                  \
    for (; i + n <= keys; i += n)                                                                                \
        NAME(score_tile)(                                                                                        \
            k + i, k_ld, q, dim, bias ? bias + i * step : 0, wide, scores + i * ATTEND_QUERIES, most, n, vectors)
    ROWS(6);
    ROWS(4);
    ROWS(2);
    ROWS(1);
#undef ROWS
}

INLINE void NAME(all_values)(
    const float *values, int64_t v_ld, int64_t dim, const float *weights, int64_t keys, const float *scale, float *y,
    int64_t y_ld, int64_t queries, const int vectors) {
    int64_t i = 0;
#define ROWS(n)                   \
    for (; i + n <= dim; i += n)  \
        NAME(value_tile)(values + i * v_ld, v_ld, weights, keys, scale, y + i * y_ld, y_ld, queries, n, vectors)
    ROWS(6);
    ROWS(4);
    ROWS(2);
    ROWS(1);
#undef ROWS
}

/* What is added to the scores: mask number (batch, head, query, key), -inf where it is boolean and false. */
static inline float NAME(masked)(const attend_step_t *s, int64_t at) {
    return s->mask_boolean ? ((const uint8_t *)s->mask)[at] ? 0 : -INFINITY : ((const float *)s->mask)[at];
}

/* weights = e^(score - most), and one divided by their sums. A query that sees no key has the sum 0. */
INLINE void NAME(softmax)(float *scores, int64_t keys, float *most, float *scale, int nan, const int vectors) {
    lanes_t top[ATTEND_VECTORS], sum[ATTEND_VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        top[v] = load(most + v * LANES);
        top[v] = where_less(top[v], all(-3.40282347e38f), all(0), top[v]);
        sum[v] = all(0);
    }
    for (int64_t i = 0; i < keys; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            float *at = scores + i * ATTEND_QUERIES + v * LANES;
            const lanes_t weight = exponential_or_0(sub(load(at), top[v]));
            store(at, weight);
            sum[v] = add(sum[v], weight);
        }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++)
        store(scale + v * LANES, where_less(sum[v], all(0.5f), all(nan ? NAN : 0), quotient(all(1), sum[v])));
}

TARGET static void NAME(attend_item)(const void *data, int64_t item, int worker) {
    const NAME(attend_t) *job = data;
    const attend_step_t *s = job->s;
    const int64_t block = item % job->blocks, head = item / job->blocks % s->heads;
    const int64_t batch = item / job->blocks / s->heads;
    const int64_t kv_head = head / (s->heads / s->kv_heads), first = block * ATTEND_QUERIES;
    const int64_t left = s->queries - first, queries = left < ATTEND_QUERIES ? left : ATTEND_QUERIES;
    const int64_t keys = s->causal && first + queries < s->keys ? first + queries : s->keys;
    float *const q = job->scratch + worker * job->scratch_size, *const most = q + s->dim * ATTEND_QUERIES;
    float *const scale = most + ATTEND_QUERIES, *const scores = scale + ATTEND_QUERIES;
    float *const bias = scores + s->keys * ATTEND_QUERIES;
    const float *const k = s->k + kv_head * s->dim * s->k_ld + batch * s->keys;
    const float *const values = s->v + kv_head * s->dim_v * s->v_ld + batch * s->keys;
    float *const y = s->y + head * s->dim_v * s->y_ld + batch * s->queries + first;

    for (int64_t d = 0; d < s->dim; d++) {
        const float *from = s->q + (head * s->dim + d) * s->q_ld + batch * s->queries + first;
        for (int64_t i = 0; i < queries; i += LANES)
            store(q + d * ATTEND_QUERIES + i, mul(load_first(from + i, queries - i), all((float)s->scale)));
    }
    for (int64_t i = 0; i < ATTEND_QUERIES; i += LANES) store(most + i, all(-INFINITY));

    /* Keys before `wide` have a number each that is added to their scores, or none; those from there on a line. */
    const int64_t *stride = s->mask_stride, at = batch * stride[0] + head * stride[1] + first * stride[2];
    int64_t wide = keys;
    if (s->mask && stride[2])
        wide = 0;
    else if (s->causal)
        wide = first < keys ? first : keys;
    for (int64_t j = 0; s->mask && j < wide; j++) bias[j] = NAME(masked)(s, at + j * stride[3]);
    const float *lines = bias + (s->mask ? wide : 0);
    int64_t apart = ATTEND_QUERIES;
    const int lie = s->mask && !s->mask_boolean && stride[2] == 1 && !s->causal; /* as vectors of queries */
    const float *const added = lie ? (const float *)s->mask + at : 0;
    if (added && queries % LANES == 0 && stride[3]) {
        lines = added; /* as they lie */
        apart = stride[3];
    } else {
        float *line = bias + (s->mask ? wide : 0);
        for (int64_t j = wide; j < keys; j++, line += ATTEND_QUERIES) {
            for (int64_t i = 0; added && i < queries; i += LANES)
                store(line + i, load_first(added + j * stride[3] + i, queries - i));
            for (int64_t i = 0; !added && i < queries; i++)
                line[i] = s->causal && j > first + i ? -INFINITY
                          : s->mask                  ? NAME(masked)(s, at + i * stride[2] + j * stride[3])
                                                     : 0;
        }
    }

#define VECTORS(n)                                                                                                    \
    do {                                                                                                              \
        NAME(all_scores)(k, s->k_ld, q + i, s->dim, s->mask ? bias : 0, 0, scores + i, most + i, wide, n);            \
        NAME(all_scores)(k + wide, s->k_ld, q + i, s->dim, lines + i, apart, scores + wide * ATTEND_QUERIES + i,      \
                         most + i, keys - wide, n);                                                                   \
        NAME(softmax)(scores + i, keys, most + i, scale + i, s->empty_nan != 0, n);                                   \
        NAME(all_values)(values, s->v_ld, s->dim_v, scores + i, keys, scale + i, y + i, s->y_ld, queries - i, n);     \
    } while (0)
    for (int64_t i = 0; i < queries; i += ATTEND_VECTORS * LANES) {
        const int64_t vectors = (queries - i + LANES - 1) / LANES;
        if (ATTEND_VECTORS == 4 && vectors >= 4)
            VECTORS(ATTEND_VECTORS);
        else if (ATTEND_VECTORS == 4 && vectors == 3)
            VECTORS(ATTEND_VECTORS < 3 ? ATTEND_VECTORS : 3);
        else if (vectors >= 2)
            VECTORS(2);
        else
            VECTORS(1);
    }
#undef VECTORS
}

static int NAME(attend)(const void *step, int threads) {
    const attend_step_t *s = step;
    NAME(attend_t) job = {s, (s->queries + ATTEND_QUERIES - 1) / ATTEND_QUERIES, 0, 0};
    /* queries, largest scores, scales, scores, a line or a number of the mask to a key */
    const int64_t added = (s->mask && s->mask_stride[2]) ? s->keys * ATTEND_QUERIES
                          : s->causal                    ? s->keys + ATTEND_QUERIES * ATTEND_QUERIES
                                                         : s->keys;
    job.scratch_size = ((s->dim + 2 + s->keys) * ATTEND_QUERIES + added + 31) / 16 * 16;
    const int64_t items = s->batch * s->heads * job.blocks;
    const int workers = items < threads ? (int)items : threads;
    if (!items) return 0;
    job.scratch = aligned_alloc(64, (size_t)(workers * job.scratch_size) * sizeof(float));
    if (!job.scratch) return -2;
    parallel_for(NAME(attend_item), &job, items, workers);
    free(job.scratch);
    return 0;
}
