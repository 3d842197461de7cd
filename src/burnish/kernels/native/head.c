/* Statistics of rows of logits in one pass over memory, and their gradient in a second one while the row is still in the cache.

     z      = cap * tanh(scale * raw / cap)                       (without the cap: scale * raw)
     lse    = m + log S,  S = sum_v e^(z_v - m)                   m is the largest logit so far; S and T are scaled when it changes
     logp   = z_y - lse,  mean = sum z / V
     entropy = lse - sum_v p_v z_v = log S - T / S,  T = sum_v e^(z_v - m) (z_v - m)
     d logp / d raw_v = (1[v = y] - p_v) (1 - (z_v / cap)^2) scale */

#include "common.h"

typedef struct {
    float scale, cap;
} shape_t;

INLINE float shaped(const void *z, i64 i, shape_t s, int capped, int half) {
    float v = load(z, i, half) * s.scale;
    return capped ? s.cap * fast_tanh(v / s.cap) : v;
}

typedef struct {
    float top;
    double sum, weighted, total;
} stats_t;

INLINE stats_t row_stats(i64 v, const void *z, shape_t shape, int capped, int half) {
    stats_t s = {-INFINITY, 0, 0, 0};
    float block[BLOCK];
    for (i64 a = 0; a < v; a += BLOCK) {
        i64 n = smaller(BLOCK, v - a);
        float top = s.top, total = 0, sum = 0, weighted = 0;
        PRAGMA(omp simd reduction(max : top) reduction(+ : total))
        for (i64 i = 0; i < n; i++) {
            float value = shaped(z, a + i, shape, capped, half);
            block[i] = value;
            total += value;
            top = value > top ? value : top;
        }
        s.total += total;
        if (top > s.top) {
            double step = (double)s.top - top, factor = s.sum > 0 ? exp(step) : 0;
            s.weighted = s.sum > 0 ? factor * (s.weighted + step * s.sum) : 0;
            s.sum *= factor;
            s.top = top;
        }
        if (top == -INFINITY && total == -INFINITY) continue; /* nothing but -inf so far: no probability */
        SIMD_SUM(sum, weighted) for (i64 i = 0; i < n; i++) {
            float x = block[i] - top, e = fast_exp(x);
            sum += e;
            weighted += e * x;
        }
        s.sum += sum;
        s.weighted += weighted;
    }
    return s;
}

/* Whether y is the first index of the largest logit, as torch's max answers. */
INLINE unsigned char is_first(i64 y, const void *z, float zy, stats_t s, shape_t shape, int capped, int half) {
    if (zy != s.top || s.sum != s.sum) return 0;
    int earlier = 0;
    PRAGMA(omp simd reduction(| : earlier))
    for (i64 i = 0; i < y; i++) earlier |= shaped(z, i, shape, capped, half) == zy;
    return !earlier;
}

#if defined(__AVX512BF16__)
/* -p scale in the place of bf16 logits, sixteen at a time; returns how many are done. */
INLINE i64 slope16(i64 v, uint16_t *z, float scale, float top, float inverse) {
    __m512 factor = _mm512_set1_ps(scale), largest = _mm512_set1_ps(top), share = _mm512_set1_ps(-inverse);
    i64 i = 0;
    for (; i + 16 <= v; i += 16) {
        __m512 p = _mm512_mul_ps(exp16(_mm512_sub_ps(_mm512_mul_ps(load16(z + i), factor), largest)), share);
        p = _mm512_mul_ps(p, factor);
        if (is_tiny16(p)) break;
        store16(z + i, p);
    }
    return i;
}
#else
#define slope16(...) 0
#endif

INLINE void gradient(i64 v, i64 y, void *z, float zy, stats_t s, shape_t shape, int capped, int half) {
    float inverse = (float)(1.0 / s.sum), top = s.top, ratio = zy / shape.cap;
    double target = (s.sum - exp((double)zy - top)) / s.sum;
    if (capped) target *= 1.0 - (double)ratio * ratio;
    i64 done = half && !capped ? slope16(v, z, shape.scale, top, inverse) : 0;
    SIMD for (i64 i = done; i < v; i++) {
        float value = shaped(z, i, shape, capped, half), t = value / shape.cap;
        float d = -(fast_exp(value - top) * inverse);
        if (capped) d *= 1.0f - t * t;
        store(z, i, d * shape.scale, half);
    }
    store(z, y, (float)target * shape.scale, half);
}

INLINE void head_row(i64 v, void *z, i64 y, shape_t shape, float *out, unsigned char *correct, int write, int capped, int half) {
    stats_t s = row_stats(v, z, shape, capped, half);
    float zy = shaped(z, y, shape, capped, half);
    double log_sum = log(s.sum);
    out[0] = (float)((double)zy - s.top - log_sum);
    out[1] = (float)(s.top + log_sum);
    out[2] = (float)(s.total / (double)v);
    out[3] = (float)(log_sum - s.weighted / s.sum);
    *correct = is_first(y, z, zy, s, shape, capped, half);
    if (write) gradient(v, y, z, zy, s, shape, capped, half);
}

/* z: [n, v] with rows `stride` elements apart; out: [n, 4] of logp, lse, mean, entropy; cap 0 is none. */
EXPORT void burnish_head(i64 n, i64 v, void *z, i64 stride, const i64 *y, float scale, float cap, float *out, unsigned char *correct, int write,
                         int half, int threads) {
    (void)threads;
    shape_t shape = {scale, cap};
    int capped = cap != 0;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 k = 0; k < n; k++) {
        void *row = out_at(z, k * stride, half);
        switch (capped << 1 | half) {
#define CASE(a, b) \
    case a << 1 | b: head_row(v, row, y[k], shape, out + 4 * k, correct + k, write, a, b); break;
            CASE(0, 0) CASE(0, 1) CASE(1, 0) CASE(1, 1)
#undef CASE
        }
    }
}
