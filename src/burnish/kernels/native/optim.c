/* AdamW over flat fp32 buffers, one pass (Loshchilov and Hutter, arXiv 1711.05101):

     g = grad * grad_scale
     m += (1 - b1) (g - m)        v = b2 v + (1 - b2) g^2
     param = (1 - lr wd) param - (lr / c1) m / (sqrt(v) / sqrt(c2) + eps),   c = 1 - b^t

   What does not change over the elements comes computed in fp64 and rounded once, as torch passes its scalars. */

#include "common.h"

enum { CHUNK = 8192 };

EXPORT void burnish_adamw(i64 n, float *param, const void *grad, float *m, float *v, float grad_scale, float keep, float m_weight, float b2,
                          float v_weight, float root_c2, float eps, float minus_step, int half, int threads) {
    (void)threads;
    i64 chunks = (n + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 c = 0; c < chunks; c++) {
        i64 a = c * CHUNK, end = smaller(n, a + CHUNK);
#define LOOP(h) \
    SIMD for (i64 i = a; i < end; i++) { \
        float g = load(grad, i, h) * grad_scale; \
        m[i] = m[i] + m_weight * (g - m[i]); \
        v[i] = v[i] * b2 + v_weight * g * g; \
        param[i] = param[i] * keep + minus_step * m[i] / (sqrtf(v[i]) / root_c2 + eps); \
    }
        if (half)
            LOOP(1)
        else
            LOOP(0)
#undef LOOP
    }
}
