/* Many rows times weights in integers: 64 outputs' codes packed as they are, 4 of them a multiplication.
 *
 *     y = Σ_groups s a (Σ code q − zero Σ q)     x = a q
 *
 * q are 8-bit integers here, a = max |x| / 127 of a group of at most 128 inputs: the numbers of a chunk's rows are less
 * exact than those of rows alone, about as much as int8 weights are, and made at twice the speed of bf16's.
 */
#pragma once
#include "quantised.h"
#include "tiles.h"

#define SHARE 128 /* inputs with one scale, at most */

typedef struct { /* of a group of a row's inputs */
    float scale;
    int32_t start; /* −zero Σ q */
} Group;

INLINE i64 share_of(const Matrix *w) { return least(w->columns, SHARE); }
INLINE Group *groups_of(const Arranged *x) { return (Group *)(x + 1); }
INLINE int8_t *bytes_of(const Arranged *x, i64 K) { return (int8_t *)(groups_of(x) + up(ceil_div(K, 32), 8)); }

/* 8 bits for each of 16 numbers. */
INLINE __m128i narrowed(__m512 x, __m512 factor) {
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, factor)));
}

static void arrange_bytes(const bf16 *x, i64 K, const Matrix *w, Arranged *to) {
    i64 share = share_of(w), zero = w->form == INT8 ? 128 : 8;
    for (i64 k = 0, g = 0; k < K; k += share, g++) {
        i64 end = least(k + share, K);
        __m256i top = _mm256_setzero_si256(), unsign = _mm256_set1_epi16(0x7fff);
        for (i64 i = k; i < end; i += 16)
            top = _mm256_max_epu16(top, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(x + i)), unsign));
        float amax = widen(_mm512_reduce_max_epu32(_mm512_cvtepu16_epi32(top)));
        __m512 factor = _mm512_set1_ps(amax > 0x1p-100f && isfinite(amax) ? 127 / amax : 0);
        __m512i sum = _mm512_setzero_si512();
        for (i64 i = k; i < end; i += 16) {
            __m128i q = narrowed(load(x + i), factor);
            sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(q));
            _mm_storeu_si128((__m128i *)(bytes_of(to, K) + i), q);
        }
        groups_of(to)[g] = (Group){isfinite(amax) ? amax / 127 : NAN, -zero * _mm512_reduce_add_epi32(sum)};
    }
}

/* 16 rows of codes from n on, a byte each: where they lie, or in `room` [16, K]. */
static const void *bytes_of_codes(const Matrix *w, i64 n, i64 K, uint8_t *room) {
    const uint8_t *codes = (const uint8_t *)w->codes + n * row_bytes(w->form, K);
    if (w->form == INT8) return codes;
    for (i64 i = 0; i < BLOCK * K; i += 64) { /* rows of K/2 bytes follow each other */
        __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + i / 2)));
        both = _mm512_or_si512(both, _mm512_slli_epi16(both, 4));
        _mm512_storeu_si512(room + i, _mm512_and_si512(both, _mm512_set1_epi8(15)));
    }
    return room;
}

/* The scales of 16 outputs from n on, for each group of inputs: [groups, PANEL]. */
static void pack_scales(const Matrix *w, i64 n, i64 K, float *to) {
    i64 share = share_of(w), of_row = ceil_div(K, w->columns);
    for (i64 i = 0; i < BLOCK; i++)
        for (i64 k = 0, g = 0; k < K; k += share, g++)
            to[g * PANEL + i] = scale_at(w, w->scales, (n + i) * of_row + k / w->columns);
}

/* _mm512_dpbusd_epi32, whose sums GCC 12 copies through the stack: half the speed. */
INLINE __m512i dot4(__m512i sum, __m512i codes, __m512i q) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(q));
    return sum;
}

typedef struct { /* a group of inputs: 6 rows of x, a panel's piece, the scales of its outputs */
    const int8_t *q[MOST_ROWS];
    Group x[MOST_ROWS];
    const uint8_t *codes;
    const float *scales;
    i64 inputs;
} Piece;

/* tile[m] += 6 rows of a group times NV · 16 columns of a panel. */
INLINE void piece_product(const int NV, const Piece *p, float (*tile)[PANEL]) {
    __m512i acc[MOST_ROWS][4];
    for (int m = 0; m < MOST_ROWS; m++)
        for (int n = 0; n < NV; n++) acc[m][n] = _mm512_setzero_si512();
    for (i64 k = 0; k < p->inputs; k += 4) {
        __m512i w[4];
        for (int n = 0; n < NV; n++) w[n] = _mm512_loadu_si512(p->codes + k * PANEL + 64 * n);
        for (int m = 0; m < MOST_ROWS; m++) {
            int four;
            memcpy(&four, p->q[m] + k, 4);
            __m512i xm = _mm512_set1_epi32(four);
            for (int n = 0; n < NV; n++) acc[m][n] = dot4(acc[m][n], w[n], xm);
        }
    }
    for (int m = 0; m < MOST_ROWS; m++)
        for (int n = 0; n < NV; n++) {
            __m512 exact = _mm512_cvtepi32_ps(_mm512_add_epi32(acc[m][n], _mm512_set1_epi32(p->x[m].start)));
            __m512 s = _mm512_mul_ps(_mm512_loadu_ps(p->scales + 16 * n), _mm512_set1_ps(p->x[m].scale));
            _mm512_storeu_ps(tile[m] + 16 * n, _mm512_fmadd_ps(exact, s, _mm512_loadu_ps(tile[m] + 16 * n)));
        }
}
static void piece_1(const Piece *p, float (*tile)[PANEL]) { piece_product(1, p, tile); }
static void piece_2(const Piece *p, float (*tile)[PANEL]) { piece_product(2, p, tile); }
static void piece_3(const Piece *p, float (*tile)[PANEL]) { piece_product(3, p, tile); }
static void piece_4(const Piece *p, float (*tile)[PANEL]) { piece_product(4, p, tile); }

/* tile[m] = 6 rows of x times NV · 16 columns of a panel. */
static void integer_panels(i64 NV, const Arranged *const *x, const uint8_t *panel, const float *scales, i64 share,
                           i64 K, float (*tile)[PANEL]) {
    static void (*const BY_WIDTH[])(const Piece *, float (*)[PANEL]) = {piece_1, piece_2, piece_3, piece_4};
    memset(tile, 0, MOST_ROWS * sizeof(*tile));
    for (i64 k = 0, g = 0; k < K; k += share, g++) {
        Piece p = {.codes = panel + k * PANEL, .scales = scales + g * PANEL, .inputs = least(share, K - k)};
        for (int m = 0; m < MOST_ROWS; m++) p.q[m] = bytes_of(x[m], K) + k, p.x[m] = groups_of(x[m])[g];
        BY_WIDTH[NV - 1](&p, tile);
    }
}
