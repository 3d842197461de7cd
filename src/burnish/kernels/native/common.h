/* What every kernel here shares: bf16 and fp32 elements, sums over a row, and exp, tanh and erf that a compiler can vectorise.

   A function that takes `half` reads or writes bf16 (1) or fp32 (0). All of them are inlined with a literal, so that the test costs
   nothing. Arithmetic is fp32. The compiler is told to contract nothing into fused multiply-adds (-ffp-contract=off), since torch's
   separate operations round one by one; FMA() below is the only place where they are wanted. */

#ifndef BURNISH_COMMON_H
#define BURNISH_COMMON_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define PRAGMA(x) _Pragma(#x)
#define SIMD PRAGMA(omp simd)
#define SIMD_SUM(...) PRAGMA(omp simd reduction(+ : __VA_ARGS__))

typedef int64_t i64;

/* Elements summed in fp32 before they go into an fp64 total: the error of a row's sum does not grow with the row. */
enum { BLOCK = 512 };

#if defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

INLINE i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 larger(i64 a, i64 b) { return a > b ? a : b; }

INLINE uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

INLINE float float_of(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* The bits of f rounded to a bf16, to nearest, ties to even, with what is below it still there; a NaN stays one. */
INLINE uint32_t rounded_bits(float f) {
    uint32_t u = bits_of(f);
    return f == f ? u + 0x7fffu + ((u >> 16) & 1u) : 0x7fc00000u;
}

INLINE uint16_t narrow(float f) { return (uint16_t)(rounded_bits(f) >> 16); }

INLINE float widen(uint16_t b) { return float_of((uint32_t)b << 16); }

/* The value as it would be read back from memory. */
INLINE float rounded(float f, int half) { return half ? float_of(rounded_bits(f) & 0xffff0000u) : f; }

INLINE float load(const void *p, i64 i, int half) { return half ? widen(((const uint16_t *)p)[i]) : ((const float *)p)[i]; }

INLINE void store(void *p, i64 i, float f, int half) {
    if (half)
        ((uint16_t *)p)[i] = narrow(f);
    else
        ((float *)p)[i] = f;
}

INLINE size_t width(int half) { return half ? sizeof(uint16_t) : sizeof(float); }

/* Pointer to element i of bf16 or fp32 memory; NULL stays NULL. */
INLINE const void *at(const void *p, i64 i, int half) { return p ? (const char *)p + i * (i64)width(half) : NULL; }
INLINE void *out_at(void *p, i64 i, int half) { return p ? (char *)p + i * (i64)width(half) : NULL; }

/* exp(x) within about one unit in the last place. exp(r) on |r| <= ln 2 / 2 is a minimax polynomial (error 2^-28), times 2^n. Results
   below 2^-125 are zero: where it is used they are added to 1 or to a sum of at least 1. NaN and infinities come through. */
INLINE float fast_exp(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: the sum's low bits are the nearest integer */
    float c = x < -87.0f ? -87.0f : x; /* there n is -126 and the scale's bits are those of zero */
    c = c > 89.0f ? 89.0f : c;
    float z = FMA(c, 1.44269504f, magic), n = z - magic;
    float r = FMA(n, -0.693359375f, c);
    r = FMA(n, 2.12194440e-4f, r);
    float q = FMA(0.0013950539021f, r, 0.0083689178996f);
    q = FMA(q, r, 0.0416662051f);
    q = FMA(q, r, 0.16666518602f);
    q = FMA(q, r, 0.50000000954f);
    float p = FMA(q * r, r, r) + 1.0f;
    float scale = float_of((bits_of(z) - bits_of(magic) + 126u) << 23); /* 2^(n - 1): 2^128 would be infinite, 2 * 2^127 need not be */
    return (p + p) * scale;
}

#if defined(__AVX512BF16__)
#include <immintrin.h>

/* Sixteen bf16 at a time, rounded by the processor in one instruction, which compilers do not find in a loop. It takes what is below the
   smallest normal number for zero, as torch does not: where is_tiny16 says so, a loop ends early and the plain one goes on. */
INLINE __m512 widen16(__m256i b) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16); }
INLINE __m512 load16(const uint16_t *p) { return widen16(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void store16(uint16_t *p, __m512 f) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(f)); }
INLINE __m512 round16(__m512 f) { return widen16((__m256i)_mm512_cvtneps_pbh(f)); }

INLINE int is_tiny16(__m512 f) { return _mm512_fpclass_ps_mask(f, 0x20); }

/* fast_exp of sixteen numbers, bit for bit. */
INLINE __m512 exp16(__m512 x) {
    __m512 magic = _mm512_set1_ps(12582912.0f), c = _mm512_max_ps(_mm512_set1_ps(-87.0f), x); /* of a NaN and a number the second */
    c = _mm512_min_ps(_mm512_set1_ps(89.0f), c);
    __m512 z = _mm512_fmadd_ps(c, _mm512_set1_ps(1.44269504f), magic), n = _mm512_sub_ps(z, magic);
    __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), c);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 q = _mm512_fmadd_ps(_mm512_set1_ps(0.0013950539021f), r, _mm512_set1_ps(0.0083689178996f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.0416662051f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.16666518602f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.50000000954f));
    __m512 p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(q, r), r, r), _mm512_set1_ps(1));
    __m512i bits = _mm512_add_epi32(_mm512_sub_epi32((__m512i)z, (__m512i)magic), _mm512_set1_epi32(126));
    return _mm512_mul_ps(_mm512_add_ps(p, p), (__m512)_mm512_slli_epi32(bits, 23));
}
#endif

/* tanh(x): an odd polynomial where it is near x, else 1 - 2 / (exp(2x) + 1). */
INLINE float fast_tanh(float x) {
    float a = float_of(bits_of(x) & 0x7fffffffu), s = a * a;
    float t = FMA(0.0021475372899f, s, -0.0081826742229f);
    t = FMA(t, s, 0.021702967185f);
    t = FMA(t, s, -0.053947204263f);
    t = FMA(t, s, 0.13333209763f);
    t = FMA(t, s, -0.33333330907f);
    float small = FMA(a * s, t, a);
    float large = 1.0f - 2.0f / (fast_exp(2.0f * a) + 1.0f);
    float y = a < 0.625f ? small : large;
    return float_of(bits_of(y) | (bits_of(x) & 0x80000000u));
}

/* erf(x): an odd polynomial up to 1, beyond it 1 - exp(-r(|x|)) with r a polynomial for -log(erfc); 1 from 4 on. */
INLINE float fast_erf(float x) {
    float a = float_of(bits_of(x) & 0x7fffffffu);
    float c = a > 4.0f ? 4.0f : a, s = c * c;
    float p = FMA(-9.6801451779e-6f, s, 0.00011270547574f);
    p = FMA(p, s, -0.0008484711874f);
    p = FMA(p, s, 0.0052210749071f);
    p = FMA(p, s, -0.026865445832f);
    p = FMA(p, s, 0.11283782747f);
    p = FMA(p, s, -0.37612638484f);
    p = FMA(p, s, 0.12837916706f);
    float small = FMA(c, p, c);
    float r = FMA(2.1686698105e-5f, c, -0.00044133448625f);
    r = FMA(r, c, 0.004204551987f);
    r = FMA(r, c, -0.025208228583f);
    r = FMA(r, c, 0.10841853015f);
    r = FMA(r, c, 0.63321993965f);
    r = FMA(r, c, 1.1295783992f);
    r = FMA(r, c, -0.00018803454439f);
    float y = a < 1.0f ? small : 1.0f - fast_exp(-r);
    y = a == a ? y : a;
    return float_of(bits_of(y) | (bits_of(x) & 0x80000000u));
}

#endif
