/* The column pass over one tile, for LANES rows at a time: the tile lies in scratch memory column by column, a vector
 * across the rows, and stays in the cache. An instruction set includes this file after it has defined
 *
 *     NAME(x)  TARGET
 *
 * With U the tile's factor, for columns j from left to right
 *
 *     q_j = the nearest of the grid (or w_j itself) where kept, else 0        e_j = (w_j - q_j) / U_jj
 *     w_k <- w_k - e_j U_jk        for all k > j
 *
 * Every w_k loses its e_j U_jk in the order of j. Those from earlier panels of columns are taken off all at once when
 * the panel is reached, from registers; those from within the panel one by one.
 */
#include "columns.h"

typedef float NAME(vec) __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));
typedef int32_t NAME(ints) __attribute__((vector_size(4 * LANES)));
#define VEC NAME(vec)
#define INTS NAME(ints)

/* Strip `strip` of 8 columns, short of its last `8 - count`: minus e_j U for the `before` columns before its panel. */
TARGET static inline void NAME(subtract)(VEC *w, const VEC *e, const float *strip, int64_t before, int64_t count) {
    VEC sum[8];
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) sum[c] = w[c < count ? c : 0];
    for (int64_t j = 0; j < before; j++) {
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) sum[c] -= e[j] * strip[8 * j + c];
    }
    for (int c = 0; c < count; c++) w[c] = sum[c];
}

/* keep[] of one group of columns: 0 at the span - kept lowest (w / d)^2, -1 at the others; among equals the first is
 * the lowest. */
TARGET static inline void NAME(choose)(const columns_t *t, const VEC *w, const float *diagonal, VEC *score, INTS *keep) {
    for (int64_t c = 0; c < t->span; c++) {
        score[c] = w[c] / diagonal[c];
        score[c] *= score[c];
    }
    for (int64_t c = 0; c < t->span; c++) {
        INTS lower = {0};
        for (int64_t i = 0; i < t->span; i++) lower -= i < c ? score[i] <= score[c] : score[i] < score[c];
        keep[c] = lower >= (int32_t)(t->span - t->kept);
    }
}

TARGET static void NAME(rows)(const void *job, int64_t item, int worker) {
    const columns_t *t = job;
    const int64_t columns = t->columns, first = item * LANES, left = t->rows - first;
    const int64_t lanes = left < LANES ? left : LANES, span = t->span > 1 ? t->span : 1;
    int64_t panel = span;
    while (panel % 8) panel += span; /* whole strips and whole groups */
    VEC *w = (VEC *)(t->scratch + worker * t->scratch_size), *e = w + columns, *score = e + columns;
    INTS *keep = (INTS *)(score + span);
    float *diagonal = (float *)(keep + columns);
    VEC scale = {0};
    for (int64_t r = 0; t->scale && r < lanes; r++) scale[r] = t->scale[first + r] < 1e-38f ? 1e-38f : t->scale[first + r];

    for (int64_t r = 0; r < LANES; r++) {
        const float *from = t->weight + (first + (r < lanes ? r : 0)) * t->stride;
        float *to = (float *)w + r;
        for (int64_t c = 0; c < columns; c++) to[LANES * c] = from[c];
        if (t->span) continue;
        const uint8_t *bits = t->mask + (first + (r < lanes ? r : 0)) * t->mask_stride;
        int32_t *kept = (int32_t *)keep + r;
        for (int64_t c = 0; c < columns; c++) kept[LANES * c] = -(int32_t)bits[c];
    }
    for (int64_t c = 0; c < columns; c++) diagonal[c] = t->upper[c / 8 * 8 * columns + 8 * c + c % 8];

    for (int64_t begin = 0; begin < columns; begin += panel) {
        const int64_t end = begin + panel < columns ? begin + panel : columns;
        for (int64_t c = begin; c < end && begin; c += 8)
            NAME(subtract)(w + c, e, t->upper + c * columns, begin, end - c < 8 ? end - c : 8);
        for (int64_t j = begin; j < end; j++) {
            if (t->span && j % span == 0) NAME(choose)(t, w + j, diagonal + j, score, keep + j);
            VEC q = w[j];
            if (t->scale) {
                VEC x = q / scale;
                INTS high = x > t->limit, low = x < -t->limit;
                VEC clipped = (VEC)(((INTS)x & ~(high | low)) | ((INTS)((VEC){0} + t->limit) & high) |
                                    ((INTS)((VEC){0} - t->limit) & low));
                q = (clipped + 12582912.0f - 12582912.0f) * scale; /* 1.5 * 2^23: to the nearest, ties to even */
            }
            q = (VEC)((INTS)q & keep[j]);
            e[j] = (w[j] - q) / diagonal[j];
            w[j] = q;
            for (int64_t k = j + 1; k < end; k++) w[k] -= e[j] * t->upper[k / 8 * 8 * columns + 8 * j + k % 8];
        }
    }

    for (int64_t r = 0; r < lanes; r++) {
        float *to = t->weight + (first + r) * t->stride;
        const float *from = (const float *)w + r;
        for (int64_t c = 0; c < columns; c++) to[c] = from[LANES * c];
        if (!t->span) continue;
        uint8_t *bits = t->mask + (first + r) * t->mask_stride;
        const int32_t *kept = (const int32_t *)keep + r;
        for (int64_t c = 0; c < columns; c++) bits[c] = (uint8_t)-kept[LANES * c];
    }
    for (int64_t c = 0; c < columns; c++) {
        const float *from = (const float *)(e + c);
        float *to = t->errors + c * t->rows + first;
        for (int64_t r = 0; r < lanes; r++) to[r] = from[r];
    }
}

#undef VEC
#undef INTS
