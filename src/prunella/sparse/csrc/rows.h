/* Product and expansion in plain loops over words of 64 weights: a row is decoded to float32 in scratch memory
 * that stays in the cache, then multiplied. An instruction set includes this file after it has defined
 *
 *     NAME(x)  TARGET
 *     static void NAME(word)(int32_t kind, uint64_t mask, const uint8_t *values, int64_t at, float *out)
 *         64 weights, zeros where the mask has none, before scales
 *     static float NAME(dot)(const float *a, const float *b, int64_t n)             n a multiple of 64
 *     static float NAME(dot_bf16)(const uint16_t *a, const float *b, int64_t n)     any n
 */
#include <math.h>
#include <string.h>

#include "internal.h"

TARGET __attribute__((unused)) static int64_t NAME(prepared_size)(const weight_t *w) { return w->words * 64 * (int64_t)sizeof(float); }

TARGET __attribute__((unused)) static void NAME(prepare)(
    const weight_t *w, const void *x, int32_t x_kind, uint8_t *tile, int64_t T, int64_t t) {
    float *to = (float *)tile;
    (void)T, (void)t;
    for (int64_t i = 0; i < w->columns; i++) to[i] = load_float(x, x_kind, i);
    for (int64_t i = w->columns; i < w->words * 64; i++) to[i] = 0;
}

/* One row as float32 with its scales, words * 64 of them. */
TARGET static void NAME(decode)(const weight_t *w, int64_t row, float *out) {
    const uint16_t *scales = w->scales ? w->scales + row * w->groups : NULL;
    int64_t at = row_begin(w, row);
    if (!w->mask) {
        const int8_t *from = (const int8_t *)w->values + at;
        for (int64_t g = 0, i = 0; i < w->columns; g++) {
            const int64_t end = (g + 1) * w->group < w->columns ? (g + 1) * w->group : w->columns;
            const float scale = from_bf16(scales[g]);
            for (; i < end; i++) out[i] = (float)from[i] * scale;
        }
        for (int64_t i = w->columns; i < w->words * 64; i++) out[i] = 0;
        return;
    }
    const uint64_t *mask = w->mask + row * w->words;
    for (int64_t i = 0; i < w->words; i++) {
        float *to = out + i * 64;
        NAME(word)(w->kind, mask[i], w->values, at, to);
        at = advance(w, at, mask[i]);
        if (scales) {
            float scale = from_bf16(scales[i * 64 / w->group]);
            for (int j = 0; j < 64; j++) to[j] *= scale;
        }
    }
}

TARGET __attribute__((unused)) static void NAME(product)(
    const job_t *job, int64_t first, int64_t last, uint8_t *scratch) {
    const weight_t *w = &job->w;
    float *row = (float *)scratch;
    for (int64_t r = first; r < last; r++) {
        NAME(decode)(w, r, row);
        for (int64_t t = 0; t < job->tokens; t++) {
            const float *x = (const float *)((const uint8_t *)job->x + t * job->stride);
            store_float(job->y, job->y_kind, t * w->rows + r, NAME(dot)(row, x, w->words * 64));
        }
    }
}

TARGET static void NAME(expand)(const job_t *job, int64_t first, int64_t last, uint8_t *scratch) {
    const weight_t *w = &job->w;
    float *row = (float *)scratch;
    for (int64_t r = first; r < last; r++) {
        NAME(decode)(w, r, row);
        int64_t base = (r - job->first) * w->columns;
        if (job->y_kind == F32) {
            memcpy((float *)job->y + base, row, (size_t)w->columns * sizeof(float));
        } else if (job->y_kind == BF16) {
            uint16_t *y = (uint16_t *)job->y + base;
            for (int64_t i = 0; i < w->columns; i++) y[i] = to_bf16(row[i]);
        } else {
            uint16_t *y = (uint16_t *)job->y + base;
            for (int64_t i = 0; i < w->columns; i++) y[i] = to_f16(row[i]);
        }
    }
}

TARGET __attribute__((unused)) static int64_t NAME(dense_prepared_size)(int64_t columns) {
    return columns * (int64_t)sizeof(float);
}

TARGET __attribute__((unused)) static void NAME(dense_prepare)(
    int64_t columns, const void *x, int32_t x_kind, void *out) {
    for (int64_t i = 0; i < columns; i++) ((float *)out)[i] = load_float(x, x_kind, i);
}

TARGET __attribute__((unused)) static void NAME(dense)(const job_t *job, int64_t first, int64_t last) {
    const weight_t *w = &job->w;
    for (int64_t r = first; r < last; r++) {
        const uint16_t *row = (const uint16_t *)w->values + r * w->columns;
        for (int64_t t = 0; t < job->tokens; t++) {
            const float *x = (const float *)((const uint8_t *)job->x + t * job->stride);
            store_float(job->y, job->y_kind, t * w->rows + r, NAME(dot_bf16)(row, x, w->columns));
        }
    }
}

TARGET static void NAME(attend)(const attend_t *a, int64_t item, float *scratch) {
    const int64_t b = item / a->kv_heads, h = item % a->kv_heads, shared = a->heads / a->kv_heads, dim = a->dim;
    const uint16_t *k = a->k + b * a->k_stride[0] + h * a->k_stride[1];
    const uint16_t *v = a->v + b * a->v_stride[0] + h * a->v_stride[1];
    float *q = scratch, *sum = q + shared * dim, *most = sum + shared * dim, *total = most + shared;
    float *weight = total + shared; /* shared x tokens */
    for (int64_t g = 0; g < shared; g++) {
        const uint16_t *from = a->q + b * a->q_stride[0] + (h * shared + g) * a->q_stride[1];
        for (int64_t i = 0; i < dim; i++) q[g * dim + i] = from_bf16(from[i]) * a->scale;
        for (int64_t i = 0; i < dim; i++) sum[g * dim + i] = 0;
        most[g] = -INFINITY, total[g] = 0;
    }
    for (int64_t j = 0; j < a->tokens; j++)
        for (int64_t g = 0; g < shared; g++) {
            const float score = NAME(dot_bf16)(k + j * a->k_stride[2], q + g * dim, dim);
            weight[g * a->tokens + j] = score;
            most[g] = score > most[g] ? score : most[g];
        }
    for (int64_t g = 0; g < shared; g++) {
        float *to = weight + g * a->tokens;
        for (int64_t j = 0; j < a->tokens; j++) to[j] = exp_negative(to[j] - most[g]);
    }
    for (int64_t j = 0; j < a->tokens; j++)
        for (int64_t g = 0; g < shared; g++) {
            const uint16_t *from = v + j * a->v_stride[2];
            const float p = weight[g * a->tokens + j];
            float *to = sum + g * dim;
            for (int64_t i = 0; i < dim; i++) to[i] += p * from_bf16(from[i]);
            total[g] += p;
        }
    uint16_t *out = a->out + (b * a->heads + h * shared) * dim;
    for (int64_t g = 0; g < shared; g++)
        for (int64_t i = 0; i < dim; i++) out[g * dim + i] = to_bf16(sum[g * dim + i] / total[g]);
}

TARGET static void NAME(norm)(const uint16_t *x, const uint16_t *weight, float eps, int64_t n, uint16_t *out) {
    float sum[16] = {0}, total = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) {
            const float value = from_bf16(x[i + j]);
            sum[j] += value * value;
        }
    for (; i < n; i++) sum[0] += from_bf16(x[i]) * from_bf16(x[i]);
    for (int j = 0; j < 16; j++) total += sum[j];
    const float scale = 1 / sqrtf(total / (float)n + eps);
    for (i = 0; i < n; i++) out[i] = to_bf16(from_bf16(to_bf16(from_bf16(x[i]) * scale)) * from_bf16(weight[i]));
}

TARGET static void NAME(gated)(const uint16_t *gate, const uint16_t *up, int64_t n, uint16_t *out) {
    for (int64_t i = 0; i < n; i++) {
        const float g = from_bf16(gate[i]), e = exp_negative(g < 0 ? g : -g);
        const float silu = (g < 0 ? g * e : g) / (1 + e);
        out[i] = to_bf16(from_bf16(to_bf16(silu)) * from_bf16(up[i]));
    }
}
