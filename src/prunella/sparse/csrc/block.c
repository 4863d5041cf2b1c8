/* One new token through blocks of a decoder such as LLaMA's. Through one of them in two calls:
 *
 *     prunella_block_in   normalize, project to queries, keys and values, rotate
 *     prunella_block_out  attend to the cache, project, add; normalize, gated MLP, add
 *
 * Between them the caller puts the key and the value into its cache. Where the cache has room for them already, one
 * call takes the token through any number of blocks:
 *
 *     prunella_blocks
 *
 * All activations are bfloat16 and rounded where transformers rounds them. Weights are packed, or dense bfloat16 (mask
 * NULL).
 */
#include <stdlib.h>
#include <string.h>

#include "internal.h"
#include "parallel.h"

#define EXPORT __attribute__((visibility("default")))

typedef struct {
    int64_t kind, rows, columns;
    const void *mask, *offsets, *values;
    int64_t count;
    const void *scales;
    int64_t group;
    const uint16_t *bias; /* rows, or NULL */
} linear_t;

typedef struct {
    const uint16_t *weight; /* NULL: no norm */
    double eps;
} norm_t;

typedef struct {
    linear_t q, k, v, o, gate, up, down;
    norm_t attention_norm, mlp_norm, q_norm, k_norm;
    int64_t heads, kv_heads, dim;
    double scale; /* of the products of queries and keys */
} block_t;

/* Where the keys and the values of a block lie (kv_heads, tokens, dim), and have room for one more token. */
typedef struct {
    uint16_t *k, *v;
    int64_t strides[4]; /* of head and token, of k, then of v */
} room_t;

enum { MOST = 3 }; /* products that share their input */

typedef struct {
    const isa_t *isa;
    job_t job[MOST];
    int64_t chunk[MOST], items[MOST];
} products_t;

static void work(const void *data, int64_t item, int worker) {
    const products_t *all = data;
    int i = 0;
    for (; item >= all->items[i]; i++) item -= all->items[i];
    const job_t *job = &all->job[i];
    const int64_t first = item * all->chunk[i], end = first + all->chunk[i];
    const int64_t last = end < job->w.rows ? end : job->w.rows;
    if (job->w.mask)
        all->isa->product(job, first, last, job->scratch + worker * job->scratch_size);
    else
        all->isa->dense(job, first, last);
}

/* y[i] = x W_i^T + bias_i for up to MOST weights of the same number of columns. */
static int products(const linear_t *const *parts, int n, const uint16_t *x, uint16_t *const *y, int threads) {
    products_t all = {.isa = prunella_isa_in_use()};
    int64_t stride[MOST], bytes = 0, scratch = 0, items = 0;
    for (int i = 0; i < n; i++) {
        const linear_t *part = parts[i];
        weight_t *w = &all.job[i].w;
        if (part->mask) {
            if (fill(w, part->kind, part->rows, part->columns, part->mask, part->offsets, part->values, part->count,
                     part->scales, part->group))
                return -1;
            stride[i] = aligned(all.isa->prepared_size(w));
            const int64_t size = aligned((w->words + 4) * 64 * (int64_t)sizeof(float));
            scratch = size > scratch ? size : scratch;
        } else {
            if (part->rows < 0 || part->columns < 1) return -1;
            *w = (weight_t){.kind = BF16, .rows = part->rows, .columns = part->columns, .values = part->values};
            stride[i] = aligned(all.isa->dense_prepared_size(w->columns));
        }
        bytes += TOKENS * stride[i];
        all.chunk[i] = chunk_of(w->rows, threads);
        items += all.items[i] = (w->rows + all.chunk[i] - 1) / all.chunk[i];
    }
    uint8_t *memory = aligned_alloc(64, (size_t)(bytes + threads * scratch + 64)), *at = memory;
    if (!memory) return -2;
    for (int i = 0; i < n; i++) {
        job_t *job = &all.job[i];
        if (parts[i]->mask)
            all.isa->prepare(&job->w, x, BF16, at, 1, 0);
        else
            all.isa->dense_prepare(job->w.columns, x, BF16, at);
        job->x = at;
        job->y = y[i];
        job->y_kind = BF16;
        job->tokens = 1;
        job->stride = stride[i];
        job->scratch = memory + bytes;
        job->scratch_size = scratch;
        at += TOKENS * stride[i];
    }
    parallel_for(work, &all, items, threads);
    free(memory);
    for (int i = 0; i < n; i++)
        for (int64_t r = 0; parts[i]->bias && r < parts[i]->rows; r++)
            y[i][r] = to_bf16(from_bf16(y[i][r]) + from_bf16(parts[i]->bias[r]));
    return 0;
}

/* Each head of x (heads, dim), in place: normalized, where there is a norm, and rotated by cos and sin (dim). */
static void turn(const norm_t *norm, uint16_t *x, int64_t heads, int64_t dim, const uint16_t *cos, const uint16_t *sin) {
    const int64_t half = dim / 2;
    for (int64_t h = 0; h < heads; h++, x += dim) {
        if (norm->weight) prunella_isa_in_use()->norm(x, norm->weight, (float)norm->eps, dim, x);
        for (int64_t i = 0; i < half; i++) {
            const float a = from_bf16(x[i]), b = from_bf16(x[i + half]);
            const float ac = from_bf16(to_bf16(a * from_bf16(cos[i]))), bs = from_bf16(to_bf16(-b * from_bf16(sin[i])));
            const float bc = from_bf16(to_bf16(b * from_bf16(cos[i + half])));
            const float as = from_bf16(to_bf16(a * from_bf16(sin[i + half])));
            x[i] = to_bf16(ac + bs);
            x[i + half] = to_bf16(bc + as);
        }
    }
}

/* q (heads, dim), k and v (kv_heads, dim) of a token x (q.columns), rotated by cos and sin (dim). */
EXPORT int prunella_block_in(
    const block_t *block, const uint16_t *x, const uint16_t *cos, const uint16_t *sin, uint16_t *q, uint16_t *k,
    uint16_t *v, int threads) {
    threads = usable(threads);
    const int64_t width = block->q.columns;
    uint16_t *normal = malloc((size_t)width * sizeof *normal);
    if (!normal) return -2;
    prunella_isa_in_use()->norm(x, block->attention_norm.weight, (float)block->attention_norm.eps, width, normal);
    const int code = products(
        (const linear_t *const[]){&block->q, &block->k, &block->v}, 3, normal, (uint16_t *const[]){q, k, v}, threads);
    free(normal);
    if (code) return code;
    turn(&block->q_norm, q, block->heads, block->dim, cos, sin);
    turn(&block->k_norm, k, block->kv_heads, block->dim, cos, sin);
    return 0;
}

static void add(const uint16_t *a, const uint16_t *b, int64_t n, uint16_t *out) {
    for (int64_t i = 0; i < n; i++) out[i] = to_bf16(from_bf16(a[i]) + from_bf16(b[i]));
}

/* y, what the block makes of the token x, from its query q (heads, dim) and all `tokens` keys and values
 * (kv_heads, tokens, dim), itself among them; strides: of head and token, of k, then of v. */
EXPORT int prunella_block_out(
    const block_t *block, const uint16_t *x, const uint16_t *q, const uint16_t *k, const uint16_t *v, int64_t tokens,
    const int64_t *strides, uint16_t *y, int threads) {
    const isa_t *isa = prunella_isa_in_use();
    const int64_t heads = block->heads, dim = block->dim, width = block->q.columns, inner = block->gate.rows;
    const int64_t longest = 2 * inner > heads * dim ? 2 * inner : heads * dim;
    threads = usable(threads);
    uint16_t *wide = malloc((size_t)(longest + 2 * width) * sizeof *wide);
    if (!wide) return -2;
    uint16_t *narrow = wide + longest, *sum = narrow + width;
    const attend_t attending = {
        .q = q, .k = k, .v = v, .out = wide, .batch = 1, .heads = heads, .kv_heads = block->kv_heads, .tokens = tokens,
        .dim = dim, .q_stride = {0, dim}, .k_stride = {0, strides[0], strides[1]},
        .v_stride = {0, strides[2], strides[3]}, .scale = (float)block->scale,
    };
    int code = prunella_run_attend(attending, threads);
    if (!code)
        code = products((const linear_t *const[]){&block->o}, 1, wide, (uint16_t *const[]){narrow}, threads);
    if (!code) {
        add(x, narrow, width, sum);
        isa->norm(sum, block->mlp_norm.weight, (float)block->mlp_norm.eps, width, narrow);
        code = products(
            (const linear_t *const[]){&block->gate, &block->up}, 2, narrow, (uint16_t *const[]){wide, wide + inner},
            threads);
    }
    if (!code) {
        isa->gated(wide, wide + inner, inner, wide);
        code = products((const linear_t *const[]){&block->down}, 1, wide, (uint16_t *const[]){narrow}, threads);
    }
    if (!code) add(sum, narrow, width, y);
    free(wide);
    return code;
}

/* A token x through `count` blocks of one width and dim, which follow each other: y (count, width), what each of them
 * makes of it. Behind the `tokens` keys and values in each block's room the token's own are written. */
EXPORT int prunella_blocks(
    const block_t *const *blocks, int64_t count, const uint16_t *x, const uint16_t *cos, const uint16_t *sin,
    const room_t *rooms, int64_t tokens, uint16_t *y, int threads) {
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        const block_t *block = blocks[i];
        if (block->q.columns != blocks[0]->q.columns || block->dim != blocks[0]->dim || tokens < 0) return -1;
        const int64_t size = (block->heads + 2 * block->kv_heads) * block->dim;
        most = size > most ? size : most;
    }
    uint16_t *q = malloc((size_t)(most ? most : 1) * sizeof *q);
    if (!q) return -2;
    int code = 0;
    for (int64_t i = 0; i < count && !code; i++) {
        const block_t *block = blocks[i];
        const room_t *room = &rooms[i];
        const int64_t dim = block->dim, *strides = room->strides;
        uint16_t *k = q + block->heads * dim, *v = k + block->kv_heads * dim;
        code = prunella_block_in(block, x, cos, sin, q, k, v, threads);
        for (int64_t h = 0; h < block->kv_heads && !code; h++) {
            memcpy(room->k + h * strides[0] + tokens * strides[1], k + h * dim, (size_t)dim * sizeof *k);
            memcpy(room->v + h * strides[2] + tokens * strides[3], v + h * dim, (size_t)dim * sizeof *v);
        }
        if (!code) code = prunella_block_out(block, x, q, room->k, room->v, tokens + 1, strides, y, threads);
        x = y;
        y += block->q.columns;
    }
    free(q);
    return code;
}
