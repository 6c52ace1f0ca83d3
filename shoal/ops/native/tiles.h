/* Attention of one head in tiles (FlashAttention-2, arXiv 2307.08691): what training and reading a prompt share.
 *
 * Scores live in 64 × 64 tiles of fp32, probabilities in bf16; tiles above the diagonal are never computed, and of the
 * last ones only what a segment fills: short answers would pay for a whole tile otherwise.
 * A product C += A B keeps B packed in pairs along the inner dimension, as the dot-product instruction wants it:
 * packed[inner/2][columns][2]. Shapes: L queries, S keys, K query and key dims, V value dims (multiples of 16).
 */
#pragma once
#include "panels.h"

#define TILE PANEL

/* MR rows by NV vectors of C (fp32), onto what stands there if `add`: A · B. A's pairs lie `row` apart between rows and
 * `step` along the inner dimension; B is packed with `columns` columns. */
INLINE void micro(const int MR, const int NV, const int add, const bf16 *A, i64 row, i64 step, const bf16 *B,
                  i64 columns, float *C, i64 ldc, i64 inner) {
    __m512 acc[4][4];
    for (int r = 0; r < MR; r++)
        for (int n = 0; n < NV; n++) acc[r][n] = add ? _mm512_loadu_ps(C + r * ldc + 16 * n) : _mm512_setzero_ps();
    for (i64 k = 0; k < inner / 2; k++) {
        __m512bh b[4];
        for (int n = 0; n < NV; n++) b[n] = (__m512bh)_mm512_loadu_si512(B + 2 * k * columns + 32 * n);
        for (int r = 0; r < MR; r++) {
            int pair;
            memcpy(&pair, A + r * row + k * step, 4);
            __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
            for (int n = 0; n < NV; n++) acc[r][n] = _mm512_dpbf16_ps(acc[r][n], a, b[n]);
        }
    }
    for (int r = 0; r < MR; r++)
        for (int n = 0; n < NV; n++) _mm512_storeu_ps(C + r * ldc + 16 * n, acc[r][n]);
}

/* C [rows, columns] = A [rows, inner] · B, or += if `add`; rows a multiple of 4, inner even, columns a multiple of 16.
 * B is packed `packed` columns wide. */
INLINE void product(const int add, i64 rows, const bf16 *A, i64 row, i64 step, const bf16 *B, i64 packed, i64 columns,
                    float *C, i64 ldc, i64 inner) {
    i64 c = 0;
    for (; c + 64 <= columns; c += 64)
        for (i64 r = 0; r < rows; r += 4)
            micro(4, 4, add, A + r * row, row, step, B + 2 * c, packed, C + r * ldc + c, ldc, inner);
    for (; c + 32 <= columns; c += 32)
        for (i64 r = 0; r < rows; r += 4)
            micro(4, 2, add, A + r * row, row, step, B + 2 * c, packed, C + r * ldc + c, ldc, inner);
    for (; c < columns; c += 16)
        for (i64 r = 0; r < rows; r += 4)
            micro(4, 1, add, A + r * row, row, step, B + 2 * c, packed, C + r * ldc + c, ldc, inner);
}

/* S [rows, keys] of a tile = X Yᵀ over dims: X dense rows, Y packed transposed. */
static void scores(i64 rows, i64 keys, const bf16 *X, const bf16 *Y, i64 dims, float *S) {
    product(0, rows, X, dims, 2, Y, TILE, keys, S, TILE, dims);
}

/* C [rows, dims] += P X: P [rows, keys] of a tile, X packed by rows. */
static void mix(i64 rows, i64 keys, const bf16 *P, const bf16 *X, i64 dims, float *C) {
    product(1, rows, P, TILE, 2, X, dims, dims, C, dims, keys);
}

/* Rows first to first + n of x, or of those that `rows` lists, into a dense tile [TILE, dims], zero below. */
static void copy_tile(const bf16 *x, i64 stride, const i64 *rows, i64 first, i64 n, i64 dims, bf16 *tile) {
    for (i64 r = 0; r < n; r++)
        memcpy(tile + r * dims, x + (rows ? rows[first + r] : first + r) * stride, dims * sizeof(bf16));
    memset(tile + n * dims, 0, (TILE - n) * dims * sizeof(bf16));
}

/* n, rounded up to a multiple of `to`. */
static i64 up(i64 n, i64 to) { return (n + to - 1) / to * to; }

/* The first rows of a tile [TILE, dims] → packed transpose for products over dims: [dims/2][TILE][2] */
static void pack_transposed(i64 rows, const bf16 *tile, i64 dims, bf16 *packed) {
    for (i64 r = 0; r < rows; r += 16) pack(tile + r * dims, dims / 2, packed + 2 * r);
}

static i64 rows_in(i64 L, i64 tile) { return L - tile * TILE < TILE ? L - tile * TILE : TILE; }

/* Room that forward_head works in, for S keys. */
static i64 forward_bytes(i64 S, i64 K, i64 V) {
    i64 tiles = (S + TILE - 1) / TILE;
    return (tiles * TILE * (K + V) + TILE * (K > V ? K : V)) * sizeof(bf16) + TILE * V * sizeof(float);
}

/* o [L, V] and lse [L] (unless NULL) of one head: L queries, the last of S tokens. Strides are between tokens; keys and
 * values are the rows in order, or those that `rows_of_S` lists. */
static void forward_head(const bf16 *q, i64 qs, const bf16 *k, i64 ks, const bf16 *v, i64 vs, const i64 *rows_of_S,
                         bf16 *o, i64 os, float *lse, i64 lse_stride, i64 L, i64 S, i64 K, i64 V, float scale,
                         bf16 *work) {
    i64 tiles = (S + TILE - 1) / TILE, before = S - L;
    bf16 *packed_k = work, *packed_v = packed_k + tiles * TILE * K, *tile = packed_v + tiles * TILE * V;
    float X[TILE * TILE] __attribute__((aligned(64))), *O = (float *)(tile + TILE * (K > V ? K : V));
    bf16 P[TILE * TILE] __attribute__((aligned(64)));
    for (i64 j = 0; j < tiles; j++) {
        i64 n = rows_in(S, j);
        copy_tile(k, ks, rows_of_S, j * TILE, n, K, tile);
        pack_transposed(n, tile, K, packed_k + j * TILE * K);
        copy_tile(v, vs, rows_of_S, j * TILE, n, V, tile);
        pack_pairs(tile, V, up(n, 16), V, packed_v + j * TILE * V, V);
    }
    for (i64 i = 0; i * TILE < L; i++) {
        i64 n = rows_in(L, i), rows = up(n, 4);
        i64 last = before + i * TILE + n - 1; /* the last key that any of them sees */
        float top[TILE], sum[TILE];
        copy_tile(q, qs, NULL, i * TILE, n, K, tile);
        memset(O, 0, TILE * V * sizeof(float));
        for (i64 r = 0; r < TILE; r++) top[r] = -INFINITY, sum[r] = 0;
        for (i64 j = 0; j * TILE <= last; j++) {
            i64 keys = up(rows_in(last + 1, j), 16);
            scores(rows, keys, tile, packed_k + j * TILE * K, K, X);
            for (i64 r = 0; r < rows; r++) {
                i64 seen = before + i * TILE + r + 1 - j * TILE;
                __m512 x[4], best = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
                for (i64 c = 0; c < keys / 16; c++) {
                    i64 open = seen - 16 * c;
                    __mmask16 m = open >= 16 ? 0xffff : open <= 0 ? 0 : (__mmask16)((1u << open) - 1);
                    x[c] = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), m, _mm512_loadu_ps(X + r * TILE + 16 * c),
                                              _mm512_set1_ps(scale));
                    best = _mm512_max_ps(best, x[c]);
                }
                float now = fmaxf(top[r], _mm512_reduce_max_ps(best)), shrink = expf(top[r] - now);
                for (i64 c = 0; c < keys / 16; c++) {
                    __mmask16 m = _mm512_cmp_ps_mask(x[c], _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ); /* NaN stays */
                    x[c] = _mm512_maskz_mov_ps(m, exp_ps(_mm512_sub_ps(x[c], _mm512_set1_ps(now))));
                    total = _mm512_add_ps(total, x[c]);
                    store(P + r * TILE + 16 * c, x[c]);
                }
                sum[r] = sum[r] * shrink + _mm512_reduce_add_ps(total);
                if (shrink != 1.0f)
                    for (i64 d = r * V; d < (r + 1) * V; d += 16)
                        _mm512_storeu_ps(O + d, _mm512_mul_ps(_mm512_loadu_ps(O + d), _mm512_set1_ps(shrink)));
                top[r] = now;
            }
            mix(rows, keys, P, packed_v + j * TILE * V, V, O);
        }
        for (i64 r = 0; r < n; r++) {
            __m512 share = _mm512_set1_ps(1.0f / sum[r]);
            if (lse) lse[(i * TILE + r) * lse_stride] = top[r] + logf(sum[r]);
            for (i64 d = 0; d < V; d += 16)
                store(o + (i * TILE + r) * os + d, _mm512_mul_ps(_mm512_loadu_ps(O + r * V + d), share));
        }
    }
}
