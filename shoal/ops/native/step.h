/* What an instruction of program.c is, and what a step brings it. */
#pragma once
#include "tiles.h"
#include <stdatomic.h>

enum { PLAIN, FP8, INT8, INT4 }; /* how numbers are written; PLAIN is bf16 */

typedef struct { /* [outputs, K] where it lies now, codes NULL where it isn't in memory; the same in ops/program.py */
    const void *codes, *scales, *least; /* ops/quant.py; least may be NULL */
    i64 form, rows, columns, half;      /* of a block with one scale; half: integers' scales are fp16 and not bf16 */
} Matrix;

typedef struct { /* the same in ops/program.py */
    i64 kind, wait;
    const void *x, *w, *w2, *bias;
    const Matrix *matrices; /* of a product; gate, up and down of one expert after the other */
    void *y, *kept, *kept2;
    i64 xs, ys; /* from row to row of x and y */
    i64 N, K, H, G, R, V, E, A, stacked, groups, best_groups, flags; /* stacked: weights that make an output */
    float eps, scale;
} Instruction;

enum { SIGMOID = 1, NORMED = 2, WIDE = 4, ADD = 8, FORETOLD = 16 }; /* flags, likewise */

typedef struct { /* what a step brings, and room for what its routers choose */
    i64 T, P, singles, chunks; /* the first rows attend one by one, those behind them in chunks of one stream each */
    const i64 *chunk_at; /* [chunks + 1]: first rows, and T */
    i64 *token_T, *position_T, *slot_T;
    i64 *stream_T;
    const i64 *table_SP;
    const float *cos, *sin; /* [positions, R/2] */
    i64 *expert_M, *row_M, *busy_E, *start_E; /* M = T·A; rows sorted by expert, the experts that have any */
    float *weight_M;
    i64 n_busy;
    _Atomic i64 routed, absent; /* rows whose experts are chosen; whether one of these wasn't in its place */
    /* How each stream's tokens are drawn, how many it may have, and its stops: from stop_at[i] on, up to the next's. */
    const float *temperature_S;
    const uint64_t *seed_S;
    const i64 *counted_S, *left_S, *stop_at, *stops; /* counted: whether the log-probability is wanted */
    i64 *drawn_T;
    double *logprob_T;
} Step;

typedef struct { /* a buffer with a row for each of the step's, of which every step's are wanted */
    const char *from;
    char *to;
    i64 bytes; /* of a row */
} Kept;

typedef struct {
    const Instruction *code, *end;
    Step *step;
    i64 team;        /* threads */
    i64 ahead[2];    /* bytes from a task's weights, and from up's beside gate's, to those asked for meanwhile */
    i64 longest;     /* tokens that any row sees */
    char *room;      /* this thread's own, for panels and attention */
    char *arranged;  /* and for rows of x as codes meet them (quantised.h), */
    const Instruction **whose; /* made for these instructions */
} Worker;

/* As a bf16 that was written and read again. */
INLINE __m512 rounded(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

/* y = x / rms(x) · w */
INLINE void normed(const bf16 *x, const float *w, i64 K, float eps, bf16 *y) {
    __m512 squares = _mm512_setzero_ps();
    for (i64 k = 0; k < K; k += 16) squares = _mm512_fmadd_ps(load(x + k), load(x + k), squares);
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / K + eps));
    for (i64 k = 0; k < K; k += 16)
        store(y + k, _mm512_mul_ps(_mm512_mul_ps(load(x + k), scale), _mm512_loadu_ps(w + k)));
}
