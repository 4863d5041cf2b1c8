/* Random weights, sane and damaged, through every entry point of the kernels on every instruction set that this
 * processor has, in buffers of exactly the sizes that the format wants. AddressSanitizer watches. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "steps.h"

int prunella_plan(const step_t *const *steps, int64_t count, int threads);
int prunella_product(
    int32_t kind, int64_t rows, int64_t columns, const void *mask, const void *offsets, const void *values,
    int64_t count, const void *scales, int64_t group, const void *x, void *y, int32_t x_kind, int64_t tokens,
    int threads);
int prunella_expand(
    int32_t kind, int64_t rows, int64_t columns, const void *mask, const void *offsets, const void *values,
    int64_t count, const void *scales, int64_t group, int64_t first, int64_t last, void *y, int32_t y_kind,
    int threads);
int prunella_dense(
    int64_t rows, int64_t columns, const void *values, const void *x, void *y, int32_t x_kind, int64_t tokens,
    int threads);
int prunella_stream_available(void);
int prunella_attention(
    const void *q, const void *k, const void *v, void *out, float *lse, int64_t batch, int64_t heads, int64_t kv_heads,
    int64_t tokens, int64_t dim, const int64_t *strides, float scale, int threads);
int prunella_attention_back(
    const void *q, const void *k, const void *v, const void *grad, const float *lse, const float *delta, void *dq,
    void *dk, void *dv, int64_t batch, int64_t heads, int64_t kv_heads, int64_t tokens, int64_t dim,
    const int64_t *strides, float scale, int threads);
typedef struct {
    int64_t kind, rows, columns;
    void *mask, *offsets, *values;
    int64_t count;
    void *scales;
    int64_t group;
    void *bias;
} linear_t;
typedef struct {
    void *weight;
    double eps;
} norm_t;
typedef struct {
    linear_t part[7]; /* q, k, v, o, gate, up, down */
    norm_t norm[4];   /* before attention, before the MLP, of queries, of keys */
    int64_t heads, kv_heads, dim;
    double scale;
} block_t;
typedef struct {
    void *k, *v;
    int64_t strides[4];
} room_t;
int prunella_block_in(
    const block_t *block, const void *x, const void *cos, const void *sin, void *q, void *k, void *v, int threads);
int prunella_block_out(
    const block_t *block, const void *x, const void *q, const void *k, const void *v, int64_t tokens,
    const int64_t *strides, void *y, int threads);
int prunella_blocks(
    const block_t *const *blocks, int64_t count, const void *x, const void *cos, const void *sin, const room_t *rooms,
    int64_t tokens, void *y, int threads);
const char *prunella_isa(int i);
int prunella_use(const char *name);

static uint64_t state = 1;

static uint64_t next(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static void *noise(int64_t bytes, int how) {
    uint8_t *data = malloc((size_t)(bytes ? bytes : 1));
    for (int64_t i = 0; i < bytes; i++) data[i] = how == 0 ? 0 : how == 1 ? 255 : (uint8_t)(next() >> 24);
    return data;
}

/* Causal attention and its gradient, forwards on whatever bits there are. */
static int attention(void) {
    const int64_t batch = 1 + (int64_t)(next() % 2), kv = 1 + (int64_t)(next() % 3), heads = kv * (1 + (int64_t)(next() % 3));
    const int64_t tokens = 1 + (int64_t)(next() % 100), dim = 32 * (1 + (int64_t)(next() % 4));
    const int64_t most = batch * heads * tokens * dim * 2, few = batch * kv * tokens * dim * 2;
    const int64_t q[] = {heads * tokens * dim, tokens * dim, dim}, k[] = {kv * tokens * dim, tokens * dim, dim};
    const int64_t strides[] = {q[0], q[1], q[2], k[0], k[1], k[2], k[0], k[1], k[2], q[0], q[1], q[2]};
    void *in[] = {noise(most, 2), noise(few, 2), noise(few, 2), noise(most, 2)};
    void *out[] = {noise(most, 0), noise(few, 0), noise(few, 0), noise(most, 0)};
    float *lse = noise(batch * heads * tokens * 4, 0), *delta = noise(batch * heads * tokens * 4, 2);
    const int failed =
        prunella_attention(in[0], in[1], in[2], out[3], lse, batch, heads, kv, tokens, dim, strides, 0.1f, 1) ||
        prunella_attention_back(in[0], in[1], in[2], in[3], lse, delta, out[0], out[1], out[2], batch, heads, kv, tokens,
                                dim, strides, 0.1f, 1) ||
        prunella_attention(in[0], in[1], in[2], out[3], lse, batch, heads, kv, tokens, 31, strides, 0.1f, 1) != -1;
    for (int i = 0; i < 4; i++) free(in[i]), free(out[i]);
    free(lse), free(delta);
    return failed;
}

/* A weight in strips, of random values: rows that keep nothing and rows that keep all among them. */
static striped_t striped(int64_t rows, int64_t channels, int64_t places) {
    const int64_t columns = channels * places, strip = places * (1 + (int64_t)(next() % (uint64_t)(256 / places)));
    striped_t w = {rows, columns, strip, (columns + strip - 1) / strip, NULL, NULL, NULL, NULL};
    uint8_t *index = malloc((size_t)(rows * columns));
    int32_t *starts = malloc((size_t)(rows * (w.strips + 1)) * sizeof *starts), count = 0;
    for (int64_t r = 0; r < rows; r++) {
        const uint64_t of_16 = next() % 4 ? next() % 17 : next() % 2 * 16;
        for (int64_t i = 0; i < columns; i++) {
            if (i % strip == 0) starts[r * (w.strips + 1) + i / strip] = count;
            if (next() % 16 < of_16) index[count++] = (uint8_t)(i % strip);
        }
        starts[r * (w.strips + 1) + w.strips] = count;
    }
    w.index = realloc(index, (size_t)(count ? count : 1)); /* of exactly this size */
    w.values = noise(count * 4, next() % 4 ? 2 : 0);
    w.starts = starts;
    return w;
}

/* Products and convolutions of many positions, on whatever bits there are, on the instruction set in use. */
static int positions(void) {
    const int64_t groups = 1 + (int64_t)(next() % 3), kernel[] = {1 + (int64_t)(next() % 4), 1 + (int64_t)(next() % 4)};
    const int64_t rows = groups * (1 + (int64_t)(next() % 40)), channels = 1 + (int64_t)(next() % 60);
    striped_t one = striped(rows, channels * 5, 1), other = striped(rows, channels, kernel[0] * kernel[1]);
    float *scale = next() % 2 ? noise(rows * 4, 2) : NULL, *bias = next() % 2 ? noise(rows * 4, 2) : NULL;
    const int64_t act = (int64_t)(next() % ACTS), count = 1 + (int64_t)(next() % 300), last = (int64_t)(next() % 2);
    const int64_t ld = (count + 15) / 16 * 16 + 16 * (int64_t)(next() % 2), more = (int64_t)(next() % 2);
    float *x = noise(channels * 5 * ld * 4, 2), *y = noise(rows * ld * 4, 0), *residual = noise(rows * ld * 4, 2);
    const product_step_t product = {STEP_PRODUCT, &one, scale, bias, x, ld, y, ld, more ? residual : NULL, ld, last, act, count};
    conv_step_t c = {.kind = STEP_CONV, .weight = &other, .scale = scale, .bias = bias, .residual_last = last, .act = act};
    int64_t size[2], out[2];
    for (int i = 0; i < 2; i++) {
        c.kernel[i] = kernel[i], c.stride[i] = 1 + (int64_t)(next() % 3), c.dilation[i] = 1 + (int64_t)(next() % 3);
        c.pad[i] = (int64_t)(next() % 6);
        const int64_t reach = (kernel[i] - 1) * c.dilation[i] - 2 * c.pad[i];
        size[i] = (reach < 0 ? 0 : reach) + 1 + (int64_t)(next() % 20);
        out[i] = (size[i] + 2 * c.pad[i] - (kernel[i] - 1) * c.dilation[i] - 1) / c.stride[i] + 1;
    }
    const int64_t area = size[0] * size[1], made = out[0] * out[1], nchw = (int64_t)(next() % 2);
    c.batch = (int64_t)(next() % 4), c.groups = groups, c.channels = channels * groups, c.rows = rows;
    c.height = size[0], c.width = size[1], c.out_height = out[0], c.out_width = out[1];
    c.x_ld = nchw ? area : c.batch * area, c.x_batch = nchw ? c.channels * area : area;
    c.y_ld = c.residual_ld = nchw ? made : c.batch * made, c.y_batch = c.residual_batch = nchw ? rows * made : made;
    float *pictures = noise(c.batch * c.channels * area * 4, 2), *results = noise(c.batch * rows * made * 4, 0);
    float *added = noise(c.batch * rows * made * 4, 2);
    c.x = pictures, c.y = results, c.residual = more ? added : NULL;
    const step_t *const steps[] = {(const step_t *)&product, (const step_t *)&c}, unknown = {STEPS};
    const step_t *const wrong[] = {&unknown};
    const int failed = prunella_plan(steps, 2, 1) || prunella_plan(wrong, 1, 1) != -1;
    free((void *)one.values), free((void *)one.index), free((void *)one.starts);
    free((void *)other.values), free((void *)other.index), free((void *)other.starts);
    free(scale), free(bias), free(x), free(y), free(residual), free(pictures), free(results), free(added);
    return failed;
}

/* One token through a block of damaged weights, on the instruction set in use. */
static int block(void) {
    const int64_t kv = 1 + (int64_t)(next() % 3), heads = kv * (1 + (int64_t)(next() % 3)), dim = 2 * (1 + (int64_t)(next() % 20));
    const int64_t width = 1 + (int64_t)(next() % 300), inner = 1 + (int64_t)(next() % 300), tokens = 1 + (int64_t)(next() % 9);
    const int64_t rows[] = {heads * dim, kv * dim, kv * dim, width, inner, inner, width};
    const int64_t columns[] = {width, width, width, heads * dim, width, width, inner};
    static const int64_t kinds[] = {1, 3, 4};
    block_t b = {.heads = heads, .kv_heads = kv, .dim = dim, .scale = 0.1}, other = b;
    for (int i = 0; i < 7; i++) {
        const int64_t kind = kinds[next() % 3], words = (columns[i] + 63) / 64;
        linear_t *part = &b.part[i];
        *part = (linear_t){.kind = kind, .rows = rows[i], .columns = columns[i]};
        if (next() % 2) part->bias = noise(rows[i] * 2, 2);
        if (next() % 4 == 0) {
            part->values = noise(rows[i] * columns[i] * 2, 2);
            continue;
        }
        part->count = (int64_t)(next() % (uint64_t)(rows[i] * columns[i] + 1)) & -2;
        part->mask = noise(rows[i] * words * 8, (int)(next() % 4));
        part->offsets = noise((rows[i] + 1) * 4, 2);
        part->values = noise(kind == 1 ? 2 * (part->count + 128) : kind == 3 ? part->count + 128 : (part->count + 128) / 2, 2);
        part->group = kind == 1 ? 0 : 128;
        part->scales = kind == 1 ? NULL : noise(rows[i] * ((columns[i] + 127) / 128) * 2, 2);
    }
    const int64_t sizes[] = {width, width, dim, dim};
    for (int i = 0; i < 4; i++) b.norm[i] = (norm_t){i < 2 || next() % 2 ? noise(sizes[i] * 2, 2) : NULL, 1e-6};
    void *x = noise(width * 2, 2), *cos = noise(dim * 2, 2), *sin = noise(dim * 2, 2), *y = noise(3 * width * 2, 0);
    void *q = noise(heads * dim * 2, 0), *k = noise(kv * dim * 2, 0), *v = noise(kv * dim * 2, 0);
    void *keys = noise(kv * tokens * dim * 2, 2), *values = noise(kv * tokens * dim * 2, 2);
    const int64_t strides[] = {tokens * dim, dim, tokens * dim, dim};
    const block_t *const blocks[] = {&b, &b, &b}, *const unlike[] = {&b, &other};
    const room_t room = {keys, values, {tokens * dim, dim, tokens * dim, dim}}, rooms[] = {room, room, room};
    const int failed = prunella_block_in(&b, x, cos, sin, q, k, v, 1) ||
                       prunella_block_out(&b, x, q, keys, values, tokens, strides, y, 1) ||
                       prunella_block_out(&b, x, q, keys, values, 0, strides, y, 1) != -1 ||
                       prunella_blocks(blocks, 3, x, cos, sin, rooms, tokens - 1, y, 1) ||
                       prunella_blocks(blocks, 0, x, cos, sin, rooms, 0, y, 1) ||
                       prunella_blocks(unlike, 2, x, cos, sin, rooms, 0, y, 1) != -1;
    for (int i = 0; i < 7; i++)
        free(b.part[i].mask), free(b.part[i].offsets), free(b.part[i].values), free(b.part[i].scales), free(b.part[i].bias);
    for (int i = 0; i < 4; i++) free(b.norm[i].weight);
    free(x), free(cos), free(sin), free(y), free(q), free(k), free(v), free(keys), free(values);
    return failed;
}

int main(int argc, char **argv) {
    const int runs = argc > 1 ? atoi(argv[1]) : 100;
    static const int64_t size[] = {4, 2, 2};
    for (int run = 0; run < runs; run++) {
        const int32_t kind = (int32_t)(next() % 5), x_kind = (int32_t)(next() % 3);
        const int64_t rows = 1 + (int64_t)(next() % 12), columns = 1 + (int64_t)(next() % 700);
        const int64_t count = (int64_t)(next() % (uint64_t)(rows * columns + 1)), words = (columns + 63) / 64;
        const int64_t tokens = 1 + (int64_t)(next() % 18), group = 128 * (1 + (int64_t)(next() % 3));
        const int64_t length = count + 128;
        const int64_t even = kind == 4 ? count & -2 : count;
        const int64_t bytes = kind == 0 ? 4 * length : kind < 3 ? 2 * length : kind == 3 ? length : (even + 128) / 2;
        const int64_t groups = (columns + group - 1) / group;
        void *mask = noise(rows * words * 8, (int)(next() % 4)), *values = noise(bytes, 2);
        int32_t *offsets = noise((rows + 1) * 4, 2);
        if (next() % 2)
            for (int64_t r = 0; r <= rows; r++) offsets[r] = (int32_t)(count * r / rows);
        void *scales = kind < 3 ? NULL : noise(rows * groups * 2, 2);
        void *x = noise(tokens * columns * size[x_kind], 2), *y = noise(tokens * rows * 4, 0);
        void *dense = noise(rows * columns * 4, 2);
        for (int i = 0; prunella_isa(i); i++) {
            if (prunella_use(prunella_isa(i)) < 0) continue;
            const int64_t first = (int64_t)(next() % (uint64_t)rows);
            if (prunella_product(kind, rows, columns, mask, offsets, values, even, scales, group, x, y, x_kind,
                                 tokens, 1) ||
                prunella_expand(kind, rows, columns, mask, offsets, values, even, scales, group, first, rows, dense,
                                x_kind, 1) ||
                prunella_dense(rows, columns, dense, x, y, x_kind, tokens, 1))
                return 1;
            if (block()) return 4;
            if (positions()) return 6;
            /* nothing left out: bytes with scales, and no more of them than there are weights */
            void *bytes_of = noise(rows * columns, 2), *of_rows = noise(rows * groups * 2, 2);
            if (prunella_product(3, rows, columns, NULL, NULL, bytes_of, rows * columns, of_rows, group, x, y, x_kind,
                                 tokens, 1) ||
                prunella_expand(3, rows, columns, NULL, NULL, bytes_of, rows * columns, of_rows, group, first, rows,
                                dense, x_kind, 1))
                return 5;
            free(bytes_of), free(of_rows);
        }
        /* what makes no sense is refused */
        if (prunella_product(7, rows, columns, mask, offsets, values, even, scales, group, x, y, x_kind, 1, 1) != -1 ||
            prunella_product(3, rows, columns, mask, offsets, values, even, NULL, group, x, y, x_kind, 1, 1) != -1 ||
            prunella_product(3, rows, columns, NULL, NULL, values, rows * columns - 1, x, group, x, y, x_kind, 1, 1) != -1 ||
            prunella_product(1, rows, columns, NULL, NULL, values, rows * columns, NULL, group, x, y, x_kind, 1, 1) != -1 ||
            prunella_product(3, rows, columns, NULL, offsets, values, rows * columns, x, group, x, y, x_kind, 1, 1) != -1 ||
            prunella_expand(0, rows, columns, mask, offsets, values, even, NULL, 0, 0, rows + 1, dense, 0, 1) != -1)
            return 2;
        if (prunella_stream_available() && attention()) return 3;
        free(mask), free(values), free(offsets), free(scales), free(x), free(y), free(dense);
    }
    printf("%d weights\n", runs);
    return 0;
}
