/* Tiles of 8-bit training, bf16 in and out: the twins of quant_tiles.py with powers of two as scales.
 *
 * y is what a number is after its rounding, in bf16, where it is exact: 8-bit products are bf16 products of such
 * numbers. Codes and scales are what is kept between forward and backward. K is a multiple of 16; subnormals are met by
 * integer conversions, never by arithmetic on them, since the process may flush denormals.
 */
#include "kernels.h"

#define TILE 128
#define LEAST 0x38d1b717u /* 1e-4f */

typedef struct {
    float scale, inverse;
    uint8_t byte; /* UE8M0; 255 is NaN */
} Scale;

/* The smallest power of two that brings amax to (2 - 2^-m) 2^e or 1.75 * 2^8: `round` carries where amax's mantissa is
 * above the format's largest one, `top` is the exponent of its largest number. */
INLINE Scale scale_of(uint16_t amax, uint32_t round, uint32_t top) {
    uint32_t bits = (uint32_t)amax << 16;
    if (amax >= 0x7f80) return (Scale){NAN, NAN, 255};
    if (bits < LEAST) bits = LEAST;
    uint32_t byte = ((bits + round) >> 23) - top;
    union { uint32_t u; float f; } scale = {byte << 23}, inverse = {(254 - byte) << 23};
    return (Scale){scale.f, inverse.f, (uint8_t)byte};
}
INLINE Scale e4m3_scale(uint16_t amax) { return scale_of(amax, 0x1fffff, 8); }
INLINE Scale e5m6_scale(uint16_t amax) { return scale_of(amax, 0x01ffff, 15); }

INLINE __m256i magnitudes(const bf16 *x) {
    return _mm256_and_si256(_mm256_loadu_si256((const __m256i *)x), _mm256_set1_epi16(0x7fff));
}
INLINE uint16_t largest(__m256i x) {
    __m128i m = _mm_max_epu16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    return (uint16_t)~_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(m, _mm_set1_epi16(-1))), 0);
}
INLINE uint16_t amax_of(const bf16 *x, i64 n) {
    __m256i most = _mm256_setzero_si256();
    for (i64 i = 0; i < n; i += 16) most = _mm256_max_epu16(most, magnitudes(x + i));
    return largest(most);
}

/* v / 2^... already in range: E4M3 codes without sign in *code, their value returned with v's sign. */
INLINE __m512 to_e4m3(__m512 v, __m512i *code) {
    __m512i bits = _mm512_castps_si512(v), a = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(a, 20), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(0x7ffff)), odd);
    __m512i small = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(a), _mm512_set1_ps(512.0f)));
    __mmask16 sub = _mm512_cmplt_epu32_mask(a, _mm512_set1_epi32(0x3c800000)); /* below 2^-6 */
    __m512i usual = _mm512_sub_epi32(_mm512_srli_epi32(r, 20), _mm512_set1_epi32(120 << 3));
    *code = _mm512_mask_blend_epi32(sub, usual, small);
    __m512 normal = _mm512_castsi512_ps(_mm512_and_si512(r, _mm512_set1_epi32(0x7ff00000)));
    __m512 value = _mm512_mask_mul_ps(normal, sub, _mm512_cvtepi32_ps(small), _mm512_set1_ps(1.0f / 512));
    __m512i sign = _mm512_and_si512(bits, _mm512_set1_epi32(0x80000000));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign));
}
INLINE __m512i sign_at(__m512 v, int bit) {
    return _mm512_slli_epi32(_mm512_srli_epi32(_mm512_castps_si512(v), 31), bit);
}

/* What codes of so many mantissa bits stand for, under a scale of this byte; the sign is bit `sign`. */
INLINE __m512 widened(__m512i code, const int mantissa, const int bias, const int sign, uint8_t byte) {
    union { uint32_t u; float f; } scale = {(uint32_t)byte << 23}, least = {(uint32_t)(128 - bias - mantissa) << 23};
    __m512i a = _mm512_and_si512(code, _mm512_set1_epi32((1 << sign) - 1));
    __mmask16 sub = _mm512_cmplt_epu32_mask(a, _mm512_set1_epi32(1 << mantissa));
    __m512i bits = _mm512_add_epi32(_mm512_slli_epi32(a, 23 - mantissa), _mm512_set1_epi32((127 - bias) << 23));
    __m512 v = _mm512_castsi512_ps(bits);
    v = _mm512_mask_mul_ps(v, sub, _mm512_cvtepi32_ps(a), _mm512_set1_ps(least.f));
    bits = _mm512_slli_epi32(_mm512_srli_epi32(code, sign), 31);
    v = _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(v), bits));
    return _mm512_mul_ps(v, _mm512_set1_ps(byte == 255 ? NAN : scale.f));
}

/* 1 x 128 tiles. codes [M, K] and scales [M, ceil(K / 128)] may be null, and so may y [M, K] */

void fp8_rows(const bf16 *x, uint8_t *codes, uint8_t *scales, bf16 *y, i64 M, i64 K) {
    i64 tiles = (K + TILE - 1) / TILE;
#pragma omp parallel for schedule(static)
    for (i64 m = 0; m < M; m++)
        for (i64 t = 0; t < tiles; t++) {
            i64 n = K - t * TILE < TILE ? K - t * TILE : TILE, at = m * K + t * TILE;
            Scale s = e4m3_scale(amax_of(x + at, n));
            __m512 inverse = _mm512_set1_ps(s.inverse), scale = _mm512_set1_ps(s.scale);
            if (codes) scales[m * tiles + t] = s.byte;
            for (i64 i = at; i < at + n; i += 16) {
                __m512 v = _mm512_mul_ps(load(x + i), inverse);
                __m512i code;
                __m512 value = to_e4m3(v, &code);
                code = s.byte == 255 ? _mm512_set1_epi32(0x7f) : _mm512_or_si512(code, sign_at(v, 7));
                if (codes) _mm_storeu_si128((__m128i *)(codes + i), _mm512_cvtepi32_epi8(code));
                if (y) store(y + i, _mm512_mul_ps(value, scale));
            }
        }
}

void fp8_decode(const uint8_t *codes, const uint8_t *scales, bf16 *y, i64 M, i64 K) {
    i64 tiles = (K + TILE - 1) / TILE;
#pragma omp parallel for schedule(static)
    for (i64 m = 0; m < M; m++)
        for (i64 k = 0; k < K; k += 16) {
            __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + m * K + k)));
            store(y + m * K + k, widened(code, 3, 7, 7, scales[m * tiles + k / TILE]));
        }
}

/* 128 x 1 tiles: rows [spans[2i], spans[2i + 1]) share each column's scale. y may be x */

void fp8_columns(const bf16 *x, const i64 *spans, i64 n_spans, bf16 *y, i64 K) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < n_spans; i++)
        for (i64 k = 0; k < K; k += 16) {
            i64 first = spans[2 * i], end = spans[2 * i + 1];
            __m256i most = _mm256_setzero_si256();
            for (i64 m = first; m < end; m++) most = _mm256_max_epu16(most, magnitudes(x + m * K + k));
            __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(most), 16);
            __mmask16 bad = _mm512_cmpge_epu32_mask(bits, _mm512_set1_epi32(0x7f800000));
            bits = _mm512_max_epu32(bits, _mm512_set1_epi32(LEAST));
            __m512i byte = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x1fffff)), 23);
            byte = _mm512_sub_epi32(byte, _mm512_set1_epi32(8));
            __m512 nan = _mm512_set1_ps(NAN);
            __m512 scale = _mm512_mask_mov_ps(_mm512_castsi512_ps(_mm512_slli_epi32(byte, 23)), bad, nan);
            __m512i opposite = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(254), byte), 23);
            __m512 inverse = _mm512_castsi512_ps(opposite);
            for (i64 m = first; m < end; m++) {
                __m512i code;
                __m512 value = to_e4m3(_mm512_mul_ps(load(x + m * K + k), inverse), &code);
                store(y + m * K + k, _mm512_mul_ps(value, scale));
            }
        }
}

/* 128 x 128 blocks of a stack of weights */

void fp8_blocks(const bf16 *w, bf16 *y, i64 E, i64 N, i64 K) {
    i64 rows = (N + TILE - 1) / TILE;
#pragma omp parallel for schedule(static)
    for (i64 b = 0; b < E * rows; b++) {
        i64 e = b / rows, first = e * N + b % rows * TILE;
        i64 end = first + TILE < (e + 1) * N ? first + TILE : (e + 1) * N;
        for (i64 k = 0; k < K; k += TILE) {
            i64 n = K - k < TILE ? K - k : TILE;
            uint16_t amax = 0;
            for (i64 r = first; r < end; r++) {
                uint16_t most = amax_of(w + r * K + k, n);
                amax = most > amax ? most : amax;
            }
            Scale s = e4m3_scale(amax);
            __m512 inverse = _mm512_set1_ps(s.inverse), scale = _mm512_set1_ps(s.scale);
            for (i64 r = first; r < end; r++)
                for (i64 i = r * K + k; i < r * K + k + n; i += 16) {
                    __m512i code;
                    store(y + i, _mm512_mul_ps(to_e4m3(_mm512_mul_ps(load(w + i), inverse), &code), scale));
                }
        }
    }
}

/* E5M6 in 1 x 128 tiles: two codes of 12 bits in three bytes */

/* 16 codes and their 24 bytes. */
INLINE void pack(uint8_t *p, __m512i code) {
    __m256i pairs = _mm512_cvtepi64_epi32(_mm512_or_si512(code, _mm512_srli_epi64(code, 20)));
    __m128i order = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    __m128i low = _mm_shuffle_epi8(_mm256_castsi256_si128(pairs), order);
    __m128i high = _mm_shuffle_epi8(_mm256_extracti128_si256(pairs, 1), order);
    _mm_storeu_si128((__m128i *)p, low);
    _mm_mask_storeu_epi8(p + 12, 0xfff, high);
}
INLINE __m512i unpack(const uint8_t *p) {
    __m128i first = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    __m128i last = _mm_setr_epi8(4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
    __m128i low = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)p), first);
    __m128i high = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(p + 8)), last);
    __m512i pairs = _mm512_cvtepu32_epi64(_mm256_set_m128i(high, low));
    __m512i odd = _mm512_slli_epi64(_mm512_srli_epi64(pairs, 12), 32);
    return _mm512_or_si512(_mm512_and_si512(pairs, _mm512_set1_epi64(0xfff)), odd);
}

void e5m6_encode(const bf16 *x, uint8_t *codes, uint8_t *scales, i64 M, i64 K) {
    i64 tiles = (K + TILE - 1) / TILE;
#pragma omp parallel for schedule(static)
    for (i64 m = 0; m < M; m++)
        for (i64 t = 0; t < tiles; t++) {
            i64 n = K - t * TILE < TILE ? K - t * TILE : TILE, at = m * K + t * TILE;
            Scale s = e5m6_scale(amax_of(x + at, n));
            scales[m * tiles + t] = s.byte;
            for (i64 i = at; i < at + n; i += 16) {
                __m512 v = _mm512_mul_ps(load(x + i), _mm512_set1_ps(s.inverse));
                __m512i a = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
                __m512i odd = _mm512_and_si512(_mm512_srli_epi32(a, 17), _mm512_set1_epi32(1));
                __m512i r = _mm512_add_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(0xffff)), odd);
                __m512i small = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(a), _mm512_set1_ps(0x1p20f)));
                __mmask16 sub = _mm512_cmplt_epu32_mask(a, _mm512_set1_epi32(0x38800000)); /* below 2^-14 */
                __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(r, 17), _mm512_set1_epi32(112 << 6));
                __m512i code = _mm512_or_si512(_mm512_mask_blend_epi32(sub, normal, small), sign_at(v, 11));
                if (s.byte == 255) code = _mm512_setzero_si512();
                pack(codes + i / 2 * 3, code);
            }
        }
}

void e5m6_decode(const uint8_t *codes, const uint8_t *scales, bf16 *y, i64 M, i64 K) {
    i64 tiles = (K + TILE - 1) / TILE;
#pragma omp parallel for schedule(static)
    for (i64 m = 0; m < M; m++)
        for (i64 k = 0; k < K; k += 16) {
            __m512i code = unpack(codes + (m * K + k) / 2 * 3);
            store(y + m * K + k, widened(code, 6, 15, 11, scales[m * tiles + k / TILE]));
        }
}
