/* AVX2: no instruction expands by a mask, so eight weights at a time are put in place by a byte shuffle whose
 * pattern is looked up by eight bits of the mask. */
#if defined(__x86_64__)

#include <immintrin.h>

#include "expand_table.h"
#include "internal.h"

#define NAME(x) avx2_##x
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET

/* Eight floats put in place by eight bits of the mask; zero where a bit is 0. */
INLINE __m256 avx2_eight(int32_t kind, unsigned bits, const uint8_t *values, int64_t at) {
    const __m128i index = _mm_loadl_epi64((const __m128i *)expand_table[bits]);
    if (kind == F32) {
        __m256i lane = _mm256_cvtepi8_epi32(index); /* 0x80 turns negative where a lane stays empty */
        __m256 v = _mm256_permutevar8x32_ps(_mm256_loadu_ps((const float *)values + at), lane);
        return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lane, 31)), v);
    }
    if (kind == BF16 || kind == F16) {
        /* byte pairs 2i, 2i+1 from value index i */
        __m128i twice = _mm_add_epi8(index, index), empty = _mm_and_si128(index, _mm_set1_epi8((char)0x80));
        __m128i low = _mm_or_si128(twice, empty);
        __m128i pairs = _mm_unpacklo_epi8(low, _mm_or_si128(low, _mm_set1_epi8(1)));
        __m128i v = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)((const uint16_t *)values + at)), pairs);
        if (kind == F16) return _mm256_cvtph_ps(v);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
    }
    __m128i bytes;
    if (kind == INT8) {
        bytes = _mm_loadl_epi64((const __m128i *)(values + at));
    } else { /* eight nibbles, from an even or odd place, to signed bytes */
        uint64_t five = 0;
        __builtin_memcpy(&five, values + (at >> 1), 5);
        __m128i packed = _mm_cvtepu8_epi16(_mm_cvtsi32_si128((int)(five >> ((at & 1) * 4))));
        __m128i nibbles = _mm_or_si128(packed, _mm_slli_epi16(packed, 4));
        nibbles = _mm_and_si128(nibbles, _mm_set1_epi8(15));
        bytes = _mm_sub_epi8(_mm_xor_si128(nibbles, _mm_set1_epi8(8)), _mm_set1_epi8(8));
    }
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(bytes, index)));
}

INLINE void avx2_word_of(int32_t kind, uint64_t mask, const uint8_t *values, int64_t at, float *out) {
    for (int i = 0; i < 8; i++, mask >>= 8) {
        _mm256_storeu_ps(out + 8 * i, avx2_eight(kind, mask & 255, values, at));
        at += __builtin_popcount((unsigned)mask & 255);
    }
}

INLINE void avx2_word(int32_t kind, uint64_t mask, const uint8_t *values, int64_t at, float *out) {
    switch (kind) { /* constants, so that each kind gets a loop without branches */
        case F32: avx2_word_of(F32, mask, values, at, out); break;
        case BF16: avx2_word_of(BF16, mask, values, at, out); break;
        case F16: avx2_word_of(F16, mask, values, at, out); break;
        case INT8: avx2_word_of(INT8, mask, values, at, out); break;
        default: avx2_word_of(INT4, mask, values, at, out);
    }
}

INLINE float avx2_total(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

INLINE float avx2_dot(const float *a, const float *b, int64_t n) {
    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t i = 0; i < n; i += 32)
        for (int j = 0; j < 4; j++)
            sum[j] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * j), _mm256_loadu_ps(b + i + 8 * j), sum[j]);
    return avx2_total(_mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3])));
}

INLINE float avx2_dot_bf16(const uint16_t *a, const float *b, int64_t n) {
    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int j = 0; j < 4; j++) {
            __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(a + i + 8 * j)));
            __m256 v = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
            sum[j] = _mm256_fmadd_ps(v, _mm256_loadu_ps(b + i + 8 * j), sum[j]);
        }
    float out = avx2_total(_mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3])));
    for (; i < n; i++) out += from_bf16(a[i]) * b[i];
    return out;
}

#include "rows.h"

TARGET static uint64_t avx2_sum(const uint8_t *data, int64_t bytes) {
    __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t i = 0; i + 128 <= bytes; i += 128)
        for (int j = 0; j < 4; j++)
            sum[j] = _mm256_add_epi64(sum[j], _mm256_loadu_si256((const __m256i *)(data + i + 32 * j)));
    uint64_t part[4];
    sum[0] = _mm256_add_epi64(_mm256_add_epi64(sum[0], sum[1]), _mm256_add_epi64(sum[2], sum[3]));
    _mm256_storeu_si256((__m256i *)part, sum[0]);
    return part[0] + part[1] + part[2] + part[3];
}

static int avx2_available(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

const isa_t prunella_avx2 = {
    .name = "avx2",
    .available = avx2_available,
    .prepared_size = avx2_prepared_size,
    .prepare = avx2_prepare,
    .product = avx2_product,
    .expand = avx2_expand,
    .dense_prepared_size = avx2_dense_prepared_size,
    .dense_prepare = avx2_dense_prepare,
    .dense = avx2_dense,
    .attend = avx2_attend,
    .norm = avx2_norm,
    .gated = avx2_gated,
    .sum = avx2_sum,
    .steps = avx2_steps,
};

#endif
