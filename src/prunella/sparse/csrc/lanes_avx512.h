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

/* Of two the larger; NaN where one of them is. */
INLINE lanes_t largest(lanes_t a, lanes_t b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_max_ps(a, b), a);
}
INLINE float sum_of(lanes_t a) { return _mm512_reduce_add_ps(a); }
/* Lanes first .. first + n - 1 to the same places behind `to`, which need not be memory before `first`. */
INLINE void store_part(float *to, lanes_t x, int64_t first, int64_t n) {
    _mm512_mask_storeu_ps(to, (__mmask16)(((1u << n) - 1) << first), x);
}
/* The same, read; the other lanes are 0. */
INLINE lanes_t load_part(const float *from, int64_t first, int64_t n) {
    return _mm512_maskz_loadu_ps((__mmask16)(((1u << n) - 1) << first), from);
}
/* Some of the lanes: those from `first` on, n of them, as far as there are such. */
#define HAS_MASKS 1
typedef __mmask16 mask_t;
INLINE mask_t mask_of(int64_t first, int64_t n) {
    const int64_t begin = first > 0 ? first : 0, end = first + n < LANES ? first + n : LANES;
    return end > begin ? (mask_t)((0xffffu << begin) & (0xffffu >> (LANES - end))) : 0;
}
/* Lanes that are not masked are 0, and not read. */
INLINE lanes_t load_mask(const float *from, mask_t mask) { return _mm512_maskz_loadu_ps(mask, from); }
/* y where it is masked, else x. */
INLINE lanes_t blend(mask_t mask, lanes_t x, lanes_t y) { return _mm512_mask_blend_ps(mask, x, y); }
/* Lane i is lane i + n of x, or 0 where there is none. */
typedef struct {
    __m512i index;
    mask_t mask;
} shift_t;
INLINE shift_t shift_by(int64_t n) {
    const __m512i from = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (shift_t){_mm512_add_epi32(from, _mm512_set1_epi32((int)n)), mask_of(-n, LANES)};
}
INLINE lanes_t shifted(shift_t s, lanes_t x) { return _mm512_maskz_permutexvar_ps(s.mask, s.index, x); }
/* x from lane n on, and then c from lane `at` on, every second one. */
typedef __m512i join_t;
INLINE join_t join_by(int n, int at) {
    int index[16];
    for (int i = 0; i < 16; i++) index[i] = i + n < 16 ? i + n : 16 + at + 2 * (i + n - 16);
    return _mm512_loadu_si512(index);
}
INLINE lanes_t joined(join_t join, lanes_t x, lanes_t c) { return _mm512_permutex2var_ps(x, join, c); }
/* Of the 2 LANES numbers a, b those with an even, or odd, index. */
INLINE lanes_t evens(lanes_t a, lanes_t b) {
    const __m512i index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(a, index, b);
}
INLINE lanes_t odds(lanes_t a, lanes_t b) {
    const __m512i index = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_permutex2var_ps(a, index, b);
}
/* LANES numbers of 16 bits, bfloat16 or float16. */
INLINE lanes_t load_16(const uint16_t *from, int bfloat) {
    const __m256i h = _mm256_loadu_si256((const __m256i *)from);
    return bfloat ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)) : _mm512_cvtph_ps(h);
}
/* x[i][j] <-> x[j][i]. */
INLINE void transpose(lanes_t *x) {
    lanes_t t[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        const __m512 a = _mm512_unpacklo_ps(x[i], x[i + 1]), b = _mm512_unpackhi_ps(x[i], x[i + 1]);
        const __m512 c = _mm512_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm512_unpackhi_ps(x[i + 2], x[i + 3]);
        t[i] = _mm512_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* t[4 k + i]: columns i, 4 + i, 8 + i, 12 + i of rows 4 k .. 4 k + 3 */
        const __m512 a = _mm512_shuffle_f32x4(t[i], t[4 + i], 0x88), b = _mm512_shuffle_f32x4(t[i], t[4 + i], 0xdd);
        const __m512 c = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0x88);
        const __m512 d = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0xdd);
        x[i] = _mm512_shuffle_f32x4(a, c, 0x88);
        x[8 + i] = _mm512_shuffle_f32x4(a, c, 0xdd);
        x[4 + i] = _mm512_shuffle_f32x4(b, d, 0x88);
        x[12 + i] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}
