/* Products of small matrices in registers, for kernels that make their operands as they go.

   They multiply fp32, or, where the processor can, words: two bf16 that follow each other along the summed dimension, added up in fp32.
   Compiled with multiply-adds (-ffp-contract=fast). */

#ifndef BURNISH_PRODUCT_H
#define BURNISH_PRODUCT_H

#include "common.h"

#if defined(__AVX512BF16__)
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

/* Rows of a product at a time; any number of columns that fills registers. */
enum { GROUP = 4 };

INLINE i64 whole(i64 n) { return (n + LANES - 1) / LANES * LANES; }

/* Words of two rows. */
INLINE void load_pair(float *restrict to, const uint16_t *restrict a, const uint16_t *restrict b, i64 n, i64 wide) {
    SIMD for (i64 d = 0; d < n; d++) to[d] = float_of(a[d] | (uint32_t)b[d] << 16);
    for (i64 d = n; d < wide; d++) to[d] = 0;
}

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

INLINE void columns_of(i64 columns, i64 depth, const float *a, i64 a_row, i64 a_step, const float *b, i64 b_step, float *c, i64 c_row,
                       int add, int words) {
    while (columns > 0) {
        i64 left = columns / LANES, taken = COLUMNS;
        if (left < 2 * COLUMNS - 1) taken = left <= COLUMNS ? left : (left + 1) / 2; /* 5 is 3 and 2, not 4 and 1 */
        switch (taken) {
        case 4: product(4 <= COLUMNS ? 4 : 1, depth, a, a_row, a_step, b, b_step, c, c_row, add, words); break;
        case 3: product(3 <= COLUMNS ? 3 : 1, depth, a, a_row, a_step, b, b_step, c, c_row, add, words); break;
        case 2: product(2, depth, a, a_row, a_step, b, b_step, c, c_row, add, words); break;
        default: product(1, depth, a, a_row, a_step, b, b_step, c, c_row, add, words); break;
        }
        columns -= taken * LANES, b += taken * LANES, c += taken * LANES;
    }
}

/* c [GROUP, columns] (+)= a b, with element (r, k) of a at r a_row + k a_step; columns fill registers, depth counts floats or words. */
static __attribute__((noinline)) void multiply(i64 columns, i64 depth, const float *a, i64 a_row, i64 a_step, const float *b, i64 b_step,
                                               float *c, i64 c_row, int add, int words) {
    if (words)
        columns_of(columns, depth, a, a_row, a_step, b, b_step, c, c_row, add, WORDS);
    else
        columns_of(columns, depth, a, a_row, a_step, b, b_step, c, c_row, add, 0);
}

#endif
