/* A vector of floats in plain C, four lanes by the vectors of GCC and Clang (on ARM they become NEON's): see
 * lanes_avx512.h. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define NAME(x) portable_##x
#define TARGET
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 4, REGISTERS = 16 };
typedef float lanes_t __attribute__((vector_size(16)));
typedef int32_t portable_bits_t __attribute__((vector_size(16)));

INLINE lanes_t all(float x) { return (lanes_t){x, x, x, x}; }
INLINE lanes_t load(const float *from) {
    lanes_t x;
    memcpy(&x, from, sizeof x);
    return x;
}
INLINE lanes_t load_first(const float *from, int64_t n) {
    lanes_t x = {0};
    memcpy(&x, from, sizeof(float) * (size_t)(n < LANES ? n : LANES));
    return x;
}
INLINE void store(float *to, lanes_t x) { memcpy(to, &x, sizeof x); }
INLINE void store_first(float *to, lanes_t x, int64_t n) {
    memcpy(to, &x, sizeof(float) * (size_t)(n < LANES ? n : LANES));
}

INLINE lanes_t add(lanes_t a, lanes_t b) { return a + b; }
INLINE lanes_t sub(lanes_t a, lanes_t b) { return a - b; }
INLINE lanes_t mul(lanes_t a, lanes_t b) { return a * b; }
INLINE lanes_t quotient(lanes_t a, lanes_t b) { return a / b; }
INLINE lanes_t muladd(lanes_t a, lanes_t b, lanes_t c) { return a * b + c; }
INLINE lanes_t root(lanes_t a) {
    for (int i = 0; i < LANES; i++) a[i] = sqrtf(a[i]);
    return a;
}
INLINE lanes_t portable_where(portable_bits_t which, lanes_t x, lanes_t y) {
    return (lanes_t)((which & (portable_bits_t)x) | (~which & (portable_bits_t)y));
}
INLINE lanes_t larger(lanes_t a, lanes_t b) { return portable_where(a > b, a, b); }
INLINE lanes_t smaller(lanes_t a, lanes_t b) { return portable_where(a < b, a, b); }
INLINE lanes_t where_less(lanes_t a, lanes_t b, lanes_t x, lanes_t y) { return portable_where(a < b, x, y); }
INLINE lanes_t absolute(lanes_t a) { return (lanes_t)((portable_bits_t)a & 0x7fffffff); }
INLINE lanes_t signed_as(lanes_t a, lanes_t b) {
    return (lanes_t)(((portable_bits_t)a & 0x7fffffff) | ((portable_bits_t)b & ~0x7fffffff));
}
INLINE lanes_t nearest(lanes_t a) {
    for (int i = 0; i < LANES; i++) a[i] = nearbyintf(a[i]);
    return a;
}
INLINE lanes_t times_power(lanes_t a, lanes_t n) {
    return a * (lanes_t)((__builtin_convertvector(n, portable_bits_t) + 127) << 23);
}

INLINE lanes_t largest(lanes_t a, lanes_t b) { return portable_where((a > b) | (a != a), a, b); }
INLINE float sum_of(lanes_t a) { return (a[0] + a[2]) + (a[1] + a[3]); }
INLINE void store_part(float *to, lanes_t x, int64_t first, int64_t n) {
    memcpy(to + first, (const float *)&x + first, sizeof(float) * (size_t)n);
}
INLINE lanes_t load_part(const float *from, int64_t first, int64_t n) {
    lanes_t x = {0};
    memcpy((float *)&x + first, from + first, sizeof(float) * (size_t)n);
    return x;
}
INLINE lanes_t evens(lanes_t a, lanes_t b) { return (lanes_t){a[0], a[2], b[0], b[2]}; }
INLINE lanes_t odds(lanes_t a, lanes_t b) { return (lanes_t){a[1], a[3], b[1], b[3]}; }
INLINE lanes_t load_16(const uint16_t *from, int bfloat) {
    lanes_t x;
    for (int i = 0; i < LANES; i++) x[i] = bfloat ? from_bf16(from[i]) : from_f16(from[i]);
    return x;
}
INLINE void transpose(lanes_t *x) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) {
            const float kept = x[i][j];
            x[i][j] = x[j][i];
            x[j][i] = kept;
        }
}
