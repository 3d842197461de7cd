/* Causal attention over a forest of segments: what flash attention does on a GPU, for the vector registers of a CPU.

   A segment's queries see the keys of its ancestors and, causally, its own; in a row these are its chain. For query i and key j of a
   chain, with f the soft cap's function (or none):

     s_ij = f(scale q_i k_j)      i - window < j <= i           p_ij = e^(s_ij - top_i) / sum_i      o_i = sum_j p_ij v_j
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

#ifndef BURNISH_ATTENTION_H
#define BURNISH_ATTENTION_H

#include "product.h"

enum { KEYS = 64, TILE = 128, WHOLE = 1024 };

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

/* What is kept of a row's softmax: the largest score, and the sum of e^(s - top). Their logarithm as one number would be rounded more. */
typedef struct {
    float top, sum;
} softmax_t;

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
    float *out, *top, *sum, *factor, *part, *delta;
    float *dk, *dv, *all_dk, *all_dv; /* [KEYS, dim] and [WHOLE, dim] */
    void *memory;
} work_t;

INLINE i64 clamp(i64 x, i64 low, i64 high) { return x < low ? low : x > high ? high : x; }
INLINE int in_words(const shape_t *shape) { return WORDS && shape->half; }

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

/* Words of two neighbours in a row. */
INLINE void load_neighbours(void *restrict to, const uint16_t *restrict from, i64 n, i64 wide) {
    uint16_t *half = to;
    SIMD for (i64 d = 0; d < n; d++) half[d] = from[d];
    for (i64 d = n; d < wide; d++) half[d] = 0;
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

/* Key or value `place` of a segment's chain; *segment becomes the one that it lies in, so ask from the end on. */
INLINE const void *key_at(const shape_t *shape, i64 head, i64 *segment, rows_t x, i64 place) {
    while (place < shape->before[*segment]) *segment = shape->parent[*segment];
    i64 token = shape->first[*segment] + place - shape->before[*segment];
    return at(x.data, head * x.head + token * x.token, shape->half);
}

/* A tile to be summed over its rows (may be NULL) and over its dimensions. */
INLINE void load_rows(const shape_t *shape, const tile_t *t, rows_t x, i64 dim, float *rows, float *turned, i64 stride) {
    i64 wide = whole(dim);
    if (!in_words(shape)) {
        float line[wide];
        for (i64 r = 0; r < t->padded; r++) {
            float *to = rows ? rows + r * wide : line;
            load_floats(to, row_at(shape, t, x, r), r < t->rows ? dim : 0, wide, shape->half);
            for (i64 d = 0; d < dim; d++) turned[d * stride + r] = to[d];
        }
        return;
    }
    uint16_t none[dim];
    memset(none, 0, sizeof none);
    for (i64 r = 0; r < t->padded; r += 2) {
        const uint16_t *a = r < t->rows ? row_at(shape, t, x, r) : none, *b = r + 1 < t->rows ? row_at(shape, t, x, r + 1) : none;
        for (i64 d = 0; d < dim / 2; d++) {
            memcpy(turned + d * stride + r, a + 2 * d, 4);
            memcpy(turned + d * stride + r + 1, b + 2 * d, 4);
        }
        if (dim % 2) {
            turned[dim / 2 * stride + r] = float_of(a[dim - 1]);
            turned[dim / 2 * stride + r + 1] = float_of(b[dim - 1]);
        }
        if (rows) load_pair(rows + r / 2 * wide, a, b, dim, wide);
    }
}

/* A block of a segment's chain to be summed over its keys and over its dimensions (either may be NULL), with zeros up to a whole group. */
INLINE void load_block(const shape_t *shape, i64 head, i64 segment, block_t b, rows_t x, i64 dim, float *keys, float *turned) {
    i64 wide = whole(dim), end = (b.count + GROUP - 1) / GROUP * GROUP;
    if (!in_words(shape)) {
        for (i64 j = end - 1; j >= 0; j--) {
            const void *from = j < b.count ? key_at(shape, head, &segment, x, b.start + j) : NULL;
            load_floats((keys ? keys : turned) + j * wide, from, from ? dim : 0, wide, shape->half);
        }
        return;
    }
    uint16_t none[dim];
    memset(none, 0, sizeof none);
    for (i64 j = end - 2; j >= 0; j -= 2) {
        const uint16_t *second = j + 1 < b.count ? key_at(shape, head, &segment, x, b.start + j + 1) : none;
        const uint16_t *first = j < b.count ? key_at(shape, head, &segment, x, b.start + j) : none;
        if (turned) load_neighbours(turned + j * wide / 2, first, dim, wide);
        if (turned) load_neighbours(turned + (j + 1) * wide / 2, second, dim, wide);
        if (keys) load_pair(keys + j / 2 * wide, first, second, dim, wide);
    }
}

/* Words of two keys' values for each row. */
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

/* Takes the memory for one thread; 1 where it cannot be had. Freed by `free(w->memory)`. */
INLINE int prepare(const shape_t *shape, work_t *w) {
    i64 rows = whole(larger(TILE, shape->groups)), d = whole(shape->dim), v = whole(shape->vdim);
    struct {
        float **to;
        i64 size;
    } parts[] = {
        {&w->q, rows * d},        {&w->q_turned, rows * d},  {&w->g, rows * v},       {&w->g_turned, rows * v},
        {&w->k, KEYS * d},        {&w->k_turned, KEYS * d},  {&w->v, KEYS * v},       {&w->v_turned, KEYS * v},
        {&w->s, KEYS * rows},     {&w->ds, KEYS * rows},     {&w->p_left, KEYS * rows}, {&w->ds_left, KEYS * rows},
        {&w->right, KEYS * rows}, {&w->out, rows * larger(d, v)}, {&w->top, rows},    {&w->sum, rows},
        {&w->factor, rows},       {&w->part, rows},          {&w->delta, rows},
        {&w->dk, KEYS * d},       {&w->dv, KEYS * v},        {&w->all_dk, WHOLE * d}, {&w->all_dv, WHOLE * v},
    };
    i64 total = 0, count = sizeof parts / sizeof *parts;
    for (i64 i = 0; i < count; i++) total += whole(parts[i].size);
    w->dim = d, w->vdim = v, w->rows = rows;
    w->memory = aligned_alloc(64, (size_t)(total * 4 + 63) / 64 * 64);
    float *next = w->memory;
    for (i64 i = 0; next && i < count; next += whole(parts[i++].size)) *parts[i].to = next;
    if (!in_words(shape)) w->k_turned = w->k, w->v_turned = w->v; /* one layout does for both sums */
    return w->memory == NULL;
}

/* What one thread does at a time: a tile (forward, or its dq), a block of keys (dk and dv), or all of some segments, which continue
   nothing outside. */
typedef struct {
    enum { ONE_TILE, ONE_BLOCK, ALL } kind;
    i64 segment, end, start, count;
} job_t;

INLINE i64 tile_jobs(const shape_t *shape, i64 first, i64 end, job_t *jobs) {
    i64 n = 0;
    for (i64 s = first; s < end; s++)
        for (i64 token = shape->first[s]; token < shape->first[s + 1]; n++) {
            tile_t t = tile_of(shape, 0, s, token);
            if (jobs) jobs[n] = (job_t){ONE_TILE, s, end, token, t.stop - token};
            token = t.stop;
        }
    return n;
}

#endif
