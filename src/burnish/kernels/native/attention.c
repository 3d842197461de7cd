/* Causal attention over a forest of segments: what flash attention does on a GPU, for the vector registers of a CPU.

   A segment's queries see the keys of its ancestors and, causally, its own; in a row these are its chain. For query i and key j of a
   chain, with f the soft cap's function (or none):

     s_ij = f(scale q_i k_j)      i - window < j <= i           p_ij = e^(s_ij - lse_i)      o_i = sum_j p_ij v_j
     ds_ij = p_ij (do_i v_j - delta_i) f'                       delta_i = do_i o_i
     dq_i = scale sum_j ds_ij k_j      dk_j = scale sum_i ds_ij q_i      dv_j = sum_i p_ij do_i

   A tile of queries (all heads that share a key head, token by token: its rows) meets blocks of KEYS keys. Scores lie in memory key by
   key, so that a register holds LANES rows and no sum goes across one: only q and do are turned around, once for a tile. What a group of
   keys is not seen by is skipped. Sums, softmax and factors are fp32.

   Products multiply fp32, or, for bf16 inputs where the processor can, words: two bf16 along the summed dimension, added up in fp32. Then
   p and ds are rounded to bf16 for their products, as flash attention does; else nothing is rounded between the inputs and the results.

   A tree of up to WHOLE tokens is one piece of work for each key head: dk and dv grow while its tiles are passed. In a larger tree each
   tile's dq and each key block's dk and dv are pieces of their own, which takes two of the products twice. What is computed does not
   depend on the number of threads. */

#include "common.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
enum { WORDS = 1 };
#else
enum { WORDS = 0 };
#endif

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
    i64 segment, head, start, stop, place, rows, padded;
} tile_t;

/* Keys start..start + count of a chain. */
typedef struct {
    i64 start, count;
} block_t;

/* A thread's memory. A factor of a product is summed over its first index in `x`, over its second in `x_turned`; where words are
   multiplied, that index counts pairs. Everything else is fp32. */
typedef struct {
    i64 dim, vdim, rows;                      /* in whole registers */
    float *q, *q_turned, *g, *g_turned;       /* a tile, and its gradient of o: [rows, dim] and [dim, rows] */
    float *k, *k_turned, *v, *v_turned;       /* a block: [KEYS, dim], summed over the keys and over the dimensions */
    float *s, *ds, *p_left, *ds_left, *right; /* [KEYS, rows]; p and ds to be summed over the rows, p or ds over the keys */
    float *out, *top, *sum, *factor, *lse, *delta;
    float *dk, *dv, *all_dk, *all_dv; /* [KEYS, dim] and [WHOLE, dim] */
    void *memory;
} work_t;

INLINE i64 whole(i64 n) { return (n + LANES - 1) / LANES * LANES; }
INLINE i64 clamp(i64 x, i64 low, i64 high) { return x < low ? low : x > high ? high : x; }
INLINE int in_words(const shape_t *shape) { return WORDS && shape->half; }

/* Products. */

INLINE vec multiply_add(vec sum, float a, vec b, int words) {
#if defined(__AVX512BF16__)
    if (words) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
#endif
    (void)words;
    return sum + a * b;
}

INLINE void product(int columns, i64 depth, const float *a, i64 a_row, i64 a_step, const float *b, i64 b_step, float *c, i64 c_row, int add,
                    int words) {
    vec sum[GROUP][COLUMNS];
    for (int r = 0; r < GROUP; r++)
        for (int j = 0; j < columns; j++) sum[r][j] = (vec){0};
    for (i64 k = 0; k < depth; k++)
        for (int j = 0; j < columns; j++) {
            vec right = *(const vec *)(b + k * b_step + j * LANES);
            for (int r = 0; r < GROUP; r++) sum[r][j] = multiply_add(sum[r][j], a[r * a_row + k * a_step], right, words);
        }
    for (int r = 0; r < GROUP; r++)
        for (int j = 0; j < columns; j++) {
            vec *to = (vec *)(c + r * c_row + j * LANES);
            if (add) sum[r][j] += *to;
            *to = sum[r][j];
        }
}

INLINE void columns_of(i64 columns, i64 depth, const float *a, i64 a_row, i64 a_step, const float *b, i64 b_step, float *c, i64 c_row, int add,
                       int words) {
    for (; columns >= COLUMNS * LANES; columns -= COLUMNS * LANES, b += COLUMNS * LANES, c += COLUMNS * LANES)
        product(COLUMNS, depth, a, a_row, a_step, b, b_step, c, c_row, add, words);
    switch (columns / LANES) { /* fewer than COLUMNS */
    case 3: product(3 < COLUMNS ? 3 : 1, depth, a, a_row, a_step, b, b_step, c, c_row, add, words); break;
    case 2: product(2 < COLUMNS ? 2 : 1, depth, a, a_row, a_step, b, b_step, c, c_row, add, words); break;
    case 1: product(1, depth, a, a_row, a_step, b, b_step, c, c_row, add, words); break;
    default: break;
    }
}

/* c [GROUP, columns] (+)= a b, with element (r, k) of a at r a_row + k a_step; columns fill registers, depth counts floats or words. */
static __attribute__((noinline)) void multiply(i64 columns, i64 depth, const float *a, i64 a_row, i64 a_step, const float *b, i64 b_step, float *c,
                                               i64 c_row, int add, int words) {
    if (words)
        columns_of(columns, depth, a, a_row, a_step, b, b_step, c, c_row, add, WORDS);
    else
        columns_of(columns, depth, a, a_row, a_step, b, b_step, c, c_row, add, 0);
}

/* Who sees whom. */

typedef struct {
    i64 first, end;
} span_t;

/* Which rows of a tile see at least one of the keys j..j + GROUP of its chain, in whole registers. */
INLINE span_t seen_by(const shape_t *shape, const tile_t *t, i64 j) {
    span_t s = {clamp((j - t->place) * shape->groups, 0, t->padded) / LANES * LANES, t->padded};
    if (shape->window) s.end = whole(clamp((j + GROUP - 1 + shape->window - t->place) * shape->groups, 0, t->padded));
    return s;
}

/* Which keys of a block the rows r..r + GROUP of a tile see, in pairs. */
INLINE span_t seen_from(const shape_t *shape, const tile_t *t, i64 r, block_t b) {
    i64 place = t->place - b.start, last = place + (r + GROUP - 1) / shape->groups;
    span_t s = {0, clamp(last + 1, 0, b.count)};
    if (shape->window) s.first = clamp(place + r / shape->groups - shape->window + 1, 0, s.end) / 2 * 2;
    s.end += s.end % 2;
    return s;
}

/* Rows outside the causal and the window's bound of key j get no probability. */
INLINE void hide(const shape_t *shape, const tile_t *t, i64 j, span_t span, float *s) {
    i64 first = clamp((j - t->place) * shape->groups, span.first, span.end), end = span.end;
    if (shape->window) end = clamp((j + shape->window - t->place) * shape->groups, span.first, span.end);
    for (i64 r = span.first; r < first; r++) s[r] = -INFINITY;
    for (i64 r = end; r < span.end; r++) s[r] = -INFINITY;
}

INLINE tile_t tile_of(const shape_t *shape, i64 head, i64 segment, i64 start) {
    i64 stop = smaller(start + larger(1, TILE / shape->groups), shape->first[segment + 1]), rows = (stop - start) * shape->groups;
    return (tile_t){segment, head, start, stop, shape->before[segment] + start - shape->first[segment], rows, whole(rows)};
}

/* The keys that a tile sees. */
INLINE i64 first_key(const shape_t *shape, const tile_t *t) { return shape->window ? larger(0, t->place - shape->window + 1) : 0; }
INLINE i64 end_key(const tile_t *t) { return t->place + t->stop - t->start; }

/* Reading and writing. */

INLINE void load_floats(float *restrict to, const void *restrict from, i64 n, i64 wide, int half) {
    if (half)
        SIMD for (i64 d = 0; d < n; d++) to[d] = load(from, d, 1);
    else
        SIMD for (i64 d = 0; d < n; d++) to[d] = load(from, d, 0);
    for (i64 d = n; d < wide; d++) to[d] = 0;
}

/* Words of two neighbours in a row, and of two rows. */
INLINE void load_neighbours(float *restrict to, const void *restrict from, i64 n, i64 wide) {
    memset((char *)memcpy(to, from, (size_t)n * 2) + n * 2, 0, (size_t)(wide - n) * 2);
}

INLINE void load_pair(float *restrict to, const uint16_t *restrict a, const uint16_t *restrict b, i64 n, i64 wide) {
    SIMD for (i64 d = 0; d < n; d++) to[d] = float_of(a[d] | (uint32_t)b[d] << 16);
    for (i64 d = n; d < wide; d++) to[d] = 0;
}

INLINE void store_row(void *restrict to, const float *restrict from, float factor, i64 n, int half) {
    if (half)
        SIMD for (i64 d = 0; d < n; d++) store(to, d, from[d] * factor, 1);
    else
        SIMD for (i64 d = 0; d < n; d++) store(to, d, from[d] * factor, 0);
}

/* Row r of a tile, to be read or written where it is no padding. */
INLINE const void *row_at(const shape_t *shape, const tile_t *t, rows_t x, i64 r) {
    i64 token = t->start + r / shape->groups, head = t->head * shape->groups + r % shape->groups;
    return at(x.data, head * x.head + token * x.token, shape->half);
}

/* A tile to be summed over its rows (may be NULL) and over its dimensions. */
static void load_rows(const shape_t *shape, const tile_t *t, rows_t x, i64 dim, float *rows, float *turned, i64 stride) {
    i64 wide = whole(dim), words = in_words(shape), depth = words ? (dim + 1) / 2 : dim;
    float line[2][wide];
    for (i64 r = 0; r < t->padded; r++) {
        i64 n = r < t->rows ? dim : 0;
        const void *from = row_at(shape, t, x, r);
        float *to = line[r % 2];
        if (words)
            load_neighbours(to, from, n, wide);
        else
            load_floats(to, from, n, wide, shape->half);
        for (i64 d = 0; d < depth; d++) turned[d * stride + r] = to[d];
        if (!rows) continue;
        if (!words)
            memcpy(rows + r * wide, to, (size_t)wide * sizeof(float));
        else if (r % 2)
            load_pair(rows + r / 2 * wide, (uint16_t *)line[0], (uint16_t *)line[1], wide, wide);
    }
}

/* A block of a segment's chain to be summed over its keys and over its dimensions (either may be NULL), with zeros up to a whole group. */
static void load_block(const shape_t *shape, i64 head, i64 segment, block_t b, rows_t x, i64 dim, float *keys, float *turned) {
    i64 wide = whole(dim), words = in_words(shape), end = (b.count + GROUP - 1) / GROUP * GROUP;
    float line[2][wide];
    for (i64 j = end - 1; j >= 0; j--) {
        i64 n = j < b.count ? dim : 0;
        while (n && b.start + j < shape->before[segment]) segment = shape->parent[segment];
        i64 token = shape->first[segment] + b.start + j - shape->before[segment];
        const void *from = at(x.data, head * x.head + token * x.token, shape->half);
        if (!words) {
            load_floats(keys ? keys + j * wide : turned + j * wide, from, n, wide, shape->half);
            continue;
        }
        load_neighbours(line[j % 2], from, n, wide);
        if (turned) memcpy(turned + j * wide / 2, line[j % 2], (size_t)wide * 2);
        if (keys && j % 2 == 0) load_pair(keys + j / 2 * wide, (uint16_t *)line[0], (uint16_t *)line[1], wide, wide);
    }
}

/* What happens to the scores of a key, over the rows that see it. */

INLINE void score(float *restrict s, span_t span, float scale, float cap) {
    if (cap > 0)
        SIMD for (i64 r = span.first; r < span.end; r++) s[r] = cap * fast_tanh(s[r] * scale / cap);
    else
        SIMD for (i64 r = span.first; r < span.end; r++) s[r] *= scale;
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
INLINE void slope(float *restrict s, float *restrict ds, const float *restrict delta, span_t span, float scale, float cap) {
    if (cap > 0)
        SIMD for (i64 r = span.first; r < span.end; r++) {
            float x = fast_tanh(s[r] * scale / cap);
            s[r] = x * cap;
            ds[r] = (ds[r] - delta[r]) * (1 - x * x);
        }
    else
        SIMD for (i64 r = span.first; r < span.end; r++) {
            s[r] *= scale;
            ds[r] -= delta[r];
        }
}

/* s becomes p, ds is complete. */
INLINE void weigh(float *restrict s, float *restrict ds, const float *restrict lse, span_t span) {
    SIMD for (i64 r = span.first; r < span.end; r++) {
        s[r] = fast_exp(s[r] - lse[r]);
        ds[r] *= s[r];
    }
}

/* Words of two keys' values for each row; and of two rows' values for one key. */
INLINE void pair_keys(float *restrict to, const float *restrict a, const float *restrict b, span_t span) {
#if defined(__AVX512BF16__)
    for (i64 r = span.first; r < span.end; r += LANES) {
        __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(a + r)));
        __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(b + r)));
        _mm512_storeu_ps(to + r, (__m512)_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
#else
    (void)to, (void)a, (void)b, (void)span;
#endif
}

INLINE void pair_rows(float *restrict to, const float *restrict a, span_t span) {
#if defined(__AVX512BF16__)
    for (i64 r = span.first; r < span.end; r += LANES)
        _mm256_storeu_si256((__m256i *)((uint16_t *)to + r), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(a + r)));
#else
    (void)to, (void)a, (void)span;
#endif
}

INLINE void rescale(float *restrict row, float factor, i64 n) {
    SIMD for (i64 d = 0; d < n; d++) row[d] *= factor;
}

INLINE void add_row(float *restrict to, const float *restrict from, i64 n) {
    SIMD for (i64 d = 0; d < n; d++) to[d] += from[d];
}

/* Forward. */

static void forward_block(const shape_t *shape, const tile_t *t, block_t b, work_t *w, int first) {
    i64 stride = w->rows, words = in_words(shape), per = words ? 2 : 1;
    float *restrict part = w->lse, *restrict factor = w->factor, *restrict sum = w->sum, *restrict top = w->top;
    memcpy(factor, top, (size_t)t->padded * sizeof(float));
    for (i64 j = 0; j < b.count; j += GROUP) {
        span_t span = seen_by(shape, t, b.start + j);
        float *s = w->s + j * stride;
        multiply(span.end - span.first, (shape->dim + per - 1) / per, w->k_turned + j * w->dim / per, w->dim / per, 1, w->q_turned + span.first,
                 stride, s + span.first, stride, 0, (int)words);
        for (i64 i = 0; i < GROUP; i++, s += stride) {
            score(s, span, shape->scale, shape->cap);
            hide(shape, t, b.start + j + i, span, s);
            raise(s, top, span);
        }
    }
    SIMD for (i64 r = 0; r < t->padded; r++) {
        factor[r] = fast_exp(factor[r] - top[r]);
        part[r] = 0;
    }
    for (i64 j = 0; j < b.count; j += GROUP) {
        span_t span = seen_by(shape, t, b.start + j);
        for (i64 i = j; i < j + GROUP; i++) {
            exponentiate(w->s + i * stride, top, part, span);
            if (words && i % 2) pair_keys(w->right + i / 2 * stride, w->s + (i - 1) * stride, w->s + i * stride, span);
        }
    }
    SIMD for (i64 r = 0; r < t->padded; r++) sum[r] = sum[r] * factor[r] + part[r];
    for (i64 r = 0; r < t->padded; r += GROUP) {
        span_t keys = seen_from(shape, t, r, b);
        for (i64 i = r; !first && i < r + GROUP; i++) rescale(w->out + i * w->vdim, factor[i], w->vdim);
        const float *p = (words ? w->right : w->s) + keys.first / per * stride + r, *v = w->v + keys.first / per * w->vdim;
        multiply(w->vdim, (keys.end - keys.first) / per, p, 1, stride, v, w->vdim, w->out + r * w->vdim, w->vdim, !first, (int)words);
    }
}

static void forward_tile(const shape_t *shape, const tile_t *t, work_t *w, const rows_t *x, float *lse, const float *sinks) {
    i64 groups = shape->groups, start = first_key(shape, t), end = end_key(t);
    load_rows(shape, t, x[0], shape->dim, NULL, w->q_turned, w->rows);
    for (i64 r = 0; r < t->padded; r++) {
        w->top[r] = sinks ? sinks[t->head * groups + r % groups] : -1e30f;
        w->sum[r] = sinks ? 1 : 0;
    }
    for (i64 from = start; from < end; from += KEYS) {
        block_t b = {from, smaller(KEYS, end - from)};
        load_block(shape, t->head, t->segment, b, x[1], shape->dim, NULL, w->k_turned);
        load_block(shape, t->head, t->segment, b, x[2], shape->vdim, w->v, NULL);
        forward_block(shape, t, b, w, from == start);
    }
    float *to = lse + (t->head * shape->first[shape->segments] + t->start) * groups;
    for (i64 r = 0; r < t->rows; r++) {
        store_row((void *)row_at(shape, t, x[3], r), w->out + r * w->vdim, 1 / w->sum[r], shape->vdim, shape->half);
        to[r] = w->top[r] + logf(w->sum[r]);
    }
}

/* Backward. */

typedef struct {
    rows_t q, k, v, g, dq, dk, dv;
    const float *lse, *delta;
} grads_t;

/* p and ds of a block, and what is wanted of their products: dq of the tile, dk and dv of the block. */
static void backward_block(const shape_t *shape, const tile_t *t, block_t b, work_t *w, int want_q, int want_kv) {
    i64 stride = w->rows, words = in_words(shape), per = words ? 2 : 1;
    for (i64 j = 0; j < b.count; j += GROUP) {
        span_t span = seen_by(shape, t, b.start + j);
        i64 n = span.end - span.first, at_row = span.first / per;
        if (n <= 0) continue;
        multiply(n, (shape->dim + per - 1) / per, w->k_turned + j * w->dim / per, w->dim / per, 1, w->q_turned + span.first, stride,
                 w->s + j * stride + span.first, stride, 0, (int)words);
        multiply(n, (shape->vdim + per - 1) / per, w->v_turned + j * w->vdim / per, w->vdim / per, 1, w->g_turned + span.first, stride,
                 w->ds + j * stride + span.first, stride, 0, (int)words);
        for (i64 i = j; i < j + GROUP; i++) {
            float *s = w->s + i * stride, *ds = w->ds + i * stride;
            slope(s, ds, w->delta, span, shape->scale, shape->cap);
            hide(shape, t, b.start + i, span, s);
            weigh(s, ds, w->lse, span);
            if (!words) continue;
            pair_rows(w->p_left + i * stride / 2, s, span);
            pair_rows(w->ds_left + i * stride / 2, ds, span);
            if (i % 2) pair_keys(w->right + i / 2 * stride, ds - stride, ds, span);
        }
        if (!want_kv) continue;
        const float *p = (words ? w->p_left : w->s) + j * stride / per + at_row, *ds = (words ? w->ds_left : w->ds) + j * stride / per + at_row;
        multiply(w->dim, n / per, ds, stride / per, 1, w->q + at_row * w->dim, w->dim, w->dk + j * w->dim, w->dim, 1, (int)words);
        multiply(w->vdim, n / per, p, stride / per, 1, w->g + at_row * w->vdim, w->vdim, w->dv + j * w->vdim, w->vdim, 1, (int)words);
    }
    for (i64 r = 0; want_q && r < t->padded; r += GROUP) {
        span_t keys = seen_from(shape, t, r, b);
        const float *ds = (words ? w->right : w->ds) + keys.first / per * stride + r, *k = w->k + keys.first / per * w->dim;
        multiply(w->dim, (keys.end - keys.first) / per, ds, 1, stride, k, w->dim, w->out + r * w->dim, w->dim, 1, (int)words);
    }
}

static void load_tile(const shape_t *shape, const tile_t *t, work_t *w, const grads_t *x, int want_kv) {
    load_rows(shape, t, x->q, shape->dim, want_kv ? w->q : NULL, w->q_turned, w->rows);
    load_rows(shape, t, x->g, shape->vdim, want_kv ? w->g : NULL, w->g_turned, w->rows);
    i64 from = (t->head * shape->first[shape->segments] + t->start) * shape->groups;
    for (i64 r = 0; r < t->padded; r++) {
        w->lse[r] = r < t->rows ? x->lse[from + r] : INFINITY;
        w->delta[r] = r < t->rows ? x->delta[from + r] : 0;
    }
}

static void load_keys(const shape_t *shape, i64 head, i64 segment, block_t b, work_t *w, const grads_t *x) {
    load_block(shape, head, segment, b, x->k, shape->dim, w->k, w->k_turned);
    load_block(shape, head, segment, b, x->v, shape->vdim, NULL, w->v_turned);
}

/* dq of one tile; with `tree` >= 0, the first token of its tree, dk and dv of all its keys are added to the thread's sums, too. */
static void tile_gradient(const shape_t *shape, const tile_t *t, work_t *w, const grads_t *x, i64 tree) {
    load_tile(shape, t, w, x, tree >= 0);
    memset(w->out, 0, (size_t)(t->padded * w->dim) * sizeof(float));
    for (i64 from = first_key(shape, t), end = end_key(t); from < end; from += KEYS) {
        block_t b = {from, smaller(KEYS, end - from)};
        load_keys(shape, t->head, t->segment, b, w, x);
        if (tree < 0) {
            backward_block(shape, t, b, w, 1, 0);
            continue;
        }
        memset(w->dk, 0, (size_t)(KEYS * w->dim) * sizeof(float));
        memset(w->dv, 0, (size_t)(KEYS * w->vdim) * sizeof(float));
        backward_block(shape, t, b, w, 1, 1);
        for (i64 j = b.count - 1, s = t->segment; j >= 0; j--) {
            while (from + j < shape->before[s]) s = shape->parent[s];
            i64 token = shape->first[s] + from + j - shape->before[s] - tree;
            add_row(w->all_dk + token * w->dim, w->dk + j * w->dim, w->dim);
            add_row(w->all_dv + token * w->vdim, w->dv + j * w->vdim, w->vdim);
        }
    }
    for (i64 r = 0; r < t->rows; r++)
        store_row((void *)row_at(shape, t, x->dq, r), w->out + r * w->dim, shape->scale, shape->dim, shape->half);
}

/* The gradients of `count` tokens from `first` on, which lie in `from` [count, wide]. */
static void store_keys(const shape_t *shape, i64 head, i64 first, i64 count, rows_t to, i64 dim, const float *from, float factor) {
    for (i64 j = 0; j < count; j++)
        store_row(out_at(to.data, head * to.head + (first + j) * to.token, shape->half), from + j * whole(dim), factor, dim, shape->half);
}

/* All gradients of one head of the segments first..end. */
static void tree_gradients(const shape_t *shape, i64 head, i64 first, i64 end, work_t *w, const grads_t *x) {
    i64 start = shape->first[first], tokens = shape->first[end] - start;
    memset(w->all_dk, 0, (size_t)(tokens * w->dim) * sizeof(float));
    memset(w->all_dv, 0, (size_t)(tokens * w->vdim) * sizeof(float));
    for (i64 s = first; s < end; s++)
        for (i64 token = shape->first[s]; token < shape->first[s + 1];) {
            tile_t t = tile_of(shape, head, s, token);
            tile_gradient(shape, &t, w, x, start);
            token = t.stop;
        }
    store_keys(shape, head, start, tokens, x->dk, shape->dim, w->all_dk, shape->scale);
    store_keys(shape, head, start, tokens, x->dv, shape->vdim, w->all_dv, 1);
}

INLINE int descends(const shape_t *shape, i64 segment, i64 from) {
    while (segment > from) segment = shape->parent[segment];
    return segment == from;
}

/* dk and dv of the keys start..start + count of a segment, from all the tiles that see them, up to segment `end`. */
static void key_gradients(const shape_t *shape, i64 head, i64 segment, i64 end, i64 start, i64 count, work_t *w, const grads_t *x) {
    block_t b = {shape->before[segment] + start - shape->first[segment], count};
    load_keys(shape, head, segment, b, w, x);
    memset(w->dk, 0, (size_t)(KEYS * w->dim) * sizeof(float));
    memset(w->dv, 0, (size_t)(KEYS * w->vdim) * sizeof(float));
    for (i64 s = segment; s < end; s++) {
        if (!descends(shape, s, segment)) continue;
        for (i64 token = s == segment ? start : shape->first[s]; token < shape->first[s + 1];) {
            tile_t t = tile_of(shape, head, s, token);
            token = t.stop;
            if (shape->window && t.place >= b.start + count + shape->window - 1) break;
            load_tile(shape, &t, w, x, 1);
            backward_block(shape, &t, b, w, 0, 1);
        }
    }
    store_keys(shape, head, start, count, x->dk, shape->dim, w->dk, shape->scale);
    store_keys(shape, head, start, count, x->dv, shape->vdim, w->dv, 1);
}

static int prepare(const shape_t *shape, work_t *w) {
    i64 rows = whole(larger(TILE, shape->groups)), d = whole(shape->dim), v = whole(shape->vdim);
    w->dim = d, w->vdim = v, w->rows = rows;
    struct {
        float **to;
        i64 size;
    } parts[] = {
        {&w->q, rows * d},  {&w->q_turned, rows * d}, {&w->g, rows * v},   {&w->g_turned, rows * v}, {&w->k, KEYS * d},     {&w->k_turned, KEYS * d},
        {&w->v, KEYS * v},  {&w->v_turned, KEYS * v}, {&w->s, KEYS * rows}, {&w->ds, KEYS * rows},    {&w->p_left, KEYS * rows}, {&w->ds_left, KEYS * rows},
        {&w->right, KEYS * rows}, {&w->out, rows * larger(d, v)}, {&w->top, rows}, {&w->sum, rows}, {&w->factor, rows}, {&w->lse, rows},
        {&w->delta, rows}, {&w->dk, KEYS * d}, {&w->dv, KEYS * v}, {&w->all_dk, WHOLE * d}, {&w->all_dv, WHOLE * v},
    };
    i64 total = 0, count = sizeof parts / sizeof *parts;
    for (i64 i = 0; i < count; i++) total += whole(parts[i].size);
    w->memory = aligned_alloc(64, (size_t)(total * 4 + 63) / 64 * 64);
    float *next = w->memory;
    for (i64 i = 0; next && i < count; i++) {
        *parts[i].to = next;
        next += whole(parts[i].size);
    }
    if (!in_words(shape)) w->k_turned = w->k, w->v_turned = w->v; /* the same memory does for both sums */
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
                forward_tile(shape, &t, &w, x, lse, sinks);
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
                    tile_gradient(shape, &t, &w, &all, -1);
                }
            }
        free(w.memory);
    }
    free(jobs);
    return failed;
}
