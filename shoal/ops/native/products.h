/* Products of rows with weights as checkpoints store them [outputs, K]: few rows by dot products over fresh weights,
 * many by panels of packed ones.
 */
#pragma once
#include "step.h"

#define BLOCK 16    /* outputs in a task */
#define AHEAD 2     /* blocks: weights are asked for so long before they are needed */
#define PANEL 64    /* outputs in a task with many rows */
#define MOST_ROWS 6 /* that meet a panel at a time */
#define MANY 24     /* rows for which packing a panel pays */

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

INLINE __m512bh pairs(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }
INLINE __m512bh half_pairs(const bf16 *p) { return (__m512bh)_mm512_maskz_loadu_epi32(0xff, p); }

/* tile[m][n] = x_m · w_n for MR rows of x and 16 / MR rows of w, K apart. Fresh weights are read one row after the
 * other, as memory likes it; where they are in cache, rows share what they load. Either way a sum runs in the same
 * order. */
INLINE void dots(const int MR, const int fresh, const bf16 *const *x, const bf16 *w, i64 K, float (*tile)[PANEL]) {
    const int NR = BLOCK / MR;
    const i64 whole = K / 32 * 32;
    __m512 acc[BLOCK];
    for (int i = 0; i < BLOCK; i++) acc[i] = _mm512_setzero_ps();
    if (fresh)
#pragma GCC unroll 16
        for (int n = 0; n < NR; n++)
            for (i64 k = 0; k < whole; k += 32) {
                __m512bh wn = pairs(w + n * K + k);
                _mm_prefetch((const char *)(w + n * K + k + AHEAD * BLOCK * K), _MM_HINT_T1);
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
static void products(i64 M, int fresh, const bf16 *const *x, const bf16 *w, i64 K, float (*tile)[PANEL]) {
    if (M == 1) return dots(1, 1, x, w, K, tile);
    const i64 rows = M == 2 ? 8 : 4;
    for (i64 n = 0; n < BLOCK; n += rows, w += rows * K) {
        float(*to)[PANEL] = (float(*)[PANEL])(tile[0] + n);
        if (M == 2)
            fresh ? dots(2, 1, x, w, K, to) : dots(2, 0, x, w, K, to);
        else
            fresh ? dots(4, 1, x, w, K, to) : dots(4, 0, x, w, K, to);
    }
}

/* 16 rows of w, K apart, as 16 columns of a panel: [K/2][PANEL][2]. */
static void pack(const bf16 *w, i64 K, bf16 *panel) {
    for (i64 k = 0; k < K; k += 32) {
        __m512i r[16], a[16];
        for (int i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_epi32(K - k < 32 ? 0xff : 0xffff, w + i * K + k);
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
        for (i64 i = 0; i < 16 && k + 2 * i < K; i++) _mm512_storeu_si512(panel + (k / 2 + i) * 2 * PANEL, a[i]);
    }
}

/* tile[m] = 6 rows of x times NV · 16 columns of a panel. */
INLINE void panel_product(const int NV, const bf16 *const *x, const bf16 *panel, i64 K, float (*tile)[PANEL]) {
    __m512 acc[MOST_ROWS][4];
    for (int m = 0; m < MOST_ROWS; m++)
        for (int n = 0; n < NV; n++) acc[m][n] = _mm512_setzero_ps();
    for (i64 k = 0; k < K; k += 2, panel += 2 * PANEL) {
        __m512bh w[4];
        for (int n = 0; n < NV; n++) w[n] = pairs(panel + 32 * n);
        for (int m = 0; m < MOST_ROWS; m++) {
            int pair;
            memcpy(&pair, x[m] + k, 4);
            __m512bh xm = (__m512bh)_mm512_set1_epi32(pair);
            for (int n = 0; n < NV; n++) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], xm, w[n]);
        }
    }
    for (int m = 0; m < MOST_ROWS; m++)
        for (int n = 0; n < NV; n++) _mm512_storeu_ps(tile[m] + 16 * n, acc[m][n]);
}

static void panel_products(i64 NV, const bf16 *const *x, const bf16 *panel, i64 K, float (*tile)[PANEL]) {
    switch (NV) {
    case 1: return panel_product(1, x, panel, K, tile);
    case 2: return panel_product(2, x, panel, K, tile);
    case 3: return panel_product(3, x, panel, K, tile);
    default: return panel_product(4, x, panel, K, tile);
    }
}

typedef struct { /* of x, from start to end: by index / divide where there is an index */
    const i64 *index;
    i64 divide, start, end;
} Rows;

/* Pointers to up to `most` rows from `row` on; the last is repeated so that there are as many. */
INLINE i64 take(const Instruction *c, Rows r, i64 row, i64 most, const bf16 **xs) {
    i64 M = least(r.end - row, most);
    for (i64 m = 0; m < most; m++) {
        i64 at = row + least(m, M - 1);
        xs[m] = (const bf16 *)c->x + (r.index ? r.index[at] / r.divide : at) * c->xs;
    }
    return M;
}

typedef void Finish(const Instruction *c, i64 row, i64 n, i64 columns, const float *products, const float *others);

/* Rows of x times `columns` outputs from n on, of a matrix or of two. A row's products go to `finish`.
 * Many rows at a time go by a panel of packed weights, without the sums across lanes. */
INLINE void multiply(const Worker *t, Rows r, i64 panel_from, const Matrix *matrices, i64 n, i64 columns,
                     Finish finish) {
    const Instruction *c = t->code;
    const bf16 *w = matrices[0].codes, *w2 = c->stacked == 2 ? matrices[1].codes : NULL;
    float tile[MOST_ROWS][PANEL];
    const bf16 *xs[MOST_ROWS];
    i64 K = c->K, total = w2 ? 2 * columns : columns, exact = r.end - panel_from < MANY ? r.end : panel_from;
    Rows before = {r.index, r.divide, r.start, exact};
    for (i64 j = 0; j < columns; j += BLOCK)
        for (i64 row = r.start; row < exact; row += 4) {
            i64 M = take(c, before, row, 4, xs);
            products(M, row == r.start, xs, w + (n + j) * K, K, tile);
            if (w2) products(M, row == r.start, xs, w2 + (n + j) * K, K, (float(*)[PANEL])(tile[0] + BLOCK));
            for (i64 m = 0; m < M; m++)
                finish(c, r.index ? r.index[row + m] : row + m, n + j, BLOCK, tile[m], tile[m] + BLOCK);
        }
    if (exact == r.end) return;
    bf16 *panel = (bf16 *)t->room;
    for (i64 j = 0; j < columns; j += BLOCK) {
        pack(w + (n + j) * K, K, panel + 2 * j);
        if (w2) pack(w2 + (n + j) * K, K, panel + 2 * (columns + j));
    }
    /* While these outputs are computed, the weights of this thread's next ones are asked for, slice by slice. */
    i64 bytes = columns * K * sizeof(bf16), slice = bytes / ceil_div(r.end - exact, MOST_ROWS) + 64;
    const char *ahead = (const char *)(w + n * K) + AHEAD * bytes;
    const char *ahead2 = w2 ? (const char *)(w2 + n * K) + AHEAD * bytes : NULL;
    for (i64 row = exact; row < r.end; row += MOST_ROWS) {
        i64 M = take(c, r, row, MOST_ROWS, xs);
        for (i64 b = 0; b < slice; b += 64) {
            _mm_prefetch(ahead + b, _MM_HINT_T1);
            if (ahead2) _mm_prefetch(ahead2 + b, _MM_HINT_T1);
        }
        ahead += slice;
        if (ahead2) ahead2 += slice;
        panel_products(total / BLOCK, xs, panel, K, tile);
        for (i64 m = 0; m < M; m++)
            finish(c, r.index ? r.index[row + m] : row + m, n, columns, tile[m], tile[m] + columns);
    }
}
