/* The stream's kernels for Python: work shared out over torch's own threads. Functions return 0, or
 *     -1  an argument makes no sense     -2  out of memory
 */
#include <stdlib.h>

#include "parallel.h"
#include "stream.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT int prunella_stream_available(void) { return stream_available(); }

static void *lines(int64_t bytes) { return aligned_alloc(64, (size_t)((bytes + 127) & ~(int64_t)63)); }

static void gram_rows(const void *job, int64_t item, int worker) {
    (void)worker;
    stream_gram_rows(job, item);
}

/* The upper triangle of gram (width, width) += x^T x, for bfloat16 x (tokens, width) with rows `stride` apart. */
EXPORT int prunella_gram(const void *x, int64_t tokens, int64_t width, int64_t stride, float *gram, int threads) {
    if (tokens < 1 || width < 1 || stride < width) return -1;
    const int64_t panels = (width + 15) / 16, half = (tokens + 1) / 2;
    gram_t job = {x, tokens, width, stride, lines(panels * half * 64), gram};
    if (!job.packed) return -2;
    stream_gram_pack(&job);
    parallel_for(gram_rows, &job, panels, usable(threads));
    free(job.packed);
    return 0;
}

static void attention_pack(const void *job, int64_t item, int worker) {
    (void)worker;
    stream_attention_pack(job, item);
}

static void attention_rows(const void *job, int64_t item, int worker) {
    const attention_t *a = job;
    stream_attention_rows(a, item, a->scratch + worker * a->scratch_size);
}

static int sensible(int64_t batch, int64_t heads, int64_t kv_heads, int64_t tokens, int64_t dim) {
    return batch >= 1 && kv_heads >= 1 && heads >= kv_heads && heads % kv_heads == 0 && tokens >= 1 && dim >= 32 &&
           dim % 32 == 0;
}

/* out (batch, tokens, heads, dim) = softmax(scale q k^T + causal mask) v, for bfloat16 q (batch, heads, tokens, dim)
 * and k, v with kv_heads in place of heads; strides holds those of q, k, v for batch, head and token. lse (batch, heads,
 * tokens) may be missing. */
EXPORT int prunella_attention(
    const void *q, const void *k, const void *v, void *out, float *lse, int64_t batch, int64_t heads, int64_t kv_heads,
    int64_t tokens, int64_t dim, const int64_t *strides, float scale, int threads) {
    if (!sensible(batch, heads, kv_heads, tokens, dim)) return -1;
    attention_t job = {.q = q, .k = k, .v = v, .out = out, .lse = lse, .batch = batch, .heads = heads, .kv_heads = kv_heads,
                       .tokens = tokens, .dim = dim, .scale = scale};
    for (int i = 0; i < 3; i++) {
        job.q_stride[i] = strides[i];
        job.k_stride[i] = strides[3 + i];
        job.v_stride[i] = strides[6 + i];
    }
    threads = usable(threads);
    job.packed_size = (tokens + 31) / 32 * 32 * (dim / 2) + (tokens + 1) / 2 * dim;
    job.scratch_size = 8 * ((tokens + 31) / 32 * 32 + dim / 2);
    job.packed = lines(batch * kv_heads * job.packed_size * 4);
    job.scratch = lines(threads * job.scratch_size * 4);
    if (job.packed && job.scratch) {
        parallel_for(attention_pack, &job, batch * kv_heads, threads);
        parallel_for(attention_rows, &job, batch * heads * ((tokens + 7) / 8), threads);
    }
    int failed = !job.packed || !job.scratch;
    free(job.packed);
    free(job.scratch);
    return failed ? -2 : 0;
}

static void attention_back_pack(const void *job, int64_t item, int worker) {
    (void)worker;
    stream_attention_back_pack(job, item);
}

static void attention_back_rows(const void *job, int64_t item, int worker) {
    const attention_back_t *a = job;
    stream_attention_back_rows(a, item, a->scratch + worker * a->scratch_size);
}

/* The gradients of q, k and v, contiguous, from that of `out`, which is here a tensor (batch, heads, tokens, dim) like
 * the others; delta (batch, heads, tokens) is its inner product with `out`. strides holds those of q, k, v, grad. */
EXPORT int prunella_attention_back(
    const void *q, const void *k, const void *v, const void *grad, const float *lse, const float *delta, void *dq,
    void *dk, void *dv, int64_t batch, int64_t heads, int64_t kv_heads, int64_t tokens, int64_t dim,
    const int64_t *strides, float scale, int threads) {
    if (!sensible(batch, heads, kv_heads, tokens, dim)) return -1;
    attention_back_t job = {.q = q, .k = k, .v = v, .grad = grad, .lse = lse, .delta = delta, .dq = dq, .dk = dk,
                            .dv = dv, .batch = batch, .heads = heads, .kv_heads = kv_heads, .tokens = tokens,
                            .dim = dim, .scale = scale};
    for (int i = 0; i < 3; i++) {
        job.q_stride[i] = strides[i];
        job.k_stride[i] = strides[3 + i];
        job.v_stride[i] = strides[6 + i];
        job.grad_stride[i] = strides[9 + i];
    }
    threads = usable(threads);
    const int64_t padded = (tokens + 31) / 32 * 32, group = heads / kv_heads, tiles = (tokens + 7) / 8;
    job.packed_size = padded * (dim / 2);
    job.scratch_size = 8 * (2 * padded + 3 * dim);
    job.packed = lines((3 + 4 * group) * job.packed_size * 4);
    job.scratch = lines(threads * job.scratch_size * 4);
    if (job.packed && job.scratch)
        for (job.b = 0; job.b < batch; job.b++)
            for (job.kv = 0; job.kv < kv_heads; job.kv++) {
                parallel_for(attention_back_pack, &job, 1 + group, threads);
                parallel_for(attention_back_rows, &job, tiles * (1 + group), threads);
            }
    int failed = !job.packed || !job.scratch;
    free(job.packed);
    free(job.scratch);
    return failed ? -2 : 0;
}
