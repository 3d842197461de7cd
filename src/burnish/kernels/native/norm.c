/* RMSNorm, one row at a time: s = x + residual, r = 1 / sqrt(mean(s^2) + eps), and

     Llama:  y = weight * (s r), where s r is rounded to x's type first, and the product to the wider of the two types
     Gemma:  y = s r (offset + weight), rounded once

   Backward, with g = dy * (offset + weight) and n = s r:  dx = r (g - n mean(g n)) + dsummed,  dweight = sum over rows of dy n. */

#include "common.h"

#if defined(__AVX512BF16__)
/* The loops that write bf16, sixteen numbers at a time; each returns how many are done. */

INLINE i64 sum16(i64 h, const uint16_t *x, const uint16_t *residual, uint16_t *summed) {
    i64 i = 0;
    for (; i + 16 <= h; i += 16) {
        __m512 s = _mm512_add_ps(load16(x + i), load16(residual + i));
        if (is_tiny16(s)) break;
        store16(summed + i, s);
    }
    return i;
}

INLINE i64 scale16(i64 h, const uint16_t *x, float r, const uint16_t *w, uint16_t *y) {
    i64 i = 0;
    for (; i + 16 <= h; i += 16) {
        __m512 n = _mm512_mul_ps(load16(x + i), _mm512_set1_ps(r)), scaled = _mm512_mul_ps(round16(n), load16(w + i));
        if (is_tiny16(n) | is_tiny16(scaled)) break;
        store16(y + i, scaled);
    }
    return i;
}

INLINE i64 slope16(i64 h, const uint16_t *dy, const uint16_t *dsummed, const uint16_t *x, const uint16_t *w, float scale, float mean, float offset,
                   uint16_t *dx) {
    __m512 r = _mm512_set1_ps(scale), c = _mm512_set1_ps(mean), plus = _mm512_set1_ps(offset);
    i64 i = 0;
    for (; i + 16 <= h; i += 16) {
        __m512 g = _mm512_mul_ps(load16(dy + i), _mm512_add_ps(plus, load16(w + i)));
        __m512 d = _mm512_mul_ps(r, _mm512_sub_ps(g, _mm512_mul_ps(_mm512_mul_ps(load16(x + i), r), c)));
        if (dsummed) d = _mm512_add_ps(d, load16(dsummed + i));
        if (is_tiny16(d)) break;
        store16(dx + i, d);
    }
    return i;
}
#else
#define sum16(...) 0
#define scale16(...) 0
#define slope16(...) 0
#endif

INLINE void forward_row(i64 h, const void *x, const void *residual, void *summed, const void *w, void *y, float *rstd, float eps, float offset,
                        int gemma, int xh, int wh, int yh) {
    if (residual) {
        i64 done = xh ? sum16(h, x, residual, summed) : 0;
        SIMD for (i64 i = done; i < h; i++) store(summed, i, load(x, i, xh) + load(residual, i, xh), xh);
        x = summed;
    }
    double total = 0;
    for (i64 a = 0; a < h; a += BLOCK) {
        i64 end = smaller(a + BLOCK, h);
        float squares = 0;
        SIMD_SUM(squares) for (i64 i = a; i < end; i++) {
            float v = load(x, i, xh);
            squares += v * v;
        }
        total += squares;
    }
    float r = 1.0f / sqrtf((float)(total / (double)h) + eps);
    *rstd = r;
    if (gemma) {
        SIMD for (i64 i = 0; i < h; i++) store(y, i, load(x, i, xh) * r * (offset + load(w, i, wh)), yh);
    } else {
        i64 done = xh && wh && yh ? scale16(h, x, r, w, y) : 0;
        SIMD for (i64 i = done; i < h; i++) store(y, i, rounded(rounded(load(x, i, xh) * r, xh) * load(w, i, wh), xh && wh), yh);
    }
}

#define EACH(M) M(0, 0, 0) M(0, 0, 1) M(0, 1, 0) M(0, 1, 1) M(1, 0, 0) M(1, 0, 1) M(1, 1, 0) M(1, 1, 1)

EXPORT void burnish_rms_forward(i64 n, i64 h, const void *x, const void *residual, void *summed, const void *w, void *y, float *rstd, float eps,
                                float offset, int gemma, int xh, int wh, int yh, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 k = 0; k < n; k++) {
        const void *xk = at(x, k * h, xh), *rk = at(residual, k * h, xh);
        void *sk = out_at(summed, k * h, xh), *yk = out_at(y, k * h, yh);
        switch (xh << 2 | wh << 1 | yh) {
#define CASE(a, b, c) \
    case a << 2 | b << 1 | c: forward_row(h, xk, rk, sk, w, yk, rstd + k, eps, offset, gemma, a, b, c); break;
            EACH(CASE)
#undef CASE
        }
    }
}

/* `dw` is a row of fp32 sums, or NULL; `offset` is 0 for Llama's cast. */
INLINE void backward_row(i64 h, const void *dy, const void *dsummed, const void *x, const void *w, float r, float offset, int gemma, void *dx,
                         float *dw, int xh, int wh, int yh) {
    double total = 0;
    for (i64 a = 0; a < h; a += BLOCK) {
        i64 end = smaller(a + BLOCK, h);
        float dot = 0;
        SIMD_SUM(dot) for (i64 i = a; i < end; i++) {
            float g = load(dy, i, yh) * (offset + load(w, i, wh));
            dot += g * (load(x, i, xh) * r);
        }
        total += dot;
    }
    float c = (float)(total / (double)h);
    /* dw first: dx may be written over dy. */
    if (dw && gemma) {
        SIMD for (i64 i = 0; i < h; i++) dw[i] += load(dy, i, yh) * (load(x, i, xh) * r);
    } else if (dw) {
        SIMD for (i64 i = 0; i < h; i++) dw[i] += load(dy, i, yh) * rounded(load(x, i, xh) * r, xh);
    }
    i64 done = xh && wh && yh ? slope16(h, dy, dsummed, x, w, r, c, offset, dx) : 0;
    if (dsummed) {
        SIMD for (i64 i = done; i < h; i++) {
            float g = load(dy, i, yh) * (offset + load(w, i, wh));
            store(dx, i, r * (g - load(x, i, xh) * r * c) + load(dsummed, i, xh), xh);
        }
    } else {
        SIMD for (i64 i = done; i < h; i++) {
            float g = load(dy, i, yh) * (offset + load(w, i, wh));
            store(dx, i, r * (g - load(x, i, xh) * r * c), xh);
        }
    }
}

/* Rows whose dw is summed in fp32 by itself. Chunks, not threads, so that the result does not depend on the number of threads. */
enum { ROWS = 64 };

EXPORT i64 burnish_rms_chunks(i64 n) { return (n + ROWS - 1) / ROWS; }

/* `partial`: [burnish_rms_chunks(n), h] zeros, or NULL where dw is not wanted. */
EXPORT void burnish_rms_backward(i64 n, i64 h, const void *dy, const void *dsummed, const void *x, const void *w, const float *rstd, float offset,
                                 int gemma, void *dx, float *partial, float *dw, int xh, int wh, int yh, int threads) {
    (void)threads;
    i64 chunks = burnish_rms_chunks(n);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 chunk = 0; chunk < chunks; chunk++) {
        float *sums = partial ? partial + chunk * h : NULL;
        for (i64 k = chunk * ROWS; k < smaller(n, (chunk + 1) * ROWS); k++) {
            const void *dyk = at(dy, k * h, yh), *dsk = at(dsummed, k * h, xh), *xk = at(x, k * h, xh);
            void *dxk = out_at(dx, k * h, xh);
            float r = rstd[k];
            switch (xh << 2 | wh << 1 | yh) {
#define CASE(a, b, c) \
    case a << 2 | b << 1 | c: backward_row(h, dyk, dsk, xk, w, r, offset, gemma, dxk, sums, a, b, c); break;
                EACH(CASE)
#undef CASE
            }
        }
    }
    if (!partial) return;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 a = 0; a < h; a += BLOCK) {
        i64 end = smaller(a + BLOCK, h);
        double total[BLOCK] = {0};
        for (i64 chunk = 0; chunk < chunks; chunk++) {
            SIMD for (i64 i = a; i < end; i++) total[i - a] += partial[chunk * h + i];
        }
        for (i64 i = a; i < end; i++) dw[i] = (float)total[i - a];
    }
}
