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
