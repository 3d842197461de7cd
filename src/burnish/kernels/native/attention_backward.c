/* Attention over a forest, backward: see attention.h. */

#include "attention.h"

/* What happens to the scores of a key, over the rows that see it. */

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
INLINE void weigh(float *restrict s, float *restrict ds, const float *restrict top, const float *restrict factor, span_t span) {
    SIMD for (i64 r = span.first; r < span.end; r++) {
        s[r] = fast_exp(s[r] - top[r]) * factor[r];
        ds[r] *= s[r];
    }
}

/* Words of two rows' values for one key. */
INLINE void pair_rows(float *restrict to, const float *restrict a, span_t span) {
#if defined(__AVX512BF16__)
    for (i64 r = span.first; r < span.end; r += LANES) store16((uint16_t *)to + r, _mm512_loadu_ps(a + r));
#else
    (void)to, (void)a, (void)span;
#endif
}

INLINE void add_row(float *restrict to, const float *restrict from, i64 n) {
    SIMD for (i64 d = 0; d < n; d++) to[d] += from[d];
}

typedef struct {
    rows_t q, k, v, g, dq, dk, dv;
    const softmax_t *kept;
    const float *delta;
} grads_t;

/* p and ds of a block, and what is wanted of their products: dq of the tile, dk and dv of the block. */
static void backward_block(const shape_t *shape, const tile_t *t, block_t b, work_t *w, int want_q, int want_kv) {
    i64 stride = w->rows, words = in_words(shape), per = words ? 2 : 1;
    for (i64 j = 0; j < b.count; j += GROUP) {
        span_t span = seen_by(shape, t, b.start + j);
        i64 n = span.end - span.first, at_row = span.first / per;
        if (n <= 0) continue;
        const float *k = w->k_turned + j * w->dim / per, *v = w->v_turned + j * w->vdim / per;
        float *scores = w->s + j * stride + span.first, *slopes = w->ds + j * stride + span.first;
        multiply(n, (shape->dim + per - 1) / per, k, w->dim / per, 1, w->q_turned + span.first, stride, scores, stride, 0, (int)words);
        multiply(n, (shape->vdim + per - 1) / per, v, w->vdim / per, 1, w->g_turned + span.first, stride, slopes, stride, 0, (int)words);
        for (i64 i = j; i < j + GROUP; i++) {
            float *s = w->s + i * stride, *ds = w->ds + i * stride;
            slope(s, ds, w->delta, span, shape->scale, shape->cap);
            hide(shape, t, b.start + i, span, s);
            weigh(s, ds, w->top, w->factor, span);
            if (!words) continue;
            pair_rows(w->p_left + i * stride / 2, s, span);
            pair_rows(w->ds_left + i * stride / 2, ds, span);
            if (i % 2) pair_keys(w->right + i / 2 * stride, ds - stride, ds, span);
        }
        if (!want_kv) continue;
        const float *p = (words ? w->p_left : w->s) + j * stride / per + at_row;
        const float *ds = (words ? w->ds_left : w->ds) + j * stride / per + at_row;
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
        w->top[r] = r < t->rows ? x->kept[from + r].top : 0;
        w->factor[r] = r < t->rows ? 1 / x->kept[from + r].sum : 0;
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

INLINE float dot(const void *a, const void *b, i64 n, int half) {
    float sum = 0;
    i64 done = 0;
#if defined(__AVX512BF16__)
    if (half && n >= 2 * LANES) {
        __m512 sums = _mm512_setzero_ps();
        for (; done + 2 * LANES <= n; done += 2 * LANES)
            sums = _mm512_dpbf16_ps(sums, (__m512bh)_mm512_loadu_si512(at(a, done, 1)), (__m512bh)_mm512_loadu_si512(at(b, done, 1)));
        sum = _mm512_reduce_add_ps(sums);
    }
#endif
    SIMD_SUM(sum) for (i64 i = done; i < n; i++) sum += load(a, i, half) * load(b, i, half);
    return sum;
}

/* delta [Hkv, T, G]: the sum of the products of an output and its gradient. */
INLINE void deltas(const shape_t *shape, i64 token, rows_t out, rows_t grad, float *delta, int half) {
    for (i64 h = 0; h < shape->heads; h++)
        for (i64 g = 0; g < shape->groups; g++) {
            i64 head = h * shape->groups + g;
            const void *o = at(out.data, head * out.head + token * out.token, half);
            const void *d = at(grad.data, head * grad.head + token * grad.token, half);
            delta[(h * shape->first[shape->segments] + token) * shape->groups + g] = dot(o, d, shape->vdim, half);
        }
}

/* x: q, k, v, out, and the gradients of out, q, k, v, shaped as in the forward pass; the last three and delta [Hkv, T, G] are written.
   Returns 1 where memory cannot be had. */
EXPORT int burnish_attention_backward(const shape_t *shape, const rows_t *x, const softmax_t *kept, float *delta, int threads) {
    (void)threads;
    grads_t all = {x[0], x[1], x[2], x[4], x[5], x[6], x[7], kept, delta};
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
