/* Causal attention over a forest of segments: what flash attention does on a GPU, for the vector registers of a CPU.

   A segment's queries see the keys of its ancestors and, causally, its own; in a row these are its chain. For query i and key j of a
   chain, with f the soft cap's function (or none):

     s_ij = f(scale q_i k_j)      i - window < j <= i           p_ij = e^(s_ij - lse_i)      o_i = sum_j p_ij v_j
     ds_ij = p_ij (do_i v_j - delta_i) f'                       delta_i = do_i o_i
     dq_i = scale sum_j ds_ij k_j      dk_j = scale sum_i ds_ij q_i      dv_j = sum_i p_ij do_i

   A tile of queries (all heads that share a key head, token by token: its rows) meets blocks of KEYS keys. Scores lie in memory key by
   key, so that a register holds LANES rows and no sum goes across one: only q and do are turned around, once for a tile. What a group of
   keys is not seen by is skipped. Sums, softmax and factors are fp32; nothing is rounded between the inputs and the results.

   A tree of up to WHOLE tokens is one piece of work for each key head: dk and dv grow while its tiles are passed. In a larger tree each
   tile's dq and each key block's dk and dv are pieces of their own, which takes two of the products twice. What is computed does not
   depend on the number of threads. */

#include "common.h"

#if defined(__AVX512F__)
enum { LANES = 16, COLUMNS = 4 };
#elif defined(__AVX__)
enum { LANES = 8, COLUMNS = 2 };
#else
enum { LANES = 4, COLUMNS = 4 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

enum { GROUP = 4, KEYS = 64, TILE = 128, WHOLE = 1024 };

/* Rows of bf16 or fp32; strides in elements, the last dimension lies together. */
typedef struct {
    void *data;
    i64 head, token;
} rows_t;

/* Segment i has the tokens first[i]..first[i + 1], after before[i] tokens of its ancestors, of which parent[i] is the last (or -1). */
typedef struct {
    i64 heads, groups, dim, vdim, segments;
    const i64 *first, *parent, *before;
    i64 window; /* 0: none */
    float scale, cap;
    int half;
} shape_t;

/* Queries of one segment and key head; `place` is the first one's in its chain. */
typedef struct {
    i64 head, start, stop, place, rows, padded;
} tile_t;

/* A thread's memory. */
typedef struct {
    i64 dim, vdim, padded; /* in whole registers */
    float *q, *qt, *g, *gt, *lse, *delta; /* a tile: [rows, dim], [dim, rows], the gradient of o likewise */
    float *k, *v;                         /* a block: [KEYS, dim] */
    float *s, *ds;                        /* [KEYS, rows] */
    float *out, *top, *sum, *factor;      /* [rows, dim] and [rows] */
    float *dk, *dv, *all_dk, *all_dv;     /* [KEYS, dim], and [WHOLE, dim] */
    void *memory;
} work_t;

INLINE i64 whole(i64 n) { return (n + LANES - 1) / LANES * LANES; }
INLINE i64 clamp(i64 x, i64 low, i64 high) { return x < low ? low : x > high ? high : x; }

/* c [GROUP, columns * LANES] (+)= a b, with element (r, k) of a at r a_row + k a_step. */
INLINE void product(int columns, i64 depth, const float *a, i64 a_row, i64 a_step, const float *b, i64 b_step, float *c, i64 c_row, int add) {
    vec sum[GROUP][COLUMNS];
    for (int r = 0; r < GROUP; r++)
        for (int j = 0; j < columns; j++) sum[r][j] = (vec){0};
    for (i64 k = 0; k < depth; k++)
        for (int j = 0; j < columns; j++) {
            vec right = *(const vec *)(b + k * b_step + j * LANES);
            for (int r = 0; r < GROUP; r++) sum[r][j] += a[r * a_row + k * a_step] * right;
        }
    for (int r = 0; r < GROUP; r++)
        for (int j = 0; j < columns; j++) {
            vec *to = (vec *)(c + r * c_row + j * LANES);
            if (add) sum[r][j] += *to;
            *to = sum[r][j];
        }
}

/* The same for any number of columns that fills registers. */
static __attribute__((noinline)) void multiply(i64 columns, i64 depth, const float *a, i64 a_row, i64 a_step, const float *b, i64 b_step, float *c,
                                               i64 c_row, int add) {
    for (; columns >= COLUMNS * LANES; columns -= COLUMNS * LANES, b += COLUMNS * LANES, c += COLUMNS * LANES)
        product(COLUMNS, depth, a, a_row, a_step, b, b_step, c, c_row, add);
    switch (columns / LANES) { /* fewer than COLUMNS */
    case 3: product(3 < COLUMNS ? 3 : 1, depth, a, a_row, a_step, b, b_step, c, c_row, add); break;
    case 2: product(2 < COLUMNS ? 2 : 1, depth, a, a_row, a_step, b, b_step, c, c_row, add); break;
    case 1: product(1, depth, a, a_row, a_step, b, b_step, c, c_row, add); break;
    default: break;
    }
}

/* Which rows of a tile see at least one of the keys j..last of its chain, in whole registers. */
typedef struct {
    i64 first, end;
} span_t;

INLINE span_t seen_by(const shape_t *shape, const tile_t *t, i64 j, i64 last) {
    span_t s = {clamp((j - t->place) * shape->groups, 0, t->padded) / LANES * LANES, t->padded};
    if (shape->window) s.end = whole(clamp((last + shape->window - t->place) * shape->groups, 0, t->padded));
    return s;
}

/* Rows outside the causal and the window's bound of key j get no probability. */
INLINE void hide(const shape_t *shape, const tile_t *t, i64 j, span_t span, float *s) {
    i64 first = clamp((j - t->place) * shape->groups, span.first, span.end), end = span.end;
    if (shape->window) end = clamp((j + shape->window - t->place) * shape->groups, span.first, span.end);
    for (i64 r = span.first; r < first; r++) s[r] = -INFINITY;
    for (i64 r = end; r < span.end; r++) s[r] = -INFINITY;
}

/* Which keys of a block the rows r..r + GROUP of a tile see, counted from the block's first. */
INLINE span_t seen_from(const shape_t *shape, const tile_t *t, i64 r, i64 start, i64 count) {
    i64 place = t->place - start, last = place + (r + GROUP - 1) / shape->groups;
    span_t s = {0, clamp(last + 1, 0, count)};
    if (shape->window) s.first = clamp(place + r / shape->groups - shape->window + 1, 0, s.end);
    return s;
}

INLINE tile_t tile_of(const shape_t *shape, i64 head, i64 segment, i64 start) {
    i64 tokens = larger(1, TILE / shape->groups), stop = smaller(start + tokens, shape->first[segment + 1]);
    tile_t t = {head, start, stop, shape->before[segment] + start - shape->first[segment], (stop - start) * shape->groups, 0};
    t.padded = whole(t.rows);
    return t;
}

/* What happens to the scores of one key, over the rows that see it. */

INLINE void score(float *restrict s, span_t span, float scale, float cap, int has_cap) {
    SIMD for (i64 r = span.first; r < span.end; r++) s[r] = has_cap ? cap * fast_tanh(s[r] * scale / cap) : s[r] * scale;
}

INLINE void raise(const float *restrict s, float *restrict top, span_t span) {
    SIMD for (i64 r = span.first; r < span.end; r++) top[r] = s[r] > top[r] ? s[r] : top[r];
}

INLINE void exponentiate(float *restrict s, const float *restrict top, float *restrict sum, span_t span) {
    SIMD for (i64 r = span.first; r < span.end; r++) {
        s[r] = fast_exp(s[r] - top[r]);
        sum[r] += s[r];
    }
}

/* s becomes the score, ds = (do v - delta) f'. */
INLINE void slope(float *restrict s, float *restrict ds, const float *restrict delta, span_t span, float scale, float cap, int has_cap) {
    SIMD for (i64 r = span.first; r < span.end; r++) {
        float x = s[r] * scale, d = ds[r] - delta[r];
        if (has_cap) {
            x = fast_tanh(x / cap);
            d *= 1 - x * x;
            x *= cap;
        }
        s[r] = x, ds[r] = d;
    }
}

/* s becomes p, ds is complete. */
INLINE void weigh(float *restrict s, float *restrict ds, const float *restrict lse, span_t span) {
    SIMD for (i64 r = span.first; r < span.end; r++) {
        s[r] = fast_exp(s[r] - lse[r]);
        ds[r] *= s[r];
    }
}

INLINE void rescale(float *restrict row, float factor, i64 n) {
    SIMD for (i64 d = 0; d < n; d++) row[d] *= factor;
}

INLINE void add_row(float *restrict to, const float *restrict from, i64 n) {
    SIMD for (i64 d = 0; d < n; d++) to[d] += from[d];
}

INLINE void store_row(void *restrict to, const float *restrict from, float factor, i64 n, int half) {
    SIMD for (i64 d = 0; d < n; d++) store(to, d, from[d] * factor, half);
}

INLINE void load_row(float *restrict to, const void *restrict from, i64 n, i64 wide, int half) {
    SIMD for (i64 d = 0; d < n; d++) to[d] = load(from, d, half);
    for (i64 d = n; d < wide; d++) to[d] = 0;
}

/* Rows of a tile in fp32: as they are (`to`, its width in whole registers) and turned around (`turned`); padded with zeros. */
INLINE void load_rows(const shape_t *shape, const tile_t *t, rows_t from, i64 dim, float *to, float *turned, i64 stride, int half) {
    i64 wide = whole(dim);
    for (i64 r = 0; r < t->padded; r++) {
        float *row = to + r * wide;
        i64 token = t->start + r / shape->groups, head = t->head * shape->groups + r % shape->groups;
        const void *in = at(from.data, head * from.head + token * from.token, half);
        load_row(row, in, r < t->rows ? dim : 0, wide, half);
    }
    for (i64 d = 0; d < dim; d++)
        for (i64 r = 0; r < t->padded; r++) turned[d * stride + r] = to[r * wide + d];
}

/* Keys or values start..start + count of a segment's chain, and zeros up to a whole group. */
INLINE void load_block(const shape_t *shape, i64 head, i64 segment, rows_t from, i64 dim, i64 start, i64 count, float *to, int half) {
    i64 wide = whole(dim);
    for (i64 j = count - 1; j >= 0; j--) {
        while (start + j < shape->before[segment]) segment = shape->parent[segment];
        i64 token = shape->first[segment] + start + j - shape->before[segment];
        const void *in = at(from.data, head * from.head + token * from.token, half);
        load_row(to + j * wide, in, dim, wide, half);
    }
    i64 rest = (GROUP - count % GROUP) % GROUP;
    memset(to + count * wide, 0, (size_t)(rest * wide) * sizeof(float));
}

INLINE void forward_block(const shape_t *shape, const tile_t *t, work_t *w, i64 start, i64 count, int first, int has_cap) {
    i64 stride = w->padded, rows = t->padded;
    memcpy(w->factor, w->top, (size_t)rows * sizeof(float));
    for (i64 j = 0; j < count; j += GROUP) {
        span_t span = seen_by(shape, t, start + j, start + j + GROUP - 1);
        float *s = w->s + j * stride;
        multiply(span.end - span.first, shape->dim, w->k + j * w->dim, w->dim, 1, w->qt + span.first, stride, s + span.first, stride, 0);
        for (i64 i = 0; i < GROUP; i++, s += stride) {
            score(s, span, shape->scale, shape->cap, has_cap);
            hide(shape, t, start + j + i, span, s);
            raise(s, w->top, span);
        }
    }
    float *restrict part = w->lse, *restrict factor = w->factor, *restrict sum = w->sum, *restrict top = w->top;
    SIMD for (i64 r = 0; r < rows; r++) {
        factor[r] = fast_exp(factor[r] - top[r]);
        part[r] = 0;
    }
    for (i64 j = 0; j < count; j += GROUP) {
        span_t span = seen_by(shape, t, start + j, start + j + GROUP - 1);
        float *s = w->s + j * stride;
        for (i64 i = 0; i < GROUP; i++, s += stride) exponentiate(s, top, part, span);
    }
    SIMD for (i64 r = 0; r < rows; r++) sum[r] = sum[r] * factor[r] + part[r];
    for (i64 r = 0; r < rows; r += GROUP) {
        span_t keys = seen_from(shape, t, r, start, count);
        if (!first)
            for (i64 i = r; i < r + GROUP; i++) rescale(w->out + i * w->vdim, factor[i], w->vdim);
        const float *p = w->s + keys.first * stride + r, *v = w->v + keys.first * w->vdim;
        multiply(w->vdim, keys.end - keys.first, p, 1, stride, v, w->vdim, w->out + r * w->vdim, w->vdim, !first);
    }
}

INLINE void forward_tile(const shape_t *shape, i64 segment, const tile_t *t, work_t *w, rows_t q, rows_t k, rows_t v, rows_t out, float *lse,
                         const float *sinks, int half) {
    i64 groups = shape->groups, end = t->place + t->stop - t->start, start = shape->window ? larger(0, t->place - shape->window + 1) : 0;
    load_rows(shape, t, q, shape->dim, w->q, w->qt, w->padded, half);
    for (i64 r = 0; r < t->padded; r++) {
        w->top[r] = sinks ? sinks[t->head * groups + r % groups] : -1e30f;
        w->sum[r] = sinks ? 1 : 0;
    }
    for (i64 block = start; block < end; block += KEYS) {
        i64 count = smaller(KEYS, end - block);
        load_block(shape, t->head, segment, k, shape->dim, block, count, w->k, half);
        load_block(shape, t->head, segment, v, shape->vdim, block, count, w->v, half);
        if (shape->cap > 0)
            forward_block(shape, t, w, block, count, block == start, 1);
        else
            forward_block(shape, t, w, block, count, block == start, 0);
    }
    for (i64 r = 0; r < t->rows; r++) {
        i64 token = t->start + r / groups, head = t->head * groups + r % groups;
        void *row = out_at(out.data, head * out.head + token * out.token, half);
        store_row(row, w->out + r * w->vdim, 1 / w->sum[r], shape->vdim, half);
        lse[(t->head * shape->first[shape->segments] + token) * groups + r % groups] = w->top[r] + logf(w->sum[r]);
    }
}

/* p and ds of a block, and the products of ds that are wanted: dq of the tile, dk and dv of the block. */
INLINE void backward_block(const shape_t *shape, const tile_t *t, work_t *w, i64 start, i64 count, int want_q, int want_kv, int has_cap) {
    i64 stride = w->padded;
    for (i64 j = 0; j < count; j += GROUP) {
        span_t span = seen_by(shape, t, start + j, start + j + GROUP - 1);
        i64 n = span.end - span.first;
        float *s = w->s + j * stride, *ds = w->ds + j * stride;
        multiply(n, shape->dim, w->k + j * w->dim, w->dim, 1, w->qt + span.first, stride, s + span.first, stride, 0);
        multiply(n, shape->vdim, w->v + j * w->vdim, w->vdim, 1, w->gt + span.first, stride, ds + span.first, stride, 0);
        for (i64 i = 0; i < GROUP; i++, s += stride, ds += stride) {
            slope(s, ds, w->delta, span, shape->scale, shape->cap, has_cap);
            hide(shape, t, start + j + i, span, s);
            weigh(s, ds, w->lse, span);
        }
        if (want_kv && n > 0) {
            s = w->s + j * stride + span.first, ds = w->ds + j * stride + span.first;
            multiply(w->dim, n, ds, stride, 1, w->q + span.first * w->dim, w->dim, w->dk + j * w->dim, w->dim, 1);
            multiply(w->vdim, n, s, stride, 1, w->g + span.first * w->vdim, w->vdim, w->dv + j * w->vdim, w->vdim, 1);
        }
    }
    for (i64 r = 0; want_q && r < t->padded; r += GROUP) {
        span_t keys = seen_from(shape, t, r, start, count);
        const float *ds = w->ds + keys.first * stride + r, *k = w->k + keys.first * w->dim;
        multiply(w->dim, keys.end - keys.first, ds, 1, stride, k, w->dim, w->out + r * w->dim, w->dim, 1);
    }
}

typedef struct {
    rows_t q, k, v, g, dq, dk, dv;
    const float *lse, *delta;
} grads_t;

INLINE void load_tile(const shape_t *shape, const tile_t *t, work_t *w, const grads_t *x, int half) {
    load_rows(shape, t, x->q, shape->dim, w->q, w->qt, w->padded, half);
    load_rows(shape, t, x->g, shape->vdim, w->g, w->gt, w->padded, half);
    i64 from = (t->head * shape->first[shape->segments] + t->start) * shape->groups;
    for (i64 r = 0; r < t->padded; r++) {
        w->lse[r] = r < t->rows ? x->lse[from + r] : INFINITY;
        w->delta[r] = r < t->rows ? x->delta[from + r] : 0;
    }
}

INLINE void load_keys(const shape_t *shape, i64 head, i64 segment, i64 start, i64 count, work_t *w, const grads_t *x, int half) {
    load_block(shape, head, segment, x->k, shape->dim, start, count, w->k, half);
    load_block(shape, head, segment, x->v, shape->vdim, start, count, w->v, half);
}

INLINE void block_of(const shape_t *shape, const tile_t *t, work_t *w, i64 start, i64 count, int want_q, int want_kv) {
    if (shape->cap > 0)
        backward_block(shape, t, w, start, count, want_q, want_kv, 1);
    else
        backward_block(shape, t, w, start, count, want_q, want_kv, 0);
}

/* dq of one tile; with `tree` >= 0, the first token of its tree, dk and dv of all its keys are added to the thread's sums, too. */
static void tile_gradient(const shape_t *shape, i64 segment, const tile_t *t, work_t *w, const grads_t *x, i64 tree) {
    i64 groups = shape->groups, end = t->place + t->stop - t->start, start = shape->window ? larger(0, t->place - shape->window + 1) : 0;
    if (shape->half)
        load_tile(shape, t, w, x, 1);
    else
        load_tile(shape, t, w, x, 0);
    memset(w->out, 0, (size_t)(t->padded * w->dim) * sizeof(float));
    for (i64 block = start; block < end; block += KEYS) {
        i64 count = smaller(KEYS, end - block), s = segment;
        if (shape->half)
            load_keys(shape, t->head, segment, block, count, w, x, 1);
        else
            load_keys(shape, t->head, segment, block, count, w, x, 0);
        if (tree < 0) {
            block_of(shape, t, w, block, count, 1, 0);
            continue;
        }
        memset(w->dk, 0, (size_t)(KEYS * w->dim) * sizeof(float));
        memset(w->dv, 0, (size_t)(KEYS * w->vdim) * sizeof(float));
        block_of(shape, t, w, block, count, 1, 1);
        for (i64 j = count - 1; j >= 0; j--) {
            while (block + j < shape->before[s]) s = shape->parent[s];
            i64 token = shape->first[s] + block + j - shape->before[s] - tree;
            add_row(w->all_dk + token * w->dim, w->dk + j * w->dim, w->dim);
            add_row(w->all_dv + token * w->vdim, w->dv + j * w->vdim, w->vdim);
        }
    }
    for (i64 r = 0; r < t->rows; r++) {
        i64 token = t->start + r / groups, head = t->head * groups + r % groups;
        void *row = out_at(x->dq.data, head * x->dq.head + token * x->dq.token, shape->half);
        if (shape->half)
            store_row(row, w->out + r * w->dim, shape->scale, shape->dim, 1);
        else
            store_row(row, w->out + r * w->dim, shape->scale, shape->dim, 0);
    }
}

INLINE void store_keys(const shape_t *shape, i64 head, i64 first, i64 count, rows_t to, i64 dim, i64 wide, const float *from, float factor) {
    for (i64 j = 0; j < count; j++) {
        void *row = out_at(to.data, head * to.head + (first + j) * to.token, shape->half);
        if (shape->half)
            store_row(row, from + j * wide, factor, dim, 1);
        else
            store_row(row, from + j * wide, factor, dim, 0);
    }
}

/* All gradients of one head of a tree: the segments first..end. */
static void tree_gradients(const shape_t *shape, i64 head, i64 first, i64 end, work_t *w, const grads_t *x) {
    i64 start = shape->first[first], tokens = shape->first[end] - start;
    memset(w->all_dk, 0, (size_t)(tokens * w->dim) * sizeof(float));
    memset(w->all_dv, 0, (size_t)(tokens * w->vdim) * sizeof(float));
    for (i64 s = first; s < end; s++)
        for (i64 token = shape->first[s]; token < shape->first[s + 1];) {
            tile_t t = tile_of(shape, head, s, token);
            tile_gradient(shape, s, &t, w, x, start);
            token = t.stop;
        }
    store_keys(shape, head, start, tokens, x->dk, shape->dim, w->dim, w->all_dk, shape->scale);
    store_keys(shape, head, start, tokens, x->dv, shape->vdim, w->vdim, w->all_dv, 1);
}

INLINE int descends(const shape_t *shape, i64 segment, i64 from) {
    while (segment > from) segment = shape->parent[segment];
    return segment == from;
}

/* dk and dv of the keys start..start + count of a segment, from all the tiles that see them, up to segment `end`. */
static void key_gradients(const shape_t *shape, i64 head, i64 segment, i64 end, i64 start, i64 count, work_t *w, const grads_t *x) {
    i64 place = shape->before[segment] + start - shape->first[segment];
    if (shape->half)
        load_keys(shape, head, segment, place, count, w, x, 1);
    else
        load_keys(shape, head, segment, place, count, w, x, 0);
    memset(w->dk, 0, (size_t)(KEYS * w->dim) * sizeof(float));
    memset(w->dv, 0, (size_t)(KEYS * w->vdim) * sizeof(float));
    for (i64 s = segment; s < end; s++) {
        if (!descends(shape, s, segment)) continue;
        for (i64 token = s == segment ? start : shape->first[s]; token < shape->first[s + 1];) {
            tile_t t = tile_of(shape, head, s, token);
            token = t.stop;
            if (shape->window && t.place >= place + count + shape->window - 1) break;
            if (shape->half)
                load_tile(shape, &t, w, x, 1);
            else
                load_tile(shape, &t, w, x, 0);
            block_of(shape, &t, w, place, count, 0, 1);
        }
    }
    store_keys(shape, head, start, count, x->dk, shape->dim, w->dim, w->dk, shape->scale);
    store_keys(shape, head, start, count, x->dv, shape->vdim, w->vdim, w->dv, 1);
}

static int prepare(const shape_t *shape, work_t *w) {
    i64 rows = whole(larger(TILE, shape->groups)), d = whole(shape->dim), v = whole(shape->vdim), wide = larger(d, v);
    w->dim = d, w->vdim = v, w->padded = rows;
    float **parts[] = {&w->q, &w->qt, &w->g, &w->gt, &w->lse, &w->delta, &w->k, &w->v, &w->s, &w->ds, &w->out, &w->top, &w->sum, &w->factor, &w->dk, &w->dv, &w->all_dk, &w->all_dv};
    i64 sizes[] = {rows * d, rows * d, rows * v, rows * v, rows, rows, KEYS * d, KEYS * v, KEYS * rows, KEYS * rows, rows * wide, rows, rows, rows, KEYS * d, KEYS * v, WHOLE * d, WHOLE * v};
    i64 total = 0, count = sizeof sizes / sizeof *sizes;
    for (i64 i = 0; i < count; i++) total += whole(sizes[i]);
    w->memory = aligned_alloc(64, (size_t)(total * 4 + 63) / 64 * 64);
    float *next = w->memory;
    for (i64 i = 0; next && i < count; i++) {
        *parts[i] = next;
        next += whole(sizes[i]);
    }
    return w->memory == NULL;
}

/* What one thread does at a time: a tile (forward, or its dq), a block of keys (dk and dv), or all of some segments (closed under parents). */
typedef struct {
    enum { ONE_TILE, ONE_BLOCK, ALL } kind;
    i64 segment, end, start, count;
} job_t;

static i64 tile_jobs(const shape_t *shape, i64 first, i64 end, job_t *jobs) {
    i64 n = 0;
    for (i64 s = first; s < end; s++)
        for (i64 token = shape->first[s]; token < shape->first[s + 1]; n++) {
            tile_t t = tile_of(shape, 0, s, token);
            if (jobs) jobs[n] = (job_t){ONE_TILE, s, end, token, t.stop - token};
            token = t.stop;
        }
    return n;
}

/* The jobs of the backward pass. `closed[s]`: no segment from s on continues one before it. */
static i64 gradient_jobs(const shape_t *shape, const char *closed, job_t *jobs) {
    i64 n = 0;
    for (i64 first = 0, end; first < shape->segments; first = end) {
        for (end = first + 1; end < shape->segments && !closed[end]; end++) {}
        if (shape->first[end] - shape->first[first] <= WHOLE) {
            if (jobs) jobs[n] = (job_t){ALL, first, end, 0, 0};
            n++;
            continue;
        }
        n += tile_jobs(shape, first, end, jobs ? jobs + n : NULL);
        for (i64 s = first; s < end; s++)
            for (i64 token = shape->first[s]; token < shape->first[s + 1]; token += KEYS, n++)
                if (jobs) jobs[n] = (job_t){ONE_BLOCK, s, end, token, smaller(KEYS, shape->first[s + 1] - token)};
    }
    return n;
}

/* x: q [Hq, T, D], k [Hkv, T, D], v [Hkv, T, V], out [Hq, T, V]. lse: [Hkv, T, G]. sinks: [Hq] or NULL. Returns 1 where memory cannot
   be had. */
EXPORT int burnish_attention_forward(const shape_t *shape, const rows_t *x, float *lse, const float *sinks, int threads) {
    (void)threads;
    i64 count = tile_jobs(shape, 0, shape->segments, NULL);
    job_t *jobs = malloc((size_t)count * sizeof(job_t));
    if (!jobs) return 1;
    tile_jobs(shape, 0, shape->segments, jobs);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        work_t w;
        failed = prepare(shape, &w);
#pragma omp for schedule(dynamic) collapse(2)
        for (i64 head = 0; head < shape->heads; head++)
            for (i64 i = 0; i < count; i++) {
                if (failed) continue;
                tile_t t = tile_of(shape, head, jobs[i].segment, jobs[i].start);
                if (shape->half)
                    forward_tile(shape, jobs[i].segment, &t, &w, x[0], x[1], x[2], x[3], lse, sinks, 1);
                else
                    forward_tile(shape, jobs[i].segment, &t, &w, x[0], x[1], x[2], x[3], lse, sinks, 0);
            }
        free(w.memory);
    }
    free(jobs);
    return failed;
}

/* delta [Hkv, T, G]: the sum of the products of an output and its gradient. */
INLINE void deltas(const shape_t *shape, i64 token, rows_t out, rows_t grad, float *delta, int half) {
    for (i64 h = 0; h < shape->heads; h++)
        for (i64 g = 0; g < shape->groups; g++) {
            i64 head = h * shape->groups + g;
            const void *o = at(out.data, head * out.head + token * out.token, half);
            const void *d = at(grad.data, head * grad.head + token * grad.token, half);
            float sum = 0;
            SIMD_SUM(sum) for (i64 i = 0; i < shape->vdim; i++) sum += load(o, i, half) * load(d, i, half);
            delta[(h * shape->first[shape->segments] + token) * shape->groups + g] = sum;
        }
}

/* x: q, k, v, out, and the gradients of out, q, k, v, shaped as in the forward pass; the last three and delta [Hkv, T, G] are written.
   Returns 1 where memory cannot be had. */
EXPORT int burnish_attention_backward(const shape_t *shape, const rows_t *x, const float *lse, float *delta, int threads) {
    (void)threads;
    grads_t all = {x[0], x[1], x[2], x[4], x[5], x[6], x[7], lse, delta};
    char *closed = malloc((size_t)shape->segments);
    if (!closed) return 1;
    for (i64 s = shape->segments - 1, least = s; s >= 0; s--) {
        least = smaller(least, shape->parent[s] < 0 ? s : shape->parent[s]);
        closed[s] = least >= s;
    }
    i64 count = gradient_jobs(shape, closed, NULL);
    job_t *jobs = malloc((size_t)count * sizeof(job_t));
    if (jobs) gradient_jobs(shape, closed, jobs);
    free(closed);
    if (!jobs) return 1;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        work_t w;
        failed = prepare(shape, &w);
#pragma omp for schedule(static)
        for (i64 token = 0; token < shape->first[shape->segments]; token++)
            if (shape->half)
                deltas(shape, token, x[3], x[4], delta, 1);
            else
                deltas(shape, token, x[3], x[4], delta, 0);
#pragma omp for schedule(dynamic) collapse(2)
        for (i64 head = 0; head < shape->heads; head++)
            for (i64 i = 0; i < count; i++) {
                job_t job = jobs[i];
                if (failed) continue;
                if (job.kind == ALL)
                    tree_gradients(shape, head, job.segment, job.end, &w, &all);
                else if (job.kind == ONE_BLOCK)
                    key_gradients(shape, head, job.segment, job.end, job.start, job.count, &w, &all);
                else {
                    tile_t t = tile_of(shape, head, job.segment, job.start);
                    tile_gradient(shape, job.segment, &t, &w, &all, -1);
                }
            }
        free(w.memory);
    }
    free(jobs);
    return failed;
}
