/* Few rows times weights in bf16, by dot products. */
#pragma once
#include "step.h"

#define BLOCK 16 /* outputs in a task */

/* The sums of 16 vectors' lanes, each in the same order: [16]. */
INLINE __m512 sums(const __m512 *v) {
    __m512 q[4];
    for (int i = 0; i < 4; i++) {
        const __m512 *w = v + 4 * i;
        __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(w[0], w[1]), _mm512_unpackhi_ps(w[0], w[1]));
        __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(w[2], w[3]), _mm512_unpackhi_ps(w[2], w[3]));
        __m512d lo = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), hi = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
        q[i] = _mm512_add_ps((__m512)lo, (__m512)hi);
    }
    __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(q[0], q[1], 0x88), _mm512_shuffle_f32x4(q[0], q[1], 0xdd));
    __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(q[2], q[3], 0x88), _mm512_shuffle_f32x4(q[2], q[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

INLINE __m512bh half_pairs(const bf16 *p) { return (__m512bh)_mm512_maskz_loadu_epi32(0xff, p); }

/* tile[m][n] = x_m · w_n for MR rows of x and 16 / MR rows of w, K apart. Fresh weights are read one row after the
 * other, as memory likes it, and those `ahead` bytes further are asked for; where they are in cache, rows share what
 * they load. Either way a sum runs in the same order. */
INLINE void dots(const int MR, const int fresh, const bf16 *const *x, const bf16 *w, i64 K, i64 ahead,
                 float (*tile)[PANEL]) {
    const int NR = BLOCK / MR;
    const i64 whole = K / 32 * 32;
    __m512 acc[BLOCK];
    for (int i = 0; i < BLOCK; i++) acc[i] = _mm512_setzero_ps();
    if (fresh)
#pragma GCC unroll 16
        for (int n = 0; n < NR; n++)
            for (i64 k = 0; k < whole; k += 32) {
                __m512bh wn = pairs(w + n * K + k);
                _mm_prefetch((const char *)(w + n * K + k) + ahead, _MM_HINT_T1);
                for (int m = 0; m < MR; m++) acc[m * NR + n] = _mm512_dpbf16_ps(acc[m * NR + n], pairs(x[m] + k), wn);
            }
    else
        for (i64 k = 0; k < whole; k += 32) {
            __m512bh xs[4];
            for (int m = 0; m < MR; m++) xs[m] = pairs(x[m] + k);
            for (int n = 0; n < NR; n++) {
                __m512bh wn = pairs(w + n * K + k);
                for (int m = 0; m < MR; m++) acc[m * NR + n] = _mm512_dpbf16_ps(acc[m * NR + n], xs[m], wn);
            }
        }
    if (whole < K)
        for (int n = 0; n < NR; n++)
            for (int m = 0; m < MR; m++)
                acc[m * NR + n] =
                    _mm512_dpbf16_ps(acc[m * NR + n], half_pairs(x[m] + whole), half_pairs(w + n * K + whole));
    float flat[BLOCK];
    _mm512_storeu_ps(flat, sums(acc));
    for (int m = 0; m < MR; m++) memcpy(tile[m], flat + m * NR, NR * sizeof(float));
}

/* tile[m] = up to 4 rows of x times 16 rows of w. The order of a sum doesn't depend on how many rows there are. */
static void products(i64 M, int fresh, const bf16 *const *x, const bf16 *w, i64 K, i64 ahead, float (*tile)[PANEL]) {
    if (M == 1) return dots(1, 1, x, w, K, ahead, tile);
    const i64 rows = M == 2 ? 8 : 4;
    for (i64 n = 0; n < BLOCK; n += rows, w += rows * K) {
        float(*to)[PANEL] = (float(*)[PANEL])(tile[0] + n);
        if (M == 2)
            fresh ? dots(2, 1, x, w, K, ahead, to) : dots(2, 0, x, w, K, ahead, to);
        else
            fresh ? dots(4, 1, x, w, K, ahead, to) : dots(4, 0, x, w, K, ahead, to);
    }
}
