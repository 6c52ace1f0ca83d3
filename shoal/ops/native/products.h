/* Products of rows with weights as checkpoints store them [outputs, K]: few rows by dot products over fresh weights,
 * many by panels of packed ones.
 */
#pragma once
#include "integers.h"

#define MANY 24 /* rows for which packing a panel pays */

/* tile[m] = M rows of x times NV · 16 columns of a panel. */
static void panel_products(i64 M, i64 NV, const bf16 *const *x, const bf16 *panel, i64 K, float (*tile)[PANEL]) {
    panel_product(M, NV, WRITE, x, 2, panel, K, tile, PANEL);
}

/* 16 rows of w from n on in bf16: where they lie, or in `room` [16, K]. */
static const bf16 *plain(const Matrix *w, i64 n, i64 K, bf16 *room) {
    if (w->form == PLAIN) return (const bf16 *)w->codes + n * K;
    for (i64 i = 0; i < BLOCK; i++)
        for (i64 k = 0; k < K; k += 16) store(room + i * K + k, dequantised(w, n + i, k, K));
    return room;
}

/* A row of an instruction's x for codes, made by this thread when it first meets it: for dots or for panels. */
static const Arranged *arranged(const Worker *t, const Matrix *w, i64 row, i64 many) {
    const Instruction *c = t->code;
    i64 at = 2 * row + many;
    Arranged *to = (Arranged *)(t->arranged + at * arranged_bytes(c->K));
    if (t->whose[at] != c) (many ? arrange_bytes : arrange)((const bf16 *)c->x + row * c->xs, c->K, w, to);
    t->whose[at] = c;
    return to;
}

typedef struct { /* of x, from start to end: by index / divide where there is an index */
    const i64 *index;
    i64 divide, start, end;
} Rows;

INLINE i64 row_of(Rows r, i64 at) { return r.index ? r.index[at] / r.divide : at; }

/* Pointers to up to `most` rows from `row` on; the last is repeated so that there are as many. */
INLINE i64 take(const Instruction *c, Rows r, i64 row, i64 most, const bf16 **xs) {
    i64 M = least(r.end - row, most);
    for (i64 m = 0; m < most; m++) xs[m] = (const bf16 *)c->x + row_of(r, row + least(m, M - 1)) * c->xs;
    return M;
}

/* tile[m] = up to 4 rows of x times 16 outputs of a matrix from n on. */
INLINE i64 few_products(const Worker *t, Rows r, i64 row, const Matrix *w, i64 n, i64 ahead, float (*tile)[PANEL]) {
    const Instruction *c = t->code;
    const bf16 *xs[4];
    const Arranged *as[4];
    i64 M = least(r.end - row, 4);
    if (w->form == PLAIN) {
        take(c, r, row, 4, xs);
        products(M, row == r.start, xs, (const bf16 *)w->codes + n * c->K, c->K, ahead, tile);
    } else {
        for (i64 m = 0; m < 4; m++) as[m] = arranged(t, w, row_of(r, row + least(m, M - 1)), 0);
        quantised_products(M, as, w, n, c->K, ahead, tile);
    }
    return M;
}

/* Outputs from n on as columns of a panel, and their scales; behind those is room for 16 rows. */
static void pack_columns(const Matrix *w, int integers, i64 n, i64 columns, i64 K, char *panel, float *scales) {
    char *room = (char *)(scales + ceil_div(K, 32) * PANEL);
    for (i64 j = 0; j < columns; j += BLOCK) {
        if (integers) {
            pack(bytes_of_codes(w, n + j, K, (uint8_t *)room), K / 4, panel + 4 * j);
            pack_scales(w, n + j, K, scales + j);
        } else {
            pack(plain(w, n + j, K, (bf16 *)room), K / 2, panel + 4 * j);
        }
    }
}

typedef void Finish(const Instruction *c, i64 row, i64 n, i64 columns, const float *products, const float *others);

/* Rows of x times `columns` outputs from n on, of a matrix or of two. A row's products go to `finish`.
 * Many rows at a time go by a panel of packed weights, without the sums across lanes. */
INLINE void multiply(const Worker *t, Rows r, i64 panel_from, const Matrix *w, i64 n, i64 columns, Finish finish) {
    const Instruction *c = t->code;
    float tile[MOST_ROWS][PANEL];
    const bf16 *xs[MOST_ROWS];
    const Arranged *as[MOST_ROWS];
    i64 two = c->stacked == 2, K = c->K, exact = r.end - panel_from < MANY ? r.end : panel_from;
    Rows before = {r.index, r.divide, r.start, exact};
    for (i64 j = 0; j < columns; j += BLOCK)
        for (i64 row = r.start; row < exact; row += 4) {
            i64 M = few_products(t, before, row, w, n + j, t->ahead[0], tile);
            if (two) few_products(t, before, row, w + 1, n + j, t->ahead[1], (float(*)[PANEL])(tile[0] + BLOCK));
            for (i64 m = 0; m < M; m++)
                finish(c, r.index ? r.index[row + m] : row + m, n + j, BLOCK, tile[m], tile[m] + BLOCK);
        }
    if (exact == r.end) return;
    const int integers = w->form > FP8 && !w->least && !(two && w[1].least);
    char *panel = t->room;
    float *scales = (float *)(panel + 2 * PANEL * K);
    for (i64 i = 0, at = 0; i <= two; i++, at += columns)
        pack_columns(w + i, integers, n, columns, K, panel + 4 * at, scales + at);
    /* While these outputs are computed, the weights of this thread's next ones are asked for, slice by slice. */
    i64 row_of_w = row_bytes(w->form, K), bytes = columns * row_of_w, NV = (two + 1) * columns / BLOCK;
    i64 slice = bytes / ceil_div(r.end - exact, MOST_ROWS) + 64;
    const char *ahead = (const char *)w->codes + n * row_of_w + t->ahead[0];
    const char *ahead2 = two ? (const char *)w[1].codes + n * row_of_w + t->ahead[1] : NULL;
    for (i64 row = exact; row < r.end; row += MOST_ROWS) {
        i64 M = least(r.end - row, MOST_ROWS);
        for (i64 b = 0; b < slice; b += 64) {
            _mm_prefetch(ahead + b, _MM_HINT_T1);
            if (ahead2) _mm_prefetch(ahead2 + b, _MM_HINT_T1);
        }
        ahead += slice;
        if (ahead2) ahead2 += slice;
        if (integers) {
            for (i64 m = 0; m < MOST_ROWS; m++) as[m] = arranged(t, w, row_of(r, row + least(m, M - 1)), 1);
            integer_panels(NV, as, (uint8_t *)panel, scales, share_of(w), K, tile);
        } else {
            take(c, r, row, M, xs);
            panel_products(M, NV, xs, (bf16 *)panel, K, tile);
        }
        for (i64 m = 0; m < M; m++)
            finish(c, r.index ? r.index[row + m] : row + m, n, columns, tile[m], tile[m] + columns);
    }
}
