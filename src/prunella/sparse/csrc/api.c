/* The C ABI: everything Python calls. Functions return 0, or a negative number:
 *     -1  an argument makes no sense     -2  out of memory
 *
 * No function reads or writes outside the buffers whose sizes the arguments state, whatever is in them.
 */
#include <stdlib.h>
#include <string.h>

#include "internal.h"
#include "parallel.h"

#define EXPORT __attribute__((visibility("default")))

static const isa_t *isa;

const isa_t *prunella_isa_in_use(void) { return isa; }

static const isa_t *const all[] = {
#if defined(__x86_64__)
    &prunella_avx512bf16, &prunella_avx512, &prunella_avx2,
#endif
#if defined(__aarch64__)
    &prunella_neon,
#endif
    &prunella_portable,
};
enum { ALL = sizeof(all) / sizeof(*all) };

/* Raised whenever what an exported function takes or does changes; native.py knows the same number. */
EXPORT int prunella_version(void) { return 8; }

/* The name of instruction set number i, best first; NULL after the last. */
EXPORT const char *prunella_isa(int i) { return i >= 0 && i < ALL ? all[i]->name : NULL; }

/* Does this processor have instruction set number i? */
EXPORT int prunella_has(int i) { return i >= 0 && i < ALL && all[i]->available(); }

/* Use the instruction set of this name, or with NULL the best one. -1 if this processor does not have it. */
EXPORT int prunella_use(const char *name) {
    for (int i = 0; i < ALL; i++)
        if ((!name || !strcmp(name, all[i]->name)) && all[i]->available()) {
            isa = all[i];
            return i;
        }
    return -1;
}

/* ------------------------------------------------------------------ rows over threads */

enum { EXPAND, PRODUCT, DENSE };

typedef struct {
    const job_t *job;
    int64_t rows, chunk;
    int what;
} share_t;

static void work(const void *data, int64_t item, int worker) {
    const share_t *share = data;
    const job_t *job = share->job;
    uint8_t *scratch = job->scratch + worker * job->scratch_size;
    int64_t first = item * share->chunk, last = first + share->chunk < share->rows ? first + share->chunk : share->rows;
    first += job->first, last += job->first;
    if (share->what == PRODUCT)
        isa->product(job, first, last, scratch);
    else if (share->what == EXPAND)
        isa->expand(job, first, last, scratch);
    else
        isa->dense(job, first, last);
}

static void run(const job_t *job, int64_t rows, int what, int threads) {
    share_t share = {job, rows, chunk_of(rows, threads), what};
    parallel_for(work, &share, (rows + share.chunk - 1) / share.chunk, threads);
}

/* ------------------------------------------------------------------ entry points */

/* y (tokens, rows) = x (tokens, columns) W^T. x and y are of `x_kind`. Where mask and offsets are NULL, W has 8 bits and
 * nothing is left out of it: values (rows, columns), count of them. */
EXPORT int prunella_product(
    int32_t kind, int64_t rows, int64_t columns, const void *mask, const void *offsets, const void *values,
    int64_t count, const void *scales, int64_t group, const void *x, void *y, int32_t x_kind, int64_t tokens,
    int threads) {
    job_t job = {0};
    if (fill(&job.w, kind, rows, columns, mask, offsets, values, count, scales, group)) return -1;
    if (x_kind < F32 || x_kind > F16 || tokens < 0) return -1;
    threads = usable(threads);
    /* The last tile is filled up with tokens of zeros, so that a kernel may always take a full one. */
    int64_t padded = (tokens + TOKENS - 1) / TOKENS * TOKENS;
    job.stride = aligned(isa->prepared_size(&job.w));
    job.scratch_size = aligned((job.w.words + 4) * 64 * (int64_t)sizeof(float));
    int64_t bytes = padded * job.stride + threads * job.scratch_size;
    uint8_t *memory = aligned_alloc(64, (size_t)(bytes ? bytes : 64));
    if (!memory) return -2;
    const int64_t row = columns * element_bits(x_kind) / 8;
    for (int64_t t = 0; t < tokens;) {
        int64_t tile = isa->tiles ? tile_of(tokens - t) : 1, end = t + tile < tokens ? t + tile : tokens;
        uint8_t *to = memory + t * job.stride;
        if (end < t + tile) memset(to, 0, (size_t)(tile * job.stride));
        for (int64_t i = 0; t < end; t++, i++) isa->prepare(&job.w, (const uint8_t *)x + t * row, x_kind, to, tile, i);
    }
    job.x = memory;
    job.y = y;
    job.y_kind = x_kind;
    job.tokens = tokens;
    job.scratch = memory + padded * job.stride;
    run(&job, rows, PRODUCT, threads);
    free(memory);
    return 0;
}

/* Rows [first, last) of W, dense, of `y_kind`. */
EXPORT int prunella_expand(
    int32_t kind, int64_t rows, int64_t columns, const void *mask, const void *offsets, const void *values,
    int64_t count, const void *scales, int64_t group, int64_t first, int64_t last, void *y, int32_t y_kind,
    int threads) {
    job_t job = {0};
    if (fill(&job.w, kind, rows, columns, mask, offsets, values, count, scales, group)) return -1;
    if (y_kind < F32 || y_kind > F16 || first < 0 || last < first || last > rows) return -1;
    threads = usable(threads);
    job.scratch_size = aligned((job.w.words + 4) * 64 * (int64_t)sizeof(float));
    job.scratch = aligned_alloc(64, (size_t)(threads * job.scratch_size));
    if (!job.scratch) return -2;
    job.y = y;
    job.y_kind = y_kind;
    job.first = first;
    run(&job, last - first, EXPAND, threads);
    free(job.scratch);
    return 0;
}

/* y (tokens, rows) = x (tokens, columns) W^T for a dense bfloat16 W (rows, columns). */
EXPORT int prunella_dense(
    int64_t rows, int64_t columns, const void *values, const void *x, void *y, int32_t x_kind, int64_t tokens,
    int threads) {
    if (rows < 0 || columns < 1 || x_kind < F32 || x_kind > F16 || tokens < 0) return -1;
    job_t job = {0};
    job.w = (weight_t){.kind = BF16, .rows = rows, .columns = columns, .values = values};
    threads = usable(threads);
    job.stride = aligned(isa->dense_prepared_size(columns));
    uint8_t *memory = aligned_alloc(64, (size_t)((tokens + 1) * job.stride));
    if (!memory) return -2;
    const int64_t row = columns * element_bits(x_kind) / 8;
    for (int64_t t = 0; t < tokens; t++)
        isa->dense_prepare(columns, (const uint8_t *)x + t * row, x_kind, memory + t * job.stride);
    job.x = memory;
    job.y = y;
    job.y_kind = x_kind;
    job.tokens = tokens;
    run(&job, rows, DENSE, threads);
    free(memory);
    return 0;
}

static void attend(const void *data, int64_t item, int worker) {
    const attend_t *job = data;
    isa->attend(job, item, job->scratch + worker * job->scratch_size);
}

int prunella_run_attend(attend_t job, int threads) {
    if (job.batch < 0 || job.kv_heads < 1 || job.heads < job.kv_heads || job.heads % job.kv_heads || job.tokens < 1 ||
        job.dim < 1)
        return -1;
    const int64_t floats = job.heads / job.kv_heads * (2 * job.dim + job.tokens + 2);
    threads = usable(threads);
    job.scratch_size = aligned(floats * (int64_t)sizeof(float)) / (int64_t)sizeof(float);
    job.scratch = aligned_alloc(64, (size_t)(threads * job.scratch_size) * sizeof(float));
    if (!job.scratch) return -2;
    parallel_for(attend, &job, job.batch * job.kv_heads, threads);
    free(job.scratch);
    return 0;
}

/* out (batch, heads, dim) = softmax(scale q k^T) v for one token q (batch, heads, dim) over k and v (batch, kv_heads,
 * tokens, dim), all bfloat16; strides holds those of batch and head for q, and of batch, head and token for k and v. */
EXPORT int prunella_attend(
    const void *q, const void *k, const void *v, void *out, int64_t batch, int64_t heads, int64_t kv_heads,
    int64_t tokens, int64_t dim, const int64_t *strides, float scale, int threads) {
    attend_t job = {.q = q, .k = k, .v = v, .out = out, .batch = batch, .heads = heads, .kv_heads = kv_heads,
                    .tokens = tokens, .dim = dim, .scale = scale};
    memcpy(job.q_stride, strides, sizeof job.q_stride);
    memcpy(job.k_stride, strides + 2, sizeof job.k_stride);
    memcpy(job.v_stride, strides + 5, sizeof job.v_stride);
    return prunella_run_attend(job, threads);
}

typedef struct {
    const uint8_t *data;
    int64_t bytes;
    uint64_t *sum;
} reading_t;

enum { PIECE = 1 << 20 };

static void read_piece(const void *data, int64_t item, int worker) {
    const reading_t *job = data;
    const int64_t at = item * PIECE, left = job->bytes - at;
    (void)worker;
    __atomic_fetch_add(job->sum, isa->sum(job->data + at, left < PIECE ? left : PIECE), __ATOMIC_RELAXED);
}

/* A sum over memory, only to learn how fast it can be read. */
EXPORT uint64_t prunella_read(const void *data, int64_t bytes, int threads) {
    uint64_t sum = 0;
    reading_t job = {data, bytes, &sum};
    parallel_for(read_piece, &job, (bytes + PIECE - 1) / PIECE, usable(threads));
    return sum;
}
