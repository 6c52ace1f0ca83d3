/* A model's step for few tokens: a list of instructions, run by one team of threads from the first to the last.
 *
 * With few tokens every weight is read once and hardly used: reading is the limit, and calling a library per product
 * costs more than the product. So a step enters here once. Each instruction is cut into tasks; a thread takes the next
 * one, and where an instruction's `wait` is set all meet before they go on.
 *
 * Whoever computes a row, and whatever rows are beside it, its numbers are the same to the last bit: every sum runs in
 * an order that depends on the row alone.
 *
 * Rounding is the model's: what a module returns is bf16, sums within are fp32.
 * Shapes: T rows, N outputs, K inputs, E experts, A chosen; in attention H heads, G key-value heads, N nope, R rope,
 * V value dims, C latent, W = C + R; P pages of UNIT tokens. All inner sizes are multiples of 16.
 */
#include "tiles.h"
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>











#define UNIT 64 /* tokens in a page: engine/pages.py */
#define BLOCK 16     /* outputs in a task */
#define AHEAD 2      /* blocks: weights are asked for so long before they are needed */
#define PANEL 64     /* outputs in a task with many rows */
#define MOST_ROWS 6  /* that meet a panel at a time */
#define MANY 24      /* rows for which packing a panel pays */
#define ROWS 256     /* rows in a task */
#define TOGETHER 4 /* heads that share the reading of a key */

typedef struct { /* the same in ops/program.py */
    i64 kind, wait;
    const void *x, *w, *w2, *bias;
    void *y, *kept, *kept2;
    i64 xs, ys; /* from row to row of x and y */
    i64 N, K, H, G, R, V, E, A, stacked, groups, best_groups, flags; /* stacked: weights that make an output */
    float eps, scale;
} Instruction;

enum { SIGMOID = 1, NORMED = 2, WIDE = 4, ADD = 8, PAIRS = 16 };

typedef struct { /* what a step brings, and room for what its routers choose */
    i64 T, P, singles, chunks; /* the first rows attend one by one, those behind them in chunks of one stream each */
    const i64 *chunk_at; /* [chunks + 1]: first rows, and T */
    i64 *token_T, *position_T, *slot_T;
    const i64 *stream_T, *table_SP;
    const float *cos, *sin; /* [positions, R/2] */
    i64 *expert_M, *row_M, *busy_E, *start_E; /* M = T·A; rows sorted by expert, the experts that have any */
    float *weight_M;
    i64 n_busy;
} Step;

typedef struct {
    const Instruction *code;
    Step *step;
    i64 longest; /* tokens that any row sees */
    char *room;  /* this thread's own, for panels and attention */
} Worker;

INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

/* The sums of 16 vectors' lanes, each in the same order: [16]. */
INLINE __m512 sums(const __m512 *v) {
    __m512 q[4];
    for (int i = 0; i < 4; i++) {
        __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[4 * i], v[4 * i + 1]), _mm512_unpackhi_ps(v[4 * i], v[4 * i + 1]));
        __m512 cd =
            _mm512_add_ps(_mm512_unpacklo_ps(v[4 * i + 2], v[4 * i + 3]), _mm512_unpackhi_ps(v[4 * i + 2], v[4 * i + 3]));
        __m512d lo = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), hi = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
        q[i] = _mm512_add_ps((__m512)lo, (__m512)hi);
    }
    __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(q[0], q[1], 0x88), _mm512_shuffle_f32x4(q[0], q[1], 0xdd));
    __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(q[2], q[3], 0x88), _mm512_shuffle_f32x4(q[2], q[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

INLINE __m512bh pairs(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }
INLINE __m512bh half_pairs(const bf16 *p) { return (__m512bh)_mm512_maskz_loadu_epi32(0xff, p); }

/* tile[m][n] = x_m · w_n for MR rows of x and 16 / MR rows of w, K apart. Fresh weights are read one row after the other,
 * as memory likes it; where they are in cache, rows share what they load. Either way a sum runs in the same order. */
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
            for (int n = 0; n < NV; n++) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], (__m512bh)_mm512_set1_epi32(pair), w[n]);
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

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }

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

/* Rows of x times `columns` outputs from n on, of w and of w2 where it isn't NULL. A row's products go to `finish`.
 * Many rows at a time go by a panel of packed weights, without the sums across lanes. */
INLINE void multiply(const Worker *t, Rows r, i64 panel_from, const bf16 *w, const bf16 *w2, i64 n, i64 columns,
                     Finish finish) {
    const Instruction *c = t->code;
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
    i64 bytes = columns * K * sizeof(bf16), slice = bytes / ceil_div(r.end - exact, MOST_ROWS) + 64;
    const char *ahead = (const char *)(w + n * K) + 2 * bytes, *ahead2 = (const char *)(w2 + n * K) + 2 * bytes;
    for (i64 row = exact; row < r.end; row += MOST_ROWS) {
        i64 M = take(c, r, row, MOST_ROWS, xs);
        for (i64 b = 0; b < slice; b += 64, ahead += 64, ahead2 += 64) {
            _mm_prefetch(ahead, _MM_HINT_T1);
            if (w2) _mm_prefetch(ahead2, _MM_HINT_T1);
        }
        panel_products(total / BLOCK, xs, panel, K, tile);
        for (i64 m = 0; m < M; m++)
            finish(c, r.index ? r.index[row + m] : row + m, n, columns, tile[m], tile[m] + columns);
    }
}

INLINE __m512 rounded(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}
INLINE __m512 silu(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

static void embed(const Worker *t, i64 row) {
    const Instruction *c = t->code;
    memcpy((bf16 *)c->y + row * c->ys, (const bf16 *)c->w + t->step->token_T[row] * c->N, c->N * sizeof(bf16));
}

INLINE void normed(const bf16 *x, const float *w, i64 K, float eps, bf16 *y) {
    __m512 squares = _mm512_setzero_ps();
    for (i64 k = 0; k < K; k += 16) squares = _mm512_fmadd_ps(load(x + k), load(x + k), squares);
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / K + eps));
    for (i64 k = 0; k < K; k += 16)
        store(y + k, _mm512_mul_ps(_mm512_mul_ps(load(x + k), scale), _mm512_loadu_ps(w + k)));
}

static void norm(const Worker *t, i64 row) {
    const Instruction *c = t->code;
    normed((const bf16 *)c->x + row * c->xs, c->w, c->K, c->eps, (bf16 *)c->y + row * c->ys);
}

/* Outputs in a task: more where many rows share the packing of their weights. */
INLINE i64 width(const Instruction *c, const Step *s) { return s->chunks ? PANEL / c->stacked : BLOCK; }

/* A task of a product over all rows: a block of outputs, and of rows where there are many. */
INLINE void all_rows(const Worker *t, i64 task, const bf16 *w, const bf16 *w2, Finish finish) {
    const Instruction *c = t->code;
    const Step *s = t->step;
    i64 columns = width(c, s), blocks = ceil_div(c->N, columns), n = task % blocks * columns, start = task / blocks * ROWS;
    Rows r = {NULL, 1, start, least(start + ROWS, s->T)};
    i64 panel_from = s->chunks && s->singles < r.end ? (s->singles > start ? s->singles : start) : r.end;
    multiply(t, r, panel_from, w, w2, n, least(columns, c->N - n), finish);
}

/* A task of a product over each expert's rows: a block of outputs of one of the experts that have any. */
INLINE void by_expert(const Worker *t, i64 task, i64 divide, Finish finish) {
    const Instruction *c = t->code;
    const Step *s = t->step;
    i64 columns = width(c, s), blocks = ceil_div(c->N, columns), e = s->busy_E[task / blocks], n = task % blocks * columns;
    const bf16 *w = (const bf16 *)c->w + e * c->stacked * c->N * c->K;
    Rows r = {s->row_M, divide, s->start_E[e], s->start_E[e + 1]};
    i64 panel_from = s->chunks ? r.start : r.end;
    while (panel_from < r.end && s->row_M[panel_from] < s->singles * c->A) panel_from++;
    multiply(t, r, panel_from, w, c->stacked == 2 ? w + c->N * c->K : NULL, n, least(columns, c->N - n), finish);
}

/* y = x wᵀ + bias, added to what stands in y if ADD; fp32 if WIDE. */
static void finish_linear(const Instruction *c, i64 row, i64 n, i64 columns, const float *products, const float *others) {
    const bf16 *bias = c->bias;
    bf16 *to = (bf16 *)c->y + row * c->ys + n;
    float *wide = (float *)c->y + row * c->ys + n;
    i64 add = c->flags & ADD, is_wide = c->flags & WIDE;
    (void)others;
    for (i64 j = 0; j < columns; j += BLOCK) {
        __m512 y = _mm512_loadu_ps(products + j);
        if (bias) y = _mm512_add_ps(y, load(bias + n + j));
        if (add) y = _mm512_add_ps(rounded(y), load(to + j));
        if (is_wide)
            _mm512_storeu_ps(wide + j, rounded(y));
        else
            store(to + j, y);
    }
}
static void linear(const Worker *t, i64 task) { all_rows(t, task, t->code->w, NULL, finish_linear); }

/* y = silu(x gateᵀ) · x upᵀ */
static void finish_gated(const Instruction *c, i64 row, i64 n, i64 columns, const float *gate, const float *up) {
    bf16 *to = (bf16 *)c->y + row * c->ys + n;
    for (i64 j = 0; j < columns; j += BLOCK)
        store(to + j, _mm512_mul_ps(silu(rounded(_mm512_loadu_ps(gate + j))), rounded(_mm512_loadu_ps(up + j))));
}
static void gated(const Worker *t, i64 task) { all_rows(t, task, t->code->w, t->code->w2, finish_gated); }

/* Each chosen expert's rows, M = T · A of them: gate and up stacked in w [E, 2N, K]; down [E, N, K]. */
static void experts_gated(const Worker *t, i64 task) { by_expert(t, task, t->code->A, finish_gated); }
static void experts_down(const Worker *t, i64 task) { by_expert(t, task, 1, finish_linear); }

/* y += Σ_A weight · x_M + shared (w2, where there is one), rounded where the model rounds. */
static void weigh(const Worker *t, i64 row) {
    const Instruction *c = t->code;
    const float *weight = t->step->weight_M + row * c->A;
    bf16 *y = (bf16 *)c->y + row * c->ys;
    for (i64 n = 0; n < c->N; n += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (i64 a = 0; a < c->A; a++) {
            __m512 x = load((const bf16 *)c->x + (row * c->A + a) * c->xs + n);
            sum = _mm512_add_ps(sum, _mm512_mul_ps(x, _mm512_set1_ps(weight[a])));
        }
        sum = rounded(sum);
        if (c->w2) sum = rounded(_mm512_add_ps(sum, load((const bf16 *)c->w2 + row * c->N + n)));
        store(y + n, _mm512_add_ps(load(y + n), sum));
    }
}

/* logits [T, E] = x wᵀ in fp32, four experts a task. */
static void logits(const Worker *t, i64 block) {
    const Instruction *c = t->code;
    i64 end = block * 4 + 4 < c->E ? block * 4 + 4 : c->E;
    for (i64 e = block * 4; e < end; e++) {
        const float *w = (const float *)c->w + e * c->K;
        for (i64 row = 0; row < t->step->T; row++) {
            const bf16 *x = (const bf16 *)c->x + row * c->xs;
            __m512 sum = _mm512_setzero_ps();
            for (i64 k = 0; k < c->K; k += 16) sum = _mm512_fmadd_ps(load(x + k), _mm512_loadu_ps(w + k), sum);
            ((float *)c->y)[row * c->E + e] = _mm512_reduce_add_ps(sum);
        }
    }
}

/* The indices of the k largest of n, the largest first. Chosen ones become −∞. */
static void largest(float *v, i64 n, i64 k, i64 *index) {
    for (i64 i = 0; i < k; i++) {
        i64 best = 0;
        for (i64 j = 1; j < n; j++)
            if (v[j] > v[best]) best = j;
        index[i] = best;
        v[best] = -INFINITY;
    }
}

/* model/moe.py's within_best_groups: −∞ for the experts of all other groups. */
static void keep_best_groups(const Instruction *c, float *choice) {
    i64 size = c->E / c->groups, best[c->groups];
    float worth[c->groups];
    int kept[c->groups];
    for (i64 g = 0; g < c->groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (i64 e = g * size; e < (g + 1) * size; e++) {
            float v = choice[e];
            if (v > first) second = first, first = v;
            else if (v > second) second = v;
        }
        worth[g] = c->flags & SIGMOID ? first + second : first;
        kept[g] = 0;
    }
    largest(worth, c->groups, c->best_groups, best);
    for (i64 i = 0; i < c->best_groups; i++) kept[best[i]] = 1;
    for (i64 e = 0; e < c->E; e++)
        if (!kept[e / size]) choice[e] = -INFINITY;
}

static void route_row(const Instruction *c, const float *logit, i64 *expert_A, float *weight_A) {
    float score[c->E], choice[c->E], top = -INFINITY, total = 0;
    for (i64 e = 0; e < c->E; e++) top = logit[e] > top ? logit[e] : top;
    for (i64 e = 0; e < c->E; e++) {
        score[e] = c->flags & SIGMOID ? 1 / (1 + expf(-logit[e])) : expf(logit[e] - top);
        total += score[e];
    }
    for (i64 e = 0; e < c->E; e++) {
        if (!(c->flags & SIGMOID)) score[e] /= total;
        choice[e] = score[e] + ((const float *)c->bias)[e];
    }
    if (c->best_groups < c->groups) keep_best_groups(c, choice);
    largest(choice, c->E, c->A, expert_A);
    float sum = 0;
    for (i64 a = 0; a < c->A; a++) sum += weight_A[a] = score[expert_A[a]];
    for (i64 a = 0; a < c->A; a++) weight_A[a] = (c->flags & NORMED ? weight_A[a] / (sum + 1e-20f) : weight_A[a]) * c->scale;
}

/* One task: every row's experts and weights, and the rows sorted by expert. */
static void route(const Worker *t, i64 task) {
    const Instruction *c = t->code;
    Step *s = t->step;
    i64 M = s->T * c->A, *start = s->start_E;
    (void)task;
    for (i64 row = 0; row < s->T; row++)
        route_row(c, (const float *)c->x + row * c->E, s->expert_M + row * c->A, s->weight_M + row * c->A);
    memset(start, 0, (c->E + 1) * sizeof(i64));
    for (i64 m = 0; m < M; m++) start[s->expert_M[m] + 1]++;
    s->n_busy = 0;
    for (i64 e = 0; e < c->E; e++) {
        if (start[e + 1]) s->busy_E[s->n_busy++] = e;
        start[e + 1] += start[e];
    }
    i64 next[c->E];
    memcpy(next, start, c->E * sizeof(i64));
    for (i64 m = 0; m < M; m++) s->row_M[next[s->expert_M[m]]++] = m;
}

/* Turn R numbers by the row's angles: neighbours (PAIRS, DeepSeek's layout) or halves (Llama's, Qwen2's). */
INLINE void rotated(const bf16 *x, const Step *s, i64 row, i64 R, i64 flags, bf16 *y) {
    const float *cos = s->cos + s->position_T[row] * (R / 2), *sin = s->sin + s->position_T[row] * (R / 2);
    i64 apart = flags & PAIRS ? 1 : R / 2, step = flags & PAIRS ? 2 : 1;
    for (i64 i = 0; i < R / 2; i++) {
        float a = widen(x[i * step]), b = widen(x[i * step + apart]);
        float turned[2] = {a * cos[i] - b * sin[i], a * sin[i] + b * cos[i]};
        __m128i narrow = (__m128i)_mm_cvtneps_pbh(_mm_set_ps(0, 0, turned[1], turned[0]));
        y[i * step] = (bf16)_mm_extract_epi16(narrow, 0);
        y[i * step + apart] = (bf16)_mm_extract_epi16(narrow, 1);
    }
}

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
        rotated((const bf16 *)c->x + row * c->xs + g * c->K, t->step, row, c->K, 0,
                (bf16 *)c->kept + slot * width + g * c->K);
    memcpy((bf16 *)c->kept2 + slot * width, (const bf16 *)c->w2 + row * c->xs, width * sizeof(bf16));
}

/* For `heads` heads and 16 · NV value dims: to = Σ p value · share, p being `apart` from head to head. */
INLINE void mix_values(const int heads, const int NV, const i64 *pages, i64 seen, const bf16 *values, i64 width,
                       const float *p, i64 apart, const float *share, float *to, i64 V) {
    __m512 acc[4][4];
    for (int i = 0; i < heads; i++)
        for (int j = 0; j < NV; j++) acc[i][j] = _mm512_setzero_ps();
    for (i64 page = 0; page * UNIT < seen; page++) {
        const bf16 *value = values + pages[page] * UNIT * width;
        for (i64 at = page * UNIT; at < least(page * UNIT + UNIT, seen); at++, value += width) {
            __m512 v[4];
            for (int j = 0; j < NV; j++) v[j] = load(value + 16 * j);
            for (int i = 0; i < heads; i++) {
                __m512 weight = _mm512_set1_ps(p[i * apart + at]);
                for (int j = 0; j < NV; j++) acc[i][j] = _mm512_fmadd_ps(weight, v[j], acc[i][j]);
            }
        }
    }
    for (int i = 0; i < heads; i++)
        for (int j = 0; j < NV; j++)
            _mm512_storeu_ps(to + i * V + 16 * j, _mm512_mul_ps(acc[i][j], _mm512_set1_ps(share[i])));
}

/* out [h, V] = softmax(scale · q keysᵀ) values over the first `seen` tokens of a row's pages, for h ≤ TOGETHER heads.
 * Keys and values of a token lie `width` apart from the next one's; inner sizes W and V. Every head by itself. */
static void attend_row(const Worker *t, i64 row, i64 h, const bf16 *q, i64 W, const bf16 *keys, const bf16 *values, i64 V,
                   i64 width, float scale, float *out) {
    const Step *s = t->step;
    const i64 *pages = s->table_SP + s->stream_T[row] * s->P, seen = s->position_T[row] + 1;
    float *scores = (float *)t->room; /* [TOGETHER, longest] */
    __m512 top[TOGETHER], factor = _mm512_set1_ps(scale);
    for (i64 i = 0; i < h; i++) top[i] = _mm512_set1_ps(-INFINITY);
    for (i64 at = 0; at < seen; at += 16) { /* rows behind the last token's are there, and masked */
        const bf16 *k = keys + (pages[at / UNIT] * UNIT + at % UNIT) * width;
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
            __m512 e = _mm512_maskz_mov_ps(valid, exp_ps(_mm512_sub_ps(_mm512_loadu_ps(p), best)));
            _mm512_storeu_ps(p, e);
            total = _mm512_add_ps(total, e);
        }
        share[i] = 1 / _mm512_reduce_add_ps(total);
    }
    for (i64 v = 0; v < V; v += 16) {
        const int four = V - v >= 64; /* 64 dims at a time while there are as many */
        for (i64 i = 0; i < h; i += h - i >= 4 ? 4 : 1) {
            const float *p = scores + i * t->longest, *mine = share + i;
            float *to = out + i * V + v;
            if (four)
                h - i >= 4 ? mix_values(4, 4, pages, seen, values + v, width, p, t->longest, mine, to, V)
                           : mix_values(1, 4, pages, seen, values + v, width, p, t->longest, mine, to, V);
            else
                h - i >= 4 ? mix_values(4, 1, pages, seen, values + v, width, p, t->longest, mine, to, V)
                           : mix_values(1, 1, pages, seen, values + v, width, p, t->longest, mine, to, V);
        }
        v += four ? 48 : 0;
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
    __m512 sum[4];
    for (int j = 0; j < NV; j++) sum[j] = _mm512_setzero_ps();
    for (i64 n = 0; n < N; n++)
        for (int j = 0; j < NV; j++)
            sum[j] = _mm512_fmadd_ps(_mm512_set1_ps(widen(q[n])), load(w + n * C + 16 * j), sum[j]);
    for (int j = 0; j < NV; j++) store(to + 16 * j, sum[j]);
}

/* Latent attention of a row, absorbed: q [H, N + R] folded into the latent by W_k, sums unfolded by W_v, both halves of
 * w [H, N + V, C]. Nothing is rebuilt. Heads from `first` on, TOGETHER at most. */
static void absorbed(const Worker *t, i64 row, i64 first) {
    const Instruction *c = t->code;
    i64 C = c->K, W = C + c->R, h = c->H - first < TOGETHER ? c->H - first : TOGETHER;
    bf16 folded[TOGETHER * W], latent[C];
    float out[TOGETHER * C];
    for (i64 i = 0; i < h; i++) {
        const bf16 *q = (const bf16 *)c->x + row * c->xs + (first + i) * (c->N + c->R);
        const bf16 *w = (const bf16 *)c->w + (first + i) * (c->N + c->V) * C;
        i64 k = 0;
        for (; k + 64 <= C; k += 64) fold(4, q, c->N, w + k, C, folded + i * W + k);
        for (; k < C; k += 16) fold(1, q, c->N, w + k, C, folded + i * W + k);
        rotated(q + c->N, t->step, row, c->R, PAIRS, folded + i * W + C);
    }
    attend_row(t, row, h, folded, W, c->kept, c->kept, C, W, c->scale, out);
    for (i64 i = 0; i < h; i++) {
        const bf16 *w = (const bf16 *)c->w + ((first + i) * (c->N + c->V) + c->N) * C, *x = latent;
        bf16 *y = (bf16 *)c->y + row * c->ys + (first + i) * c->V;
        float tile[1][PANEL];
        round_off(out + i * C, C, latent);
        for (i64 v = 0; v < c->V; v += BLOCK) {
            products(1, 1, &x, w + v * C, C, tile);
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
        for (i64 j = 0; j < columns; j += BLOCK) pack(w + (n + j) * C, C, panel + 2 * j);
        for (i64 at = 0; at < S; at += MOST_ROWS) {
            i64 M = least(S - at, MOST_ROWS);
            for (i64 m = 0; m < MOST_ROWS; m++) xs[m] = token(pages, c->kept, C + c->R, at + least(m, M - 1));
            panel_products(columns / BLOCK, xs, panel, C, tile);
            for (i64 m = 0; m < M; m++)
                for (i64 j = n; j < n + columns; j += BLOCK)
                    store(j < c->N ? k + (at + m) * K + j : v + (at + m) * V + j - c->N, _mm512_loadu_ps(tile[m] + j - n));
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
    forward_head(q, K, k, K, v, V, y, c->ys, NULL, 0, L, S, K, V, c->scale, v + S * V);
}

/* A task: TOGETHER heads of a single row, or one head of a chunk. */
static void attend_latent(const Worker *t, i64 task) {
    const Step *s = t->step;
    i64 parts = ceil_div(t->code->H, TOGETHER), singles = s->singles * parts;
    if (task < singles) return absorbed(t, task / parts, task % parts * TOGETHER);
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
        rotated((const bf16 *)c->x + row * c->xs + (first + i) * K, t->step, row, K, 0, q + i * K);
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
        rotated((const bf16 *)c->x + (start + row) * c->xs + head * K, s, start + row, K, 0, q + row * K);
    for (i64 at = 0; at < S; at++) {
        memcpy(k + at * K, token(pages, c->kept, c->G * K, at) + g * K, bytes);
        memcpy(v + at * K, token(pages, c->kept2, c->G * K, at) + g * K, bytes);
    }
    bf16 *y = (bf16 *)c->y + start * c->ys + head * K;
    forward_head(q, K, k, K, v, K, y, c->ys, NULL, 0, L, S, K, K, c->scale, v + S * K);
}

/* A task: heads of a single row that share a key-value head, TOGETHER at most; or one head of a chunk. */
static void attend_heads(const Worker *t, i64 task) {
    const Instruction *c = t->code;
    const Step *s = t->step;
    i64 shared = c->H / c->G, parts = ceil_div(shared, TOGETHER), singles = s->singles * c->G * parts;
    if (task < singles) {
        i64 g = task / parts % c->G, first = task % parts * TOGETHER;
        i64 h = shared - first < TOGETHER ? shared - first : TOGETHER;
        return attend_group(t, task / (c->G * parts), g, g * shared + first, h);
    }
    const i64 *at = s->chunk_at + (task - singles) / c->H;
    attend_chunk(t, at[0], at[1] - at[0], (task - singles) % c->H);
}

static void (*const KINDS[])(const Worker *, i64) = {
    embed, norm, linear, gated, keep_latent, keep_heads, attend_latent, attend_heads, logits, route, experts_gated,
    experts_down, weigh,
};

static i64 tasks(const Instruction *c, const Step *s) {
    void (*kind)(const Worker *, i64) = KINDS[c->kind];
    if (kind == linear || kind == gated) return ceil_div(c->N, width(c, s)) * ceil_div(s->T, ROWS);
    if (kind == experts_gated || kind == experts_down) return s->n_busy * ceil_div(c->N, width(c, s));
    if (kind == attend_latent) return s->singles * ceil_div(c->H, TOGETHER) + s->chunks * c->H;
    if (kind == attend_heads) return s->singles * c->G * ceil_div(c->H / c->G, TOGETHER) + s->chunks * c->H;
    if (kind == logits) return ceil_div(c->E, 4);
    return kind == route ? 1 : s->T;
}

typedef struct {
    _Atomic i64 next;
    char apart[56];
} Counter; /* of the tasks that were taken; a cache line each */

/* Ask for the weights that this thread's first task of an instruction probably needs. */
static void warm(const Instruction *c, i64 task) {
    if ((KINDS[c->kind] != linear && KINDS[c->kind] != gated) || (task + 1) * BLOCK > c->N) return;
    const char *w = (const char *)c->w + task * BLOCK * c->K * sizeof(bf16);
    for (i64 b = 0; b < BLOCK * c->K * (i64)sizeof(bf16); b += 64) _mm_prefetch(w + b, _MM_HINT_T1);
}

/* All threads come here before any goes on. Spins, since it is mostly a matter of a microsecond. */
static void meet(_Atomic i64 *arrived, i64 threads) {
    i64 round = atomic_fetch_add(arrived, 1) / threads + 1;
    for (i64 spins = 0; atomic_load_explicit(arrived, memory_order_acquire) < round * threads; spins++)
        if (spins < 4096)
            _mm_pause();
        else
            sched_yield();
}

/* Bytes that panels and attention need on a thread, for tokens as far as `longest`. */
static i64 room_for(const Instruction *code, i64 n, const Step *s, i64 longest) {
    i64 bytes = TOGETHER * longest * sizeof(float);
    for (const Instruction *c = code; s->chunks && c < code + n; c++) {
        i64 panel = c->K * PANEL * sizeof(bf16);
        bytes = panel > bytes ? panel : bytes;
        int latent = KINDS[c->kind] == attend_latent;
        i64 K = latent ? c->N + c->R : c->K, V = latent ? c->V : c->K;
        if (!latent && KINDS[c->kind] != attend_heads) continue;
        i64 rebuilt = (s->T * K + longest * (K + V)) * sizeof(bf16) + forward_bytes(longest, K, V) + panel;
        bytes = rebuilt > bytes ? rebuilt : bytes;
    }
    return bytes;
}

/* Run the instructions. Returns 1 where there is no memory for attention. */
int run_program(const Instruction *code, i64 n, Step *step, i64 threads) {
    i64 longest = 0;
    for (i64 row = 0; step->position_T && row < step->T; row++)
        longest = step->position_T[row] >= longest ? step->position_T[row] + 1 : longest;
    longest = ceil_div(longest, UNIT) * UNIT;
    i64 bytes = room_for(code, n, step, longest);
    Counter *counters = calloc(n, sizeof(Counter));
    char *room = malloc(threads * bytes);
    _Atomic i64 arrived = 0;
    if (!counters || (bytes && !room)) return free(counters), free(room), 1;
#pragma omp parallel num_threads(threads)
    {
        i64 team = omp_get_num_threads();
        Worker worker = {code, step, longest, room + omp_get_thread_num() * bytes};
        for (i64 i = 0; i < n; i++, worker.code++) {
            i64 count = tasks(worker.code, step), task;
            while ((task = atomic_fetch_add_explicit(&counters[i].next, 1, memory_order_relaxed)) < count)
                KINDS[worker.code->kind](&worker, task);
            if (worker.code->wait) {
                if (i + 1 < n) warm(worker.code + 1, omp_get_thread_num());
                meet(&arrived, team);
            }
        }
    }
    free(counters);
    free(room);
    return 0;
}

/* The first of the largest of n logits; -1 where one isn't finite. */
static i64 likeliest(const float *logit, i64 n) {
    __m512 top = _mm512_set1_ps(-INFINITY), zero = _mm512_setzero_ps();
    for (i64 i = 0; i < n; i += 16) {
        __m512 x = _mm512_loadu_ps(logit + i);
        top = _mm512_max_ps(top, x);
        zero = _mm512_fmadd_ps(x, _mm512_setzero_ps(), zero);
    }
    if (_mm512_reduce_add_ps(zero) != 0) return -1;
    float best = _mm512_reduce_max_ps(top);
    i64 i = 0;
    while (logit[i] != best) i++;
    return i;
}

/* Up to `steps` steps of rows that are streams of their own, each fed the likeliest token of the one before. Leaves
 * tokens [steps, T] and the hidden states [steps, T, D] behind them. Returns how many steps were finite; -1: no memory. */
int run_greedy(const Instruction *code, i64 n, Step *s, i64 threads, i64 steps, const float *logits, i64 V,
               const bf16 *hidden, i64 D, i64 *tokens, bf16 *states) {
    for (i64 step = 0; step < steps; step++) {
        if (run_program(code, n, s, threads)) return -1;
        for (i64 row = 0; row < s->T; row++) {
            i64 token = likeliest(logits + row * V, V), next = s->position_T[row] + 1;
            if (token < 0) return step;
            tokens[step * s->T + row] = s->token_T[row] = token;
            if (step + 1 < steps)
                s->slot_T[row] = s->table_SP[s->stream_T[row] * s->P + next / UNIT] * UNIT + next % UNIT;
            s->position_T[row] = next;
        }
        memcpy(states + step * s->T * D, hidden, s->T * D * sizeof(bf16));
    }
    return steps;
}
