/* What the kernels share: bf16 loads and stores, and a vector exponential. x86-64 with AVX512-BF16. */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
typedef int64_t i64;
#define INLINE static inline __attribute__((always_inline))

INLINE __m512 load(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
INLINE void store(bf16 *p, __m512 x) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x)); }
INLINE float widen(bf16 x) {
    union { uint32_t u; float f; } v = {(uint32_t)x << 16};
    return v.f;
}

/* e^x to 2 ulp: x = n ln2 + r, a degree-5 polynomial in r, scaled by 2^n. NaN stays NaN. */
INLINE __m512 exp_ps(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.3f), x); /* of a NaN and a number, max gives its second operand */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(8.37312452e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.16695364e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.66664720e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.99999851e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}
