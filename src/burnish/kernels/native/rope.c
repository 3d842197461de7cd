/* Rotary position embedding, half-split: with d rotated dimensions and x_j the partner of x_i (j = i + d/2),

     y_i = x_i cos_i - x_j sin_i        y_j = x_j cos_j + x_i sin_j

   `inverse` is the transpose of that, which is the backward pass:

     y_i = x_i cos_i + x_j sin_j        y_j = x_j cos_j - x_i sin_i

   Products and sum are rounded one by one to the wider of the two types, as torch's three operations do. Both partners are read before
   either is written, so that y may be x. */

#include "common.h"

INLINE void rotate(i64 d, i64 rest, const void *x, const void *cosine, const void *sine, void *y, int inverse, int xh, int th) {
    const int both = xh && th;
    const i64 m = d / 2;
    if (inverse) {
        SIMD for (i64 i = 0; i < m; i++) {
            float a = load(x, i, xh), b = load(x, i + m, xh);
            float ya = rounded(a * load(cosine, i, th), both) + rounded(b * load(sine, i + m, th), both);
            float yb = rounded(b * load(cosine, i + m, th), both) - rounded(a * load(sine, i, th), both);
            store(y, i, ya, xh);
            store(y, i + m, yb, xh);
        }
    } else {
        SIMD for (i64 i = 0; i < m; i++) {
            float a = load(x, i, xh), b = load(x, i + m, xh);
            float ya = rounded(a * load(cosine, i, th), both) - rounded(b * load(sine, i, th), both);
            float yb = rounded(b * load(cosine, i + m, th), both) + rounded(a * load(sine, i + m, th), both);
            store(y, i, ya, xh);
            store(y, i + m, yb, xh);
        }
    }
    if (rest && x != y) memcpy(out_at(y, d, xh), at(x, d, xh), (size_t)rest * width(xh));
}

/* x and y: [batch, heads, t, d + rest] with the given strides (in elements) of the first three dimensions; tables [t, d] in one piece. */
EXPORT void burnish_rope(i64 batch, i64 heads, i64 t, i64 d, i64 rest, const void *x, const i64 *xs, const void *cosine, const void *sine, void *y,
                         const i64 *ys, int inverse, int xh, int th, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) collapse(2)
    for (i64 b = 0; b < batch; b++)
        for (i64 k = 0; k < t; k++) {
            const void *c = at(cosine, k * d, th), *s = at(sine, k * d, th);
            for (i64 head = 0; head < heads; head++) {
                const void *xk = at(x, b * xs[0] + head * xs[1] + k * xs[2], xh);
                void *yk = out_at(y, b * ys[0] + head * ys[1] + k * ys[2], xh);
                switch (inverse << 2 | xh << 1 | th) {
#define CASE(a, e) \
    case 0 << 2 | a << 1 | e: rotate(d, rest, xk, c, s, yk, 0, a, e); break; \
    case 1 << 2 | a << 1 | e: rotate(d, rest, xk, c, s, yk, 1, a, e); break;
                    CASE(0, 0) CASE(0, 1) CASE(1, 0) CASE(1, 1)
#undef CASE
                }
            }
        }
}
