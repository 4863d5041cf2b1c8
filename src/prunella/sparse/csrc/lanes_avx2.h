/* A vector of floats in AVX2: see lanes_avx512.h. */
#include <immintrin.h>

#define NAME(x) avx2_##x
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { LANES = 8, REGISTERS = 16 };
typedef __m256 lanes_t;

INLINE __m256i avx2_first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n > LANES ? LANES : (int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE lanes_t all(float x) { return _mm256_set1_ps(x); }
INLINE lanes_t load(const float *from) { return _mm256_loadu_ps(from); }
INLINE lanes_t load_first(const float *from, int64_t n) { return _mm256_maskload_ps(from, avx2_first(n)); }
INLINE void store(float *to, lanes_t x) { _mm256_storeu_ps(to, x); }
INLINE void store_first(float *to, lanes_t x, int64_t n) { _mm256_maskstore_ps(to, avx2_first(n), x); }

INLINE lanes_t add(lanes_t a, lanes_t b) { return _mm256_add_ps(a, b); }
INLINE lanes_t sub(lanes_t a, lanes_t b) { return _mm256_sub_ps(a, b); }
INLINE lanes_t mul(lanes_t a, lanes_t b) { return _mm256_mul_ps(a, b); }
INLINE lanes_t quotient(lanes_t a, lanes_t b) { return _mm256_div_ps(a, b); }
INLINE lanes_t muladd(lanes_t a, lanes_t b, lanes_t c) { return _mm256_fmadd_ps(a, b, c); }
INLINE lanes_t root(lanes_t a) { return _mm256_sqrt_ps(a); }
INLINE lanes_t larger(lanes_t a, lanes_t b) { return _mm256_max_ps(a, b); }
INLINE lanes_t smaller(lanes_t a, lanes_t b) { return _mm256_min_ps(a, b); }
INLINE lanes_t where_less(lanes_t a, lanes_t b, lanes_t x, lanes_t y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
INLINE lanes_t absolute(lanes_t a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE lanes_t signed_as(lanes_t a, lanes_t b) {
    return _mm256_or_ps(absolute(a), _mm256_and_ps(b, _mm256_set1_ps(-0.0f)));
}
INLINE lanes_t nearest(lanes_t a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE lanes_t times_power(lanes_t a, lanes_t n) {
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(power));
}

INLINE lanes_t largest(lanes_t a, lanes_t b) {
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
INLINE float sum_of(lanes_t a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE void store_part(float *to, lanes_t x, int64_t first, int64_t n) {
    _mm256_maskstore_ps(to, _mm256_andnot_si256(avx2_first(first), avx2_first(first + n)), x);
}
INLINE lanes_t load_part(const float *from, int64_t first, int64_t n) {
    return _mm256_maskload_ps(from, _mm256_andnot_si256(avx2_first(first), avx2_first(first + n)));
}
#define HAS_MASKS 1
typedef __m256i mask_t;
INLINE mask_t mask_of(int64_t first, int64_t n) {
    return _mm256_andnot_si256(avx2_first(first < 0 ? 0 : first), avx2_first(first + n < 0 ? 0 : first + n));
}
INLINE lanes_t load_mask(const float *from, mask_t mask) { return _mm256_maskload_ps(from, mask); }
INLINE lanes_t blend(mask_t mask, lanes_t x, lanes_t y) { return _mm256_blendv_ps(x, y, _mm256_castsi256_ps(mask)); }
typedef struct {
    __m256i index;
    mask_t mask;
} shift_t;
INLINE shift_t shift_by(int64_t n) {
    const __m256i from = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (shift_t){_mm256_add_epi32(from, _mm256_set1_epi32((int)n)), mask_of(-n, LANES)};
}
INLINE lanes_t shifted(shift_t s, lanes_t x) {
    return _mm256_and_ps(_mm256_permutevar8x32_ps(x, s.index), _mm256_castsi256_ps(s.mask));
}
typedef struct {
    __m256i from_x, from_c;
    __m256 which;
} join_t;
INLINE join_t join_by(int n, int at) {
    int x[8], c[8], which[8];
    for (int i = 0; i < 8; i++) {
        x[i] = i + n;
        c[i] = at + 2 * (i + n - 8);
        which[i] = i + n < 8 ? 0 : -1;
    }
    return (join_t){_mm256_loadu_si256((const __m256i *)x), _mm256_loadu_si256((const __m256i *)c),
                    _mm256_loadu_ps((const float *)which)};
}
INLINE lanes_t joined(join_t join, lanes_t x, lanes_t c) {
    return _mm256_blendv_ps(
        _mm256_permutevar8x32_ps(x, join.from_x), _mm256_permutevar8x32_ps(c, join.from_c), join.which);
}
INLINE lanes_t evens(lanes_t a, lanes_t b) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88)), 0xd8));
}
INLINE lanes_t odds(lanes_t a, lanes_t b) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8));
}
INLINE lanes_t load_16(const uint16_t *from, int bfloat) {
    const __m128i h = _mm_loadu_si128((const __m128i *)from);
    return bfloat ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)) : _mm256_cvtph_ps(h);
}
INLINE void transpose(lanes_t *x) {
    lanes_t t[8];
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        const __m256 a = _mm256_unpacklo_ps(x[i], x[i + 1]), b = _mm256_unpackhi_ps(x[i], x[i + 1]);
        const __m256 c = _mm256_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
        t[i] = _mm256_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x20);
        x[4 + i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x31);
    }
}
