/* What the instruction sets share: how a packed weight lies in memory, and the table of functions that each
 * of them fills. docs/format.md specifies the layout. */
#ifndef PRUNELLA_INTERNAL_H
#define PRUNELLA_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "steps.h"

enum { F32, BF16, F16, INT8, INT4 };

/* Values that may be read past the last one: the format pads with as many zeros. */
enum { PAD = 128 };
/* Inputs that share one scale of the activations where the product is made in integers. */
enum { SPAN = 128 };
/* Tokens whose sums are kept in registers at once. */
enum { TOKENS = 8 };

typedef struct {
    int32_t kind;
    int64_t rows, columns, words; /* words: 64-bit words in a row of the mask */
    const uint64_t *mask;         /* rows x words; NULL: every weight is kept, INT8 only */
    const int32_t *offsets;       /* rows + 1; NULL where mask is */
    const uint8_t *values;        /* count + PAD of them; without a mask rows x columns and no more */
    int64_t count;
    const uint16_t *scales; /* bfloat16, rows x groups; NULL for floating-point values */
    int64_t group, groups;  /* inputs to a scale, a multiple of SPAN; scales to a row */
} weight_t;

typedef struct {
    weight_t w;
    const void *x; /* as `prepare` left it: whole tiles of tokens */
    void *y;       /* tokens x rows */
    int64_t tokens, stride; /* stride: bytes that a token takes in x */
    int32_t y_kind;
    int64_t first; /* expand: the first row of the output */
    uint8_t *scratch;
    int64_t scratch_size; /* a thread's share */
} job_t;

/* Attention of one new token over all that are cached, bfloat16 throughout, the last dimension contiguous. */
typedef struct {
    const uint16_t *q, *k, *v; /* q (batch, heads, dim), k and v (batch, kv_heads, tokens, dim) */
    uint16_t *out;             /* (batch, heads, dim), contiguous */
    int64_t batch, heads, kv_heads, tokens, dim;
    int64_t q_stride[2], k_stride[3], v_stride[3]; /* of batch, head and token */
    float scale;
    float *scratch; /* a thread's share: scratch_size */
    int64_t scratch_size;
} attend_t;

typedef struct {
    const char *name;
    int (*available)(void);
    /* Activations are prepared in tiles of 1, 2, 4 or 8 tokens (where `tiles`; else one by one): how many bytes
     * a token takes, and how token i of T goes into the memory of its tile. */
    int tiles;
    int64_t (*prepared_size)(const weight_t *);
    void (*prepare)(const weight_t *, const void *x, int32_t x_kind, uint8_t *tile, int64_t T, int64_t i);
    /* Rows [first, last) of y = x W^T, for all tokens. */
    void (*product)(const job_t *, int64_t first, int64_t last, uint8_t *scratch);
    /* Rows [first, last) as a dense matrix. */
    void (*expand)(const job_t *, int64_t first, int64_t last, uint8_t *scratch);
    /* Rows [first, last) of y = x W^T for a dense bfloat16 W (w.values), x being float32 as prepared. */
    int64_t (*dense_prepared_size)(int64_t columns);
    void (*dense_prepare)(int64_t columns, const void *x, int32_t x_kind, void *out);
    void (*dense)(const job_t *, int64_t first, int64_t last);
    /* One head of k and v with all heads of q that share it; item = (number in the batch) * kv_heads + head. */
    void (*attend)(const attend_t *, int64_t item, float *scratch);
    /* out = x / rms(x) * weight, n of each, bfloat16, rounded where LLaMA's RMSNorm rounds. x may be out. */
    void (*norm)(const uint16_t *x, const uint16_t *weight, float eps, int64_t n, uint16_t *out);
    /* out = silu(gate) * up, n of each, bfloat16, rounded after either step. */
    void (*gated)(const uint16_t *gate, const uint16_t *up, int64_t n, uint16_t *out);
    /* A sum over memory, as fast as it can be read. */
    uint64_t (*sum)(const uint8_t *, int64_t bytes);
    /* The steps of a plan, by kind; NULL where none is known. */
    const step_run_t *steps;
} isa_t;

extern const isa_t prunella_avx512bf16, prunella_avx512, prunella_avx2, prunella_neon, prunella_portable;

/* The instruction set in use. */
const isa_t *prunella_isa_in_use(void);

/* Attention of one new token, on scratch memory of its own. -1: an argument makes no sense; -2: out of memory. */
int prunella_run_attend(attend_t job, int threads);

static inline int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

/* Rows that a thread takes at a time. */
static inline int64_t chunk_of(int64_t rows, int threads) {
    int64_t chunk = rows / (threads * 16);
    return chunk < 8 ? 8 : chunk > 64 ? 64 : chunk;
}

/* The weight that these arguments describe; -1 if they make no sense. */
static inline int fill(
    weight_t *w, int64_t kind, int64_t rows, int64_t columns, const void *mask, const void *offsets,
    const void *values, int64_t count, const void *scales, int64_t group) {
    if (kind < F32 || kind > INT4 || rows < 0 || columns < 1 || count < 0) return -1;
    if ((kind >= INT8) != (scales != NULL) || (scales && (group < SPAN || group % SPAN))) return -1;
    if (rows && (!mask != !offsets || (!mask && (kind != INT8 || count / columns < rows)))) return -1;
    *w = (weight_t){
        (int32_t)kind, rows, columns, (columns + 63) / 64, mask, offsets, values, count, scales, group,
        scales ? (columns + group - 1) / group : 0,
    };
    return 0;
}

/* How many tokens a tile takes when this many are left: 1, 2, 4 or 8, and at the end no fewer than there are. */
static inline int64_t tile_of(int64_t left) { return left == 1 ? 1 : left == 2 ? 2 : left <= 4 ? 4 : TOKENS; }

/* ------------------------------------------------------------------ numbers */

static inline float bits_float(uint32_t bits) {
    float out;
    __builtin_memcpy(&out, &bits, 4);
    return out;
}

static inline uint32_t float_bits(float value) {
    uint32_t out;
    __builtin_memcpy(&out, &value, 4);
    return out;
}

static inline float from_bf16(uint16_t h) { return bits_float((uint32_t)h << 16); }

static inline uint16_t to_bf16(float f) {
    uint32_t u = float_bits(f);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)((u >> 16) | 0x40); /* NaN stays NaN */
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline float from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, low = h & 0x7fff;
    if (low >= 0x7c00) return bits_float(sign | 0x7f800000 | (low & 0x3ff) << 13);
    if (low >= 0x0400) return bits_float(sign | ((low << 13) + (112u << 23)));
    float small = (float)low * 0x1p-24f; /* zero and subnormal */
    return bits_float(sign | float_bits(small));
}

static inline uint16_t to_f16(float f) {
    uint32_t u = float_bits(f), sign = (u >> 16) & 0x8000, low = u & 0x7fffffff;
    if (low > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (low >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (low < 0x38800000) { /* subnormal: let the addition round */
        float shifted = bits_float(low) + 0.5f;
        return (uint16_t)(sign | (float_bits(shifted) - 0x3f000000));
    }
    low += 0xfff + ((low >> 13) & 1);
    return (uint16_t)(sign | ((low - (112u << 23)) >> 13));
}

/* e^x for x <= 0, to float's precision; NaN stays NaN. Without branches, so that loops over it become vectors. */
static inline float exp_negative(float x) {
    x = x < -87 ? -87 : x;
    const float round = x * 1.442695041f + 12582912.0f; /* 1.5 * 2^23: the integer lies in the low bits */
    const float n = round - 12582912.0f;
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts */
    const float series =
        1 + r * (1 + r * (0.5f + r * (0.16666667f + r * (0.041666668f + r * (0.0083333338f + r * 0.0013888889f)))));
    return series * bits_float((float_bits(round) + 127) << 23);
}

static inline float load_float(const void *x, int32_t kind, int64_t i) {
    if (kind == F32) return ((const float *)x)[i];
    uint16_t h = ((const uint16_t *)x)[i];
    return kind == BF16 ? from_bf16(h) : from_f16(h);
}

static inline void store_float(void *y, int32_t kind, int64_t i, float value) {
    if (kind == F32)
        ((float *)y)[i] = value;
    else
        ((uint16_t *)y)[i] = kind == BF16 ? to_bf16(value) : to_f16(value);
}

/* Value number i as a float, before its scale. */
static inline float value_at(int32_t kind, const uint8_t *values, int64_t i) {
    switch (kind) {
        case F32: return ((const float *)values)[i];
        case BF16: return from_bf16(((const uint16_t *)values)[i]);
        case F16: return from_f16(((const uint16_t *)values)[i]);
        case INT8: return (float)(int8_t)values[i];
        default: { /* two to a byte, the first in the low half; -8 .. 7 */
            uint8_t nibble = (uint8_t)(values[i >> 1] >> ((i & 1) * 4)) & 15;
            return (float)((int)(nibble ^ 8) - 8);
        }
    }
}

static inline int64_t element_bits(int32_t kind) {
    return kind == F32 ? 32 : kind == BF16 || kind == F16 ? 16 : kind == INT8 ? 8 : 4;
}

/* Where a row's values begin. A damaged offset is brought inside: no mask and no offset, whatever they hold,
 * can make a kernel read outside of its buffers. The same is done after every word of the mask. */
static inline int64_t row_begin(const weight_t *w, int64_t row) {
    if (!w->offsets) return row * w->columns;
    uint32_t begin = (uint32_t)w->offsets[row];
    return begin < (uint64_t)w->count ? (int64_t)begin : w->count;
}

static inline int64_t advance(const weight_t *w, int64_t at, uint64_t word) {
    at += __builtin_popcountll(word);
    return at < w->count ? at : w->count;
}

#endif
