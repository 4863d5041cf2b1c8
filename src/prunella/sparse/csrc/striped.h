/* Products of pruned weights with many positions, and convolutions: written once for the vectors of lanes_*.h.
 *
 * An item of work is a tile of POSITIONS positions and a range of rows. For each strip of columns the tile's inputs are
 * copied side by side into a panel that stays in the first cache; then every kept weight of a row is spread over a vector
 * and multiplied with the panel's row of its column, the sums of all positions in registers. Sums wait between the strips
 * in `sums`, in the second cache.
 *
 * What is left out is a zero, and a zero times NaN or infinity is NaN: where a panel holds one of these, its columns that a
 * row left out are multiplied too.
 *
 * A convolution is the same with a column for each channel and place of the kernel. Its positions are those of `pitch`
 * columns and `planes` rows a picture, as large as the output and, where that saves zeros between rows, a little larger;
 * what falls outside of the output is dropped at the end.
 */
enum { STRIPED_VECTORS = 8, POSITIONS = STRIPED_VECTORS * LANES, STRIPED_ROWS = 768 };

typedef struct {
    const striped_t *w;
    const float *scale, *bias, *x, *residual;
    float *y;
    int64_t x_ld, y_ld, residual_ld, residual_last, act;
    int64_t positions; /* that are computed */
    int64_t parts;     /* of the rows of a group, alike in kept weights */
    int64_t groups;
    const conv_step_t *conv; /* NULL: a product */
    int64_t pitch, planes;   /* a convolution: positions in a row, rows in a picture */
    float *scratch; /* of a worker: the panel, `flat` floats for a part of a padded picture, the sums */
    int64_t scratch_size, flat;
} NAME(striped_job_t);

INLINE int64_t NAME(least)(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t NAME(most)(int64_t a, int64_t b) { return a > b ? a : b; }

/* The last step of n results of a row: y = act(scale sums + bias + residual). Out of line, since it is long and seldom much
 * of the work. */
static TARGET __attribute__((noinline)) void NAME(striped_finish)(
    const NAME(striped_job_t) *job, int64_t row, int64_t n, const float *sums, const float *residual, float *y) {
    const lanes_t scale = all(job->scale ? job->scale[row] : 1), bias = all(job->scale && job->bias ? job->bias[row] : 0);
    const int64_t act = job->act;
    for (int64_t i = 0; i < n; i += LANES) {
        lanes_t x = load_first(sums + i, n - i);
        if (job->scale) x = muladd(x, scale, bias);
        if (residual && !job->residual_last) x = add(x, load_first(residual + i, n - i));
        x = activated(act, x);
        if (residual && job->residual_last) x = add(x, load_first(residual + i, n - i));
        store_first(y + i, x, n - i);
    }
}

/* sums += 0 x for the columns of a strip that a row left out. */
static TARGET __attribute__((noinline)) void NAME(striped_zeros)(
    const striped_t *w, int64_t strip, int64_t row, int64_t count, const float *panel, float *sums) {
    const int32_t *starts = w->starts + row * (w->strips + 1) + strip;
    const int64_t columns = NAME(least)(w->strip, w->columns - strip * w->strip);
    int32_t k = starts[0];
    for (int64_t i = 0; i < columns; i++, panel += count) {
        if (k < starts[1] && w->index[k] == i) {
            k++;
            continue;
        }
        for (int64_t v = 0; v < count; v += LANES) store(sums + v, muladd(all(0), load(panel + v), load(sums + v)));
    }
}

/* One strip of columns for rows [first, last) and V vectors of positions from `at` on. Where `direct`, the last strip
 * writes into y, else the sums stay in `sums`. wild: there are NaNs or infinities in the panel. */
INLINE void NAME(striped_strip)(
    const NAME(striped_job_t) *job, int64_t strip, int64_t first, int64_t last, const float *panel, float *sums,
    int64_t at, int wild, const int direct, const int V) {
    const striped_t *w = job->w;
    const int end = strip == w->strips - 1;
    const int32_t *starts = w->starts + first * (w->strips + 1) + strip;
    for (int64_t row = first; row < last; row++, starts += w->strips + 1, sums += V * LANES) {
        lanes_t sum[STRIPED_VECTORS];
        const int32_t stop = starts[1];
        if (row + 1 < last) { /* the next row's sums and values, which the processor does not foresee */
            const int32_t next = starts[w->strips + 1];
            _Pragma("GCC unroll 8") for (int v = 0; v < V; v++)
                __builtin_prefetch(sums + V * LANES + v * LANES, 1);
            __builtin_prefetch(w->values + next);
            __builtin_prefetch(w->index + next);
        }
        if (strip) {
            _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) sum[v] = load(sums + v * LANES);
        } else {
            const lanes_t bias = all(job->bias && !job->scale ? job->bias[row] : 0);
            _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) sum[v] = bias;
        }
        for (int32_t k = starts[0]; k < stop; k++) {
            const float *x = panel + (int64_t)w->index[k] * (V * LANES);
            const lanes_t weight = all(w->values[k]);
            _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) sum[v] = muladd(weight, load(x + v * LANES), sum[v]);
        }
        if (wild) {
            float wait[POSITIONS];
            _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) store(wait + v * LANES, sum[v]);
            NAME(striped_zeros)(w, strip, row, V * LANES, panel, wait);
            _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) sum[v] = load(wait + v * LANES);
        }
        if (end && direct) {
            float *y = job->y + row * job->y_ld + at;
            _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) store(y + v * LANES, sum[v]);
            if (job->act || job->residual || job->scale)
                NAME(striped_finish)(
                    job, row, V * LANES, y, job->residual ? job->residual + row * job->residual_ld + at : NULL, y);
        } else {
            _Pragma("GCC unroll 8") for (int v = 0; v < V; v++) store(sums + v * LANES, sum[v]);
        }
    }
}

#define STRIPED_CASE(V)                                                                                       \
    case V:                                                                                                \
        if (direct)                                                                                        \
            NAME(striped_strip)(job, strip, first, last, panel, sums, at, wild, 1, V);                              \
        else                                                                                               \
            NAME(striped_strip)(job, strip, first, last, panel, sums, at, wild, 0, V);                              \
        break;

static TARGET __attribute__((noinline)) void NAME(striped_rows)(
    const NAME(striped_job_t) *job, int64_t strip, int64_t first, int64_t last, const float *panel, float *sums,
    int64_t at, int wild, int direct, int64_t vectors) {
    switch (vectors) {
        STRIPED_CASE(1) STRIPED_CASE(2) STRIPED_CASE(3) STRIPED_CASE(4) STRIPED_CASE(5) STRIPED_CASE(6) STRIPED_CASE(7) STRIPED_CASE(8)
    }
}

/* ------------------------------------------------------------------ panels */

enum { WATCHES = 4 };

/* watch += 0 x: no longer 0 where NaN or infinity was among n elements. */
INLINE void NAME(look)(const float *x, int64_t n, lanes_t *watch) {
    int64_t i = 0;
    for (; i + WATCHES * LANES <= n; i += WATCHES * LANES)
        _Pragma("GCC unroll 4") for (int u = 0; u < WATCHES; u++)
            watch[u] = muladd(all(0), load(x + i + u * LANES), watch[u]);
    for (; i < n; i += LANES) watch[0] = muladd(all(0), load_first(x + i, n - i), watch[0]);
}

INLINE int NAME(seen)(const lanes_t *watch) {
    float each[LANES];
    int wild = 0;
    store(each, add(add(watch[0], watch[1]), add(watch[2], watch[3])));
    for (int i = 0; i < LANES; i++) wild |= each[i] != 0;
    return wild;
}

/* The panel of a product's columns: `count` positions of each, zeros from `rest` on. */
INLINE void NAME(fetch_columns)(
    const float *x, int64_t x_ld, int64_t columns, int64_t rest, float *panel, const int64_t count, lanes_t *watch) {
    for (int64_t i = 0; i < columns; i++, x += x_ld, panel += count)
        _Pragma("GCC unroll 8") for (int64_t v = 0; v < count; v += LANES) {
            const lanes_t here =
                v + LANES <= rest ? load(x + v) : v < rest ? load_first(x + v, rest - v) : all(0);
            store(panel + v, here);
            watch[v / LANES % WATCHES] = muladd(all(0), here, watch[v / LANES % WATCHES]);
        }
}

/* `count` elements of row `y` of a picture's channel into `to`, the first being column `x`, then every `step`th; zeros
 * outside of the picture. */
INLINE void NAME(fetch_row)(const conv_step_t *c, const float *plane, int64_t y, int64_t x, int64_t count, float *to) {
    const int64_t step = c->stride[1];
    if (y < 0 || y >= c->height) {
        for (int64_t i = 0; i < count; i++) to[i] = 0;
        return;
    }
    const float *row = plane + y * c->width;
    int64_t i = 0, inside = x < c->width ? NAME(least)(count, (c->width - x + step - 1) / step) : 0;
    for (; i < count && x + i * step < 0; i++) to[i] = 0;
    if (step == 1) {
        for (; i + LANES <= inside; i += LANES) store(to + i, load(row + x + i));
        if (i < inside) {
            store_first(to + i, load_first(row + x + i, inside - i), inside - i);
            i = inside;
        }
    } else
        for (; i < inside; i++) to[i] = row[x + i * step];
    for (; i < count; i++) to[i] = 0;
}

/* The panel of one channel: for each place of the kernel, `step` apart, the inputs of `count` positions from `at` on, `tile`
 * of them side by side and the next ones `next` further on. The part of the padded picture that belongs to them is made once
 * for each of the strides' phases, so that a place is a piece of it. */
INLINE void NAME(fetch_channel)(
    const NAME(striped_job_t) *job, const float *x, int64_t at, int64_t count, float *flat, float *panel, int64_t step,
    int64_t tile, int64_t next, lanes_t *watch) {
    const conv_step_t *c = job->conv;
    const int64_t pitch = job->pitch, size = job->planes * pitch;
    const int64_t reach_y = (c->kernel[0] - 1) * c->dilation[0], reach_x = (c->kernel[1] - 1) * c->dilation[1];
    for (int64_t phase_y = 0; phase_y < NAME(least)(c->stride[0], reach_y + 1); phase_y++)
        for (int64_t phase_x = 0; phase_x < NAME(least)(c->stride[1], reach_x + 1); phase_x++) {
            const int64_t down = (reach_y - phase_y) / c->stride[0], right = (reach_x - phase_x) / c->stride[1];
            const int64_t length = count + down * pitch + right;
            int used = 0;
            for (int64_t i = 0; i < c->kernel[0]; i++)
                for (int64_t j = 0; j < c->kernel[1]; j++)
                    used |= i * c->dilation[0] % c->stride[0] == phase_y && j * c->dilation[1] % c->stride[1] == phase_x;
            if (!used) continue;
            /* element e of the flat planes is column e % pitch of row e / pitch, counted through all pictures */
            for (int64_t e = 0; e < length;) {
                const int64_t picture = (at + e) / size, row = (at + e) % size / pitch, column = (at + e) % pitch;
                const int64_t run = NAME(least)(length - e, pitch - column);
                const int inside = picture < c->batch;
                NAME(fetch_row)(
                    c, x + (inside ? picture : 0) * c->x_batch, inside ? row * c->stride[0] + phase_y - c->pad[0] : -1,
                    column * c->stride[1] + phase_x - c->pad[1], run, flat + e);
                e += run;
            }
            NAME(look)(flat, length, watch);
            for (int64_t i = 0; i < c->kernel[0]; i++)
                for (int64_t j = 0; j < c->kernel[1]; j++) {
                    const int64_t y = i * c->dilation[0], z = j * c->dilation[1];
                    if (y % c->stride[0] != phase_y || z % c->stride[1] != phase_x) continue;
                    const float *from = flat + y / c->stride[0] * pitch + z / c->stride[1];
                    float *to = panel + (i * c->kernel[1] + j) * step;
                    for (int64_t t = 0; t < count; t += tile, from += tile, to += next)
                        for (int64_t v = 0; v < tile; v += LANES) store(to + v, load(from + v));
                }
        }
}

/* The results of rows [first, last) and the tile of `count` positions from `at` on, whose sums lie `stride` apart. */
static TARGET void NAME(finish_tile)(
    const NAME(striped_job_t) *job, int64_t at, int64_t count, int64_t stride, int64_t first, int64_t last,
    const float *sums) {
    const conv_step_t *c = job->conv;
    if (!c) {
        for (int64_t r = first; r < last; r++)
            NAME(striped_finish)(
                job, r, count, sums + (r - first) * stride,
                job->residual ? job->residual + r * job->residual_ld + at : NULL, job->y + r * job->y_ld + at);
        return;
    }
    const int64_t size = job->planes * job->pitch;
    for (int64_t e = 0; e < count;) { /* the pieces of rows that are in the output */
        const int64_t picture = (at + e) / size, row = (at + e) % size / job->pitch, column = (at + e) % job->pitch;
        const int64_t run = NAME(least)(count - e, job->pitch - column);
        const int64_t piece = NAME(least)(run, c->out_width - column), to = row * c->out_width + column;
        if (picture < c->batch && row < c->out_height)
            for (int64_t r = first; piece > 0 && r < last; r++)
                NAME(striped_finish)(
                    job, r, piece, sums + (r - first) * stride + e,
                    job->residual ? job->residual + r * job->residual_ld + picture * c->residual_batch + to : NULL,
                    job->y + r * job->y_ld + picture * c->y_batch + to);
        e += run;
    }
}

/* ------------------------------------------------------------------ items of work */

/* The first row of part p of a group whose rows are [begin, end): parts are alike in kept weights. */
INLINE int64_t NAME(part_begin)(const NAME(striped_job_t) *job, int64_t begin, int64_t end, int64_t p) {
    const striped_t *w = job->w;
    const int64_t step = w->strips + 1, from = w->starts[begin * step], to = w->starts[(end - 1) * step + w->strips];
    const int64_t wanted = from + (to - from) * p / job->parts;
    if (!p) return begin;
    if (p == job->parts) return end;
    int64_t low = begin, high = end;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (w->starts[middle * step] < wanted) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* An item of work: tiles of `wide` positions, of each group of rows all parts. */
typedef struct {
    int64_t at, group, part;  /* the tile's first position, the group of rows and the part of it */
    int64_t rows;             /* in a group */
    int64_t places, channels; /* of a kernel; that go into a strip */
    float *panel;
} NAME(striped_item_t);

INLINE NAME(striped_item_t) NAME(item_of)(const NAME(striped_job_t) *job, int64_t item, int worker, int64_t wide) {
    const int64_t places = job->conv ? job->conv->kernel[0] * job->conv->kernel[1] : 1;
    return (NAME(striped_item_t)){
        .at = item / job->parts / job->groups * wide,
        .group = item / job->parts % job->groups,
        .part = item % job->parts,
        .rows = job->w->rows / job->groups,
        .places = places,
        .channels = job->w->strip / places,
        .panel = (float *)((uint8_t *)job->scratch + worker * job->scratch_size),
    };
}

/* The first input of a strip of an item. */
INLINE const float *NAME(inputs_of)(const NAME(striped_job_t) *job, const NAME(striped_item_t) *it, int64_t strip) {
    return job->x + (it->group * job->w->columns / it->places + strip * it->channels) * job->x_ld;
}

static TARGET void NAME(striped_item)(const void *data, int64_t item, int worker) {
    const NAME(striped_job_t) *job = data;
    const conv_step_t *c = job->conv;
    const striped_t *w = job->w;
    const NAME(striped_item_t) it = NAME(item_of)(job, item, worker, POSITIONS);
    const int64_t at = it.at, from = it.group * it.rows;
    const int64_t begin = NAME(part_begin)(job, from, from + it.rows, it.part);
    const int64_t end = NAME(part_begin)(job, from, from + it.rows, it.part + 1);
    const int64_t vectors = NAME(least)(STRIPED_VECTORS, (job->positions - at + LANES - 1) / LANES), count = vectors * LANES;
    float *panel = it.panel, *flat = panel + w->strip * POSITIONS;
    for (int64_t first = begin; first < end; first += STRIPED_ROWS) {
        const int64_t last = NAME(least)(end, first + STRIPED_ROWS);
        float *sums = flat + job->flat;
        for (int64_t strip = 0; strip < w->strips; strip++) {
            const int64_t columns = NAME(least)(w->strip, w->columns - strip * w->strip);
            const float *x = NAME(inputs_of)(job, &it, strip);
            lanes_t watch[WATCHES] = {all(0), all(0), all(0), all(0)};
            if (c) {
                const int64_t here = columns / it.places;
                for (int64_t i = 0; i < here; i++)
                    NAME(fetch_channel)(
                        job, x + i * job->x_ld, at, count, flat, panel + i * count, here * count, count, 0, watch);
            } else if (at + POSITIONS <= job->positions)
                NAME(fetch_columns)(x + at, job->x_ld, columns, POSITIONS, panel, POSITIONS, watch);
            else
                NAME(fetch_columns)(x + at, job->x_ld, columns, job->positions - at, panel, count, watch);
            NAME(striped_rows)(job, strip, first, last, panel, sums, at, NAME(seen)(watch), !c, vectors);
        }
        if (c) NAME(finish_tile)(job, at, count, count, first, last, sums);
    }
}

/* ------------------------------------------------------------------ by code of its own */

enum { CODE_TILE = 16, CODE_MOST = 27 }; /* positions that code takes at a time; blocks of rows whose sums fit the cache */

/* Fetch part t of the code and values that come next, which the processor does not foresee, into the second cache. */
INLINE void NAME(foresee)(const code_t *next, int64_t t, int64_t parts) {
    const char *from[2] = {(const char *)next->run, (const char *)next->values};
    const int64_t size[2] = {(const char *)next[1].run - from[0], (const char *)next[1].values - from[1]};
    for (int i = 0; i < 2; i++)
        for (int64_t at = size[i] * t / parts & ~63, end = size[i] * (t + 1) / parts; at < end; at += 64)
            __builtin_prefetch(from[i] + at, 0, 2);
}

/* wild += 0 x for the positions of a panel. */
static TARGET __attribute__((noinline)) void NAME(look_closely)(
    const float *panel, int64_t columns, int64_t tiles, float *wild) {
    for (int64_t t = 0; t < tiles; t++)
        for (int64_t i = 0; i < columns; i++)
            for (int64_t v = 0; v < CODE_TILE; v += LANES, panel += LANES)
                store(wild + t * CODE_TILE + v, muladd(all(0), load(panel), load(wild + t * CODE_TILE + v)));
}

/* As above, with code: a tile has CODE_SUMS positions, its panel lies in pieces (columns, CODE_TILE). Products are summed
 * in y itself, convolutions in `sums`. Which weights are left out is not known here: where an input is NaN or infinite, all
 * results of its position become NaN. */
static TARGET void NAME(coded_item)(const void *data, int64_t item, int worker) {
    static const float zeros[CODE_ROWS] = {0};
    const NAME(striped_job_t) *job = data;
    const conv_step_t *c = job->conv;
    const striped_t *w = job->w;
    const NAME(striped_item_t) it = NAME(item_of)(job, item, worker, CODE_SUMS);
    const int64_t at = it.at, group = it.group, rows = it.rows, blocks = (rows + CODE_ROWS - 1) / CODE_ROWS;
    const int64_t begin = blocks * it.part / job->parts, end = blocks * (it.part + 1) / job->parts;
    const int64_t tiles = NAME(least)(CODE_SUMS / CODE_TILE, (job->positions - at + CODE_TILE - 1) / CODE_TILE);
    const int64_t count = tiles * CODE_TILE, stride = c ? CODE_SUMS : job->y_ld;
    const int apart = (w->ends & CODE_APART) != 0;
    float *panel = it.panel, *flat = panel + w->strip * CODE_SUMS, *sums = flat + job->flat;
    for (int64_t first = begin; first < end; first += CODE_MOST) {
        const int64_t last = NAME(least)(end, first + CODE_MOST), from = group * rows + first * CODE_ROWS;
        const int64_t to = NAME(least)((group + 1) * rows, group * rows + last * CODE_ROWS);
        float *y = c ? sums : job->y + from * stride + at, wild[CODE_SUMS] = {0};
        const float *residual = c || !job->residual ? NULL : job->residual + from * job->residual_ld + at;
        int any = 0;
        for (int64_t strip = 0; strip < w->strips; strip++) {
            const int64_t columns = NAME(least)(w->strip, w->columns - strip * w->strip);
            const float *x = NAME(inputs_of)(job, &it, strip);
            lanes_t watch[WATCHES] = {all(0), all(0), all(0), all(0)};
            if (c) {
                const int64_t here = columns / it.places;
                for (int64_t i = 0; i < here; i++)
                    NAME(fetch_channel)(
                        job, x + i * job->x_ld, at, count, flat, panel + i * CODE_TILE, here * CODE_TILE, CODE_TILE,
                        columns * CODE_TILE, watch);
            } else if (apart)
                for (int64_t i = 0; i < columns; i++)
                    NAME(look)(x + i * job->x_ld + at, NAME(least)(count, job->positions - at), watch);
            else
                for (int64_t i = 0; i < columns; i++)
                    for (int64_t t = 0; t < tiles; t++)
                        NAME(fetch_columns)(
                            x + i * job->x_ld + at + t * CODE_TILE, 0, 1, job->positions - at - t * CODE_TILE,
                            panel + (t * columns + i) * CODE_TILE, CODE_TILE, watch);
            if (NAME(seen)(watch)) {
                any = 1;
                if (apart)
                    for (int64_t i = 0; i < columns; i++)
                        for (int64_t t = 0; t < count; t++) wild[t] += 0 * x[i * job->x_ld + at + t];
                else
                    NAME(look_closely)(panel, columns, tiles, wild);
            }
            for (int64_t b = first; b < last; b++) {
                const code_t *code = w->code + (group * blocks + b) * w->strips + strip;
                const code_t *next = b + 1 < last ? code + w->strips : code + (strip + 1 < w->strips) - (b - first) * w->strips;
                const int64_t row = (b - first) * CODE_ROWS;
                for (int64_t t = 0; t < tiles; t++) {
                    NAME(foresee)(next, t, tiles);
                    code->run(
                        apart ? x + at + t * CODE_TILE : panel + t * columns * CODE_TILE, y + row * stride + t * CODE_TILE,
                        code->values, job->bias ? job->bias + from + row : zeros, stride * (int64_t)sizeof(float),
                        residual ? residual + row * stride + t * CODE_TILE : NULL, job->x_ld * (int64_t)sizeof(float));
                }
            }
        }
        for (int64_t r = 0; any && r < to - from; r++)
            for (int64_t t = 0; t < count; t++) y[r * stride + t] += wild[t];
        NAME(striped_job_t) rest = *job; /* what the code did not do */
        if (w->ends & (CODE_RELU | CODE_RELU6)) rest.act = ACT_NONE;
        if (w->ends & CODE_RESIDUAL) rest.residual = NULL;
        if (c || rest.act || rest.residual) NAME(finish_tile)(&rest, at, count, stride, from, to, y);
    }
}

/* Does the code do what the step wants? */
static TARGET int NAME(agree)(const NAME(striped_job_t) *job) {
    const int64_t ends = job->w->ends;
    return !job->scale && (!(ends & CODE_RELU) || job->act == ACT_RELU) && (!(ends & CODE_RELU6) || job->act == ACT_RELU6) &&
           (!(ends & CODE_RESIDUAL) || (job->residual && job->residual_ld == job->y_ld && !(job->act && job->residual_last))) &&
           (!job->conv || !ends);
}

static TARGET int NAME(striped_run)(NAME(striped_job_t) *job, int threads) {
    const int64_t rows = job->w->rows / job->groups, wide = job->w->code ? CODE_SUMS : POSITIONS;
    const int64_t items = (job->positions + wide - 1) / wide * job->groups;
    if (!job->positions || !rows) return 0;
    int64_t high = NAME(least)(rows, STRIPED_ROWS);
    if (job->w->code && !NAME(agree)(job)) return -1;
    if (job->w->code) {
        const int64_t blocks = (rows + CODE_ROWS - 1) / CODE_ROWS;
        job->parts = (blocks + CODE_MOST - 1) / CODE_MOST;
        if (threads > 1 && items < 2 * threads)
            job->parts = NAME(most)(job->parts, NAME(least)(blocks, (2 * threads + items - 1) / items));
        high = NAME(least)(blocks, CODE_MOST) * CODE_ROWS;
    } else {
        job->parts = (rows + STRIPED_ROWS - 1) / STRIPED_ROWS;
        if (threads > 1 && items < 4 * threads) /* enough to share out, of at least 16 rows */
            job->parts = NAME(most)(job->parts, NAME(least)(rows / 16, (4 * threads + items - 1) / items));
    }
    if (job->conv) {
        const conv_step_t *c = job->conv;
        job->flat = wide + ((c->kernel[0] - 1) * c->dilation[0] / c->stride[0] + 1) * job->pitch +
                    (c->kernel[1] - 1) * c->dilation[1] / c->stride[1];
        job->flat = (job->flat + 2 * LANES - 1) / LANES * LANES;
    }
    const int64_t floats = (job->w->strip + high) * wide + job->flat;
    job->scratch_size = (floats * (int64_t)sizeof(float) + 4095) / 4096 * 4096;
    job->scratch = aligned_alloc(4096, (size_t)(threads * job->scratch_size));
    if (!job->scratch) return -2;
    parallel_for(job->w->code ? NAME(coded_item) : NAME(striped_item), job, items * job->parts, threads);
    free(job->scratch);
    return 0;
}

static TARGET int NAME(product)(const void *data, int threads) {
    const product_step_t *step = data;
    NAME(striped_job_t) job = {
        .w = step->weight, .scale = step->scale, .bias = step->bias, .x = step->x, .residual = step->residual, .y = step->y, .x_ld = step->x_ld,
        .y_ld = step->y_ld, .residual_ld = step->residual_ld, .residual_last = step->residual_last, .act = step->act,
        .positions = step->positions, .groups = 1,
    };
    return NAME(striped_run)(&job, threads);
}

/* The fewest positions in a row (or rows in a picture) of `out` outputs, so that what a row reads beyond its end are zeros
 * and the next row begins with as many. */
static TARGET int64_t NAME(pitch)(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    int64_t most = out, zeros = INT64_MAX;
    const int64_t reach = (kernel - 1) * dilation;
    for (int64_t phase = 0; phase < NAME(least)(stride, reach + 1); phase++) {
        /* element e of the phase is input e * stride + phase - pad */
        most = NAME(most)(most, (in + pad - phase + stride - 1) / stride);
        zeros = NAME(least)(zeros, pad > phase ? (pad - phase + stride - 1) / stride : 0);
    }
    return NAME(least)(out + reach / stride, NAME(most)(most, out + reach / stride - zeros));
}

static TARGET int NAME(conv)(const void *data, int threads) {
    const conv_step_t *step = data;
    NAME(striped_job_t) job = {
        .w = step->weight, .scale = step->scale, .bias = step->bias, .x = step->x, .residual = step->residual, .y = step->y, .x_ld = step->x_ld,
        .y_ld = step->y_ld, .residual_ld = step->residual_ld, .residual_last = step->residual_last, .act = step->act,
        .groups = step->groups, .conv = step,
    };
    job.pitch = NAME(pitch)(
        step->width, step->out_width, step->kernel[1], step->stride[1], step->pad[1], step->dilation[1]);
    job.planes = NAME(pitch)(
        step->height, step->out_height, step->kernel[0], step->stride[0], step->pad[0], step->dilation[0]);
    job.positions = step->batch && step->out_height && step->out_width
                        ? ((step->batch - 1) * job.planes + step->out_height - 1) * job.pitch + step->out_width
                        : 0;
    return NAME(striped_run)(&job, threads);
}
