/* NEON: as on AVX2, eight weights at a time are put in place by a table lookup whose pattern is found by eight
 * bits of the mask; lookups out of the table give zero. */
#if defined(__aarch64__)

#include <arm_neon.h>

#include "expand_table.h"
#include "internal.h"

#define NAME(x) neon_##x
#define TARGET
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    float32x4_t low, high;
} eight_t;

INLINE eight_t neon_eight(int32_t kind, unsigned bits, const uint8_t *values, int64_t at) {
    const uint8x8_t index = vld1_u8((const uint8_t *)expand_table[bits]);
    if (kind == F32) {
        /* bytes 4i .. 4i+3 from value index i; an empty lane's 0x80 saturates and stays out of the table */
        const uint8_t *from = values + 4 * at;
        uint8x16x2_t table = {{vld1q_u8(from), vld1q_u8(from + 16)}};
        uint8x8_t four = vqadd_u8(vqadd_u8(index, index), vqadd_u8(index, index));
        uint8x16_t twice = vcombine_u8(vzip1_u8(four, four), vzip2_u8(four, four));
        static const uint8_t step[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
        uint8x16_t low = vqaddq_u8(vzip1q_u8(twice, twice), vld1q_u8(step));
        uint8x16_t high = vqaddq_u8(vzip2q_u8(twice, twice), vld1q_u8(step));
        return (eight_t){vreinterpretq_f32_u8(vqtbl2q_u8(table, low)), vreinterpretq_f32_u8(vqtbl2q_u8(table, high))};
    }
    if (kind == BF16 || kind == F16) {
        uint8x8_t two = vqadd_u8(index, index);
        uint8x16_t pairs = vcombine_u8(vzip1_u8(two, vqadd_u8(two, vdup_n_u8(1))),
                                       vzip2_u8(two, vqadd_u8(two, vdup_n_u8(1))));
        uint16x8_t v = vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(values + 2 * at), pairs));
        if (kind == F16) {
            float16x8_t half = vreinterpretq_f16_u16(v);
            return (eight_t){vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
        }
        return (eight_t){vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(v), 16)),
                         vreinterpretq_f32_u32(vshll_high_n_u16(v, 16))};
    }
    uint8x8_t bytes;
    if (kind == INT8) {
        bytes = vld1_u8(values + at);
    } else { /* eight nibbles, from an even or odd place, to signed bytes */
        uint64_t five = 0;
        __builtin_memcpy(&five, values + (at >> 1), 5);
        uint8x8_t packed = vcreate_u8((five >> ((at & 1) * 4)) & 0xffffffff);
        uint8x8_t nibbles = vzip1_u8(vand_u8(packed, vdup_n_u8(15)), vshr_n_u8(packed, 4));
        bytes = vsub_u8(veor_u8(nibbles, vdup_n_u8(8)), vdup_n_u8(8));
    }
    int8x8_t placed = vreinterpret_s8_u8(vtbl1_u8(bytes, index));
    int16x8_t wide = vmovl_s8(placed);
    return (eight_t){vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
}

INLINE void neon_word_of(int32_t kind, uint64_t mask, const uint8_t *values, int64_t at, float *out) {
    for (int i = 0; i < 8; i++, mask >>= 8) {
        eight_t v = neon_eight(kind, mask & 255, values, at);
        vst1q_f32(out + 8 * i, v.low);
        vst1q_f32(out + 8 * i + 4, v.high);
        at += __builtin_popcount((unsigned)mask & 255);
    }
}

INLINE void neon_word(int32_t kind, uint64_t mask, const uint8_t *values, int64_t at, float *out) {
    switch (kind) {
        case F32: neon_word_of(F32, mask, values, at, out); break;
        case BF16: neon_word_of(BF16, mask, values, at, out); break;
        case F16: neon_word_of(F16, mask, values, at, out); break;
        case INT8: neon_word_of(INT8, mask, values, at, out); break;
        default: neon_word_of(INT4, mask, values, at, out);
    }
}

INLINE float neon_dot(const float *a, const float *b, int64_t n) {
    float32x4_t sum[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
    for (int64_t i = 0; i < n; i += 16)
        for (int j = 0; j < 4; j++) sum[j] = vfmaq_f32(sum[j], vld1q_f32(a + i + 4 * j), vld1q_f32(b + i + 4 * j));
    return vaddvq_f32(vaddq_f32(vaddq_f32(sum[0], sum[1]), vaddq_f32(sum[2], sum[3])));
}

INLINE float neon_dot_bf16(const uint16_t *a, const float *b, int64_t n) {
    float32x4_t sum[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 4; j++) {
            float32x4_t v = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(a + i + 4 * j), 16));
            sum[j] = vfmaq_f32(sum[j], v, vld1q_f32(b + i + 4 * j));
        }
    float out = vaddvq_f32(vaddq_f32(vaddq_f32(sum[0], sum[1]), vaddq_f32(sum[2], sum[3])));
    for (; i < n; i++) out += from_bf16(a[i]) * b[i];
    return out;
}

#include "rows.h"

static uint64_t neon_sum(const uint8_t *data, int64_t bytes) {
    uint64x2_t sum[4] = {vdupq_n_u64(0), vdupq_n_u64(0), vdupq_n_u64(0), vdupq_n_u64(0)};
    for (int64_t i = 0; i + 64 <= bytes; i += 64)
        for (int j = 0; j < 4; j++) sum[j] = vaddq_u64(sum[j], vreinterpretq_u64_u8(vld1q_u8(data + i + 16 * j)));
    return vaddvq_u64(vaddq_u64(vaddq_u64(sum[0], sum[1]), vaddq_u64(sum[2], sum[3])));
}

static int neon_available(void) { return 1; /* every 64-bit ARM has it */ }

const isa_t prunella_neon = {
    .name = "neon",
    .available = neon_available,
    .prepared_size = neon_prepared_size,
    .prepare = neon_prepare,
    .product = neon_product,
    .expand = neon_expand,
    .dense_prepared_size = neon_dense_prepared_size,
    .dense_prepare = neon_dense_prepare,
    .dense = neon_dense,
    .attend = neon_attend,
    .norm = neon_norm,
    .gated = neon_gated,
    .sum = neon_sum,
    .steps = portable_steps,
};

#endif
