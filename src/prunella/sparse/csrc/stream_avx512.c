/* What the stream spends its time on, in bfloat16 with sums in float32: x^T x of a layer's inputs, and causal
 * attention. Both for AVX-512 with BF16, where torch has no product of bfloat16 into float32 and an attention at
 * a third of the machine's speed.
 *
 * vdpbf16ps multiplies pairs: the two operands of a product are first laid out with each pair of the summed
 * index side by side, in panels of 16 columns that are then read from end to end.
 */
#include "stream.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

int stream_available(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

/* Two rows of 16 values, interleaved: out[i] = (low[i], high[i]). */
INLINE TARGET __m512i pairs16(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

INLINE TARGET __m256i load16(const bf16 *from, int64_t count) {
    if (count >= 16) return _mm256_loadu_si256((const __m256i *)from);
    return _mm256_maskz_loadu_epi16((__mmask16)((1u << (count < 0 ? 0 : count)) - 1), from);
}

INLINE TARGET __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

/* Rows [0, rows) of x (columns contiguous, rows `stride` apart) as panels of 16 columns:
 * out[panel][row / 2][column] = pair of rows. Missing rows and columns are zero. */
static TARGET void pack_rows(const bf16 *x, int64_t rows, int64_t columns, int64_t stride, uint32_t *out) {
    const int64_t half = (rows + 1) / 2;
    for (int64_t p = 0; p < columns; p += 16, out += half * 16)
        for (int64_t t = 0; t < half; t++) {
            __m256i low = load16(x + 2 * t * stride + p, columns - p);
            __m256i high = 2 * t + 1 < rows ? load16(x + (2 * t + 1) * stride + p, columns - p) : _mm256_setzero_si256();
            _mm512_storeu_si512(out + 16 * t, pairs16(low, high));
        }
}

/* ------------------------------------------------------------------ x^T x */

enum { DEPTH = 256 }; /* pairs of tokens at a time: five panels of them fit in the first two caches */

/* G[i0 .. i0+8)[j0 .. j0+48) += sum over `depth` pairs; a holds the panel of i0, b three panels from j0 on. */
INLINE TARGET void gram_tile(
    const uint32_t *a, const uint32_t *b, int64_t panel, int64_t depth, float *g, int64_t width, int64_t i0,
    int64_t j0, int panels) {
    __m512 sum[8][3];
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 3; j++) sum[i][j] = _mm512_setzero_ps();
    const uint32_t *b1 = panels > 1 ? b + panel : b, *b2 = panels > 2 ? b + 2 * panel : b;
    for (int64_t t = 0; t < depth; t++) {
        __m512i c0 = _mm512_loadu_si512(b + 16 * t), c1 = _mm512_loadu_si512(b1 + 16 * t);
        __m512i c2 = _mm512_loadu_si512(b2 + 16 * t);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            __m512i r = _mm512_set1_epi32((int)a[16 * t + i]);
            sum[i][0] = dot(sum[i][0], r, c0);
            sum[i][1] = dot(sum[i][1], r, c1);
            sum[i][2] = dot(sum[i][2], r, c2);
        }
    }
    for (int i = 0; i < 8 && i0 + i < width; i++)
        for (int j = 0; j < panels; j++) {
            int64_t at = j0 + 16 * j, left = width - at;
            __mmask16 mask = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
            float *to = g + (i0 + i) * width + at;
            _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sum[i][j]));
        }
}

/* Work item `item`: 16 rows of G, from their panel of the diagonal to the right. */
TARGET void stream_gram_rows(const gram_t *job, int64_t item) {
    const int64_t panels = (job->width + 15) / 16, half = (job->tokens + 1) / 2, panel = half * 16;
    for (int64_t t = 0; t < half; t += DEPTH) {
        int64_t depth = half - t < DEPTH ? half - t : DEPTH;
        const uint32_t *a = job->packed + item * panel + 16 * t;
        for (int64_t j = item; j < panels; j += 3) {
            int count = panels - j < 3 ? (int)(panels - j) : 3;
            const uint32_t *b = job->packed + j * panel + 16 * t;
            gram_tile(a, b, panel, depth, job->gram, job->width, 16 * item, 16 * j, count);
            gram_tile(a + 8, b, panel, depth, job->gram, job->width, 16 * item + 8, 16 * j, count);
        }
    }
}

TARGET void stream_gram_pack(const gram_t *job) {
    pack_rows(job->x, job->tokens, job->width, job->stride, job->packed);
}

/* ------------------------------------------------------------------ causal attention */

/* e^x for x <= 0, to float32 rounding: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
INLINE TARGET __m512 exp_ps(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x); /* a NaN stays one */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.3981999507e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

enum { ROWS = 8 }; /* queries at a time */

/* x (rows, dim) as panels of 16 rows: out[row / 16][d / 2][row] = pair of d. Rows from `rows` to `padded` are zero. */
static void pack_columns(const bf16 *x, int64_t rows, int64_t padded, int64_t dim, int64_t stride, uint32_t *out) {
    for (int64_t t = 0; t < padded; t++) {
        uint32_t *to = out + t / 16 * 16 * (dim / 2) + t % 16;
        for (int64_t d = 0; d < dim / 2; d++) {
            uint32_t pair = 0;
            if (t < rows) memcpy(&pair, x + t * stride + 2 * d, 4);
            to[16 * d] = pair;
        }
    }
}

/* Work item: the keys of one head, by pack_columns, and its values, by pack_rows. */
TARGET void stream_attention_pack(const attention_t *a, int64_t item) {
    const int64_t b = item / a->kv_heads, h = item % a->kv_heads, T = a->tokens, D = a->dim;
    const int64_t padded = (T + 31) / 32 * 32;
    const bf16 *k = (const bf16 *)a->k + b * a->k_stride[0] + h * a->k_stride[1];
    const bf16 *v = (const bf16 *)a->v + b * a->v_stride[0] + h * a->v_stride[1];
    uint32_t *keys = a->packed + item * a->packed_size, *values = keys + padded * D / 2;
    pack_columns(k, T, padded, D, a->k_stride[2], keys);
    pack_rows(v, T, D, a->v_stride[2], values);
}

/* Up to ROWS rows of x side by side; missing ones are zero. */
static void copy_rows(const bf16 *from, int64_t rows, int64_t stride, int64_t dim, uint32_t *to) {
    memset(to, 0, sizeof(uint32_t) * ROWS * (dim / 2));
    for (int64_t i = 0; i < rows; i++) memcpy(to + i * (dim / 2), from + i * stride, sizeof(bf16) * dim);
}

/* The first `count` of 16 places. */
INLINE __mmask16 up_to(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1); }

/* sum[row][column] += left[row][pair] * panels[pair][column] over pairs, for ROWS rows and two panels of 16 columns. */
INLINE TARGET void add_products(
    __m512 sum[ROWS][2], const uint32_t *left, int64_t stride, int64_t pairs, const uint32_t *p0, const uint32_t *p1) {
    for (int64_t t = 0; t < pairs; t++) {
        __m512i c0 = _mm512_loadu_si512(p0 + 16 * t), c1 = _mm512_loadu_si512(p1 + 16 * t);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            __m512i r = _mm512_set1_epi32((int)left[i * stride + t]);
            sum[i][0] = dot(sum[i][0], r, c0);
            sum[i][1] = dot(sum[i][1], r, c1);
        }
    }
}

/* scores[row][key] for ROWS queries and two panels of 16 keys. */
INLINE TARGET void score_tile(
    const uint32_t *q, int64_t half_dim, const uint32_t *keys, float *scores, int64_t stride, __m512 scale) {
    __m512 sum[ROWS][2];
    for (int i = 0; i < ROWS; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    add_products(sum, q, half_dim, half_dim, keys, keys + 16 * half_dim);
    for (int i = 0; i < ROWS; i++) {
        _mm512_storeu_ps(scores + i * stride, _mm512_mul_ps(sum[i][0], scale));
        _mm512_storeu_ps(scores + i * stride + 16, _mm512_mul_ps(sum[i][1], scale));
    }
}

/* out[row][d .. d+32) = sum over pairs of keys of p[row][pair] * values, divided by the row's total. */
INLINE TARGET void value_tile(
    const uint32_t *p, int64_t stride, int64_t pairs, const uint32_t *v0, const uint32_t *v1, const float *total,
    bf16 *out, int64_t out_stride, int rows) {
    __m512 sum[ROWS][2];
    for (int i = 0; i < ROWS; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    add_products(sum, p, stride, pairs, v0, v1);
    for (int i = 0; i < rows; i++) {
        __m512 by = _mm512_set1_ps(1.0f / total[i]);
        __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_mul_ps(sum[i][1], by), _mm512_mul_ps(sum[i][0], by));
        _mm512_storeu_si512(out + i * out_stride, (__m512i)pair);
    }
}

/* Work item: ROWS queries of one head. */
TARGET void stream_attention_rows(const attention_t *a, int64_t item, float *scratch) {
    const int64_t T = a->tokens, D = a->dim, half = D / 2, tiles = (T + ROWS - 1) / ROWS;
    const int64_t tile = tiles - 1 - item % tiles, head = item / tiles % a->heads, b = item / tiles / a->heads;
    const int64_t kv = head / (a->heads / a->kv_heads), padded = (T + 31) / 32 * 32;
    const uint32_t *keys = a->packed + (b * a->kv_heads + kv) * a->packed_size, *values = keys + padded * half;
    const int64_t first = tile * ROWS, rows = T - first < ROWS ? T - first : ROWS;
    const int64_t seen = first + rows, span = (seen + 31) / 32 * 32, stride = padded;

    uint32_t *q = (uint32_t *)(scratch + ROWS * stride);
    const bf16 *from = (const bf16 *)a->q + b * a->q_stride[0] + head * a->q_stride[1] + first * a->q_stride[2];
    copy_rows(from, rows, a->q_stride[2], D, q);

    const __m512 scale = _mm512_set1_ps(a->scale);
    for (int64_t t = 0; t < span; t += 32) score_tile(q, half, keys + t * half, scratch + t, stride, scale);
    float total[ROWS];
    const int64_t pairs = (seen + 1) / 2;
    for (int64_t i = 0; i < ROWS; i++) {
        float *s = scratch + i * stride;
        const int64_t visible = first + i + 1 < seen ? first + i + 1 : seen;
        __m512 top = _mm512_set1_ps(-INFINITY);
        int64_t t = 0;
        for (; t + 16 <= visible; t += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(s + t));
        const __mmask16 rest = up_to(visible - t);
        top = _mm512_mask_max_ps(top, rest, top, _mm512_maskz_loadu_ps(rest, s + t));
        const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top));
        __m512 sum = _mm512_setzero_ps();
        uint16_t *p = (uint16_t *)s; /* written behind what is still to be read */
        for (t = 0; t < span; t += 32) {
            __m512 e0 = _mm512_maskz_mov_ps(up_to(visible - t), exp_ps(_mm512_sub_ps(_mm512_loadu_ps(s + t), most)));
            __m512 e1 =
                _mm512_maskz_mov_ps(up_to(visible - t - 16), exp_ps(_mm512_sub_ps(_mm512_loadu_ps(s + t + 16), most)));
            sum = _mm512_add_ps(sum, _mm512_add_ps(e0, e1));
            _mm512_storeu_si512(p + t, (__m512i)_mm512_cvtne2ps_pbh(e1, e0));
        }
        total[i] = _mm512_reduce_add_ps(sum);
        if (a->lse && i < rows)
            a->lse[(b * a->heads + head) * T + first + i] = _mm512_cvtss_f32(most) + logf(total[i]);
    }
    bf16 *out = (bf16 *)a->out + ((b * T + first) * a->heads + head) * D;
    const int64_t panel = (T + 1) / 2 * 16;
    for (int64_t d = 0; d < D; d += 32) {
        const uint32_t *v = values + d / 16 * panel;
        value_tile((uint32_t *)scratch, stride, pairs, v, v + panel, total, out + d, a->heads * D, (int)rows);
    }
}

/* ------------------------------------------------------------------ its gradient */

/* With P = softmax(scale Q K^T) and its gradient dP = G V^T:
 *     dV = P^T G,    dS = scale P * (dP - delta),    dQ = dS K,    dK = dS^T Q
 * P is made again from its logarithms. Rows of P and dS (for dQ) and columns of them (for dK and dV) are work items of
 * their own, which the two loops below treat alike: nothing is shared between items, and the result does not depend on
 * the threads. */

enum { K_COLUMNS, V_COLUMNS, K_ROWS, SHARED, Q_COLUMNS = 0, G_COLUMNS, Q_ROWS, G_ROWS, EACH };

/* Work item: 0, the keys and values of the group; n, the queries and gradients of its n-th head. */
TARGET void stream_attention_back_pack(const attention_back_t *a, int64_t item) {
    const int64_t T = a->tokens, D = a->dim, padded = (T + 31) / 32 * 32, size = a->packed_size;
    if (item == 0) {
        const bf16 *k = (const bf16 *)a->k + a->b * a->k_stride[0] + a->kv * a->k_stride[1];
        const bf16 *v = (const bf16 *)a->v + a->b * a->v_stride[0] + a->kv * a->v_stride[1];
        pack_columns(k, T, padded, D, a->k_stride[2], a->packed + K_COLUMNS * size);
        pack_columns(v, T, padded, D, a->v_stride[2], a->packed + V_COLUMNS * size);
        pack_rows(k, T, D, a->k_stride[2], a->packed + K_ROWS * size);
        return;
    }
    const int64_t head = a->kv * (a->heads / a->kv_heads) + item - 1;
    uint32_t *to = a->packed + (SHARED + (item - 1) * EACH) * size;
    const bf16 *q = (const bf16 *)a->q + a->b * a->q_stride[0] + head * a->q_stride[1];
    const bf16 *g = (const bf16 *)a->grad + a->b * a->grad_stride[0] + head * a->grad_stride[1];
    pack_columns(q, T, padded, D, a->q_stride[2], to + Q_COLUMNS * size);
    pack_columns(g, T, padded, D, a->grad_stride[2], to + G_COLUMNS * size);
    pack_rows(q, T, D, a->q_stride[2], to + Q_ROWS * size);
    pack_rows(g, T, D, a->grad_stride[2], to + G_ROWS * size);
}

/* out[row][d] += sum over pairs of tokens of p[row][pair] * rows, for all d. */
INLINE TARGET void add_tile(
    const uint32_t *p, int64_t stride, int64_t pairs, const uint32_t *rows, int64_t panel, int64_t dim, float *out) {
    for (int64_t d = 0; d < dim; d += 32) {
        const uint32_t *c = rows + d / 16 * panel;
        __m512 sum[ROWS][2];
        for (int i = 0; i < ROWS; i++) {
            sum[i][0] = _mm512_loadu_ps(out + i * dim + d);
            sum[i][1] = _mm512_loadu_ps(out + i * dim + d + 16);
        }
        add_products(sum, p, stride, pairs, c, c + panel);
        for (int i = 0; i < ROWS; i++) {
            _mm512_storeu_ps(out + i * dim + d, sum[i][0]);
            _mm512_storeu_ps(out + i * dim + d + 16, sum[i][1]);
        }
    }
}

/* (p, scale p (dp - delta)) of 16 places, p = e^(s - lse) where `seen` and 0 elsewhere. */
INLINE TARGET __m512 soft_back(__m512 s, __m512 *dp, __m512 lse, __m512 delta, __m512 scale, __mmask16 seen) {
    __m512 p = _mm512_maskz_mov_ps(seen, exp_ps(_mm512_sub_ps(s, lse)));
    *dp = _mm512_mul_ps(_mm512_mul_ps(p, scale), _mm512_sub_ps(*dp, delta));
    return p;
}

static TARGET void store_rows(const float *from, int64_t rows, int64_t dim, bf16 *to) {
    for (int64_t d = 0; d < rows * dim; d += 32) {
        __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + d + 16), _mm512_loadu_ps(from + d));
        _mm512_storeu_si512(to + d, (__m512i)pair);
    }
}

/* Work item: ROWS keys of the group (dK and dV), the first ones first, as they are seen by most queries; then ROWS
 * queries of each of its heads (dQ), the last ones first. */
TARGET void stream_attention_back_rows(const attention_back_t *a, int64_t item, float *scratch) {
    const int64_t T = a->tokens, D = a->dim, half = D / 2, tiles = (T + ROWS - 1) / ROWS, stride = (T + 31) / 32 * 32;
    const int64_t heads = a->heads / a->kv_heads, size = a->packed_size, panel = (T + 1) / 2 * 16;
    const int by_key = item < tiles;
    const int64_t tile = by_key ? item : tiles - 1 - item % tiles;
    const int64_t first = tile * ROWS, rows = T - first < ROWS ? T - first : ROWS;
    /* the columns of P^T (queries from the first key on) or P (keys up to the last query) that count */
    const int64_t begin = by_key ? first / 32 * 32 : 0, end = by_key ? T : first + rows;
    const __m512 one = _mm512_set1_ps(1.0f), scale = _mm512_set1_ps(a->scale);
    float *s = scratch, *dp = s + ROWS * stride, *sum = dp + ROWS * stride, *second = sum + ROWS * D;
    uint32_t *x = (uint32_t *)(second + ROWS * D), *y = x + ROWS * half;
    memset(sum, 0, sizeof(float) * 2 * ROWS * D);
    const int64_t from = by_key ? 0 : item / tiles - 1, to = by_key ? heads : item / tiles;
    for (int64_t n = from; n < to; n++) {
        const int64_t head = a->kv * heads + n;
        const uint32_t *own = a->packed + (SHARED + n * EACH) * size, *left, *right;
        const float *lse = a->lse + (a->b * a->heads + head) * T, *delta = a->delta + (a->b * a->heads + head) * T;
        if (by_key) {
            const bf16 *k = (const bf16 *)a->k + a->b * a->k_stride[0] + a->kv * a->k_stride[1];
            const bf16 *v = (const bf16 *)a->v + a->b * a->v_stride[0] + a->kv * a->v_stride[1];
            copy_rows(k + first * a->k_stride[2], rows, a->k_stride[2], D, x);
            copy_rows(v + first * a->v_stride[2], rows, a->v_stride[2], D, y);
            left = own + Q_COLUMNS * size, right = own + G_COLUMNS * size;
        } else {
            const bf16 *q = (const bf16 *)a->q + a->b * a->q_stride[0] + head * a->q_stride[1];
            const bf16 *g = (const bf16 *)a->grad + a->b * a->grad_stride[0] + head * a->grad_stride[1];
            copy_rows(q + first * a->q_stride[2], rows, a->q_stride[2], D, x);
            copy_rows(g + first * a->grad_stride[2], rows, a->grad_stride[2], D, y);
            left = a->packed + K_COLUMNS * size, right = a->packed + V_COLUMNS * size;
        }
        for (int64_t t = begin; t < end; t += 32) {
            score_tile(x, half, left + t * half, s + t - begin, stride, scale);
            score_tile(y, half, right + t * half, dp + t - begin, stride, one);
        }
        for (int64_t i = 0; i < ROWS; i++) {
            float *si = s + i * stride, *di = dp + i * stride;
            uint16_t *p = (uint16_t *)si, *ds = (uint16_t *)di; /* written behind what is still to be read */
            const int64_t at = first + i;
            /* a missing row of queries has no statistics, a missing row of keys is zero */
            const __m512 lse_i = _mm512_set1_ps(by_key || i >= rows ? 0 : lse[at]);
            const __m512 delta_i = _mm512_set1_ps(by_key || i >= rows ? 0 : delta[at]);
            for (int64_t t = begin; t < end; t += 32, si += 32, di += 32, p += 32, ds += 32) {
                __m512 d[2], e[2];
                for (int j = 0; j < 2; j++) {
                    const int64_t c = t + 16 * j;
                    const __mmask16 there = up_to(T - c);
                    const __mmask16 seen =
                        i >= rows ? 0 : by_key ? there & (__mmask16)~up_to(at - c) : up_to(at + 1 - c);
                    d[j] = _mm512_loadu_ps(di + 16 * j);
                    e[j] = soft_back(
                        _mm512_loadu_ps(si + 16 * j), &d[j], by_key ? _mm512_maskz_loadu_ps(there, lse + c) : lse_i,
                        by_key ? _mm512_maskz_loadu_ps(there, delta + c) : delta_i, scale, seen);
                }
                _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(e[1], e[0]));
                _mm512_storeu_si512(ds, (__m512i)_mm512_cvtne2ps_pbh(d[1], d[0]));
            }
        }
        const int64_t pairs = (end + 1) / 2 - begin / 2, skip = begin / 2 * 16;
        if (by_key) {
            add_tile((uint32_t *)dp, stride, pairs, own + Q_ROWS * size + skip, panel, D, sum);
            add_tile((uint32_t *)s, stride, pairs, own + G_ROWS * size + skip, panel, D, second);
        } else
            add_tile((uint32_t *)dp, stride, pairs, a->packed + K_ROWS * size, panel, D, sum);
    }
    if (by_key) {
        const int64_t place = ((a->b * a->kv_heads + a->kv) * T + first) * D;
        store_rows(sum, rows, D, (bf16 *)a->dk + place);
        store_rows(second, rows, D, (bf16 *)a->dv + place);
    } else
        store_rows(sum, rows, D, (bf16 *)a->dq + ((a->b * a->heads + a->kv * heads + from) * T + first) * D);
}

#else

int stream_available(void) { return 0; }
void stream_gram_pack(const gram_t *job) { (void)job; }
void stream_gram_rows(const gram_t *job, int64_t item) { (void)job, (void)item; }
void stream_attention_pack(const attention_t *job, int64_t item) { (void)job, (void)item; }
void stream_attention_rows(const attention_t *job, int64_t item, float *scratch) { (void)job, (void)item, (void)scratch; }
void stream_attention_back_pack(const attention_back_t *job, int64_t item) { (void)job, (void)item; }
void stream_attention_back_rows(const attention_back_t *job, int64_t item, float *scratch) { (void)job, (void)item, (void)scratch; }

#endif
