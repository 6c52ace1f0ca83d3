/* Few rows times weights in few bits (ops/quant.py), which are read as they lie, a line of 64 bytes at a time; the line
 * `ahead` bytes further is asked for meanwhile.
 *
 *     fp8          y = Σ_blocks s Σ w x               codes become bf16 by table, exactly
 *     int8, int4   y = a (Σ_groups s Σ code q + z Σ q)    with x = a q, z = −128 s, −8 s or the least number
 *
 * q are 16-bit integers, a = max |x| / 32767 a row: a number moves by 2^-16 of the largest, so a sum of K by less than
 * bf16 then rounds it, up to K = 16,384 and whatever stands out. Sums over a line are exact integers, those over lines
 * fp32 in an order that depends on the row alone.
 */
#pragma once
#include "dots.h"

/* Inputs in a line of codes, and bytes of a row of K. */
INLINE i64 line_of(const int form) { return form == INT4 ? 128 : 64; }
INLINE i64 row_bytes(i64 form, i64 K) { return form == PLAIN ? 2 * K : form == INT4 ? K / 2 : K; }

typedef struct { /* a row of x as codes meet it; behind it `numbers`, then `sums` */
    float scale;
    char apart[60];
} Arranged;

INLINE int16_t *numbers_of(const Arranged *x) { return (int16_t *)(x + 1); }                  /* [K], in lines */
INLINE float *sums_of(const Arranged *x, i64 K) { return (float *)(numbers_of(x) + ceil_div(K, 128) * 128); }
static i64 arranged_bytes(i64 K) { return sizeof(Arranged) + ceil_div(K, 128) * 256 + ceil_div(K, 512) * 64; }

/* The numbers of two vectors of words, every second one. */
INLINE __m512i evens(__m512i a, __m512i b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)), _mm512_cvtepi32_epi16(b), 1);
}
INLINE __m512i odds(__m512i a, __m512i b) { return evens(_mm512_srli_epi32(a, 16), _mm512_srli_epi32(b, 16)); }

/* 128 numbers as lines want them: int8's words hold neighbours, int4's four of them; bytes that become words by
 * unpacking are the first and the second halves of 16. */
INLINE void in_lines(const i64 form, const __m512i *v, int16_t *to) {
    __m512i out[4];
    if (form == FP8)
        for (int i = 0; i < 4; i += 2) {
            __m512i halves = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13);
            out[i] = _mm512_permutex2var_epi64(v[i], halves, v[i + 1]);
            halves = _mm512_add_epi64(halves, _mm512_set1_epi64(2));
            out[i + 1] = _mm512_permutex2var_epi64(v[i], halves, v[i + 1]);
        }
    else
        for (int i = 0; i < 4; i += 2) out[i] = evens(v[i], v[i + 1]), out[i + 1] = odds(v[i], v[i + 1]);
    if (form == INT4) {
        __m512i even[2] = {out[0], out[2]}, odd[2] = {out[1], out[3]};
        out[0] = evens(even[0], even[1]), out[1] = evens(odd[0], odd[1]);
        out[2] = odds(even[0], even[1]), out[3] = odds(odd[0], odd[1]);
    }
    for (int i = 0; i < 4; i++) _mm512_storeu_si512(to + 32 * i, out[i]);
}

/* 32 numbers of a row from k on, zero behind its end. */
INLINE __m512i words(const bf16 *x, i64 k, i64 K) {
    return _mm512_maskz_loadu_epi16(K - k >= 32 ? ~0u : K <= k ? 0 : (1u << (K - k)) - 1, x + k);
}

INLINE __m512i fixed(__m512i x, __m512 factor) {
    __m512i low = _mm512_slli_epi32(x, 16), high = _mm512_and_si512(x, _mm512_set1_epi32(0xffff0000));
    low = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)low, factor));
    high = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)high, factor));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16));
}

static void arrange(const bf16 *x, i64 K, const Matrix *w, Arranged *to) {
    i64 form = w->form, group = w->columns, groups = ceil_div(K, group);
    float *sums = sums_of(to, K), inverse = 0;
    if (form != FP8) {
        __m512i top = _mm512_setzero_si512();
        for (i64 k = 0; k < K; k += 32)
            top = _mm512_max_epu16(top, _mm512_and_si512(words(x, k, K), _mm512_set1_epi16(0x7fff)));
        top = _mm512_max_epu16(top, _mm512_srli_epi32(top, 16));
        float amax = widen(_mm512_reduce_max_epu32(_mm512_and_si512(top, _mm512_set1_epi32(0xffff))));
        to->scale = isfinite(amax) ? amax / 32767 : NAN;
        inverse = amax > 0x1p-100f && isfinite(amax) ? 32767 / amax : 0;
        memset(sums, 0, ceil_div(groups, 16) * 64);
    }
    for (i64 k = 0; k < K; k += 128) {
        __m512i v[4];
        for (int i = 0; i < 4; i++) {
            v[i] = words(x, k + 32 * i, K);
            if (form == FP8 || k + 32 * i >= K) continue;
            v[i] = fixed(v[i], _mm512_set1_ps(inverse));
            __m512i all = _mm512_dpwssd_epi32(_mm512_setzero_si512(), v[i], _mm512_set1_epi16(1));
            sums[(k + 32 * i) / group] += _mm512_reduce_add_epi32(all);
        }
        in_lines(form, v, numbers_of(to) + k);
    }
}

/* E4M3's magnitudes as bf16: high and low bytes. */
static uint8_t FP8_BYTES[2][128];
__attribute__((constructor)) static void tabulate(void) {
    for (int code = 0; code < 128; code++) {
        float x = code == 127 ? NAN : code < 8 ? ldexpf(code, -9) : ldexpf(8 + code % 8, code / 8 - 10);
        uint32_t bits;
        memcpy(&bits, &x, 4);
        FP8_BYTES[0][code] = bits >> 24, FP8_BYTES[1][code] = bits >> 16;
    }
}

/* A line of codes, of which `valid` bytes are there, as words: bf16, or integers from zero. */
INLINE void unpack(const int form, const uint8_t *codes, i64 valid, __m512i *v) {
    __m512i line = valid >= 64 ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi8((1ull << valid) - 1, codes);
    const __m512i nibble = _mm512_set1_epi16(15);
    if (form == FP8) {
        __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(FP8_BYTES[0]), line,
                                                _mm512_loadu_si512(FP8_BYTES[0] + 64));
        __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(FP8_BYTES[1]), line,
                                               _mm512_loadu_si512(FP8_BYTES[1] + 64));
        high = _mm512_ternarylogic_epi32(high, line, _mm512_set1_epi8(0x80), 0xf8); /* high | line & sign */
        v[0] = _mm512_unpacklo_epi8(low, high), v[1] = _mm512_unpackhi_epi8(low, high);
    } else if (form == INT8) {
        v[0] = _mm512_and_si512(line, _mm512_set1_epi16(255)), v[1] = _mm512_srli_epi16(line, 8);
    } else {
        v[0] = _mm512_and_si512(line, nibble), v[1] = _mm512_and_si512(_mm512_srli_epi16(line, 4), nibble);
        v[2] = _mm512_and_si512(_mm512_srli_epi16(line, 8), nibble), v[3] = _mm512_srli_epi16(line, 12);
    }
}

INLINE float scale_at(const Matrix *w, const void *from, i64 at) {
    if (w->form == FP8) return ((const float *)from)[at];
    uint16_t x = ((const uint16_t *)from)[at];
    return w->half ? _cvtsh_ss(x) : widen(x);
}

/* 16 numbers of a row from k on, which share a block. */
INLINE __m512 dequantised(const Matrix *w, i64 n, i64 k, i64 K) {
    const uint8_t *codes = (const uint8_t *)w->codes + n * row_bytes(w->form, K);
    i64 block = n / w->rows * ceil_div(K, w->columns) + k / w->columns;
    __m512 scale = _mm512_set1_ps(scale_at(w, w->scales, block)), least = _mm512_setzero_ps();
    __m512i x;
    if (w->form == FP8) {
        __m256i code = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(codes + k)));
        __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi16(127));
        __m256i half = _mm256_or_si256(_mm256_slli_epi16(magnitude, 7),
                                       _mm256_slli_epi16(_mm256_andnot_si256(_mm256_set1_epi16(127), code), 8));
        half = _mm256_mask_mov_epi16(half, _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(127)),
                                     _mm256_set1_epi16(0x7e00));
        return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256)), scale);
    }
    if (w->form == INT8) {
        x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + k)));
        x = _mm512_sub_epi32(x, _mm512_set1_epi32(128));
    } else {
        __m128i both = _mm_loadl_epi64((const __m128i *)(codes + k / 2)), low = _mm_set1_epi8(15);
        both = _mm_unpacklo_epi8(_mm_and_si128(both, low), _mm_and_si128(_mm_srli_epi16(both, 4), low));
        x = _mm512_cvtepu8_epi32(both);
        if (w->least) least = _mm512_set1_ps(scale_at(w, w->least, block));
        else x = _mm512_sub_epi32(x, _mm512_set1_epi32(8));
    }
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), scale, least);
}

/* Up to 16 scales of groups, from `at` on. */
INLINE __m512 scales_of(const Matrix *w, const void *from, i64 at, i64 n) {
    __m256i x = _mm256_maskz_loadu_epi16(n >= 16 ? 0xffff : (1u << n) - 1, (const uint16_t *)from + at);
    return w->half ? _mm512_cvtph_ps(x) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

/* total[m] = Σ over lanes, MR rows of x times row n of w: integers. */
INLINE void integer_dot(const int form, const int MR, const Arranged *const *x, const Matrix *w, i64 n, i64 K,
                        i64 ahead, __m512 *total) {
    const i64 L = line_of(form), bytes = row_bytes(form, K), groups = ceil_div(K, w->columns);
    const uint8_t *codes = (const uint8_t *)w->codes + n * bytes;
    const int log = w->columns == K ? 31 : __builtin_ctzll(w->columns);
    const __m128i shift = _mm_cvtsi64_si128(log);
    const __m512i lane = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32(L / 16));
    const int one = w->columns >= L; /* scale for all of a line */
    __m512 sum[4];
    for (int m = 0; m < MR; m++) sum[m] = _mm512_setzero_ps();
    for (i64 g = 0; g < groups; g += 16) {
        float each[16];
        __m512 s = scales_of(w, w->scales, n * groups + g, groups - g);
        __m512 z = w->least ? scales_of(w, w->least, n * groups + g, groups - g)
                            : _mm512_mul_ps(s, _mm512_set1_ps(form == INT8 ? -128 : -8));
        for (int m = 0; m < MR; m++) sum[m] = _mm512_fmadd_ps(z, _mm512_loadu_ps(sums_of(x[m], K) + g), sum[m]);
        if (one) _mm512_storeu_ps(each, s);
        for (i64 k = g * w->columns, end = least(K, (g + 16) * w->columns); k < end; k += L) {
            __m512i v[4], at = _mm512_srl_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(k)), shift);
            const uint8_t *line = codes + (form == INT4 ? k / 2 : k);
            unpack(form, line, form == INT4 ? (K - k) / 2 : K - k, v);
            _mm_prefetch((const char *)line + ahead, _MM_HINT_T1);
            __m512 scale = one ? _mm512_set1_ps(each[(k >> log) - g]) : _mm512_permutexvar_ps(at, s);
            for (int m = 0; m < MR; m++) {
                __m512i exact = _mm512_setzero_si512();
                for (int i = 0; i < L / 32; i++)
                    exact = _mm512_dpwssd_epi32(exact, _mm512_loadu_si512(numbers_of(x[m]) + k + 32 * i), v[i]);
                sum[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scale, sum[m]);
            }
        }
    }
    for (int m = 0; m < MR; m++) total[m * BLOCK] = sum[m];
}

/* The same in fp8. */
INLINE void fp8_dot(const int MR, const Arranged *const *x, const Matrix *w, i64 n, i64 K, i64 ahead, __m512 *total) {
    const uint8_t *codes = (const uint8_t *)w->codes + n * K;
    const float *scale = (const float *)w->scales + n / w->rows * ceil_div(K, w->columns);
    __m512 sum[4];
    for (int m = 0; m < MR; m++) sum[m] = _mm512_setzero_ps();
    for (i64 block = 0; block < K; block += w->columns, scale++) {
        __m512 part[4];
        for (int m = 0; m < MR; m++) part[m] = _mm512_setzero_ps();
        for (i64 k = block, end = least(K, block + w->columns); k < end; k += 64) {
            __m512i v[2];
            unpack(FP8, codes + k, K - k, v);
            _mm_prefetch((const char *)codes + k + ahead, _MM_HINT_T1);
            for (int m = 0; m < MR; m++)
                for (int i = 0; i < 2; i++)
                    part[m] = _mm512_dpbf16_ps(part[m], (__m512bh)_mm512_loadu_si512(numbers_of(x[m]) + k + 32 * i),
                                               (__m512bh)v[i]);
        }
        for (int m = 0; m < MR; m++) sum[m] = _mm512_fmadd_ps(part[m], _mm512_set1_ps(*scale), sum[m]);
    }
    for (int m = 0; m < MR; m++) total[m * BLOCK] = sum[m];
}

/* tile[m] = MR rows of x times 16 rows of w from n on. */
INLINE void quantised_dots(const int form, const int MR, const Arranged *const *x, const Matrix *w, i64 n, i64 K,
                           i64 ahead, float (*tile)[PANEL]) {
    __m512 total[4 * BLOCK];
    for (i64 i = 0; i < BLOCK; i++)
        form == FP8 ? fp8_dot(MR, x, w, n + i, K, ahead, total + i)
                    : integer_dot(form, MR, x, w, n + i, K, ahead, total + i);
    for (int m = 0; m < MR; m++) {
        __m512 y = sums(total + m * BLOCK);
        _mm512_storeu_ps(tile[m], form == FP8 ? y : _mm512_mul_ps(y, _mm512_set1_ps(x[m]->scale)));
    }
}

/* Up to 4 rows. The order of a sum doesn't depend on how many there are. */
static void quantised_products(i64 M, const Arranged *const *x, const Matrix *w, i64 n, i64 K, i64 ahead,
                               float (*tile)[PANEL]) {
    switch (w->form * 4 + (M > 2 ? 3 : M)) {
    case FP8 * 4 + 1: return quantised_dots(FP8, 1, x, w, n, K, ahead, tile);
    case FP8 * 4 + 2: return quantised_dots(FP8, 2, x, w, n, K, ahead, tile);
    case FP8 * 4 + 3: return quantised_dots(FP8, 4, x, w, n, K, ahead, tile);
    case INT8 * 4 + 1: return quantised_dots(INT8, 1, x, w, n, K, ahead, tile);
    case INT8 * 4 + 2: return quantised_dots(INT8, 2, x, w, n, K, ahead, tile);
    case INT8 * 4 + 3: return quantised_dots(INT8, 4, x, w, n, K, ahead, tile);
    case INT4 * 4 + 1: return quantised_dots(INT4, 1, x, w, n, K, ahead, tile);
    case INT4 * 4 + 2: return quantised_dots(INT4, 2, x, w, n, K, ahead, tile);
    default: return quantised_dots(INT4, 4, x, w, n, K, ahead, tile);
    }
}
