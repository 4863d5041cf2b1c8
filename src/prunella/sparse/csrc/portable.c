/* Plain C, for processors that no other file here knows. */
#define NAME(x) portable_##x
#define TARGET

#include "internal.h"

static void portable_word(int32_t kind, uint64_t mask, const uint8_t *values, int64_t at, float *out) {
    for (int j = 0; j < 64; j++) out[j] = 0;
    for (; mask; mask &= mask - 1) out[__builtin_ctzll(mask)] = value_at(kind, values, at++);
}

static float portable_dot(const float *a, const float *b, int64_t n) {
    float sum[8] = {0}; /* several sums, so that the compiler may keep them in a vector */
    for (int64_t i = 0; i < n; i += 8)
        for (int j = 0; j < 8; j++) sum[j] += a[i + j] * b[i + j];
    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

static float portable_dot_bf16(const uint16_t *a, const float *b, int64_t n) {
    float sum[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) sum[j] += from_bf16(a[i + j]) * b[i + j];
    for (; i < n; i++) sum[0] += from_bf16(a[i]) * b[i];
    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

#include "rows.h"

static uint64_t portable_sum(const uint8_t *data, int64_t bytes) {
    uint64_t sum[8] = {0}, part;
    for (int64_t i = 0; i + 64 <= bytes; i += 64)
        for (int j = 0; j < 8; j++) {
            memcpy(&part, data + i + 8 * j, 8);
            sum[j] += part;
        }
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

static int portable_available(void) { return 1; }

const isa_t prunella_portable = {
    .name = "portable",
    .available = portable_available,
    .prepared_size = portable_prepared_size,
    .prepare = portable_prepare,
    .product = portable_product,
    .expand = portable_expand,
    .dense_prepared_size = portable_dense_prepared_size,
    .dense_prepare = portable_dense_prepare,
    .dense = portable_dense,
    .attend = portable_attend,
    .norm = portable_norm,
    .gated = portable_gated,
    .sum = portable_sum,
    .steps = portable_steps,
};
