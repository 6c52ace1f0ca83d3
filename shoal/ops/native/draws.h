/* A token by its logits: draws.c. */
#pragma once
#include "kernels.h"

/* Of V finite logits (a multiple of 16): the first of the likeliest, or a draw at a temperature above 0. -1 where one
 * isn't finite. With `logprob`, the token's own by the raw distribution. */
i64 draw(const float *logit, i64 V, float temperature, uint64_t seed, i64 position, double *logprob);
