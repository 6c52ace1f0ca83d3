/* Attention over a paged cache: what is kept of a token, rows that attend alone, chunks that attend in tiles. */
#pragma once
#include "products.h"

#define UNIT 64    /* tokens in a page: engine/pages.py */
#define TOGETHER 8 /* heads in a task at most, which share the reading of keys */
#define FOLDED 16  /* rows of an up-projection that are asked for before they are needed */

enum { HALVES, PAIRS }; /* how the two numbers that turn together lie: Llama's and Qwen2's layout, DeepSeek's */

/* Turn R numbers by the row's angles. */
INLINE void rotated(const bf16 *x, const Step *s, i64 row, i64 R, const int layout, bf16 *y) {
    const float *cos = s->cos + s->position_T[row] * (R / 2), *sin = s->sin + s->position_T[row] * (R / 2);
    i64 apart = layout == PAIRS ? 1 : R / 2, step = layout == PAIRS ? 2 : 1;
    for (i64 i = 0; i < R / 2; i++) {
        float a = widen(x[i * step]), b = widen(x[i * step + apart]);
        float turned[2] = {a * cos[i] - b * sin[i], a * sin[i] + b * cos[i]};
        __m128i narrow = (__m128i)_mm_cvtneps_pbh(_mm_set_ps(0, 0, turned[1], turned[0]));
        y[i * step] = (bf16)_mm_extract_epi16(narrow, 0);
        y[i * step + apart] = (bf16)_mm_extract_epi16(narrow, 1);
    }
}

/* Heads in a task: fewer where a step has too few rows to keep all threads at work. */
INLINE i64 together(const Step *s) { return s->singles < 4 ? TOGETHER / 2 : TOGETHER; }

/* The row of the latent cache: c normed, k_rope turned. x is kv_down's [C | R]. */
static void keep_latent(const Worker *t, i64 row) {
    const Instruction *c = t->code;
    const bf16 *x = (const bf16 *)c->x + row * c->xs;
    bf16 *to = (bf16 *)c->kept + t->step->slot_T[row] * (c->K + c->R);
    normed(x, c->w, c->K, c->eps, to);
    rotated(x + c->K, t->step, row, c->R, PAIRS, to + c->K);
}

/* k turned and v as it is: x is k [G, K], w is v. */
static void keep_heads(const Worker *t, i64 row) {
    const Instruction *c = t->code;
    i64 width = c->G * c->K, slot = t->step->slot_T[row];
    for (i64 g = 0; g < c->G; g++)
        rotated((const bf16 *)c->x + row * c->xs + g * c->K, t->step, row, c->K, HALVES,
                (bf16 *)c->kept + slot * width + g * c->K);
    memcpy((bf16 *)c->kept2 + slot * width, (const bf16 *)c->w2 + row * c->xs, width * sizeof(bf16));
}

/* For `heads` heads and `dims` value dims, 32 · NV or 16: to = Σ p value · share, p being `apart` from head to head.
 * Two tokens at a time: numbers of the one beside those of the other, times two of p. */
INLINE void mix_values(const int heads, const int NV, const i64 dims, const i64 *pages, i64 seen, const bf16 *values,
                       i64 width, const bf16 *p, i64 apart, const float *share, float *to, i64 V) {
    const __mmask32 there = dims < 32 ? 0xffff : ~0u;
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    __m512 low[4][2], high[4][2];
    for (int i = 0; i < heads; i++)
        for (int j = 0; j < NV; j++) low[i][j] = high[i][j] = _mm512_setzero_ps();
    for (i64 page = 0; page * UNIT < seen; page++) {
        const bf16 *value = values + pages[page] * UNIT * width;
        for (i64 at = page * UNIT; at < least(page * UNIT + UNIT, seen); at += 2, value += 2 * width) {
            __m512bh lows[2], highs[2];
            for (int j = 0; j < NV; j++) {
                __m512i one = _mm512_maskz_loadu_epi16(there, value + 32 * j);
                __m512i other = _mm512_maskz_loadu_epi16(at + 1 < seen ? there : 0, value + width + 32 * j);
                lows[j] = (__m512bh)_mm512_unpacklo_epi16(one, other);
                highs[j] = (__m512bh)_mm512_unpackhi_epi16(one, other);
            }
            for (int i = 0; i < heads; i++) {
                int pair;
                memcpy(&pair, p + i * apart + at, 4);
                __m512bh weights = (__m512bh)_mm512_set1_epi32(pair);
                for (int j = 0; j < NV; j++) {
                    low[i][j] = _mm512_dpbf16_ps(low[i][j], weights, lows[j]);
                    high[i][j] = _mm512_dpbf16_ps(high[i][j], weights, highs[j]);
                }
            }
        }
    }
    for (int i = 0; i < heads; i++)
        for (int j = 0; j < NV; j++) {
            __m512 mine = _mm512_set1_ps(share[i]), a = low[i][j], b = high[i][j];
            _mm512_storeu_ps(to + i * V + 32 * j, _mm512_mul_ps(_mm512_permutex2var_ps(a, first, b), mine));
            if (dims < 32) continue;
            _mm512_storeu_ps(to + i * V + 32 * j + 16, _mm512_mul_ps(_mm512_permutex2var_ps(a, second, b), mine));
        }
}

/* out [h, V] = softmax(scale · q keysᵀ) values over the first `seen` tokens of a row's pages, for h ≤ TOGETHER heads.
 * Keys and values of a token lie `width` apart from the next one's; inner sizes W and V. Every head by itself;
 * probabilities are bf16, as in tiles.h. */
static void attend_row(const Worker *t, i64 row, i64 h, const bf16 *q, i64 W, const bf16 *keys, const bf16 *values,
                       i64 V, i64 width, float scale, float *out) {
    const Step *s = t->step;
    const i64 *pages = s->table_SP + s->stream_T[row] * s->P, seen = s->position_T[row] + 1;
    float *scores = (float *)t->room; /* [TOGETHER, longest] */
    __m512 top[TOGETHER], factor = _mm512_set1_ps(scale);
    for (i64 i = 0; i < h; i++) top[i] = _mm512_set1_ps(-INFINITY);
    for (i64 at = 0; at < seen; at += 16) { /* rows behind the last token's are there, and masked */
        const bf16 *k = keys + (pages[at / UNIT] * UNIT + at % UNIT) * width;
        i64 next = at + 16 < seen ? at + 16 : at;
        const bf16 *ahead = keys + (pages[next / UNIT] * UNIT + next % UNIT) * width;
        for (i64 n = 0; n < 16; n++)
            for (i64 w = 0; w < W; w += 32) _mm_prefetch((const char *)(ahead + n * width + w), _MM_HINT_T0);
        __mmask16 valid = seen - at >= 16 ? 0xffff : (1 << (seen - at)) - 1;
        for (i64 i = 0; i < h; i++) {
            __m512 acc[16];
            i64 w = 0;
            for (int n = 0; n < 16; n++) acc[n] = _mm512_setzero_ps();
            for (; w + 32 <= W; w += 32) {
                __m512bh qs = pairs(q + i * W + w);
                for (int n = 0; n < 16; n++) acc[n] = _mm512_dpbf16_ps(acc[n], qs, pairs(k + n * width + w));
            }
            if (w < W)
                for (int n = 0; n < 16; n++)
                    acc[n] = _mm512_dpbf16_ps(acc[n], half_pairs(q + i * W + w), half_pairs(k + n * width + w));
            __m512 score = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), valid, sums(acc), factor);
            _mm512_storeu_ps(scores + i * t->longest + at, score);
            top[i] = _mm512_max_ps(top[i], score);
        }
    }
    float share[TOGETHER];
    for (i64 i = 0; i < h; i++) {
        __m512 best = _mm512_set1_ps(_mm512_reduce_max_ps(top[i])), total = _mm512_setzero_ps();
        for (i64 at = 0; at < seen; at += 16) {
            float *p = scores + i * t->longest + at;
            __mmask16 valid = seen - at >= 16 ? 0xffff : (1 << (seen - at)) - 1;
            __m512 e = rounded(_mm512_maskz_mov_ps(valid, exp_ps(_mm512_sub_ps(_mm512_loadu_ps(p), best))));
            store((bf16 *)(scores + i * t->longest) + at, e); /* over scores that were read */
            total = _mm512_add_ps(total, e);
        }
        share[i] = 1 / _mm512_reduce_add_ps(total);
    }
    for (i64 v = 0, dims; v < V; v += dims) {
        dims = V - v >= 64 ? 64 : V - v >= 32 ? 32 : 16;
        for (i64 i = 0; i < h; i += h - i >= 4 ? 4 : 1) {
            const bf16 *p = (const bf16 *)(scores + i * t->longest), *from = values + v;
            float *mine = share + i, *to = out + i * V + v;
            i64 apart = 2 * t->longest, four = h - i >= 4;
            if (dims == 64)
                four ? mix_values(4, 2, 64, pages, seen, from, width, p, apart, mine, to, V)
                     : mix_values(1, 2, 64, pages, seen, from, width, p, apart, mine, to, V);
            else if (dims == 32)
                four ? mix_values(4, 1, 32, pages, seen, from, width, p, apart, mine, to, V)
                     : mix_values(1, 1, 32, pages, seen, from, width, p, apart, mine, to, V);
            else
                four ? mix_values(4, 1, 16, pages, seen, from, width, p, apart, mine, to, V)
                     : mix_values(1, 1, 16, pages, seen, from, width, p, apart, mine, to, V);
        }
    }
}

INLINE void round_off(const float *x, i64 n, bf16 *y) {
    for (i64 i = 0; i < n; i += 16) store(y + i, _mm512_loadu_ps(x + i));
}

INLINE const bf16 *token(const i64 *pages, const void *kept, i64 width, i64 position) {
    return (const bf16 *)kept + (pages[position / UNIT] * UNIT + position % UNIT) * width;
}

/* 16 · NV numbers of q w: q [N], rows of w C apart. */
INLINE void fold(const int NV, const bf16 *q, i64 N, const bf16 *w, i64 C, bf16 *to) {
    __m512 sum[8];
    for (int j = 0; j < NV; j++) sum[j] = _mm512_setzero_ps();
    for (i64 n = 0; n < N; n++, w += C) {
        __m512 x = _mm512_set1_ps(widen(q[n]));
        for (int j = 0; j < NV; j += 2) _mm_prefetch((const char *)(w + 16 * j + FOLDED * C), _MM_HINT_T1);
        for (int j = 0; j < NV; j++) sum[j] = _mm512_fmadd_ps(x, load(w + 16 * j), sum[j]);
    }
    for (int j = 0; j < NV; j++) store(to + 16 * j, sum[j]);
}

/* Latent attention of a row, absorbed: q [H, N + R] folded into the latent by W_k, sums unfolded by W_v, both halves of
 * w [H, N + V, C]. Nothing is rebuilt. h ≤ TOGETHER heads from `first` on. */
static void absorbed(const Worker *t, i64 row, i64 first, i64 h) {
    const Instruction *c = t->code;
    i64 C = c->K, W = C + c->R;
    bf16 folded[TOGETHER * W], latent[C];
    float out[TOGETHER * C];
    for (i64 i = 0; i < h; i++) {
        const bf16 *q = (const bf16 *)c->x + row * c->xs + (first + i) * (c->N + c->R);
        const bf16 *w = (const bf16 *)c->w + (first + i) * (c->N + c->V) * C;
        i64 k = 0;
        for (; k + 128 <= C; k += 128) fold(8, q, c->N, w + k, C, folded + i * W + k);
        for (; k + 64 <= C; k += 64) fold(4, q, c->N, w + k, C, folded + i * W + k);
        for (; k < C; k += 16) fold(1, q, c->N, w + k, C, folded + i * W + k);
        rotated(q + c->N, t->step, row, c->R, PAIRS, folded + i * W + C);
    }
    for (i64 i = 0; i < h; i++) { /* W_v is asked for, and comes while the row attends */
        const bf16 *w = (const bf16 *)c->w + ((first + i) * (c->N + c->V) + c->N) * C;
        for (i64 n = 0; n < c->V * C; n += 32) _mm_prefetch((const char *)(w + n), _MM_HINT_T1);
    }
    attend_row(t, row, h, folded, W, c->kept, c->kept, C, W, c->scale, out);
    for (i64 i = 0; i < h; i++) {
        const bf16 *w = (const bf16 *)c->w + ((first + i) * (c->N + c->V) + c->N) * C, *x = latent;
        bf16 *y = (bf16 *)c->y + row * c->ys + (first + i) * c->V;
        float tile[1][PANEL];
        round_off(out + i * C, C, latent);
        for (i64 v = 0; v < c->V; v += BLOCK) {
            products(1, 1, &x, w + v * C, C, 0, tile);
            store(y + v, _mm512_loadu_ps(tile[0]));
        }
    }
}

/* Latent attention of a chunk's head, rebuilt: k_nope and v of all tokens made from their latents first. */
static void rebuilt(const Worker *t, i64 start, i64 L, i64 head) {
    const Instruction *c = t->code;
    const Step *s = t->step;
    const i64 *pages = s->table_SP + s->stream_T[start] * s->P, S = s->position_T[start] + L;
    i64 C = c->K, K = c->N + c->R, V = c->V;
    bf16 *q = (bf16 *)t->room, *k = q + L * K, *v = k + S * K;
    const bf16 *w = (const bf16 *)c->w + head * (c->N + V) * C, *xs[MOST_ROWS];
    bf16 *panel = v + S * V;
    float tile[MOST_ROWS][PANEL];
    for (i64 n = 0; n < c->N + V; n += PANEL) {
        i64 columns = least(c->N + V - n, PANEL);
        for (i64 j = 0; j < columns; j += BLOCK) pack(w + (n + j) * C, C / 2, panel + 2 * j);
        for (i64 at = 0; at < S; at += MOST_ROWS) {
            i64 M = least(S - at, MOST_ROWS);
            for (i64 m = 0; m < M; m++) xs[m] = token(pages, c->kept, C + c->R, at + m);
            panel_products(M, columns / BLOCK, xs, panel, C, tile);
            for (i64 m = 0; m < M; m++)
                for (i64 j = n; j < n + columns; j += BLOCK) {
                    bf16 *to = j < c->N ? k + (at + m) * K + j : v + (at + m) * V + j - c->N;
                    store(to, _mm512_loadu_ps(tile[m] + j - n));
                }
        }
    }
    for (i64 at = 0; at < S; at++)
        memcpy(k + at * K + c->N, token(pages, c->kept, C + c->R, at) + C, c->R * sizeof(bf16));
    for (i64 row = 0; row < L; row++) {
        const bf16 *from = (const bf16 *)c->x + (start + row) * c->xs + head * K;
        memcpy(q + row * K, from, c->N * sizeof(bf16));
        rotated(from + c->N, s, start + row, c->R, PAIRS, q + row * K + c->N);
    }
    bf16 *y = (bf16 *)c->y + start * c->ys + head * V;
    forward_head(q, K, k, K, v, V, NULL, y, c->ys, NULL, 0, L, S, K, V, c->scale, v + S * V);
}

/* A task: some heads of a single row, or one head of a chunk. */
static void attend_latent(const Worker *t, i64 task) {
    const Step *s = t->step;
    i64 H = t->code->H, h = together(s), parts = ceil_div(H, h), singles = s->singles * parts;
    if (task < singles) return absorbed(t, task / parts, task % parts * h, least(h, H - task % parts * h));
    const i64 *at = s->chunk_at + (task - singles) / t->code->H;
    rebuilt(t, at[0], at[1] - at[0], (task - singles) % t->code->H);
}

/* Grouped-query attention of a row: q [H, K] turned here; h heads from `first` on, which share key-value head g. */
static void attend_group(const Worker *t, i64 row, i64 g, i64 first, i64 h) {
    const Instruction *c = t->code;
    i64 K = c->K;
    bf16 q[TOGETHER * K];
    float out[TOGETHER * K];
    for (i64 i = 0; i < h; i++)
        rotated((const bf16 *)c->x + row * c->xs + (first + i) * K, t->step, row, K, HALVES, q + i * K);
    const bf16 *keys = (const bf16 *)c->kept + g * K, *values = (const bf16 *)c->kept2 + g * K;
    attend_row(t, row, h, q, K, keys, values, K, c->G * K, c->scale, out);
    for (i64 i = 0; i < h; i++) round_off(out + i * K, K, (bf16 *)c->y + row * c->ys + (first + i) * K);
}

/* The same for one head of a chunk. */
static void attend_chunk(const Worker *t, i64 start, i64 L, i64 head) {
    const Instruction *c = t->code;
    const Step *s = t->step;
    const i64 *pages = s->table_SP + s->stream_T[start] * s->P, S = s->position_T[start] + L;
    i64 K = c->K, g = head / (c->H / c->G), bytes = K * sizeof(bf16);
    bf16 *q = (bf16 *)t->room, *k = q + L * K, *v = k + S * K;
    for (i64 row = 0; row < L; row++)
        rotated((const bf16 *)c->x + (start + row) * c->xs + head * K, s, start + row, K, HALVES, q + row * K);
    for (i64 at = 0; at < S; at++) {
        memcpy(k + at * K, token(pages, c->kept, c->G * K, at) + g * K, bytes);
        memcpy(v + at * K, token(pages, c->kept2, c->G * K, at) + g * K, bytes);
    }
    bf16 *y = (bf16 *)c->y + start * c->ys + head * K;
    forward_head(q, K, k, K, v, K, NULL, y, c->ys, NULL, 0, L, S, K, K, c->scale, v + S * K);
}

/* A task: heads of a single row that share a key-value head, or one head of a chunk. */
static void attend_heads(const Worker *t, i64 task) {
    const Instruction *c = t->code;
    const Step *s = t->step;
    i64 shared = c->H / c->G, h = together(s), parts = ceil_div(shared, h), singles = s->singles * c->G * parts;
    if (task < singles) {
        i64 g = task / parts % c->G, first = task % parts * h;
        return attend_group(t, task / (c->G * parts), g, g * shared + first, least(h, shared - first));
    }
    const i64 *at = s->chunk_at + (task - singles) / c->H;
    attend_chunk(t, at[0], at[1] - at[0], (task - singles) % c->H);
}
