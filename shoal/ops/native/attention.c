/* Causal attention over packed segments, forward and backward (FlashAttention-2, arXiv 2307.08691), AVX512-BF16.
 *
 * Segments may begin alike: what they share lies there once, in the first of them, and attends there.
 *
 *     S = scale · Q Kᵀ     P = softmax(S)     O = P V
 *     dV = Pᵀ dO     dS = P (dO Vᵀ − rowsum(dO O)) · scale     dQ = dS K     dK = dSᵀ Q
 *
 * One task is one (segment, head), in tiles (tiles.h). The backward pass rebuilds P from the saved log-sum-exp.
 * Shapes: L tokens of a segment, K query and key dims, V value dims (multiples of 16).
 */
#include "tiles.h"

/* C [keys, dims] += Pᵀ X over rows: both packed by rows, so that no tile is ever transposed. */
static void mix_transposed(i64 rows, i64 keys, const bf16 *P, const bf16 *X, i64 dims, float *C) {
    product(1, keys, P, 2, 2 * TILE, X, dims, dims, C, dims, rows);
}

/* The first rows of an fp32 tile [TILE, TILE] as bf16, in dense rows. */
static void narrow(i64 rows, const float *x, bf16 *plain) {
    for (i64 i = 0; i < rows * TILE; i += 16) store(plain + i, _mm512_loadu_ps(x + i));
}

typedef struct { /* L queries, the last of S tokens, whose keys and values are the rows in order, or listed ones */
    const bf16 *q, *k, *v, *o, *d_o;
    bf16 *dq;
    float *dk, *dv; /* sums [S, K], [S, V] */
    const float *lse;
    const i64 *rows_of_S;
    i64 qs, ks, vs, os, lse_stride, L, S, K, V;
    float scale;
} Head;

static void backward_head(const Head *h, bf16 *work) {
    i64 L = h->L, K = h->K, V = h->V, before = h->S - L, tiles = (h->S + TILE - 1) / TILE;
    i64 wide = TILE * (K > V ? K : V);
    bf16 *kt = work, *kr = kt + tiles * TILE * K, *vt = kr + tiles * TILE * K, *q = vt + tiles * TILE * V;
    bf16 *go = q + wide, *packed_q = go + wide, *packed_go = packed_q + wide;
    float *dQ = (float *)(packed_go + wide);
    float S[TILE * TILE] __attribute__((aligned(64))), D[TILE * TILE] __attribute__((aligned(64)));
    bf16 P[TILE * TILE] __attribute__((aligned(64))), packed_P[TILE * TILE] __attribute__((aligned(64)));
    for (i64 j = 0; j < tiles; j++) {
        i64 n = rows_in(h->S, j);
        copy_tile(h->k, h->ks, h->rows_of_S, j * TILE, n, K, q);
        pack_transposed(n, q, K, kt + j * TILE * K);
        pack_pairs(q, K, up(n, 16), K, kr + j * TILE * K, K);
        copy_tile(h->v, h->vs, h->rows_of_S, j * TILE, n, V, q);
        pack_transposed(n, q, V, vt + j * TILE * V);
    }
    for (i64 i = 0; i * TILE < L; i++) {
        i64 n = rows_in(L, i), rows = up(n, 4), last = before + i * TILE + n - 1;
        float delta[TILE] = {0}, lse[TILE];
        copy_tile(h->q, h->qs, NULL, i * TILE, n, K, q);
        copy_tile(h->d_o, h->os, NULL, i * TILE, n, V, go);
        pack_pairs(q, K, rows, K, packed_q, K);
        pack_pairs(go, V, rows, V, packed_go, V);
        memset(dQ, 0, TILE * K * sizeof(float));
        for (i64 r = 0; r < TILE; r++) lse[r] = r < n ? h->lse[(i * TILE + r) * h->lse_stride] : INFINITY;
        for (i64 r = 0; r < n; r++) {
            __m512 dot = _mm512_setzero_ps();
            for (i64 d = 0; d < V; d += 16)
                dot = _mm512_fmadd_ps(load(go + r * V + d), load(h->o + (i * TILE + r) * h->os + d), dot);
            delta[r] = _mm512_reduce_add_ps(dot);
        }
        for (i64 j = 0; j * TILE <= last; j++) {
            i64 keys = up(rows_in(last + 1, j), 16), ahead = before + (i - j) * TILE + 1;
            scores(rows, keys, q, kt + j * TILE * K, K, S);
            scores(rows, keys, go, vt + j * TILE * V, V, D);
            for (i64 r = 0; r < rows; r++)
                for (i64 c = 0; c < keys / 16; c++) {
                    i64 open = ahead + r - 16 * c, at = r * TILE + 16 * c;
                    __mmask16 m = open >= 16 ? 0xffff : open <= 0 ? 0 : (__mmask16)((1u << open) - 1);
                    __m512 s = _mm512_loadu_ps(S + at), row = _mm512_set1_ps(lse[r]), scale = _mm512_set1_ps(h->scale);
                    __m512 p = _mm512_maskz_mov_ps(r < n ? m : 0, exp_ps(_mm512_fmsub_ps(s, scale, row)));
                    __m512 d = _mm512_sub_ps(_mm512_loadu_ps(D + at), _mm512_set1_ps(delta[r]));
                    _mm512_storeu_ps(S + at, p);
                    _mm512_storeu_ps(D + at, _mm512_mul_ps(_mm512_mul_ps(p, d), scale));
                }
            narrow(rows, S, P);
            pack_pairs(P, TILE, rows, TILE, packed_P, TILE);
            mix_transposed(rows, keys, packed_P, packed_go, V, h->dv + j * TILE * V);
            narrow(rows, D, P);
            pack_pairs(P, TILE, rows, TILE, packed_P, TILE);
            mix_transposed(rows, keys, packed_P, packed_q, K, h->dk + j * TILE * K);
            mix(rows, keys, P, kr + j * TILE * K, K, dQ);
        }
        for (i64 r = 0; r < n; r++)
            for (i64 d = 0; d < K; d += 16) store(h->dq + (i * TILE + r) * h->qs + d, _mm512_loadu_ps(dQ + r * K + d));
    }
}

static i64 longest(const i64 *starts, i64 segments) {
    i64 most = 0;
    for (i64 s = 0; s < segments; s++) most = starts[s + 1] - starts[s] > most ? starts[s + 1] - starts[s] : most;
    return (most + TILE - 1) / TILE * TILE;
}

/* q [T, H, K], k [T, G, K], v [T, G, V] → o [T, H, V] and lse [T, H]; dense; H a multiple of G; starts has
 * segments + 1, and counts `rows`: a segment's are `shared` ones, of the first segment before it that shares nothing,
 * and then its own, one after the other. Gives 0, or 1 where memory ran out. */
int attention_forward(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *o, float *lse, const i64 *starts, i64 segments,
                      const i64 *rows, const i64 *shared, i64 H, i64 G, i64 K, i64 V, float scale) {
    i64 bytes = forward_bytes(longest(starts, segments), K, V);
    char *memory = pieces(bytes);
    if (!memory) return 1;
#pragma omp parallel for schedule(dynamic)
    for (i64 task = 0; task < segments * H; task++) {
        i64 s = task / H, h = task % H, g = h / (H / G), S = starts[s + 1] - starts[s], L = S - shared[s];
        if (!L) continue;
        i64 t = rows[starts[s] + shared[s]];
        forward_head(q + (t * H + h) * K, H * K, k + g * K, G * K, v + g * V, G * V, rows + starts[s],
                     o + (t * H + h) * V, H * V, lse + t * H + h, H, L, S, K, V, scale,
                     (bf16 *)(memory + omp_get_thread_num() * bytes));
    }
    free(memory);
    return 0;
}

/* One task is a key-value head with all its query heads, in a segment that shares nothing and those behind it that
 * share with it: so dk and dv have one writer. */
int attention_backward(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *o, const float *lse, const bf16 *d_o,
                       bf16 *dq, bf16 *dk, bf16 *dv, const i64 *starts, i64 segments, const i64 *rows,
                       const i64 *shared, i64 H, i64 G, i64 K, i64 V, float scale) {
    i64 most = longest(starts, segments), wide = TILE * (K > V ? K : V), in_sums = most * (K + V) * sizeof(float);
    i64 bytes = in_sums + (most * (2 * K + V) + 4 * wide + 2 * TILE * K) * sizeof(bf16);
    char *memory = pieces(bytes);
    if (!memory) return 1;
#pragma omp parallel for schedule(dynamic)
    for (i64 task = 0; task < segments * G; task++) {
        i64 first = task / G, g = task % G;
        if (shared[first]) continue; /* the task of an earlier one */
        char *mine = memory + omp_get_thread_num() * bytes;
        float *sum_k = (float *)mine, *sum_v = sum_k + most * K;
        for (i64 s = first; s == first || (s < segments && shared[s]); s++) {
            i64 P = shared[s], S = starts[s + 1] - starts[s], L = S - P;
            const i64 *its = rows + starts[s];
            memset(sum_k + P * K, 0, (most - P) * K * sizeof(float));
            memset(sum_v + P * V, 0, (most - P) * V * sizeof(float));
            for (i64 h = g * (H / G); L && h < (g + 1) * (H / G); h++) {
                i64 t = its[P];
                Head head = {q + (t * H + h) * K, k + g * K, v + g * V, o + (t * H + h) * V, d_o + (t * H + h) * V,
                             dq + (t * H + h) * K, sum_k, sum_v, lse + t * H + h, its,
                             H * K, G * K, G * V, H * V, H, L, S, K, V, scale};
                backward_head(&head, (bf16 *)(mine + in_sums));
            }
            for (i64 i = 0; i < S; i++) { /* what is shared grows with each that shares it */
                bf16 *to_k = dk + (its[i] * G + g) * K, *to_v = dv + (its[i] * G + g) * V;
                for (i64 d = 0; d < K; d += 16) store(to_k + d, _mm512_loadu_ps(sum_k + i * K + d));
                for (i64 d = 0; d < V; d += 16) store(to_v + d, _mm512_loadu_ps(sum_v + i * V + d));
            }
        }
    }
    free(memory);
    return 0;
}
