/* Causal attention over packed segments, forward and backward (FlashAttention-2, arXiv 2307.08691), AVX512-BF16.
 *
 *     S = scale · Q Kᵀ     P = softmax(S)     O = P V
 *     dV = Pᵀ dO     dS = P (dO Vᵀ − rowsum(dO O)) · scale     dQ = dS K     dK = dSᵀ Q
 *
 * One task is one (segment, head). Scores live in 64 × 64 tiles of fp32, probabilities in bf16; tiles above the
 * diagonal are never computed. The backward pass rebuilds P from the saved log-sum-exp.
 *
 * A product C += A B keeps B packed in pairs along the inner dimension, as the dot-product instruction wants it:
 * packed[inner/2][columns][2]. Shapes: L tokens of a segment, K query and key dims, V value dims (multiples of 16).
 */
#include "kernels.h"
#include <omp.h>

#define TILE 64

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

/* C [TILE, columns] = A [TILE, inner] · B, or += if `add`; inner even, columns a multiple of 16. */
INLINE void product(const int add, const bf16 *A, i64 row, i64 step, const bf16 *B, i64 columns, float *C, i64 ldc,
                    i64 inner) {
    i64 c = 0;
    for (; c + 64 <= columns; c += 64)
        for (i64 r = 0; r < TILE; r += 4)
            micro(4, 4, add, A + r * row, row, step, B + 2 * c, columns, C + r * ldc + c, ldc, inner);
    for (; c + 32 <= columns; c += 32)
        for (i64 r = 0; r < TILE; r += 4)
            micro(4, 2, add, A + r * row, row, step, B + 2 * c, columns, C + r * ldc + c, ldc, inner);
    for (; c < columns; c += 16)
        for (i64 r = 0; r < TILE; r += 4)
            micro(4, 1, add, A + r * row, row, step, B + 2 * c, columns, C + r * ldc + c, ldc, inner);
}

/* S [TILE, TILE] = X Yᵀ over dims: X dense rows, Y packed transposed. */
static void scores(const bf16 *X, const bf16 *Y, i64 dims, float *S) {
    product(0, X, dims, 2, Y, TILE, S, TILE, dims);
}

/* C [TILE, dims] += P X: P [TILE, TILE] dense rows, X packed by rows. */
static void mix(const bf16 *P, const bf16 *X, i64 dims, float *C) { product(1, P, TILE, 2, X, dims, C, dims, TILE); }

/* C [TILE, dims] += Pᵀ X: both packed by rows, so that no tile is ever transposed. */
static void mix_transposed(const bf16 *P, const bf16 *X, i64 dims, float *C) {
    product(1, P, 2, 2 * TILE, X, dims, C, dims, TILE);
}

/* Rows [n, dims] (stride apart) into a dense tile [TILE, dims], zero below. */
static void copy_tile(const bf16 *x, i64 stride, i64 n, i64 dims, bf16 *tile) {
    for (i64 r = 0; r < n; r++) memcpy(tile + r * dims, x + r * stride, dims * sizeof(bf16));
    memset(tile + n * dims, 0, (TILE - n) * dims * sizeof(bf16));
}

/* tile [TILE, dims] → packed for products over rows: [TILE/2][dims][2] */
static void pack_rows(const bf16 *tile, i64 dims, bf16 *packed) {
    for (i64 r = 0; r < TILE; r += 2)
        for (i64 d = 0; d < dims; d += 16) {
            __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(tile + r * dims + d)));
            __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(tile + (r + 1) * dims + d)));
            _mm512_storeu_si512(packed + r * dims + 2 * d, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
}

/* tile [TILE, dims] → packed transpose for products over dims: [dims/2][TILE][2] */
static void pack_transposed(const bf16 *tile, i64 dims, bf16 *packed) {
    const uint32_t *pairs = (const uint32_t *)tile;
    uint32_t *out = (uint32_t *)packed;
    for (i64 d = 0; d < dims / 2; d++)
        for (i64 r = 0; r < TILE; r++) out[d * TILE + r] = pairs[r * (dims / 2) + d];
}

/* An fp32 tile [TILE, TILE] as bf16, in dense rows. */
static void narrow(const float *x, bf16 *plain) {
    for (i64 i = 0; i < TILE * TILE; i += 16) store(plain + i, _mm512_loadu_ps(x + i));
}

static i64 rows_in(i64 L, i64 tile) { return L - tile * TILE < TILE ? L - tile * TILE : TILE; }

/* lse [segment rows] and o for one head of one segment. Strides are between tokens. */
static void forward_head(const bf16 *q, i64 qs, const bf16 *k, i64 ks, const bf16 *v, i64 vs, bf16 *o, i64 os,
                         float *lse, i64 lse_stride, i64 L, i64 K, i64 V, float scale, bf16 *work) {
    i64 tiles = (L + TILE - 1) / TILE;
    bf16 *packed_k = work, *packed_v = packed_k + tiles * TILE * K, *tile = packed_v + tiles * TILE * V;
    float S[TILE * TILE] __attribute__((aligned(64))), *O = (float *)(tile + TILE * (K > V ? K : V));
    bf16 P[TILE * TILE] __attribute__((aligned(64)));
    for (i64 j = 0; j < tiles; j++) {
        copy_tile(k + j * TILE * ks, ks, rows_in(L, j), K, tile);
        pack_transposed(tile, K, packed_k + j * TILE * K);
        copy_tile(v + j * TILE * vs, vs, rows_in(L, j), V, tile);
        pack_rows(tile, V, packed_v + j * TILE * V);
    }
    for (i64 i = 0; i < tiles; i++) {
        i64 n = rows_in(L, i);
        float top[TILE], sum[TILE];
        copy_tile(q + i * TILE * qs, qs, n, K, tile);
        memset(O, 0, TILE * V * sizeof(float));
        for (i64 r = 0; r < TILE; r++) top[r] = -INFINITY, sum[r] = 0;
        for (i64 j = 0; j <= i; j++) {
            scores(tile, packed_k + j * TILE * K, K, S);
            for (i64 r = 0; r < TILE; r++) {
                i64 seen = j < i ? TILE : r + 1;
                __m512 x[4], best = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
                for (i64 c = 0; c < 4; c++) {
                    i64 open = seen - 16 * c;
                    __mmask16 m = open >= 16 ? 0xffff : open <= 0 ? 0 : (__mmask16)((1u << open) - 1);
                    x[c] = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), m, _mm512_loadu_ps(S + r * TILE + 16 * c),
                                              _mm512_set1_ps(scale));
                    best = _mm512_max_ps(best, x[c]);
                }
                float now = fmaxf(top[r], _mm512_reduce_max_ps(best)), shrink = expf(top[r] - now);
                for (i64 c = 0; c < 4; c++) {
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
            mix(P, packed_v + j * TILE * V, V, O);
        }
        for (i64 r = 0; r < n; r++) {
            __m512 share = _mm512_set1_ps(1.0f / sum[r]);
            lse[(i * TILE + r) * lse_stride] = top[r] + logf(sum[r]);
            for (i64 d = 0; d < V; d += 16)
                store(o + (i * TILE + r) * os + d, _mm512_mul_ps(_mm512_loadu_ps(O + r * V + d), share));
        }
    }
}

typedef struct {
    const bf16 *q, *k, *v, *o, *d_o;
    bf16 *dq;
    float *dk, *dv; /* [L, K], [L, V], zeroed by the caller */
    const float *lse;
    i64 qs, ks, vs, os, lse_stride, dqs, L, K, V;
    float scale;
} Head;

static void backward_head(const Head *h, bf16 *work) {
    i64 L = h->L, K = h->K, V = h->V, tiles = (L + TILE - 1) / TILE, wide = TILE * (K > V ? K : V);
    bf16 *kt = work, *kr = kt + tiles * TILE * K, *vt = kr + tiles * TILE * K, *q = vt + tiles * TILE * V;
    bf16 *go = q + wide, *packed_q = go + wide, *packed_go = packed_q + wide;
    float *dQ = (float *)(packed_go + wide);
    float S[TILE * TILE] __attribute__((aligned(64))), D[TILE * TILE] __attribute__((aligned(64)));
    bf16 P[TILE * TILE] __attribute__((aligned(64))), packed_P[TILE * TILE] __attribute__((aligned(64)));
    for (i64 j = 0; j < tiles; j++) {
        copy_tile(h->k + j * TILE * h->ks, h->ks, rows_in(L, j), K, q);
        pack_transposed(q, K, kt + j * TILE * K);
        pack_rows(q, K, kr + j * TILE * K);
        copy_tile(h->v + j * TILE * h->vs, h->vs, rows_in(L, j), V, q);
        pack_transposed(q, V, vt + j * TILE * V);
    }
    for (i64 i = 0; i < tiles; i++) {
        i64 n = rows_in(L, i);
        float delta[TILE] = {0}, lse[TILE];
        copy_tile(h->q + i * TILE * h->qs, h->qs, n, K, q);
        copy_tile(h->d_o + i * TILE * h->os, h->os, n, V, go);
        pack_rows(q, K, packed_q);
        pack_rows(go, V, packed_go);
        memset(dQ, 0, TILE * K * sizeof(float));
        for (i64 r = 0; r < TILE; r++) lse[r] = r < n ? h->lse[(i * TILE + r) * h->lse_stride] : INFINITY;
        for (i64 r = 0; r < n; r++) {
            __m512 dot = _mm512_setzero_ps();
            for (i64 d = 0; d < V; d += 16)
                dot = _mm512_fmadd_ps(load(go + r * V + d), load(h->o + (i * TILE + r) * h->os + d), dot);
            delta[r] = _mm512_reduce_add_ps(dot);
        }
        for (i64 j = 0; j <= i; j++) {
            scores(q, kt + j * TILE * K, K, S);
            scores(go, vt + j * TILE * V, V, D);
            for (i64 r = 0; r < TILE; r++)
                for (i64 c = 0; c < 4; c++) {
                    i64 open = (j < i ? TILE : r + 1) - 16 * c, at = r * TILE + 16 * c;
                    __mmask16 m = open >= 16 ? 0xffff : open <= 0 ? 0 : (__mmask16)((1u << open) - 1);
                    __m512 s = _mm512_loadu_ps(S + at), row = _mm512_set1_ps(lse[r]), scale = _mm512_set1_ps(h->scale);
                    __m512 p = _mm512_maskz_mov_ps(r < n ? m : 0, exp_ps(_mm512_fmsub_ps(s, scale, row)));
                    __m512 d = _mm512_sub_ps(_mm512_loadu_ps(D + at), _mm512_set1_ps(delta[r]));
                    _mm512_storeu_ps(S + at, p);
                    _mm512_storeu_ps(D + at, _mm512_mul_ps(_mm512_mul_ps(p, d), scale));
                }
            narrow(S, P);
            pack_rows(P, TILE, packed_P);
            mix_transposed(packed_P, packed_go, V, h->dv + j * TILE * V);
            narrow(D, P);
            pack_rows(P, TILE, packed_P);
            mix_transposed(packed_P, packed_q, K, h->dk + j * TILE * K);
            mix(P, kr + j * TILE * K, K, dQ);
        }
        for (i64 r = 0; r < n; r++)
            for (i64 d = 0; d < K; d += 16) store(h->dq + (i * TILE + r) * h->dqs + d, _mm512_loadu_ps(dQ + r * K + d));
    }
}

static i64 longest(const i64 *starts, i64 segments) {
    i64 most = 0;
    for (i64 s = 0; s < segments; s++) most = starts[s + 1] - starts[s] > most ? starts[s + 1] - starts[s] : most;
    return (most + TILE - 1) / TILE * TILE;
}

/* One aligned piece for each thread; `bytes` a multiple of 64. Null where memory ran out. */
static char *pieces(i64 bytes) { return aligned_alloc(64, bytes * omp_get_max_threads()); }

/* q [T, H, K], k [T, G, K], v [T, G, V] → o [T, H, V] and lse [T, H]; dense; H a multiple of G; starts has
 * segments + 1. Gives 0, or 1 where memory ran out. */
int attention_forward(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *o, float *lse, const i64 *starts, i64 segments,
                      i64 H, i64 G, i64 K, i64 V, float scale) {
    i64 L = longest(starts, segments), wide = TILE * (K > V ? K : V);
    i64 bytes = (L * (K + V) + wide + 2 * TILE * V) * sizeof(bf16);
    char *memory = pieces(bytes);
    if (!memory) return 1;
#pragma omp parallel for schedule(dynamic)
    for (i64 task = 0; task < segments * H; task++) {
        i64 s = task / H, h = task % H, g = h / (H / G), t = starts[s];
        forward_head(q + (t * H + h) * K, H * K, k + (t * G + g) * K, G * K, v + (t * G + g) * V, G * V,
                     o + (t * H + h) * V, H * V, lse + t * H + h, H, starts[s + 1] - t, K, V, scale,
                     (bf16 *)(memory + omp_get_thread_num() * bytes));
    }
    free(memory);
    return 0;
}

/* One task is one (segment, key-value head) with all its query heads, so that dk and dv have one writer. */
int attention_backward(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *o, const float *lse, const bf16 *d_o,
                       bf16 *dq, bf16 *dk, bf16 *dv, const i64 *starts, i64 segments, i64 H, i64 G, i64 K, i64 V,
                       float scale) {
    i64 L = longest(starts, segments), wide = TILE * (K > V ? K : V), in_sums = L * (K + V) * sizeof(float);
    i64 bytes = in_sums + (L * (2 * K + V) + 4 * wide + 2 * TILE * K) * sizeof(bf16);
    char *memory = pieces(bytes);
    if (!memory) return 1;
#pragma omp parallel for schedule(dynamic)
    for (i64 task = 0; task < segments * G; task++) {
        i64 s = task / G, g = task % G, t = starts[s], n = starts[s + 1] - t;
        char *mine = memory + omp_get_thread_num() * bytes;
        float *sum_k = (float *)mine, *sum_v = sum_k + L * K;
        memset(mine, 0, in_sums);
        for (i64 h = g * (H / G); h < (g + 1) * (H / G); h++) {
            Head head = {q + (t * H + h) * K, k + (t * G + g) * K, v + (t * G + g) * V, o + (t * H + h) * V,
                         d_o + (t * H + h) * V, dq + (t * H + h) * K, sum_k, sum_v, lse + t * H + h,
                         H * K, G * K, G * V, H * V, H, H * K, n, K, V, scale};
            backward_head(&head, (bf16 *)(mine + in_sums));
        }
        for (i64 r = 0; r < n; r++) {
            bf16 *to_k = dk + ((t + r) * G + g) * K, *to_v = dv + ((t + r) * G + g) * V;
            for (i64 d = 0; d < K; d += 16) store(to_k + d, _mm512_loadu_ps(sum_k + r * K + d));
            for (i64 d = 0; d < V; d += 16) store(to_v + d, _mm512_loadu_ps(sum_v + r * V + d));
        }
    }
    free(memory);
    return 0;
}
