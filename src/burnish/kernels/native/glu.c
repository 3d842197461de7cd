/* Gated linear units: h = act(gate) * up, with act(gate) rounded to the tensors' type before the product, as torch's two operations do.

     silu       a(x) = x / (1 + e^-x)          a' = s (1 + x (1 - s)),  s = 1 / (1 + e^-x)
     gelu_tanh  a(x) = x s,  s = 1 / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3);  0.5 (1 + tanh u) without its cancellation for u < 0
                                                a' = s + 2 x s (1 - s) u', 1 - s = e^-2u s
     gelu       a(x) = x 0.5 (1 + erf(x / sqrt 2))   a' = 0.5 (1 + erf(x / sqrt 2)) + x e^(-x^2/2) / sqrt(2 pi)

   Backward:  dup = dh a(gate),  dgate = round(dh up) a'(gate). */

#include "common.h"

enum { SILU, GELU_TANH, GELU };
enum { CHUNK = 4096 };

#define ROOT_2_OVER_PI 0.79788456f
#define CUBIC 0.044715f

/* e^-2u */
INLINE float gelu_tanh_exp(float x) { return fast_exp(-2.0f * (ROOT_2_OVER_PI * (x + CUBIC * (x * x * x)))); }

INLINE float gelu_gate(float x) { return 0.5f * (1.0f + fast_erf(x * 0.70710678f)); }

INLINE float act(float x, int kind) {
    if (kind == SILU) return x / (1.0f + fast_exp(-x));
    return kind == GELU_TANH ? x / (1.0f + gelu_tanh_exp(x)) : x * gelu_gate(x);
}

INLINE float act_slope(float x, int kind) {
    if (kind == SILU) {
        float s = 1.0f / (1.0f + fast_exp(-x));
        return s * (1.0f + x * (1.0f - s));
    }
    if (kind == GELU_TANH) {
        float e = gelu_tanh_exp(x), s = 1.0f / (1.0f + e);
        float rest = e < 1e30f ? e * s : 1.0f; /* 1 - s, without its cancellation */
        return s + 2.0f * x * rest * s * (ROOT_2_OVER_PI * (1.0f + 3.0f * CUBIC * (x * x)));
    }
    return gelu_gate(x) + x * (fast_exp(-0.5f * (x * x)) * 0.39894228f);
}

#if defined(__AVX512BF16__)
/* silu on bf16, sixteen numbers at a time. Both return how many are done. */

/* 1 + e^-x */
INLINE __m512 silu_divisor16(__m512 x) { return _mm512_add_ps(_mm512_set1_ps(1), exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))); }

INLINE i64 silu_forward(i64 n, const uint16_t *gate, const uint16_t *up, uint16_t *h) {
    i64 i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 x = load16(gate + i), act = _mm512_div_ps(x, silu_divisor16(x)), y = _mm512_mul_ps(round16(act), load16(up + i));
        if (is_tiny16(act) | is_tiny16(y)) break;
        store16(h + i, y);
    }
    return i;
}

INLINE i64 silu_backward(i64 n, const uint16_t *dh, const uint16_t *gate, const uint16_t *up, uint16_t *dgate, uint16_t *dup, uint16_t *h,
                         int want_h) {
    __m512 one = _mm512_set1_ps(1);
    i64 i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 d = load16(dh + i), x = load16(gate + i), u = load16(up + i);
        __m512 sum = silu_divisor16(x), act = _mm512_div_ps(x, sum), s = _mm512_div_ps(one, sum), a = round16(act);
        __m512 slope = _mm512_mul_ps(s, _mm512_add_ps(one, _mm512_mul_ps(x, _mm512_sub_ps(one, s))));
        __m512 du = _mm512_mul_ps(d, a), product = _mm512_mul_ps(d, u), y = _mm512_mul_ps(a, u);
        __m512 dg = _mm512_mul_ps(round16(product), slope);
        if (is_tiny16(act) | is_tiny16(du) | is_tiny16(product) | is_tiny16(dg) | is_tiny16(y)) break;
        store16(dup + i, du);
        store16(dgate + i, dg);
        if (want_h) store16(h + i, y);
    }
    return i;
}
#else
#define silu_forward(...) 0
#define silu_backward(...) 0
#endif

INLINE void forward_chunk(i64 n, const void *gate, const void *up, void *h, int kind, int half) {
    i64 done = kind == SILU && half ? silu_forward(n, gate, up, h) : 0;
    SIMD for (i64 i = done; i < n; i++) store(h, i, rounded(act(load(gate, i, half), kind), half) * load(up, i, half), half);
}

INLINE void backward_chunk(i64 n, const void *dh, const void *gate, const void *up, void *dgate, void *dup, void *h, int want_h, int kind,
                           int half) {
    i64 done = kind == SILU && half ? silu_backward(n, dh, gate, up, dgate, dup, h, want_h) : 0;
    SIMD for (i64 i = done; i < n; i++) {
        float d = load(dh, i, half), x = load(gate, i, half), u = load(up, i, half), a = rounded(act(x, kind), half);
        store(dup, i, d * a, half);
        store(dgate, i, rounded(d * u, half) * act_slope(x, kind), half);
        if (want_h) store(h, i, a * u, half);
    }
}

#define EACH(M) M(SILU, 0) M(SILU, 1) M(GELU_TANH, 0) M(GELU_TANH, 1) M(GELU, 0) M(GELU, 1)

/* gate and up: [n, m] with rows `sg` and `su` elements apart; h in one piece. */
EXPORT void burnish_glu_forward(i64 n, i64 m, const void *gate, i64 sg, const void *up, i64 su, void *h, int kind, int half, int threads) {
    (void)threads;
    i64 chunks = (m + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads) collapse(2)
    for (i64 k = 0; k < n; k++)
        for (i64 c = 0; c < chunks; c++) {
            i64 a = c * CHUNK, size = smaller(CHUNK, m - a);
            const void *g = at(gate, k * sg + a, half), *u = at(up, k * su + a, half);
            void *y = out_at(h, k * m + a, half);
            switch (kind << 1 | half) {
#define CASE(e, f) \
    case e << 1 | f: forward_chunk(size, g, u, y, e, f); break;
                EACH(CASE)
#undef CASE
            }
        }
}

/* dh, dgate, dup and h (or NULL) in one piece. */
EXPORT void burnish_glu_backward(i64 n, i64 m, const void *dh, const void *gate, i64 sg, const void *up, i64 su, void *dgate, void *dup, void *h,
                                 int kind, int half, int threads) {
    (void)threads;
    i64 chunks = (m + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads) collapse(2)
    for (i64 k = 0; k < n; k++)
        for (i64 c = 0; c < chunks; c++) {
            i64 a = c * CHUNK, size = smaller(CHUNK, m - a);
            const void *g = at(gate, k * sg + a, half), *u = at(up, k * su + a, half), *d = at(dh, k * m + a, half);
            void *dg = out_at(dgate, k * m + a, half), *du = out_at(dup, k * m + a, half), *y = out_at(h, k * m + a, half);
            switch ((h != NULL) << 3 | kind << 1 | half) {
#define CASE(e, f) \
    case e << 1 | f: backward_chunk(size, d, g, u, dg, du, NULL, 0, e, f); break; \
    case 1 << 3 | e << 1 | f: backward_chunk(size, d, g, u, dg, du, y, 1, e, f); break;
                EACH(CASE)
#undef CASE
            }
        }
}
