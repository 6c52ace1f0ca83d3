/* A model's step for few tokens: a list of instructions, run by one team of threads from the first to the last.
 *
 * With few tokens every weight is read once and hardly used: reading is the limit, and calling a library per product
 * costs more than the product. So a step enters here once. Each instruction is cut into tasks; a thread takes the next
 * one, or a few where they are small, and where an instruction's `wait` is set all meet before they go on.
 *
 * Whoever computes a row, and whatever rows are beside it, its numbers are the same to the last bit: every sum runs in
 * an order that depends on the row alone.
 *
 * Rounding is the model's: what a module returns is bf16, sums within are fp32.
 * Shapes: T rows, N outputs, K inputs, E experts, A chosen; in attention H heads, G key-value heads, N nope, R rope,
 * V value dims, C latent, W = C + R; P pages of UNIT tokens. All inner sizes are multiples of 16.
 */
#include "draws.h"
#include "paged.h"
#include <sched.h>

#define ROWS 256  /* in a task, of many */
#define ROUTED 16 /* rows in a task of a router */
#define TAKEN 32768 /* bytes of weights in the tasks that a thread takes at a time, where there are enough of them */

INLINE __m512 silu(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

static void embed(const Worker *t, i64 row) {
    const Instruction *c = t->code;
    memcpy((bf16 *)c->y + row * c->ys, (const bf16 *)c->w + t->step->token_T[row] * c->N, c->N * sizeof(bf16));
}

static void norm(const Worker *t, i64 row) {
    const Instruction *c = t->code;
    normed((const bf16 *)c->x + row * c->xs, c->w, c->K, c->eps, (bf16 *)c->y + row * c->ys);
}

/* Outputs in a task: more where many rows share the packing of their weights. */
INLINE i64 width(const Instruction *c, const Step *s) { return s->chunks ? PANEL / c->stacked : BLOCK; }

/* A task of a product over all rows: a block of outputs, and of rows where there are many. */
INLINE void all_rows(const Worker *t, i64 task, Finish finish) {
    const Instruction *c = t->code;
    const Step *s = t->step;
    i64 columns = width(c, s), blocks = ceil_div(c->N, columns);
    i64 n = task % blocks * columns, start = task / blocks * ROWS;
    Rows r = {NULL, 1, start, least(start + ROWS, s->T)};
    i64 panel_from = s->chunks && s->singles < r.end ? (s->singles > start ? s->singles : start) : r.end;
    multiply(t, r, panel_from, c->matrices, n, least(columns, c->N - n), finish);
}

/* A task of a product over each expert's rows: a block of outputs of one of the experts that have any. */
INLINE void by_expert(const Worker *t, i64 task, i64 divide, i64 which, Finish finish) {
    const Instruction *c = t->code;
    Step *s = t->step;
    i64 columns = width(c, s), blocks = ceil_div(c->N, columns);
    i64 e = s->busy_E[task / blocks], n = task % blocks * columns;
    const Matrix *matrices = c->matrices + 3 * e + which;
    if (!matrices->codes) {
        s->absent = 1;
        return;
    }
    Rows r = {s->row_M, divide, s->start_E[e], s->start_E[e + 1]};
    i64 panel_from = s->chunks ? r.start : r.end;
    while (panel_from < r.end && s->row_M[panel_from] < s->singles * c->A) panel_from++;
    multiply(t, r, panel_from, matrices, n, least(columns, c->N - n), finish);
}

/* y = x wᵀ + bias, added to what stands in y if ADD; fp32 if WIDE. */
static void finish_linear(const Instruction *c, i64 row, i64 n, i64 columns, const float *products,
                          const float *others) {
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
static void linear(const Worker *t, i64 task) { all_rows(t, task, finish_linear); }

/* y = silu(x gateᵀ) · x upᵀ */
static void finish_gated(const Instruction *c, i64 row, i64 n, i64 columns, const float *gate, const float *up) {
    bf16 *to = (bf16 *)c->y + row * c->ys + n;
    for (i64 j = 0; j < columns; j += BLOCK)
        store(to + j, _mm512_mul_ps(silu(rounded(_mm512_loadu_ps(gate + j))), rounded(_mm512_loadu_ps(up + j))));
}
static void gated(const Worker *t, i64 task) { all_rows(t, task, finish_gated); }

/* Each chosen expert's rows, M = T · A of them. */
static void experts_gated(const Worker *t, i64 task) { by_expert(t, task, t->code->A, 0, finish_gated); }
static void experts_down(const Worker *t, i64 task) { by_expert(t, task, 1, 2, finish_linear); }

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
    float factor = c->flags & NORMED ? c->scale / (sum + 1e-20f) : c->scale;
    for (i64 a = 0; a < c->A; a++) weight_A[a] *= factor;
}

/* The rows sorted by expert. */
static void sort_rows(const Instruction *c, Step *s) {
    i64 M = s->T * c->A, *start = s->start_E;
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

/* A task: some rows' experts and weights, kept in y if there is one. Whoever ends last sorts all rows. If FORETOLD,
 * they are left in y and nobody follows them. */
static void route(const Worker *t, i64 task) {
    const Instruction *c = t->code;
    Step *s = t->step;
    i64 start = task * ROUTED, end = least(start + ROUTED, s->T), foretold = c->flags & FORETOLD, guess_A[c->A];
    float unused_A[c->A];
    for (i64 row = start; row < end; row++) {
        i64 *expert_A = foretold ? guess_A : s->expert_M + row * c->A;
        route_row(c, (const float *)c->x + row * c->E, expert_A, foretold ? unused_A : s->weight_M + row * c->A);
        for (i64 a = 0; c->y && a < c->A; a++) ((int16_t *)c->y)[row * c->ys + a] = expert_A[a];
    }
    if (foretold || atomic_fetch_add(&s->routed, end - start) + end - start < s->T) return;
    s->routed = 0;
    sort_rows(c, s);
}

/* The row's next token. */
static void draw_next(const Worker *t, i64 row) {
    const Instruction *c = t->code;
    Step *s = t->step;
    i64 stream = s->stream_T[row];
    double *logprob = s->counted_S[stream] ? s->logprob_T + row : NULL;
    s->drawn_T[row] = draw((const float *)c->x + row * c->xs, c->N, s->temperature_S[stream], s->seed_S[stream],
                           s->position_T[row] + 1, logprob);
}

static void (*const KINDS[])(const Worker *, i64) = {
    embed, norm, linear, gated, keep_latent, keep_heads, attend_latent, attend_heads, logits, route, experts_gated,
    experts_down, weigh, draw_next,
};

static i64 tasks(const Instruction *c, const Step *s) {
    void (*kind)(const Worker *, i64) = KINDS[c->kind];
    if (kind == linear || kind == gated) return ceil_div(c->N, width(c, s)) * ceil_div(s->T, ROWS);
    if (kind == experts_gated || kind == experts_down) return s->n_busy * ceil_div(c->N, width(c, s));
    if (kind == attend_latent) return s->singles * ceil_div(c->H, together(s)) + s->chunks * c->H;
    if (kind == attend_heads) return s->singles * c->G * ceil_div(c->H / c->G, together(s)) + s->chunks * c->H;
    if (kind == logits) return ceil_div(c->E, 4);
    return kind == route ? ceil_div(s->T, ROUTED) : s->T;
}

typedef struct {
    _Atomic i64 next;
    char apart[56];
} Counter; /* of the tasks that were taken; a cache line each */

/* Where the weights of a task begin, the second matrix's if it has two; NULL where it has none. */
static const char *weights_of(const Instruction *c, const Step *s, i64 task, i64 second) {
    void (*kind)(const Worker *, i64) = KINDS[c->kind];
    if (!c->matrices) return NULL;
    i64 columns = width(c, s), blocks = ceil_div(c->N, columns);
    const Matrix *w = c->matrices;
    if (kind == experts_gated || kind == experts_down) w += 3 * s->busy_E[task / blocks];
    w += kind == experts_down ? 2 : second && c->stacked == 2;
    return w->codes ? (const char *)w->codes + task % blocks * columns * row_bytes(w->form, c->K) : NULL;
}

/* How a product's matrices are written. A mixture's experts are of one form, and some may not be there. */
static i64 form_of(const Instruction *c) {
    const Matrix *w = c->matrices + (KINDS[c->kind] == experts_down ? 2 : 0), *end = w + 3 * c->E;
    while (w + 3 < end && !w->codes) w += 3;
    return w->form;
}

/* Tasks that a thread takes at a time: small ones together, since the counter goes to and fro between the cores. */
static i64 taken_together(const Instruction *c, const Step *s, i64 count, i64 team) {
    if (!c->matrices || s->chunks) return 1;
    i64 bytes = width(c, s) * c->stacked * row_bytes(form_of(c), c->K);
    i64 n = least(TAKEN / bytes, count / (4 * team));
    return n > 1 ? n : 1;
}

/* What this thread asks for during a task: the weights of the one it will probably take next, of this instruction or
 * of one behind it, as far as experts are chosen; while the last row's are sorted, a guess. `batch` are those from
 * `first` on that it has taken. */
static void look_ahead(Worker *t, i64 task, i64 first, i64 batch, i64 count) {
    const Instruction *then = t->code;
    i64 next = task + 1;
    t->ahead[0] = t->ahead[1] = 0;
    if (next == first + batch || next == count) {
        i64 turn = first / batch + t->team, turns = ceil_div(count, batch);
        while (turn >= turns) {
            turn -= turns;
            if (++then == t->end || KINDS[then->kind] == route) return;
            count = then->matrices ? tasks(then, t->step) : 0;
            batch = taken_together(then, t->step, count, t->team);
            turns = ceil_div(count, batch);
        }
        next = turn * batch;
    }
    for (i64 i = 0; i < 2; i++) {
        const char *from = weights_of(t->code, t->step, task, i), *to = weights_of(then, t->step, next, i);
        if (from && to) t->ahead[i] = to - from;
    }
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

/* Bytes that panels and attention need on a thread, for tokens as far as `longest`: plan/fit.py foretells them, and
 * those below. */
i64 room_for(const Instruction *code, i64 n, const Step *s, i64 longest) {
    i64 bytes = TOGETHER * longest * sizeof(float);
    for (const Instruction *c = code; s->chunks && c < code + n; c++) {
        i64 panel = c->K * (PANEL + BLOCK) * sizeof(bf16) + (ceil_div(c->K, 32) + 1) * PANEL * sizeof(float);
        bytes = panel > bytes ? panel : bytes;
        int latent = KINDS[c->kind] == attend_latent;
        i64 K = latent ? c->N + c->R : c->K, V = latent ? c->V : c->K;
        if (!latent && KINDS[c->kind] != attend_heads) continue;
        i64 rebuilt = (s->T * K + longest * (K + V)) * sizeof(bf16) + forward_bytes(longest, K, V) + panel;
        bytes = rebuilt > bytes ? rebuilt : bytes;
    }
    return bytes;
}

/* Of an instruction's x: those of the step, or of its experts. */
static i64 rows_of_x(const Instruction *c, const Step *s) {
    return KINDS[c->kind] == experts_down ? s->T * c->A : s->T;
}

/* Bytes that a product's rows of x need on a thread, as codes meet them in either way; `rows` becomes the most. */
i64 room_for_arranged(const Instruction *code, i64 n, const Step *s, i64 *rows) {
    i64 most = *rows = 0;
    for (const Instruction *c = code; c < code + n; c++) {
        if (!c->matrices || form_of(c) == PLAIN) continue; /* bf16 meets rows of x as they are */
        i64 these = 2 * rows_of_x(c, s), bytes = these * arranged_bytes(c->K);
        most = bytes > most ? bytes : most;
        *rows = these > *rows ? these : *rows;
    }
    return most;
}

/* Run the instructions. Returns 1 where there is no memory for attention, 2 where an expert isn't in memory. */
int run_program(const Instruction *code, i64 n, Step *step, i64 threads) {
    i64 longest = 0;
    for (i64 row = 0; step->position_T && row < step->T; row++)
        longest = step->position_T[row] >= longest ? step->position_T[row] + 1 : longest;
    longest = ceil_div(longest, UNIT) * UNIT;
    i64 rows, in_arranged = room_for_arranged(code, n, step, &rows);
    i64 bytes = up(room_for(code, n, step, longest), 64), each = up(rows, 8);
    Counter *counters = calloc(n, sizeof(Counter));
    const Instruction **whose = calloc(threads * each + 1, sizeof(*whose));
    char *room = aligned_alloc(64, threads * (bytes + in_arranged) + 64);
    _Atomic i64 arrived = 0;
    step->absent = 0;
    if (!counters || !whose || !room) return free(counters), free(whose), free(room), 1;
#pragma omp parallel num_threads(threads)
    {
        i64 team = omp_get_num_threads();
        i64 me = omp_get_thread_num();
        char *mine = room + me * (bytes + in_arranged);
        Worker worker = {code, code + n, step, team, {0, 0}, longest, mine, mine + bytes, whose + me * each};
        for (i64 i = 0; i < n; i++, worker.code++) {
            i64 count = tasks(worker.code, step), batch = taken_together(worker.code, step, count, team), first;
            while ((first = atomic_fetch_add_explicit(&counters[i].next, batch, memory_order_relaxed)) < count)
                for (i64 task = first; task < least(first + batch, count); task++) {
                    look_ahead(&worker, task, first, batch, count);
                    KINDS[worker.code->kind](&worker, task);
                }
            if (worker.code->wait) meet(&arrived, team);
        }
    }
    free(counters);
    free(whose);
    free(room);
    return step->absent ? 2 : 0;
}

static int is_stop(const Step *s, i64 stream, i64 token) {
    for (i64 i = s->stop_at[stream]; i < s->stop_at[stream + 1]; i++)
        if (s->stops[i] == token) return 1;
    return 0;
}

/* Up to `steps` steps of rows that are streams of their own, each fed the token drawn in the one before; the program
 * ends with the draw. A stream that has drawn a stop, or all it may, leaves. Ends before a step that isn't finite.
 * Leaves tokens and log-probabilities [S, steps], the rows of `kept` behind them, and how many each stream has, taken
 * [S] (zeros at first). Returns what a step does that fails. */
int run_steps(const Instruction *code, i64 n, Step *s, i64 threads, i64 steps, i64 *tokens, double *logprobs,
              i64 *taken, const Kept *kept, i64 n_kept) {
    while (steps && s->T) {
        int failed = run_program(code, n, s, threads);
        if (failed) return failed;
        for (i64 row = 0; row < s->T; row++)
            if (s->drawn_T[row] < 0) return 0;
        i64 stay = 0;
        for (i64 row = 0; row < s->T; row++) {
            i64 stream = s->stream_T[row], token = s->drawn_T[row], at = stream * steps + taken[stream]++;
            tokens[at] = token;
            logprobs[at] = s->logprob_T[row];
            for (const Kept *k = kept; k < kept + n_kept; k++)
                memcpy(k->to + at * k->bytes, k->from + row * k->bytes, k->bytes);
            if (taken[stream] == s->left_S[stream] || is_stop(s, stream, token)) continue;
            i64 next = s->position_T[row] + 1;
            s->token_T[stay] = token;
            s->position_T[stay] = next;
            s->slot_T[stay] = s->table_SP[stream * s->P + next / UNIT] * UNIT + next % UNIT;
            s->stream_T[stay++] = stream;
        }
        s->T = s->singles = stay;
    }
    return 0;
}
