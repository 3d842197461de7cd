/* Causal softmax in place over scores [groups, rows, keys], and its backward pass.

   Row r stands for query q = r mod queries (several query heads of one key head may be stacked), which sees the keys
   q + offset - window < k <= q + offset. Only those are read; the others become exact zeros.

     p = e^(scale s - lse)          ds = scale p (dp - delta),  delta = sum_k p dp */

#include "common.h"

typedef struct {
    i64 first, end;
} span_t;

INLINE span_t visible(i64 row, i64 queries, i64 keys, i64 offset, i64 window) {
    i64 last = row % queries + offset;
    span_t s = {window > 0 ? larger(0, last - window + 1) : 0, smaller(last + 1, keys)};
    if (s.end < s.first) s.end = s.first = 0;
    return s;
}

INLINE void blank(void *row, i64 keys, span_t s, int half) {
    memset(row, 0, (size_t)s.first * width(half));
    memset(out_at(row, s.end, half), 0, (size_t)(keys - s.end) * width(half));
}

INLINE float softmax_span(void *s, i64 n, float scale, float *e, int half) {
    float top = -INFINITY;
    PRAGMA(omp simd reduction(max : top))
    for (i64 i = 0; i < n; i++) {
        float value = load(s, i, half) * scale;
        e[i] = value;
        top = value > top ? value : top;
    }
    double total = 0;
    for (i64 a = 0; a < n; a += BLOCK) {
        i64 end = smaller(a + BLOCK, n);
        float sum = 0;
        SIMD_SUM(sum) for (i64 i = a; i < end; i++) {
            e[i] = fast_exp(e[i] - top);
            sum += e[i];
        }
        total += sum;
    }
    float inverse = (float)(1.0 / total);
    SIMD for (i64 i = 0; i < n; i++) store(s, i, e[i] * inverse, half);
    return (float)(top + log(total));
}

/* Rows lie `row_stride` elements apart, groups `group_stride`; window 0 is none. Returns 1 where memory for a row cannot be had. */
EXPORT int burnish_softmax_forward(i64 groups, i64 rows, i64 keys, void *scores, i64 group_stride, i64 row_stride, float scale, i64 offset,
                                   i64 queries, i64 window, float *lse, int half, int threads) {
    (void)threads;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *e = malloc((size_t)larger(keys, 1) * sizeof(float));
        failed = e == NULL;
#pragma omp for schedule(static, 8) collapse(2) /* in small pieces: the rows grow longer */
        for (i64 g = 0; g < groups; g++)
            for (i64 r = 0; r < rows; r++) {
                void *row = out_at(scores, g * group_stride + r * row_stride, half);
                span_t s = visible(r, queries, keys, offset, window);
                if (!e) continue;
                void *part = out_at(row, s.first, half);
                i64 n = s.end - s.first;
                float total = -INFINITY;
                if (n) total = half ? softmax_span(part, n, scale, e, 1) : softmax_span(part, n, scale, e, 0);
                lse[g * rows + r] = total;
                blank(row, keys, s, half);
            }
        free(e);
    }
    return failed;
}

INLINE void backward_span(const void *p, void *dp, i64 n, float scale, const float *delta, int ph, int dh) {
    double total = 0;
    if (delta)
        total = *delta;
    else
        for (i64 a = 0; a < n; a += BLOCK) {
            i64 end = smaller(a + BLOCK, n);
            float sum = 0;
            SIMD_SUM(sum) for (i64 i = a; i < end; i++) sum += load(p, i, ph) * load(dp, i, dh);
            total += sum;
        }
    float d = (float)total;
    SIMD for (i64 i = 0; i < n; i++) store(dp, i, load(p, i, ph) * (load(dp, i, dh) - d) * scale, dh);
}

/* p and dp with strides as above, each its own; delta: [groups, rows], or NULL: computed from p and dp. */
EXPORT void burnish_softmax_backward(i64 groups, i64 rows, i64 keys, const void *p, i64 p_group, i64 p_row, void *dp, i64 dp_group, i64 dp_row,
                                     const float *delta, float scale, i64 offset, i64 queries, i64 window, int ph, int dh, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static, 8) num_threads(threads) collapse(2)
    for (i64 g = 0; g < groups; g++)
        for (i64 r = 0; r < rows; r++) {
            void *row = out_at(dp, g * dp_group + r * dp_row, dh);
            span_t s = visible(r, queries, keys, offset, window);
            const void *from = at(p, g * p_group + r * p_row + s.first, ph);
            void *part = out_at(row, s.first, dh);
            const float *d = delta ? delta + g * rows + r : NULL;
            switch (ph << 1 | dh) {
#define CASE(a, b) \
    case a << 1 | b: backward_span(from, part, s.end - s.first, scale, d, a, b); break;
                CASE(0, 0) CASE(0, 1) CASE(1, 0) CASE(1, 1)
#undef CASE
            }
            blank(row, keys, s, dh);
        }
}
