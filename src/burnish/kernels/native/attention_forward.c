/* Attention over a forest, forward: see attention.h. */

#include "attention.h"

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

INLINE void rescale(float *restrict row, float factor, i64 n) {
    SIMD for (i64 d = 0; d < n; d++) row[d] *= factor;
}

static void forward_block(const shape_t *shape, const tile_t *t, block_t b, work_t *w, int first) {
    i64 stride = w->rows, words = in_words(shape), per = words ? 2 : 1;
    float *restrict part = w->part, *restrict factor = w->factor, *restrict sum = w->sum, *restrict top = w->top;
    memcpy(factor, top, (size_t)t->padded * sizeof(float));
    for (i64 j = 0; j < b.count; j += GROUP) {
        span_t span = seen_by(shape, t, b.start + j);
        float *s = w->s + j * stride;
        const float *k = w->k_turned + j * w->dim / per, *q = w->q_turned + span.first;
        multiply(span.end - span.first, (shape->dim + per - 1) / per, k, w->dim / per, 1, q, stride, s + span.first, stride, 0, (int)words);
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

static void forward_tile(const shape_t *shape, const tile_t *t, work_t *w, const rows_t *x, softmax_t *kept, const float *sinks) {
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
    softmax_t *to = kept + (t->head * shape->first[shape->segments] + t->start) * groups;
    for (i64 r = 0; r < t->rows; r++) {
        store_row((void *)row_at(shape, t, x[3], r), w->out + r * w->vdim, 1 / w->sum[r], shape->vdim, shape->half);
        to[r] = (softmax_t){w->top[r], w->sum[r]};
    }
}

/* x: q [Hq, T, D], k [Hkv, T, D], v [Hkv, T, V], out [Hq, T, V]. kept: [Hkv, T, G]. sinks: [Hq] or NULL. Returns 1 where memory cannot
   be had. */
EXPORT int burnish_attention_forward(const shape_t *shape, const rows_t *x, softmax_t *kept, const float *sinks, int threads) {
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
                forward_tile(shape, &t, &w, x, kept, sinks);
            }
        free(w.memory);
    }
    free(jobs);
    return failed;
}
