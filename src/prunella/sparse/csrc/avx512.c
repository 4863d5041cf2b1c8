/* AVX-512 with VBMI2, whose vpexpandb/w put values in place by a mask, and VNNI; with BF16 where there is.
 *
 * The expansions always work from a register: from memory they are microcoded on AMD. Sums stay in registers for
 * tiles of 1, 2, 4 or 8 tokens; for more, a row is expanded again, from the cache.
 *
 * Quantized values are multiplied as integers. For every SPAN inputs the activations are scaled to 16 bits, far
 * finer than bfloat16 (an infinity or NaN makes the scale NaN, and so the result). vpdpbusd wants one operand
 * unsigned, so the weights q become q + bias (their sign bit flipped, which also turns a pruned 0 into a bias),
 * and the activations are split into signed bytes, x = 256 h + l. Then
 *
 *     sum q x = 256 sum (q + bias) h + sum (q + bias) l - sum bias x
 *
 * holds exactly, lane by lane; the last sum depends on the activations alone and is where the sums start.
 */
#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#include "internal.h"

#define NAME(x) plain_##x
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,fma,f16c,bmi2,popcnt")))
#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16,fma,f16c,bmi2,popcnt")))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

/* How many bytes ahead to fetch, since the processor's own prefetchers stop at the ends of pages: packed values AHEAD
 * into the first cache, for they come in uneven steps; what is read line by line FAR into the second, which has room
 * for more requests on their way. Beyond WIDE words in a row the activations leave the first cache, and loading them
 * again must not wait behind values on their way from memory: these go WIDE_FAR ahead into the second as well. */
enum { AHEAD = 4096, FAR = 3072, WIDE = 96, WIDE_AHEAD = 2048, WIDE_FAR = 16384 };

/* ------------------------------------------------------------------ 64 weights */

/* On Zen 4 an expansion waits for the old content of the register that it writes, though it replaces all of it:
 * a chain of five cycles from one expansion to the next. Clearing the register first, which costs nothing, breaks
 * the chain; a compiler that knows nothing of it would drop the clearing, hence the assembler. */
#define EXPAND(INSTRUCTION, MASK, FROM)                                                                            \
    __m512i out;                                                                                                   \
    __asm__("vpxorq %0, %0, %0\n\t" INSTRUCTION " %2, %0%{%1%}%{z%}" : "=&v"(out) : "Yk"(MASK), "v"(FROM));       \
    return out;

/* A mask comes straight from memory: by way of a general register it takes a slot of the vector units. */
#define LOAD_MASK(TYPE, INSTRUCTION, FROM)                                                                         \
    TYPE k;                                                                                                        \
    __asm__(INSTRUCTION " %1, %0" : "=Yk"(k) : "m"(*(const TYPE *)(FROM)));

/* Part h of a word of the mask: 32 weights of 16 bits. */
INLINE TARGET __m512i expand16(const uint64_t *mask, int h, const uint16_t *from) {
    LOAD_MASK(__mmask32, "kmovd", (const uint8_t *)mask + 4 * h)
    EXPAND("vpexpandw", k, _mm512_loadu_si512(from))
}

/* Part q of a word of the mask: 16 weights of 32 bits. */
INLINE TARGET __m512i expand32(const uint64_t *mask, int q, const float *from) {
    LOAD_MASK(__mmask16, "kmovw", (const uint8_t *)mask + 2 * q)
    EXPAND("vpexpandd", k, _mm512_loadu_si512(from))
}

INLINE TARGET __m512i expand8(const uint64_t *mask, __m512i from) {
    LOAD_MASK(__mmask64, "kmovq", mask)
    EXPAND("vpexpandb", k, from)
}

/* 64 bytes of q + bias, and bias where the mask is 0. */
INLINE TARGET __m512i expand_bytes(int32_t kind, const uint64_t *mask, const uint8_t *values, int64_t at) {
    if (kind == INT8) {
        __m512i q = expand8(mask, _mm512_loadu_si512(values + at));
        return _mm512_xor_si512(q, _mm512_set1_epi8((char)0x80));
    }
    /* Eight nibbles lie in five bytes: bring these into eight-byte lanes, and shift each nibble into its byte. */
#define LANE(A) A, A + 1, A + 2, A + 3, A + 4, A + 5, A + 6, A + 7
#define SHIFT(A) A, A + 4, A + 8, A + 12, A + 16, A + 20, A + 24, A + 28
#define EIGHT(X) X, X, X, X, X, X, X, X
    static const uint8_t lanes[64] __attribute__((aligned(64))) = {
        LANE(0), LANE(4), LANE(8), LANE(12), LANE(16), LANE(20), LANE(24), LANE(28)};
    static const uint8_t shifts[2][64] __attribute__((aligned(64))) = {{EIGHT(SHIFT(0))}, {EIGHT(SHIFT(4))}};
    __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(lanes), _mm512_loadu_si512(values + (at >> 1)));
    bytes = _mm512_multishift_epi64_epi8(_mm512_load_si512(shifts[at & 1]), bytes);
    __m512i nibbles = _mm512_and_si512(bytes, _mm512_set1_epi8(15));
    return _mm512_xor_si512(expand8(mask, nibbles), _mm512_set1_epi8(8));
}

/* 64 weights as float32 in their order, as rows.h wants them. */
TARGET static void plain_word(int32_t kind, uint64_t mask, const uint8_t *values, int64_t at, float *out) {
    if (kind == F32) {
        for (int i = 0; i < 4; i++) {
            _mm512_storeu_si512(out + 16 * i, expand32(&mask, i, (const float *)values + at));
            at += __builtin_popcountll(mask >> 16 * i & 0xffff);
        }
    } else if (kind == BF16 || kind == F16) {
        for (int i = 0; i < 2; i++) {
            __m512i v = expand16(&mask, i, (const uint16_t *)values + at);
            at += __builtin_popcountll(mask >> 32 * i & 0xffffffff);
            __m256i low = _mm512_castsi512_si256(v), high = _mm512_extracti64x4_epi64(v, 1);
            if (kind == F16) {
                _mm512_storeu_ps(out + 32 * i, _mm512_cvtph_ps(low));
                _mm512_storeu_ps(out + 32 * i + 16, _mm512_cvtph_ps(high));
            } else {
                _mm512_storeu_si512(out + 32 * i, _mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16));
                _mm512_storeu_si512(out + 32 * i + 16, _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
            }
        }
    } else {
        const int bias = kind == INT8 ? 128 : 8;
        uint8_t q[64];
        _mm512_storeu_si512(q, expand_bytes(kind, &mask, values, at));
        for (int i = 0; i < 64; i++) out[i] = (float)((int)q[i] - bias);
    }
}

TARGET static float plain_dot(const float *a, const float *b, int64_t n) {
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < n; i += 64)
        UNROLL for (int j = 0; j < 4; j++) sum[j] =
            _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16 * j), _mm512_loadu_ps(b + i + 16 * j), sum[j]);
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

TARGET static float plain_dot_bf16(const uint16_t *a, const float *b, int64_t n) {
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < n; i += 64)
        UNROLL for (int j = 0; j < 4; j++) {
            int64_t left = n - i - 16 * j;
            __mmask16 k = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
            __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, a + i + 16 * j));
            __m512 v = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
            sum[j] = _mm512_fmadd_ps(v, _mm512_maskz_loadu_ps(k, b + i + 16 * j), sum[j]);
        }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

#include "rows.h"

/* ------------------------------------------------------------------ activations */

/* How a tile of T tokens lies in memory: unit by unit, in each of them token by token; so a kernel finds all
 * tokens at constant distances. A unit, by the kind of the values and the processor, is
 *     F32, F16    64 float32
 *     BF16        64 bfloat16 for vdpbf16ps (if `bf16`), else 64 float32, of every 32 first the even ones
 *     INT8, INT4  SPAN inputs: h (SPAN bytes), l (SPAN bytes), where the sums start (16 int32)
 * and for INT8 and INT4 the scales follow, 16 spans by 16 spans. */
enum { UNIT = 2 * SPAN + 64 };

INLINE int64_t spans(const weight_t *w) { return (w->columns + SPAN - 1) / SPAN; }

static int64_t size_of_token(const weight_t *w, int bf16) {
    if (w->kind >= INT8) return spans(w) * UNIT + (spans(w) + 15) / 16 * 64;
    return w->words * 64 * (w->kind == BF16 && bf16 ? 2 : 4);
}

TARGET static void prepare_integers(
    const weight_t *w, const void *x, int32_t x_kind, uint8_t *tile, int64_t T, int64_t t) {
    float *scales = (float *)(tile + T * spans(w) * UNIT);
    const __m512i bias = _mm512_set1_epi8((char)(w->kind == INT8 ? 128 : 8));
    for (int64_t s = 0; s < (spans(w) + 15) / 16 * 16; s++) {
        float *scale = scales + s / 16 * 16 * T + 16 * t + s % 16;
        *scale = 0;
        if (s >= spans(w)) continue;
        float part[SPAN];
        const int64_t count = w->columns - s * SPAN < SPAN ? w->columns - s * SPAN : SPAN;
        if (x_kind == BF16)
            for (int64_t i = 0; i < count; i++) part[i] = from_bf16(((const uint16_t *)x)[s * SPAN + i]);
        else
            for (int64_t i = 0; i < count; i++) part[i] = load_float(x, x_kind, s * SPAN + i);
        for (int64_t i = count; i < SPAN; i++) part[i] = 0;
        __m512i most = _mm512_setzero_si512(); /* of the bits without the sign, which order as numbers do */
        for (int i = 0; i < SPAN; i += 16)
            most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(part + i), _mm512_set1_epi32(0x7fffffff)));
        const float largest = bits_float(_mm512_reduce_max_epu32(most));
        /* 32512 = 127 * 256: h never needs a 128. A scale below the smallest normal number is not inverted. */
        const float step = largest / 32512;
        const int finite = float_bits(largest) < 0x7f800000;
        const __m512 inverse = _mm512_set1_ps(finite && step > 0x1p-126f ? 1 / step : 0);
        *scale = finite ? step : largest * 0;
        uint8_t *unit = tile + (s * T + t) * UNIT;
        for (int i = 0; i < SPAN; i += 16) {
            const __m512 v = finite ? _mm512_loadu_ps(part + i) : _mm512_setzero_ps();
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse));
            const __m512i l = _mm512_srai_epi32(_mm512_slli_epi32(q, 24), 24);
            const __m512i h = _mm512_srai_epi32(_mm512_sub_epi32(q, l), 8);
            _mm_storeu_si128((__m128i *)(unit + i), _mm512_cvtepi32_epi8(h));
            _mm_storeu_si128((__m128i *)(unit + SPAN + i), _mm512_cvtepi32_epi8(l));
        }
        __m512i high = _mm512_setzero_si512(), low = high;
        for (int i = 0; i < SPAN; i += 64) {
            high = _mm512_dpbusd_epi32(high, bias, _mm512_loadu_si512(unit + i));
            low = _mm512_dpbusd_epi32(low, bias, _mm512_loadu_si512(unit + SPAN + i));
        }
        const __m512i all = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
        _mm512_storeu_si512(unit + 2 * SPAN, _mm512_sub_epi32(_mm512_setzero_si512(), all));
    }
}

TARGET static void prepare_floats(
    const weight_t *w, const void *x, int32_t x_kind, uint8_t *tile, int64_t T, int64_t t, int bf16) {
    const int bytes = w->kind == BF16 && bf16 ? 2 : 4;
    for (int64_t j = 0; j < w->words; j++) {
        uint8_t *unit = tile + (j * T + t) * 64 * bytes;
        const int64_t count = w->columns - 64 * j < 64 ? w->columns - 64 * j : 64;
        if (count < 64) memset(unit, 0, (size_t)(64 * bytes));
        if (bytes == 2 && x_kind == BF16) {
            memcpy(unit, (const uint16_t *)x + 64 * j, (size_t)count * 2);
            continue;
        }
        for (int64_t i = 0; i < count; i++) {
            const float value = load_float(x, x_kind, 64 * j + i);
            if (bytes == 2)
                ((uint16_t *)unit)[i] = to_bf16(value);
            else
                ((float *)unit)[w->kind == BF16 ? i / 32 * 32 + i % 2 * 16 + i % 32 / 2 : i] = value;
        }
    }
}

/* ------------------------------------------------------------------ products */

/* The products go by tiles of R rows and T tokens with R * T sums in registers: one load of the activations
 * serves R rows, one expansion serves T tokens. (For one token R is 1: memory is read fastest in one stream.)
 * R, T, kind and `careful` are constants wherever these functions are inlined. Only a careful tile, one row high,
 * keeps its place inside of the values after every word; the others are for rows that begin so far from the end that
 * no mask could lead them out. */
enum { ROWS = 4 };

INLINE int64_t step(const weight_t *w, int64_t at, uint64_t word, const int careful) {
    return careful ? advance(w, at, word) : at + __builtin_popcountll(word);
}

INLINE int near_end(const weight_t *w, int64_t r, const int R) {
    int64_t last = 0;
    for (int a = 0; a < R; a++) last = row_begin(w, r + a) > last ? row_begin(w, r + a) : last;
    return last + w->words * 64 > w->count;
}

/* How many bytes ahead of a row's place to fetch. Where one row at a time is read, memory is read in one stream;
 * with several, what each reads next lies in the next tile. */
INLINE int64_t fetch_ahead(const weight_t *w, int64_t r, const int R) {
    if (R == 1) return w->words > WIDE ? WIDE_AHEAD : AHEAD;
    return r + R < w->rows ? (row_begin(w, r + R) - row_begin(w, r)) * element_bits(w->kind) / 8 : 0;
}

INLINE void fetch(const void *from, int64_t ahead, const int wide) {
    _mm_prefetch((const char *)from + ahead, _MM_HINT_T0);
    if (wide) _mm_prefetch((const char *)from + WIDE_FAR, _MM_HINT_T1);
}

INLINE TARGET void store_tile(
    const job_t *job, int64_t r, int64_t t, const int R, const int T, __m512 (*sum)[TOKENS]) {
    UNROLL for (int a = 0; a < R; a++) UNROLL for (int i = 0; i < T; i++)
        if (t + i < job->tokens)
            store_float(job->y, job->y_kind, (t + i) * job->w.rows + r + a, _mm512_reduce_add_ps(sum[a][i]));
}

/* Float values. Few tokens get P sums each, which take turns (over U words): a product waits four to six cycles
 * for the one before it in the same sum. The product of two vectors of bfloat16 is a macro, since it needs its own
 * target. */
#define FLOAT_TILE(BF16_INSTRUCTION, PRODUCT_OF_BF16)                                                              \
    const weight_t *w = &job->w;                                                                                   \
    const uint64_t *mask = w->mask + r * w->words;                                                                 \
    const int P = T == 1 ? 4 : T < TOKENS ? 2 : 1, U = P == 4 ? 4 : 1;                                             \
    const int64_t unit = kind == BF16 && BF16_INSTRUCTION ? 128 : 256;                                             \
    const uint8_t *x = (const uint8_t *)job->x + t * job->stride;                                                  \
    const int64_t ahead = fetch_ahead(w, r, R);                                                                    \
    const int wide = R == 1 && w->words > WIDE;                                                                    \
    int64_t at[ROWS];                                                                                              \
    __m512 sum[ROWS][TOKENS];                                                                                      \
    UNROLL for (int a = 0; a < R; a++) {                                                                           \
        at[a] = row_begin(w, r + a);                                                                               \
        UNROLL for (int i = 0; i < T * P; i++) sum[a][i] = _mm512_setzero_ps();                                    \
    }                                                                                                              \
    for (int64_t k = 0; k < w->words; k += U) UNROLL for (int u = 0; u < U; u++) {                                 \
        const int64_t j = k + u;                                                                                   \
        if (u && j == w->words) break;                                                                             \
        UNROLL for (int a = 0; a < R; a++) {                                                                       \
            const uint64_t *here = mask + a * w->words + j, m = *here;                                             \
            if (kind == F32) {                                                                                     \
                const float *from = (const float *)w->values + at[a];                                              \
                fetch(from, ahead, wide);                                                                          \
                _mm_prefetch((const char *)from + ahead + 64, _MM_HINT_T0);                                        \
                UNROLL for (int q = 0; q < 4; q++) {                                                               \
                    const uint64_t before = m & (((uint64_t)1 << 16 * q) - 1);                                     \
                    const __m512i v = expand32(here, q, from + __builtin_popcountll(before));                      \
                    UNROLL for (int i = 0; i < T; i++) {                                                           \
                        const __m512 xi = _mm512_loadu_ps(x + i * unit + 64 * q);                                  \
                        const int to = i + T * (q % P);                                                        \
                        sum[a][to] = _mm512_fmadd_ps(_mm512_castsi512_ps(v), xi, sum[a][to]);                      \
                    }                                                                                              \
                }                                                                                                  \
            } else {                                                                                               \
                const uint16_t *from = (const uint16_t *)w->values + at[a];                                        \
                fetch(from, ahead, wide);                                                                          \
                UNROLL for (int h = 0; h < 2; h++) {                                                               \
                    const uint64_t before = h ? m & 0xffffffff : 0;                                                \
                    const __m512i v = expand16(here, h, from + __builtin_popcountll(before));                      \
                    if (kind == BF16 && BF16_INSTRUCTION) {                                                        \
                        UNROLL for (int i = 0; i < T; i++) {                                                       \
                            const __m512i xi = _mm512_loadu_si512(x + i * unit + 64 * h);                          \
                            const int to = i + T * ((2 * u + h) % P);                                              \
                            PRODUCT_OF_BF16;                                                                       \
                        }                                                                                          \
                    } else {                                                                                       \
                        __m512 even, odd;                                                                          \
                        if (kind == BF16) {                                                                        \
                            even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));                                  \
                            odd = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)));    \
                        } else { /* the first and the last sixteen */                                              \
                            even = _mm512_cvtph_ps(_mm512_castsi512_si256(v));                                     \
                            odd = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1));                                \
                        }                                                                                          \
                        UNROLL for (int i = 0; i < T; i++) {                                                       \
                            const uint8_t *xi = x + i * unit + 128 * h;                                            \
                            const int to = i + T * (2 * h % P), next = i + T * ((2 * h + 1) % P);                  \
                            sum[a][to] = _mm512_fmadd_ps(even, _mm512_loadu_ps(xi), sum[a][to]);                   \
                            sum[a][next] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(xi + 64), sum[a][next]);           \
                        }                                                                                          \
                    }                                                                                              \
                }                                                                                                  \
            }                                                                                                      \
            at[a] = step(w, at[a], m, careful);                                                                    \
        }                                                                                                          \
        x += T * unit;                                                                                             \
    }                                                                                                              \
    UNROLL for (int a = 0; a < R; a++) UNROLL for (int i = T; i < T * P; i++)                                      \
        sum[a][i % T] = _mm512_add_ps(sum[a][i % T], sum[a][i]);                                                   \
    store_tile(job, r, t, R, T, sum);

INLINE TARGET void float_tile(
    const job_t *job, int64_t r, int64_t t, const int R, const int T, const int careful, const int32_t kind) {
    FLOAT_TILE(0, (void)xi; (void)to)
}

INLINE TARGET_BF16 void bf16_tile(
    const job_t *job, int64_t r, int64_t t, const int R, const int T, const int careful, const int32_t kind) {
    FLOAT_TILE(1, sum[a][to] = _mm512_dpbf16_ps(sum[a][to], (__m512bh)v, (__m512bh)xi))
}

/* The scales of 16 spans of a row from span b on, as far as there are so many. */
INLINE TARGET __m512 sixteen_scales(const weight_t *w, int64_t r, int64_t b, int64_t blocks) {
    const uint16_t *row = w->scales + r * w->groups;
    if (w->groups == 1) return _mm512_set1_ps(from_bf16(row[0]));
    if (w->group == SPAN) {
        const __mmask16 k = blocks - b >= 16 ? 0xffff : (__mmask16)((1u << (blocks - b)) - 1);
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, row + b));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    float part[16];
    for (int64_t i = 0; i < 16; i++) part[i] = b + i < blocks ? from_bf16(row[(b + i) * SPAN / w->group]) : 0;
    return _mm512_loadu_ps(part);
}

/* SPAN inputs (or, if `half`, the 64 of an odd last word) of R rows and T tokens. `left`: columns from here on. */
INLINE TARGET void integer_span(
    const weight_t *w, const uint64_t *mask, const uint8_t *x, int64_t *at, float (*scales)[16], int64_t s,
    int64_t ahead, const int wide, __m512 (*sum)[TOKENS], int64_t left, const int R, const int T, const int careful,
    const int32_t kind, const int dense, const int half) {
    __m512i high[ROWS][TOKENS], low[ROWS][TOKENS];
    UNROLL for (int i = 0; i < T; i++) {
        const __m512i start = _mm512_loadu_si512(x + i * UNIT + 2 * SPAN);
        UNROLL for (int a = 0; a < R; a++) high[a][i] = _mm512_setzero_si512(), low[a][i] = start;
    }
    UNROLL for (int h = 0; h < 2; h++) {
        UNROLL for (int a = 0; a < R; a++) {
            if (half && h) break;
            __m512i q;
            if (dense) {
                const uint8_t *from = w->values + at[a] + 64 * h;
                _mm_prefetch((const char *)from + FAR, _MM_HINT_T1);
                const int64_t columns = left - 64 * h; /* of this word */
                const __mmask64 k = columns >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << columns) - 1;
                q = left >= SPAN ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(k, from);
                q = _mm512_xor_si512(q, _mm512_set1_epi8((char)0x80));
                if (h) at[a] += SPAN;
            } else {
                const uint64_t *here = mask + a * w->words + h;
                const uint8_t *from = w->values + (kind == INT8 ? at[a] : at[a] >> 1);
                if (h == 0) fetch(from, ahead, wide);
                q = expand_bytes(kind, here, w->values, at[a]);
                at[a] = step(w, at[a], *here, careful);
            }
            UNROLL for (int i = 0; i < T; i++) {
                const uint8_t *xi = x + i * UNIT + 64 * h;
                high[a][i] = _mm512_dpbusd_epi32(high[a][i], q, _mm512_loadu_si512(xi));
                low[a][i] = _mm512_dpbusd_epi32(low[a][i], q, _mm512_loadu_si512(xi + SPAN));
            }
        }
    }
    UNROLL for (int a = 0; a < R; a++) UNROLL for (int i = 0; i < T; i++) {
        const __m512i total = _mm512_add_epi32(_mm512_slli_epi32(high[a][i], 8), low[a][i]);
        const __m512 scale = _mm512_set1_ps(scales[a * T + i][s]);
        sum[a][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scale, sum[a][i]);
    }
}

/* 8- or 4-bit values. `dense`: none is left out. */
INLINE TARGET void integer_tile(
    const job_t *job, int64_t r, int64_t t, const int R, const int T, const int careful, const int32_t kind,
    const int dense) {
    const weight_t *w = &job->w;
    const uint8_t *x = (const uint8_t *)job->x + t * job->stride;
    const uint64_t *mask = dense ? NULL : w->mask + r * w->words;
    const int64_t blocks = spans(w), whole = w->words / 2;
    const float *x_scales = (const float *)(x + T * blocks * UNIT);
    const int64_t ahead = dense ? 0 : fetch_ahead(w, r, R);
    const int wide = R == 1 && w->words > WIDE;
    int64_t at[ROWS];
    __m512 sum[ROWS][TOKENS];
    UNROLL for (int a = 0; a < R; a++) {
        at[a] = row_begin(w, r + a);
        UNROLL for (int i = 0; i < T; i++) sum[a][i] = _mm512_setzero_ps();
    }
    for (int64_t b = 0; b < blocks; b += 16) {
        /* scale of the weights times scale of the activations, for each span, row and token */
        float scales[ROWS * TOKENS][16] __attribute__((aligned(64)));
        UNROLL for (int a = 0; a < R; a++) {
            const __m512 of_row = sixteen_scales(w, r + a, b, blocks);
            UNROLL for (int i = 0; i < T; i++)
                _mm512_store_ps(scales[a * T + i], _mm512_mul_ps(of_row, _mm512_loadu_ps(x_scales + 16 * i)));
        }
        x_scales += 16 * T;
        const int64_t end = b + 16 < whole ? 16 : whole - b;
        int64_t left = w->columns - b * SPAN;
        for (int64_t s = 0; s < end; s++, x += T * UNIT, left -= SPAN) {
            integer_span(w, mask, x, at, scales, s, ahead, wide, sum, left, R, T, careful, kind, dense, 0);
            if (!dense) mask += 2;
        }
        if (end < 16 && whole < blocks)
            integer_span(w, mask, x, at, scales, end, ahead, wide, sum, left, R, T, careful, kind, dense, 1);
    }
    store_tile(job, r, t, R, T, sum);
}

#define PASS(TILE, R, T, ...)                                                                                      \
    for (; r < last;) {                                                                                            \
        if (r + R <= last && !near_end(w, r, R)) {                                                                 \
            TILE(job, r, t, R, T, 0, __VA_ARGS__);                                                                 \
            r += R;                                                                                                \
        } else {                                                                                                   \
            TILE(job, r, t, 1, T, 1, __VA_ARGS__);                                                                 \
            r++;                                                                                                   \
        }                                                                                                          \
    }

/* R1 rows at a time for tiles of one token, R2 for two, R4 for four and R8 for eight. */
#define ALL_TILES(TILE, R1, R2, R4, R8, ...)                                                                       \
    const weight_t *w = &job->w;                                                                                   \
    for (int64_t t = 0; t < job->tokens; t += TOKENS) {                                                            \
        int64_t r = first;                                                                                         \
        switch (tile_of(job->tokens - t)) {                                                                        \
            case 1: PASS(TILE, R1, 1, __VA_ARGS__) break;                                                          \
            case 2: PASS(TILE, R2, 2, __VA_ARGS__) break;                                                          \
            case 4: PASS(TILE, R4, 4, __VA_ARGS__) break;                                                          \
            default: PASS(TILE, R8, 8, __VA_ARGS__)                                                                \
        }                                                                                                          \
    }

TARGET static void f32_product(const job_t *job, int64_t first, int64_t last) {
    ALL_TILES(float_tile, 1, 2, 2, 2, F32)
}
TARGET static void f16_product(const job_t *job, int64_t first, int64_t last) {
    ALL_TILES(float_tile, 1, 2, 2, 2, F16)
}
TARGET static void shift_product(const job_t *job, int64_t first, int64_t last) {
    ALL_TILES(float_tile, 1, 2, 2, 2, BF16)
}
TARGET_BF16 static void bf16_product(const job_t *job, int64_t first, int64_t last) {
    ALL_TILES(bf16_tile, 1, 2, 2, 2, BF16)
}
TARGET static void int8_product(const job_t *job, int64_t first, int64_t last) {
    ALL_TILES(integer_tile, 1, 2, 2, 1, INT8, 0)
}
TARGET static void rounded_product(const job_t *job, int64_t first, int64_t last) {
    ALL_TILES(integer_tile, 1, 2, 2, 1, INT8, 1)
}
TARGET static void int4_product(const job_t *job, int64_t first, int64_t last) {
    ALL_TILES(integer_tile, 1, 4, 2, 1, INT4, 0)
}

static void avx512_product(const job_t *job, int64_t first, int64_t last, uint8_t *scratch) {
    (void)scratch;
    switch (job->w.kind) {
        case F32: f32_product(job, first, last); break;
        case F16: f16_product(job, first, last); break;
        case BF16: shift_product(job, first, last); break;
        case INT8: (job->w.mask ? int8_product : rounded_product)(job, first, last); break;
        default: int4_product(job, first, last);
    }
}

static void avx512bf16_product(const job_t *job, int64_t first, int64_t last, uint8_t *scratch) {
    if (job->w.kind == BF16)
        bf16_product(job, first, last);
    else
        avx512_product(job, first, last, scratch);
}

static int64_t avx512_prepared_size(const weight_t *w) { return size_of_token(w, 0); }
static int64_t avx512bf16_prepared_size(const weight_t *w) { return size_of_token(w, 1); }

static void avx512_prepare(const weight_t *w, const void *x, int32_t x_kind, uint8_t *tile, int64_t T, int64_t t) {
    if (w->kind >= INT8)
        prepare_integers(w, x, x_kind, tile, T, t);
    else
        prepare_floats(w, x, x_kind, tile, T, t, 0);
}

static void avx512bf16_prepare(
    const weight_t *w, const void *x, int32_t x_kind, uint8_t *tile, int64_t T, int64_t t) {
    if (w->kind >= INT8)
        prepare_integers(w, x, x_kind, tile, T, t);
    else
        prepare_floats(w, x, x_kind, tile, T, t, 1);
}

/* ------------------------------------------------------------------ expansion */

TARGET static void avx512_expand(const job_t *job, int64_t first, int64_t last, uint8_t *scratch) {
    const weight_t *w = &job->w;
    if (w->kind != job->y_kind || (w->kind != BF16 && w->kind != F16)) {
        plain_expand(job, first, last, scratch);
        return;
    }
    for (int64_t r = first; r < last; r++) { /* 16-bit values as they are */
        const uint64_t *mask = w->mask + r * w->words;
        uint16_t *y = (uint16_t *)job->y + (r - job->first) * w->columns;
        int64_t at = row_begin(w, r);
        for (int64_t j = 0; j < w->words; j++) {
            const uint64_t m = mask[j];
            const uint16_t *from = (const uint16_t *)w->values + at;
            _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
            const int64_t left = w->columns - 64 * j;
            const uint64_t keep = left >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << left) - 1;
            _mm512_mask_storeu_epi16(y + 64 * j, (__mmask32)keep, expand16(mask + j, 0, from));
            if (left > 32)
                _mm512_mask_storeu_epi16(y + 64 * j + 32, (__mmask32)(keep >> 32),
                                         expand16(mask + j, 1, from + __builtin_popcountll(m & 0xffffffff)));
            at = advance(w, at, m);
        }
    }
}

/* ------------------------------------------------------------------ dense bfloat16 */

static int64_t dense16_prepared_size(int64_t columns) { return (columns + 31) / 32 * 64; }

static void dense16_prepare(int64_t columns, const void *x, int32_t x_kind, void *out) {
    uint16_t *to = out;
    for (int64_t i = 0; i < (columns + 31) / 32 * 32; i++)
        to[i] = i >= columns ? 0 : x_kind == BF16 ? ((const uint16_t *)x)[i] : to_bf16(load_float(x, x_kind, i));
}

TARGET_BF16 static void dense16(const job_t *job, int64_t first, int64_t last) {
    const weight_t *w = &job->w;
    const int64_t whole = w->columns / 256 * 256;
    for (int64_t r = first; r < last; r++) {
        const uint16_t *row = (const uint16_t *)w->values + r * w->columns;
        for (int64_t t = 0; t < job->tokens; t++) {
            const uint16_t *x = (const uint16_t *)((const uint8_t *)job->x + t * job->stride);
            __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int64_t i = 0; i < whole; i += 256)
                UNROLL for (int j = 0; j < 8; j++) { /* four sums: the instruction takes six cycles */
                    _mm_prefetch((const char *)(row + i + 32 * j) + FAR, _MM_HINT_T1);
                    const __m512i v = _mm512_loadu_si512(row + i + 32 * j), xi = _mm512_loadu_si512(x + i + 32 * j);
                    sum[j % 4] = _mm512_dpbf16_ps(sum[j % 4], (__m512bh)v, (__m512bh)xi);
                }
            for (int64_t i = whole; i < w->columns; i += 32) {
                const int64_t left = w->columns - i;
                const __mmask32 k = left >= 32 ? 0xffffffff : (1u << left) - 1;
                const __m512i v = _mm512_maskz_loadu_epi16(k, row + i), xi = _mm512_loadu_si512(x + i);
                sum[0] = _mm512_dpbf16_ps(sum[0], (__m512bh)v, (__m512bh)xi);
            }
            sum[0] = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
            store_float(job->y, job->y_kind, t * w->rows + r, _mm512_reduce_add_ps(sum[0]));
        }
    }
}

TARGET static uint64_t avx512_sum(const uint8_t *data, int64_t bytes) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (int64_t i = 0; i + 256 <= bytes; i += 256) {
        for (int j = 0; j < 256; j += 64) _mm_prefetch((const char *)data + i + j + FAR, _MM_HINT_T1);
        a = _mm512_add_epi64(a, _mm512_loadu_si512(data + i));
        b = _mm512_add_epi64(b, _mm512_loadu_si512(data + i + 64));
        c = _mm512_add_epi64(c, _mm512_loadu_si512(data + i + 128));
        d = _mm512_add_epi64(d, _mm512_loadu_si512(data + i + 192));
    }
    return (uint64_t)_mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_add_epi64(a, b), _mm512_add_epi64(c, d)));
}

static int avx512_available(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

static int avx512bf16_available(void) { return avx512_available() && __builtin_cpu_supports("avx512bf16"); }

const isa_t prunella_avx512 = {
    .name = "avx512",
    .available = avx512_available,
    .tiles = 1,
    .prepared_size = avx512_prepared_size,
    .prepare = avx512_prepare,
    .product = avx512_product,
    .expand = avx512_expand,
    .dense_prepared_size = plain_dense_prepared_size,
    .dense_prepare = plain_dense_prepare,
    .dense = plain_dense,
    .attend = plain_attend,
    .norm = plain_norm,
    .gated = plain_gated,
    .sum = avx512_sum,
    .steps = avx512_steps,
};

const isa_t prunella_avx512bf16 = {
    .name = "avx512bf16",
    .available = avx512bf16_available,
    .tiles = 1,
    .prepared_size = avx512bf16_prepared_size,
    .prepare = avx512bf16_prepare,
    .product = avx512bf16_product,
    .expand = avx512_expand,
    .dense_prepared_size = dense16_prepared_size,
    .dense_prepare = dense16_prepare,
    .dense = dense16,
    .attend = plain_attend,
    .norm = plain_norm,
    .gated = plain_gated,
    .sum = avx512_sum,
    .steps = avx512_steps,
};

#endif
