/* A vector of floats in AVX-512. Every lanes_*.h offers the same names, so that a kernel is written once. */
#include <immintrin.h>

#define NAME(x) avx512_##x
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,bmi2,popcnt")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { LANES = 16, REGISTERS = 32 };
typedef __m512 lanes_t;

/* The first n lanes, 0 <= n; all of them from LANES on. */
INLINE __mmask16 avx512_first(int64_t n) { return n >= LANES ? 0xffff : (__mmask16)((1u << n) - 1); }

INLINE lanes_t all(float x) { return _mm512_set1_ps(x); }
INLINE lanes_t load(const float *from) { return _mm512_loadu_ps(from); }
/* The first n; the others are 0. Nothing beyond them is read or written. */
INLINE lanes_t load_first(const float *from, int64_t n) { return _mm512_maskz_loadu_ps(avx512_first(n), from); }
INLINE void store(float *to, lanes_t x) { _mm512_storeu_ps(to, x); }
INLINE void store_first(float *to, lanes_t x, int64_t n) { _mm512_mask_storeu_ps(to, avx512_first(n), x); }

INLINE lanes_t add(lanes_t a, lanes_t b) { return _mm512_add_ps(a, b); }
INLINE lanes_t sub(lanes_t a, lanes_t b) { return _mm512_sub_ps(a, b); }
INLINE lanes_t mul(lanes_t a, lanes_t b) { return _mm512_mul_ps(a, b); }
INLINE lanes_t quotient(lanes_t a, lanes_t b) { return _mm512_div_ps(a, b); }
INLINE lanes_t muladd(lanes_t a, lanes_t b, lanes_t c) { return _mm512_fmadd_ps(a, b, c); } /* a b + c */
INLINE lanes_t root(lanes_t a) { return _mm512_sqrt_ps(a); }
/* Of two the larger, or the smaller; b where one of them is NaN. */
INLINE lanes_t larger(lanes_t a, lanes_t b) { return _mm512_max_ps(a, b); }
INLINE lanes_t smaller(lanes_t a, lanes_t b) { return _mm512_min_ps(a, b); }
/* a < b ? x : y, lane by lane. */
INLINE lanes_t where_less(lanes_t a, lanes_t b, lanes_t x, lanes_t y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
INLINE lanes_t absolute(lanes_t a) { return _mm512_abs_ps(a); }
/* |a| with the sign of b. */
INLINE lanes_t signed_as(lanes_t a, lanes_t b) {
    return _mm512_or_ps(_mm512_abs_ps(a), _mm512_and_ps(b, _mm512_set1_ps(-0.0f)));
}
/* The nearest whole number, ties to the even one. */
INLINE lanes_t nearest(lanes_t a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* a 2^n for a whole n of -126 .. 127. */
INLINE lanes_t times_power(lanes_t a, lanes_t n) { return _mm512_scalef_ps(a, n); }
