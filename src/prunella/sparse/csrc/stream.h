/* Kernels of the stream: see stream_avx512.c. */
#ifndef PRUNELLA_STREAM_H
#define PRUNELLA_STREAM_H

#include <stdint.h>

typedef struct {
    const void *x;                  /* (tokens, width) bfloat16, rows `stride` apart */
    int64_t tokens, width, stride;
    uint32_t *packed;               /* ceil(width / 16) * ceil(tokens / 2) * 16 */
    float *gram;                    /* (width, width): its upper triangle, by panels of 16, is added to */
} gram_t;

typedef struct {
    const void *q, *k, *v;          /* bfloat16 (batch, heads, tokens, dim), dim contiguous */
    void *out;                      /* bfloat16 (batch, tokens, heads, dim), contiguous */
    float *lse;                     /* (batch, heads, tokens): log of the sum of e^score; may be missing */
    int64_t batch, heads, kv_heads, tokens, dim;
    int64_t q_stride[3], k_stride[3], v_stride[3];
    float scale;
    uint32_t *packed;               /* packed_size for each of batch * kv_heads */
    int64_t packed_size;
    float *scratch;                 /* scratch_size for each thread */
    int64_t scratch_size;
} attention_t;

typedef struct {
    const void *q, *k, *v, *grad;   /* bfloat16 (batch, heads, tokens, dim), dim contiguous; grad of `out` */
    const float *lse, *delta;       /* (batch, heads, tokens); delta = sum over dim of grad * out */
    void *dq, *dk, *dv;             /* bfloat16 (batch, heads, tokens, dim), contiguous */
    int64_t batch, heads, kv_heads, tokens, dim;
    int64_t q_stride[3], k_stride[3], v_stride[3], grad_stride[3];
    float scale;
    int64_t b, kv;                  /* the group that is being worked on: a head of keys and the queries' that share it */
    uint32_t *packed;               /* packed_size for each of K, V by pairs of dim, K by pairs of keys; then for each
                                       head of queries Q, G by pairs of dim, Q, G by pairs of queries */
    int64_t packed_size;
    float *scratch;                 /* scratch_size for each thread */
    int64_t scratch_size;
} attention_back_t;

int stream_available(void);
void stream_gram_pack(const gram_t *job);
void stream_gram_rows(const gram_t *job, int64_t item);
void stream_attention_pack(const attention_t *job, int64_t item);
void stream_attention_rows(const attention_t *job, int64_t item, float *scratch);
void stream_attention_back_pack(const attention_back_t *job, int64_t item);
void stream_attention_back_rows(const attention_back_t *job, int64_t item, float *scratch);

#endif
