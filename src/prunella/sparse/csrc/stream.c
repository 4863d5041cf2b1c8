/* The stream's kernels for Python: work shared out over torch's own threads. Functions return 0, or
 *     -1  an argument makes no sense     -2  out of memory
 */
#include <stdlib.h>

#include "stream.h"

#define EXPORT __attribute__((visibility("default")))

typedef void (*parallel_t)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

static parallel_t parallel;

EXPORT void prunella_stream_threads(void *gomp_parallel) { parallel = (parallel_t)gomp_parallel; }
EXPORT int prunella_stream_available(void) { return stream_available(); }

typedef struct {
    void (*item)(const void *job, int64_t item, float *scratch);
    const void *job;
    int64_t items, next, scratch_size;
    int worker;
    float *scratch;
} share_t;

static void work(void *data) {
    share_t *share = data;
    int me = __atomic_fetch_add(&share->worker, 1, __ATOMIC_RELAXED);
    float *scratch = share->scratch ? share->scratch + me * share->scratch_size : NULL;
    for (;;) {
        int64_t item = __atomic_fetch_add(&share->next, 1, __ATOMIC_RELAXED);
        if (item >= share->items) return;
        share->item(share->job, item, scratch);
    }
}

static void run(
    void (*item)(const void *, int64_t, float *), const void *job, int64_t items, float *scratch,
    int64_t scratch_size, int threads) {
    share_t share = {item, job, items, 0, scratch_size, 0, scratch};
    if (parallel && threads > 1 && items > 1)
        parallel(work, &share, (unsigned)threads, 0);
    else
        work(&share);
}

static void *lines(int64_t bytes) { return aligned_alloc(64, (size_t)((bytes + 127) & ~(int64_t)63)); }

static void gram_rows(const void *job, int64_t item, float *scratch) {
    (void)scratch;
    stream_gram_rows(job, item);
}

/* The upper triangle of gram (width, width) += x^T x, for bfloat16 x (tokens, width) with rows `stride` apart. */
EXPORT int prunella_gram(const void *x, int64_t tokens, int64_t width, int64_t stride, float *gram, int threads) {
    if (tokens < 1 || width < 1 || stride < width) return -1;
    const int64_t panels = (width + 15) / 16, half = (tokens + 1) / 2;
    gram_t job = {x, tokens, width, stride, lines(panels * half * 64), gram};
    if (!job.packed) return -2;
    stream_gram_pack(&job);
    run(gram_rows, &job, panels, NULL, 0, threads);
    free(job.packed);
    return 0;
}

static void attention_pack(const void *job, int64_t item, float *scratch) {
    (void)scratch;
    stream_attention_pack(job, item);
}

static void attention_rows(const void *job, int64_t item, float *scratch) { stream_attention_rows(job, item, scratch); }

/* out (batch, tokens, heads, dim) = softmax(scale q k^T + causal mask) v, for bfloat16 q (batch, heads, tokens, dim)
 * and k, v with kv_heads in place of heads; strides holds those of q, k, v for batch, head and token. */
EXPORT int prunella_attention(
    const void *q, const void *k, const void *v, void *out, int64_t batch, int64_t heads, int64_t kv_heads,
    int64_t tokens, int64_t dim, const int64_t *strides, float scale, int threads) {
    if (batch < 1 || kv_heads < 1 || heads < kv_heads || heads % kv_heads || tokens < 1 || dim < 32 || dim % 32)
        return -1;
    attention_t job = {.q = q, .k = k, .v = v, .out = out, .batch = batch, .heads = heads, .kv_heads = kv_heads,
                       .tokens = tokens, .dim = dim, .scale = scale};
    for (int i = 0; i < 3; i++) {
        job.q_stride[i] = strides[i];
        job.k_stride[i] = strides[3 + i];
        job.v_stride[i] = strides[6 + i];
    }
    threads = parallel && threads > 1 ? threads : 1;
    job.packed_size = (tokens + 15) / 16 * 16 * (dim / 2) + (tokens + 1) / 2 * dim;
    const int64_t scratch_size = 8 * ((tokens + 31) / 32 * 32 + dim / 2);
    job.packed = lines(batch * kv_heads * job.packed_size * 4);
    float *scratch = lines(threads * scratch_size * 4);
    if (job.packed && scratch) {
        run(attention_pack, &job, batch * kv_heads, NULL, 0, threads);
        run(attention_rows, &job, batch * heads * ((tokens + 7) / 8), scratch, scratch_size, threads);
    }
    int failed = !job.packed || !scratch;
    free(job.packed);
    free(scratch);
    return failed ? -2 : 0;
}
