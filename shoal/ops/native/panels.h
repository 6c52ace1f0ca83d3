/* Right-hand sides in pairs along the inner dimension, [inner/2][columns][2], as the dot-product instruction wants
 * them. A panel has room for 64 columns.
 */
#pragma once
#include "kernels.h"
#include <omp.h>

#define PANEL 64    /* columns */
#define MOST_ROWS 6 /* that meet a panel at a time */

INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
/* One aligned piece for each thread; `bytes` a multiple of 64. Null where memory ran out. */
static char *pieces(i64 bytes) { return aligned_alloc(64, bytes * omp_get_max_threads()); }

INLINE __m512bh pairs(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }

/* 16 rows of D pieces of 4 bytes, D apart, as 16 columns of a panel [D][PANEL]. */
static void pack(const void *w, i64 D, void *panel) {
    for (i64 d = 0; d < D; d += 16) {
        __m512i r[16], a[16];
        __mmask16 valid = D - d < 16 ? (1 << (D - d)) - 1 : 0xffff;
        for (int i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_epi32(valid, (const char *)w + 4 * (i * D + d));
        for (int i = 0; i < 16; i += 2) {
            a[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
            a[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            r[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
            r[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
            r[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
            r[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
        }
        for (int i = 0; i < 4; i++) {
            __m512i even = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), odd = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
            __m512i more_even = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
            __m512i more_odd = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
            a[i] = _mm512_shuffle_i32x4(even, more_even, 0x88);
            a[4 + i] = _mm512_shuffle_i32x4(odd, more_odd, 0x88);
            a[8 + i] = _mm512_shuffle_i32x4(even, more_even, 0xdd);
            a[12 + i] = _mm512_shuffle_i32x4(odd, more_odd, 0xdd);
        }
        for (i64 i = 0; i < 16 && d + i < D; i++) _mm512_storeu_si512((char *)panel + 4 * (d + i) * PANEL, a[i]);
    }
}

/* Rows [rows, columns], `stride` apart, in pairs of rows, of `width` columns each. An odd last row meets zeros. */
static void pack_pairs(const bf16 *x, i64 stride, i64 rows, i64 columns, bf16 *packed, i64 width) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i left = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(32)), 16));
    const __m512i right = _mm512_add_epi16(left, _mm512_set1_epi16(16));
    for (i64 r = 0; r < rows; r += 2, packed += 2 * width)
        for (i64 d = 0; d < columns; d += 32) {
            __mmask32 valid = columns - d < 32 ? 0xffff : 0xffffffff, both = r + 1 < rows ? valid : 0;
            __m512i even = _mm512_maskz_loadu_epi16(valid, x + r * stride + d);
            __m512i odd = _mm512_maskz_loadu_epi16(both, x + (r + 1) * stride + d);
            _mm512_storeu_si512(packed + 2 * d, _mm512_permutex2var_epi16(even, left, odd));
            if (columns - d >= 32)
                _mm512_storeu_si512(packed + 2 * d + 32, _mm512_permutex2var_epi16(even, right, odd));
        }
}

enum { WRITE, ADD_TO, ROUND }; /* what becomes of sums: fp32, onto fp32, bf16 */

/* C = A · B, rows `ldc` apart: MR rows, pairs `step` apart along the inner dimension, times NV · 16 columns of a panel.
 */
INLINE void block(const int MR, const int NV, const int how, const bf16 *const *A, i64 step, const bf16 *panel,
                  i64 inner, void *C, i64 ldc) {
    __m512 acc[MOST_ROWS][4];
    float *sums = C;
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < NV; n++)
            acc[m][n] = how == ADD_TO ? _mm512_loadu_ps(sums + m * ldc + 16 * n) : _mm512_setzero_ps();
    for (i64 k = 0; k < ceil_div(inner, 2); k++, panel += 2 * PANEL) {
        __m512bh b[4];
        for (int n = 0; n < NV; n++) b[n] = pairs(panel + 32 * n);
        for (int m = 0; m < MR; m++) {
            int pair;
            memcpy(&pair, A[m] + k * step, 4);
            __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
            for (int n = 0; n < NV; n++) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], a, b[n]);
        }
    }
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < NV; n++)
            if (how == ROUND)
                store((bf16 *)C + m * ldc + 16 * n, acc[m][n]);
            else
                _mm512_storeu_ps(sums + m * ldc + 16 * n, acc[m][n]);
}

#define OF_ROWS(NV)                                                                                                    \
    switch (M) {                                                                                                       \
    case 1: return block(1, NV, how, A, step, panel, inner, C, ldc);                                                   \
    case 2: return block(2, NV, how, A, step, panel, inner, C, ldc);                                                   \
    case 3: return block(3, NV, how, A, step, panel, inner, C, ldc);                                                   \
    case 4: return block(4, NV, how, A, step, panel, inner, C, ldc);                                                   \
    case 5: return block(5, NV, how, A, step, panel, inner, C, ldc);                                                   \
    default: return block(6, NV, how, A, step, panel, inner, C, ldc);                                                  \
    }

/* The same for M rows, at most MOST_ROWS, and up to four vectors of columns. */
INLINE void panel_product(i64 M, i64 NV, const int how, const bf16 *const *A, i64 step, const bf16 *panel, i64 inner,
                          void *C, i64 ldc) {
    switch (NV) {
    case 1: OF_ROWS(1)
    case 2: OF_ROWS(2)
    case 3: OF_ROWS(3)
    default: OF_ROWS(4)
    }
}
