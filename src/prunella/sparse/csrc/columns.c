/* The inner loops of SparseGPT and DSnoT, rows over threads. Functions return 0, or
 *     -1  an argument makes no sense     -2  out of memory
 */
#pragma GCC optimize("fp-contract=fast") /* w - e U in one rounding, as torch makes it: -std=c11 forbids it */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "parallel.h"
#include "columns.h"

#define EXPORT __attribute__((visibility("default")))

#define NAME(x) any_##x
#define TARGET
#include "columns_rows.h"
#undef NAME
#undef TARGET

#if defined(__x86_64__)
#define NAME(x) avx2_##x
#define TARGET __attribute__((target("avx2,fma")))
#include "columns_rows.h"
#undef NAME
#undef TARGET

#define NAME(x) avx512_##x
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma")))
#include "columns_rows.h"
#endif

/* Number 0 runs anywhere; the last one that the processor can run is the best. */
static int can(int number) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (number == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (number == 2)
        return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
#endif
    return number == 0;
}

static void (*const bodies[])(const void *, int64_t, int) = {
    any_rows,
#if defined(__x86_64__)
    avx2_rows, avx512_rows,
#endif
};
enum { BODIES = sizeof(bodies) / sizeof(*bodies) };

static int body = -1;

/* Use instruction set `number` from now on, the best if it is negative; -1 if this is impossible. */
EXPORT int prunella_sweep_use(int number) {
    if (number < 0)
        for (number = BODIES - 1; !can(number);) number--;
    if (number >= BODIES || !can(number)) return -1;
    return body = number;
}

/* The pass over a tile of columns_rows.h: weight, mask and errors are written. `upper` is the tile's square of U, rows
 * `upper_stride` apart. */
EXPORT int prunella_sweep(
    float *weight, int64_t stride, const float *upper, int64_t upper_stride, uint8_t *mask, int64_t mask_stride,
    float *errors, int64_t rows, int64_t columns, int64_t kept, int64_t span, const float *scale, int64_t limit,
    int threads) {
    if (rows < 1 || columns < 1 || stride < columns || upper_stride < columns || mask_stride < columns) return -1;
    if (span < 0 || kept < 0 || kept > span || (span && columns % span) || (scale && limit < 1)) return -1;
    const int64_t strips = (columns + 7) / 8;
    threads = usable(threads);
    columns_t job = {weight, stride, NULL, mask,  mask_stride,  errors, rows, columns,
                   kept,   span,   scale, (float)limit, NULL, 0};
    job.scratch_size = (3 * columns + (span ? span : 1)) * LANES + (columns + 15) / 16 * 16;
    const int64_t whole = (strips * columns * 8 + 15) / 16 * 16;
    float *memory = aligned_alloc(64, (size_t)(whole + threads * job.scratch_size) * sizeof(float));
    if (!memory) return -2;
    for (int64_t s = 0; s < strips; s++)
        for (int64_t j = 0; j < columns; j++)
            for (int64_t c = 0; c < 8; c++)
                memory[(s * columns + j) * 8 + c] =
                    8 * s + c < columns && 8 * s + c >= j ? upper[j * upper_stride + 8 * s + c] : 0;
    job.upper = memory;
    job.scratch = memory + whole;
    if (body < 0) prunella_sweep_use(-1);
    parallel_for(bodies[body], &job, (rows + LANES - 1) / LANES, threads);
    free(memory);
    return 0;
}

/* ------------------------------------------------------------------ DSnoT's swaps */

typedef struct {
    uint8_t *mask;                  /* (rows, columns), written */
    const float *d, *grow, *score;  /* (rows, columns) */
    const float *error;             /* (rows) */
    int64_t rows, columns, cycles, span;
    float threshold;
    int same_sign;
    int32_t *scratch; /* 5 * columns for each thread */
} swap_t;

/* A heap of columns, best key first: the largest key, or the smallest where `sign` is -1; among equals the first. */
typedef struct {
    int32_t *at;
    int64_t count;
    const float *key;
    float sign;
} heap_t;

static inline int before(const heap_t *h, int32_t a, int32_t b) {
    const float x = h->sign * h->key[a], y = h->sign * h->key[b];
    return x > y || (x == y && a < b);
}

static void sink(heap_t *h, int64_t i) {
    const int32_t moved = h->at[i];
    for (int64_t child; (child = 2 * i + 1) < h->count; i = child) {
        if (child + 1 < h->count && before(h, h->at[child + 1], h->at[child])) child++;
        if (!before(h, h->at[child], moved)) break;
        h->at[i] = h->at[child];
    }
    h->at[i] = moved;
}

static void heapify(heap_t *h) {
    for (int64_t i = h->count / 2 - 1; i >= 0; i--) sink(h, i);
}

static void pop(heap_t *h) {
    h->at[0] = h->at[--h->count];
    if (h->count) sink(h, 0);
}

static int sign(float x) { return (x > 0) - (x < 0); }

/* One row of `plain_swap` in steps/dsnot.py, with the same sums in the same order. */
static void swap_row(const void *job, int64_t row, int worker) {
    const swap_t *s = job;
    const int64_t n = s->columns;
    uint8_t *mask = s->mask + row * n;
    const float *d = s->d + row * n, *grow = s->grow + row * n, *score = s->score + row * n;
    int32_t *memory = s->scratch + worker * 5 * n;
    heap_t grows[2] = {{memory, 0, grow, 1}, {memory + n, 0, grow, -1}};
    heap_t prunes[2] = {{memory + 2 * n, 0, score, -1}, {memory + 3 * n, 0, score, -1}};
    uint8_t *open = (uint8_t *)(memory + 4 * n); /* kept weights that may be pruned, under N:M */
    memcpy(open, mask, (size_t)n);
    for (int32_t i = 0; i < n; i++) { /* into all four without a branch, counted in one of them */
        const int kept = mask[i], up = d[i] > 0, down = d[i] < 0;
        grows[0].at[grows[0].count] = grows[1].at[grows[1].count] = i;
        prunes[0].at[prunes[0].count] = prunes[1].at[prunes[1].count] = i;
        grows[0].count += up & ~kept, grows[1].count += down & ~kept;
        prunes[0].count += kept & down, prunes[1].count += kept & up;
    }
    float e = s->error[row];
    const int first = sign(e);
    int ready[2] = {0, 0}; /* whether the heaps of a side were made */
    for (int64_t cycle = 0; cycle < s->cycles; cycle++) {
        const int side = e < 0;
        if (!ready[side]) {
            heapify(&grows[side]);
            if (!s->span) heapify(&prunes[side]);
            ready[side] = 1;
        }
        if (!grows[side].count || !(fabsf(e) > s->threshold)) return;
        const int32_t grown = grows[side].at[0];
        int32_t pruned = -1;
        if (s->span) {
            const int32_t start = (int32_t)(grown / s->span * s->span);
            for (int32_t i = start; i < start + s->span; i++)
                if (open[i] && isfinite(score[i]) && (pruned < 0 || score[i] < score[pruned])) pruned = i;
        } else {
            if (!prunes[side].count) return;
            pruned = prunes[side].at[0];
        }
        if (pruned >= 0) {
            const float next = e + d[pruned] - d[grown];
            if (!(fabsf(next) < fabsf(e)) || (s->same_sign && sign(next) != first)) return;
            mask[grown] = 1;
            mask[pruned] = 0;
            open[pruned] = 0;
            e = next;
        } /* else the group is used up: its candidate is passed over */
        pop(&grows[side]);
        if (!s->span) pop(&prunes[side]);
    }
}

EXPORT int prunella_swap(
    uint8_t *mask, const float *d, const float *grow, const float *score, const float *error, int64_t rows,
    int64_t columns, int64_t cycles, float threshold, int64_t same_sign, int64_t span, int threads) {
    if (rows < 1 || columns < 1 || columns > INT32_MAX || cycles < 0 || span < 0 || (span && columns % span)) return -1;
    threads = usable(threads);
    swap_t job = {mask, d, grow, score, error, rows, columns, cycles, span, threshold, same_sign != 0, NULL};
    job.scratch = malloc((size_t)(threads * 5 * columns) * sizeof(int32_t));
    if (!job.scratch) return -2;
    parallel_for(swap_row, &job, rows, threads);
    free(job.scratch);
    return 0;
}
