/* The model's small operations for x86-64 CPUs with AVX512-BF16: one pass over memory each, fp32 inside.
 *
 * Products stand in gemm.c, attention in attention.c, and here what surrounds them. Every function is the twin of one
 * in reference.py and is tested against it. Rows are split over OpenMP threads (torch's own pool); nothing is allocated
 * but small tiles.
 */
#include "kernels.h"

/* ---- rms norm: y = x · rstd · w. Rows of x may lie `stride` apart; D is a multiple of 16. ------------------------ */

void rms_norm_forward(const bf16 *x, i64 stride, const float *w, bf16 *y, float *rstd, i64 T, i64 D, float eps) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < T; t++) {
        const bf16 *row = x + t * stride;
        __m512 sum = _mm512_setzero_ps();
        for (i64 d = 0; d < D; d += 16) sum = _mm512_fmadd_ps(load(row + d), load(row + d), sum);
        rstd[t] = 1.0f / sqrtf(_mm512_reduce_add_ps(sum) / D + eps);
        __m512 r = _mm512_set1_ps(rstd[t]);
        for (i64 d = 0; d < D; d += 16)
            store(y + t * D + d, _mm512_mul_ps(_mm512_mul_ps(load(row + d), r), _mm512_loadu_ps(w + d)));
    }
}

/* dx = rstd · (g − x̂ · mean(g x̂)) with g = dy · w and x̂ = x · rstd; dw = Σ_t dy · x̂, one partial row per block. */
void rms_norm_backward(const bf16 *x, i64 stride, const float *w, const float *rstd, const bf16 *dy, bf16 *dx,
                       float *dw_parts, i64 blocks, i64 T, i64 D) {
#pragma omp parallel for schedule(static)
    for (i64 b = 0; b < blocks; b++) {
        float *dw = dw_parts + b * D;
        memset(dw, 0, D * sizeof(float));
        for (i64 t = T * b / blocks; t < T * (b + 1) / blocks; t++) {
            const bf16 *row = x + t * stride, *grad = dy + t * D;
            __m512 r = _mm512_set1_ps(rstd[t]), dot = _mm512_setzero_ps();
            for (i64 d = 0; d < D; d += 16) {
                __m512 hat = _mm512_mul_ps(load(row + d), r), g = load(grad + d);
                dot = _mm512_fmadd_ps(_mm512_mul_ps(g, _mm512_loadu_ps(w + d)), hat, dot);
                _mm512_storeu_ps(dw + d, _mm512_fmadd_ps(g, hat, _mm512_loadu_ps(dw + d)));
            }
            __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / D);
            for (i64 d = 0; d < D; d += 16) {
                __m512 hat = _mm512_mul_ps(load(row + d), r);
                __m512 g = _mm512_mul_ps(load(grad + d), _mm512_loadu_ps(w + d));
                store(dx + t * D + d, _mm512_mul_ps(r, _mm512_fnmadd_ps(hat, mean, g)));
            }
        }
    }
}

/* ---- swiglu: y = gate · σ(gate) · up. gate and up may be halves of one row: `stride` apart; F a multiple of 16. -- */

INLINE __m512 sigmoid(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

void swiglu_forward(const bf16 *gate, const bf16 *up, i64 stride, bf16 *y, i64 T, i64 F) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < T; t++)
        for (i64 f = 0; f < F; f += 16) {
            __m512 g = load(gate + t * stride + f), u = load(up + t * stride + f);
            store(y + t * F + f, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), u));
        }
}

void swiglu_backward(const bf16 *gate, const bf16 *up, i64 stride, const bf16 *dy, bf16 *dgate, bf16 *dup, i64 T,
                     i64 F) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < T; t++)
        for (i64 f = 0; f < F; f += 16) {
            __m512 g = load(gate + t * stride + f), u = load(up + t * stride + f), d = load(dy + t * F + f);
            __m512 s = sigmoid(g), silu = _mm512_mul_ps(g, s), one = _mm512_set1_ps(1.0f);
            __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one)); /* σ (1 + g (1 − σ)) */
            store(dup + t * stride + f, _mm512_mul_ps(d, silu));
            store(dgate + t * stride + f, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
        }
}

/* ---- rotary positions: neighbouring pairs turn by the row's angles, backwards with sign −1. Rows of x lie `row` apart
 * and heads `head`; R is a multiple of 16. --------------------------------------------------------------------- */

void rotate_pairs(const bf16 *x, i64 row, i64 head, const float *cos, const float *sin, float sign, bf16 *y, i64 T,
                  i64 H, i64 R) {
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < T; t++)
        for (i64 r = 0; r < R; r += 16) {
            __m256 c8 = _mm256_loadu_ps(cos + t * (R / 2) + r / 2), s8 = _mm256_loadu_ps(sin + t * (R / 2) + r / 2);
            __m512 c = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(c8));
            __m512 s = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(s8));
            s = _mm512_mul_ps(s, _mm512_set1_ps(sign));
            for (i64 h = 0; h < H; h++) {
                __m512 v = load(x + t * row + h * head + r), swapped = _mm512_permute_ps(v, 0xb1);
                store(y + (t * H + h) * R + r, _mm512_fmaddsub_ps(v, c, _mm512_mul_ps(swapped, s)));
            }
        }
}

/* ---- experts: the K that a row chooses, and rows (token, choice) sorted by them, earlier tokens first ------------ */

/* The indices of each row's K largest, the largest first. */
void top_k(const float *x, i64 T, i64 E, i64 K, i64 *index) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < T; t++) {
        float v[E];
        memcpy(v, x + t * E, E * sizeof(float));
        for (i64 k = 0; k < K; k++) {
            i64 best = 0;
            for (i64 e = 1; e < E; e++) best = v[e] > v[best] ? e : best;
            index[t * K + k] = best;
            v[best] = -INFINITY;
        }
    }
}

/* Returns 1 where an expert isn't one of E. */
int sort_by_expert(const i64 *expert, i64 M, i64 K, i64 E, i64 *token, i64 *place, i64 *counts) {
    memset(counts, 0, E * sizeof(i64));
    for (i64 m = 0; m < M; m++) {
        if (expert[m] < 0 || expert[m] >= E) return 1;
        counts[expert[m]]++;
    }
    i64 next[E], total = 0;
    for (i64 e = 0; e < E; e++) next[e] = total, total += counts[e];
    for (i64 m = 0; m < M; m++) {
        place[m] = next[expert[m]]++;
        token[place[m]] = m / K;
    }
    return 0;
}

/* ---- expert rows: weigh_rows and the backward of both ways ------------------------------------------------------- */

/* y_t = Σ_k w_tk · rows[place_tk]; without weights (w null) it is the backward of gather_rows. */
void sum_rows(const bf16 *rows, const i64 *place, const float *w, bf16 *y, i64 T, i64 K, i64 D) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < T; t++)
        for (i64 d = 0; d < D; d += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (i64 k = t * K; k < (t + 1) * K; k++)
                sum = _mm512_fmadd_ps(_mm512_set1_ps(w ? w[k] : 1.0f), load(rows + place[k] * D + d), sum);
            store(y + t * D + d, sum);
        }
}

/* d rows[place_tk] = w_tk · dy_t and d w_tk = dy_t · rows[place_tk] */
void weigh_rows_backward(const bf16 *rows, const i64 *place, const float *w, const bf16 *dy, bf16 *drows, float *dw,
                         i64 T, i64 K, i64 D) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < T; t++)
        for (i64 k = t * K; k < (t + 1) * K; k++) {
            __m512 dot = _mm512_setzero_ps(), weight = _mm512_set1_ps(w[k]);
            for (i64 d = 0; d < D; d += 16) {
                __m512 g = load(dy + t * D + d);
                dot = _mm512_fmadd_ps(g, load(rows + place[k] * D + d), dot);
                store(drows + place[k] * D + d, _mm512_mul_ps(g, weight));
            }
            dw[k] = _mm512_reduce_add_ps(dot);
        }
}

/* ---- cross-entropy over bf16 logits; the logits become their own gradient ---------------------------------------- */

/* nll_t = logsumexp(z_t) − z_t[y_t]; z_t ← scale · (softmax(z_t) − 1[y_t]). A negative target counts nothing. */
void cross_entropy(bf16 *logits, const i64 *targets, float scale, float *nll, i64 T, i64 V) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < T; t++) {
        bf16 *z = logits + t * V;
        if (targets[t] < 0) {
            nll[t] = 0.0f;
            memset(z, 0, V * sizeof(bf16));
            continue;
        }
        __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        i64 v = 0;
        for (; v + 16 <= V; v += 16) top = _mm512_max_ps(top, load(z + v));
        float max = _mm512_reduce_max_ps(top), tail = 0.0f, target = widen(z[targets[t]]);
        for (; v < V; v++) max = fmaxf(max, widen(z[v]));
        __m512 m = _mm512_set1_ps(max);
        for (v = 0; v + 16 <= V; v += 16) sum = _mm512_add_ps(sum, exp_ps(_mm512_sub_ps(load(z + v), m)));
        for (; v < V; v++) tail += expf(widen(z[v]) - max);
        float total = _mm512_reduce_add_ps(sum) + tail, inverse = scale / total;
        nll[t] = logf(total) + max - target;
        float hit = scale * (expf(target - max) / total - 1.0f);
        for (v = 0; v + 16 <= V; v += 16)
            store(z + v, _mm512_mul_ps(exp_ps(_mm512_sub_ps(load(z + v), m)), _mm512_set1_ps(inverse)));
        for (; v < V; v++) {
            bf16 lane[16];
            store(lane, _mm512_set1_ps(expf(widen(z[v]) - max) * inverse));
            z[v] = lane[0];
        }
        bf16 lane[16];
        store(lane, _mm512_set1_ps(hit));
        z[targets[t]] = lane[0];
    }
}

/* ---- the squares of a gradient: each stretch of `stretch` numbers has a sum of its own, whoever computes it ------ */

void sum_squares(const bf16 *x, i64 n, i64 stretch, float *sums) {
#pragma omp parallel for schedule(static)
    for (i64 start = 0; start < n; start += stretch) {
        i64 end = n - start < stretch ? n : start + stretch;
        __m512 sum = _mm512_setzero_ps();
        for (i64 i = start; i < end; i += 16) {
            __mmask16 k = end - i >= 16 ? 0xffff : (__mmask16)((1u << (end - i)) - 1);
            __m512 v = _mm512_castsi512_ps(
                _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, x + i)), 16));
            sum = _mm512_fmadd_ps(v, v, sum);
        }
        sums[start / stretch] = _mm512_reduce_add_ps(sum);
    }
}

/* ---- AdamW on an fp32 master with a bf16 or fp32 gradient; the bf16 weight is written in the same pass ----------- */

/* m, v ← moments of clip·g; p ← p (1 − lr·decay) − step · m / (√v · root + eps); step and root correct their bias. */
void adamw(float *p, float *m, float *v, const void *grad, i64 grad_is_bf16, bf16 *weight, i64 n, float clip, float lr,
           float beta1, float beta2, float eps, float decay, float step, float root) {
    __m512 b1 = _mm512_set1_ps(beta1), b2 = _mm512_set1_ps(beta2), c1 = _mm512_set1_ps(1 - beta1);
    __m512 c2 = _mm512_set1_ps(1 - beta2), keep = _mm512_set1_ps(1 - lr * decay), s = _mm512_set1_ps(step);
    __m512 e = _mm512_set1_ps(eps), ro = _mm512_set1_ps(root), cl = _mm512_set1_ps(clip);
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n; i += 16) {
        __mmask16 k = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        __m512 g = grad_is_bf16
                       ? _mm512_castsi512_ps(_mm512_slli_epi32(
                             _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, (const bf16 *)grad + i)), 16))
                       : _mm512_maskz_loadu_ps(k, (const float *)grad + i);
        g = _mm512_mul_ps(g, cl);
        __m512 mi = _mm512_fmadd_ps(b1, _mm512_maskz_loadu_ps(k, m + i), _mm512_mul_ps(c1, g));
        __m512 vi = _mm512_fmadd_ps(b2, _mm512_maskz_loadu_ps(k, v + i), _mm512_mul_ps(_mm512_mul_ps(c2, g), g));
        __m512 pi = _mm512_mul_ps(keep, _mm512_maskz_loadu_ps(k, p + i));
        __m512 under = _mm512_fmadd_ps(_mm512_sqrt_ps(vi), ro, e);
        pi = _mm512_fnmadd_ps(s, _mm512_div_ps(mi, under), pi);
        _mm512_mask_storeu_ps(m + i, k, mi);
        _mm512_mask_storeu_ps(v + i, k, vi);
        _mm512_mask_storeu_ps(p + i, k, pi);
        if (weight) _mm256_mask_storeu_epi16(weight + i, k, (__m256i)_mm512_cvtneps_pbh(pi));
    }
}
