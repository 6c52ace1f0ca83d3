/* Products of blocks of rows with stacked matrices, as training needs them: y = x Wᵀ, dx = dy W and dW = dyᵀ x.
 *
 * Block e, rows starts[e] to starts[e + 1], meets matrix e; a plain product is one block. A task packs 64 columns of
 * its right-hand side (panels.h) and streams rows past them, six at a time, with all sums in registers. So small
 * products of any number of rows run near the processor's peak. Inner dimensions and columns are multiples of 16.
 */
#include "panels.h"
#include <omp.h>

#define TOGETHER 384 /* rows that a packed panel serves before the next task */
#define INNER 256    /* rows that a matrix's gradient sums at a time */
#define OUTPUTS 192  /* of its own rows, a task */

/* MR rows by NV vectors of A · B, in bf16 into C, or onto C's sums in fp32 if `add`. A's pairs lie `row` apart between
 * rows and `step` along the inner dimension. */
INLINE void block(const int MR, const int NV, const int add, const bf16 *A, i64 row, i64 step, const bf16 *B, void *C,
                  i64 ldc, i64 inner) {
    __m512 acc[MOST_ROWS][4];
    float *sums = C;
    for (int r = 0; r < MR; r++)
        for (int n = 0; n < NV; n++) acc[r][n] = add ? _mm512_loadu_ps(sums + r * ldc + 16 * n) : _mm512_setzero_ps();
    for (i64 k = 0; k < inner; k += 2, A += step, B += 2 * PANEL) {
        __m512bh b[4];
        for (int n = 0; n < NV; n++) b[n] = pairs(B + 32 * n);
        for (int r = 0; r < MR; r++) {
            int pair;
            memcpy(&pair, A + r * row, 4);
            for (int n = 0; n < NV; n++)
                acc[r][n] = _mm512_dpbf16_ps(acc[r][n], (__m512bh)_mm512_set1_epi32(pair), b[n]);
        }
    }
    for (int r = 0; r < MR; r++)
        for (int n = 0; n < NV; n++)
            if (add)
                _mm512_storeu_ps(sums + r * ldc + 16 * n, acc[r][n]);
            else
                store((bf16 *)C + r * ldc + 16 * n, acc[r][n]);
}

#define OF_ROWS(NV)                                                                                                    \
    switch (rows) {                                                                                                    \
    case 1: return block(1, NV, add, A, row, step, B, C, ldc, inner);                                                 \
    case 2: return block(2, NV, add, A, row, step, B, C, ldc, inner);                                                 \
    case 3: return block(3, NV, add, A, row, step, B, C, ldc, inner);                                                 \
    case 4: return block(4, NV, add, A, row, step, B, C, ldc, inner);                                                 \
    case 5: return block(5, NV, add, A, row, step, B, C, ldc, inner);                                                 \
    default: return block(6, NV, add, A, row, step, B, C, ldc, inner);                                                \
    }

INLINE void blocks(i64 rows, i64 NV, const int add, const bf16 *A, i64 row, i64 step, const bf16 *B, void *C, i64 ldc,
                   i64 inner) {
    switch (NV) {
    case 1: OF_ROWS(1)
    case 2: OF_ROWS(2)
    case 3: OF_ROWS(3)
    default: OF_ROWS(4)
    }
}

static char *rooms(i64 bytes) { return aligned_alloc(64, bytes * omp_get_max_threads()); }

/* Which block task `at` falls into, when block e has tasks first[e] to first[e + 1]. */
static i64 block_of(const i64 *first, i64 E, i64 at) {
    i64 low = 0, high = E;
    while (high - low > 1) {
        i64 middle = (low + high) / 2;
        if (first[middle] <= at) low = middle;
        else high = middle;
    }
    return low;
}

/* y [M, N] = x [M, K], rows xs apart, times matrix e of w [E, N, K] transposed, or of w [E, K, N] if `as_stored`.
 * Gives 0, or 1 where memory ran out. */
int grouped_rows(const bf16 *x, i64 xs, const bf16 *w, int64_t as_stored, const i64 *starts, i64 E, i64 K, i64 N,
                 bf16 *y) {
    i64 panels = ceil_div(N, PANEL), bytes = 2 * PANEL * K;
    i64 *first = malloc((E + 1) * sizeof(i64));
    char *memory = rooms(bytes);
    if (!first || !memory) return free(first), free(memory), 1;
    first[0] = 0;
    for (i64 e = 0; e < E; e++) first[e + 1] = first[e] + panels * ceil_div(starts[e + 1] - starts[e], TOGETHER);
#pragma omp parallel for schedule(dynamic)
    for (i64 task = 0; task < first[E]; task++) {
        i64 e = block_of(first, E, task), at = task - first[e], n = at % panels * PANEL;
        i64 start = starts[e] + at / panels * TOGETHER, end = least(start + TOGETHER, starts[e + 1]);
        i64 columns = least(PANEL, N - n);
        bf16 *panel = (bf16 *)(memory + omp_get_thread_num() * bytes);
        if (as_stored)
            pack_pairs(w + e * K * N + n, N, K, columns, panel, PANEL);
        else
            for (i64 j = 0; j < columns; j += 16) pack(w + (e * N + n + j) * K, K / 2, panel + 2 * j);
        for (i64 r = start; r < end; r += MOST_ROWS)
            blocks(least(MOST_ROWS, end - r), columns / 16, 0, x + r * xs, xs, 2, panel, y + r * N + n, N, K);
    }
    free(first);
    free(memory);
    return 0;
}

/* dw [E, N, K] = dyᵀ x over each block's rows: dy [M, N] and x [M, K], rows ds and xs apart. Zero without rows. */
int grouped_matrices(const bf16 *dy, i64 ds, const bf16 *x, i64 xs, const i64 *starts, i64 E, i64 N, i64 K, bf16 *dw) {
    i64 panels = ceil_div(K, PANEL), parts = ceil_div(N, OUTPUTS), wide = least(N, OUTPUTS);
    i64 packed = 2 * INNER * (PANEL + wide), bytes = packed + 4 * PANEL * wide;
    char *memory = rooms(bytes);
    if (!memory) return 1;
#pragma omp parallel for schedule(dynamic)
    for (i64 task = 0; task < E * panels * parts; task++) {
        i64 e = task / (panels * parts), k = task / parts % panels * PANEL, n = task % parts * OUTPUTS;
        i64 outputs = least(OUTPUTS, N - n), columns = least(PANEL, K - k);
        bf16 *panel = (bf16 *)(memory + omp_get_thread_num() * bytes), *rows = panel + INNER * PANEL;
        float *sums = (float *)((char *)panel + packed);
        bf16 *to = dw + (e * N + n) * K + k;
        memset(sums, 0, 4 * PANEL * wide);
        for (i64 m = starts[e]; m < starts[e + 1]; m += INNER) {
            i64 inner = least(INNER, starts[e + 1] - m);
            pack_pairs(x + m * xs + k, xs, inner, columns, panel, PANEL);
            pack_pairs(dy + m * ds + n, ds, inner, outputs, rows, outputs);
            for (i64 r = 0; r < outputs; r += MOST_ROWS)
                blocks(least(MOST_ROWS, outputs - r), columns / 16, 1, rows + 2 * r, 2, 2 * outputs, panel,
                       sums + r * PANEL, PANEL, inner);
        }
        for (i64 r = 0; r < outputs; r++)
            for (i64 j = 0; j < columns; j += 16) store(to + r * K + j, _mm512_loadu_ps(sums + r * PANEL + j));
    }
    free(memory);
    return 0;
}
