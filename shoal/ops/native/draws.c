/* A token by its logits: the twin of what engine/sampler.py does where nothing edits or cuts the distribution.
 *
 * A uniform number, hashed from (seed, position) as data/draws.py does, is found on the cumulative sum of
 * e^((x - top) / T). Exponentials are fp32, sums fp64, in an order that depends on V alone. So a row draws the same
 * whatever is beside it, and other than in fp64 throughout only where the number falls within rounding of a boundary:
 * less than once in 100,000 draws.
 */
#include "draws.h"

#define PART 128 /* logits between two sums that are kept */
#define GAMMA 0x9E3779B97F4A7C15u

static uint64_t stirred(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

/* In [0, 1), 48 bits. Purpose 0, a draw: engine/sampler.py. */
double uniform(uint64_t seed, uint64_t position, uint64_t purpose) {
    uint64_t x = stirred(seed + GAMMA * (position + 1));
    return (double)(stirred(x + GAMMA * (purpose + 1)) >> 16) / (double)(1ll << 48);
}

/* The largest of n; NaN where one isn't finite. */
static float highest(const float *x, i64 n) {
    __m512 top[4], zero[4];
    for (int j = 0; j < 4; j++) top[j] = _mm512_set1_ps(-INFINITY), zero[j] = _mm512_setzero_ps();
    for (i64 i = 0; i < n; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        int j = i / 16 % 4; /* sums of their own, so that none waits for the one before */
        top[j] = _mm512_max_ps(top[j], v);
        zero[j] = _mm512_fmadd_ps(v, _mm512_setzero_ps(), zero[j]);
    }
    __m512 none = _mm512_add_ps(_mm512_add_ps(zero[0], zero[1]), _mm512_add_ps(zero[2], zero[3]));
    __m512 all = _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
    return _mm512_reduce_add_ps(none) == 0 ? _mm512_reduce_max_ps(all) : NAN;
}

typedef struct { /* 1 / T to twice the digits, and the largest logit */
    __m512 inverse, rest, top;
} Scale;

static Scale scale_of(float top, float temperature) {
    float inverse = 1.0f / temperature, rest = 1.0 / temperature - inverse;
    return (Scale){_mm512_set1_ps(inverse), _mm512_set1_ps(rest), _mm512_set1_ps(top)};
}

/* e^((x - top) / T), each to 1 ulp: as kernels.h does it, with what rounding took from the exponent, and a degree more.
 */
INLINE __m512 weights(const float *x, Scale s) {
    __m512 below = _mm512_sub_ps(_mm512_loadu_ps(x), s.top), y = _mm512_mul_ps(below, s.inverse);
    __m512 rest = _mm512_fmadd_ps(below, s.rest, _mm512_fmsub_ps(below, s.inverse, y));
    y = _mm512_max_ps(_mm512_set1_ps(-87.3f), y);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), y);
    r = _mm512_add_ps(_mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r), rest);
    __m512 p = _mm512_set1_ps(1.38146105e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.36871123e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.16683875e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.66665207e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.99999935e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* Σ of n weights */
static double total(const float *x, i64 n, Scale s) {
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    for (i64 i = 0; i < n; i += 16) {
        __m512 e = weights(x + i, s);
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(e)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(e, 1)));
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}

/* Where the cumulative sum of n weights, from `sum` on, passes `reached`. */
static i64 passed(const float *x, i64 n, Scale s, double sum, double reached) {
    float e[PART];
    for (i64 i = 0; i < n; i += 16) _mm512_storeu_ps(e + i, weights(x + i, s));
    for (i64 i = 0; i < n; i++)
        if ((sum += e[i]) > reached) return i;
    return n - 1; /* by rounding */
}

INLINE i64 size(i64 V, i64 part) { return V - part * PART < PART ? V - part * PART : PART; }

i64 draw(const float *logit, i64 V, float temperature, uint64_t seed, i64 position, double *logprob) {
    float top = highest(logit, V);
    if (top != top) return -1;
    i64 token = 0, parts = (V + PART - 1) / PART, part = 0;
    double sums[parts], sum = 0;
    if (temperature == 0) {
        while (logit[token] != top) token++;
    } else {
        Scale s = scale_of(top, temperature);
        for (i64 i = 0; i < parts; i++) sums[i] = sum += total(logit + i * PART, size(V, i), s);
        double reached = uniform(seed, position, 0) * sum;
        while (part < parts - 1 && sums[part] <= reached) part++;
        const float *x = logit + part * PART;
        token = part * PART + passed(x, size(V, part), s, part ? sums[part - 1] : 0, reached);
    }
    if (logprob) {
        double raw = temperature == 1 ? sum : total(logit, V, scale_of(top, 1));
        *logprob = (double)logit[token] - top - log(raw);
    }
    return token;
}

/* The same for R rows, the log-probabilities of all. */
void draw_rows(const float *logits, i64 R, i64 V, const float *temperature_R, const uint64_t *seed_R,
               const i64 *position_R, i64 *token_R, double *logprob_R) {
#pragma omp parallel for schedule(static)
    for (i64 r = 0; r < R; r++)
        token_R[r] = draw(logits + r * V, V, temperature_R[r], seed_R[r], position_R[r], logprob_R + r);
}
