/* Products of blocks of rows with stacked matrices, as training needs them: y = x Wᵀ, dx = dy W and dW = dyᵀ x.
 *
 * Block e, rows starts[e] to starts[e + 1], meets matrix e; a plain product is one block. A task packs 64 columns of
 * its right-hand side (panels.h) and streams rows past them, six at a time, with all sums in registers. So small
 * products of any number of rows run near the processor's peak. Inner dimensions and columns are multiples of 16.
 */
#include "panels.h"

#define TOGETHER 384 /* rows that a packed panel serves before the next task */
#define INNER 256    /* rows that a matrix's gradient sums at a time */
#define OUTPUTS 192  /* of its own rows, a task */

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
int grouped_rows(const bf16 *x, i64 xs, const bf16 *w, i64 as_stored, const i64 *starts, i64 E, i64 K, i64 N,
                 bf16 *y) {
    i64 panels = ceil_div(N, PANEL), bytes = 2 * PANEL * K;
    i64 *first = malloc((E + 1) * sizeof(i64));
    char *memory = pieces(bytes);
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
        for (i64 r = start; r < end; r += MOST_ROWS) {
            i64 M = least(MOST_ROWS, end - r);
            const bf16 *A[MOST_ROWS];
            for (i64 m = 0; m < M; m++) A[m] = x + (r + m) * xs;
            panel_product(M, columns / 16, ROUND, A, 2, panel, K, y + r * N + n, N);
        }
    }
    free(first);
    free(memory);
    return 0;
}

/* dw [E, N, K] = dyᵀ x over each block's rows: dy [M, N] and x [M, K], rows ds and xs apart. Zero without rows. */
int grouped_matrices(const bf16 *dy, i64 ds, const bf16 *x, i64 xs, const i64 *starts, i64 E, i64 N, i64 K, bf16 *dw) {
    i64 panels = ceil_div(K, PANEL), parts = ceil_div(N, OUTPUTS), wide = least(N, OUTPUTS);
    i64 packed = 2 * INNER * (PANEL + wide), bytes = packed + 4 * PANEL * wide;
    char *memory = pieces(bytes);
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
            for (i64 r = 0; r < outputs; r += MOST_ROWS) {
                i64 M = least(MOST_ROWS, outputs - r);
                const bf16 *A[MOST_ROWS];
                for (i64 j = 0; j < M; j++) A[j] = rows + 2 * (r + j);
                panel_product(M, columns / 16, ADD_TO, A, 2 * outputs, panel, inner, sums + r * PANEL, PANEL);
            }
        }
        for (i64 r = 0; r < outputs; r++)
            for (i64 j = 0; j < columns; j += 16) store(to + r * K + j, _mm512_loadu_ps(sums + r * PANEL + j));
    }
    free(memory);
    return 0;
}
