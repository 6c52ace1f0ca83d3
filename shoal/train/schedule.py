"""What changes over a run, as functions of its progress p in [0, 1]."""

from itertools import pairwise
from math import cos, pi

from shoal.train.config import LossConfig, PretrainConfig, ScheduleConfig


def learning_rate(c: ScheduleConfig, p: float) -> float:
    """As a share of the peak. A warm-up of 0 is none, one of 1 is the whole run; a decay of 0 stays at the peak."""
    if c.warmup and p <= c.warmup:
        return p / c.warmup
    if c.kind == "cosine":
        return c.final + (1 - c.final) * (1 + cos(pi * (p - c.warmup) / (1 - c.warmup))) / 2
    if c.kind == "v3":
        return _v3(c, p)
    return 1.0 if p <= 1 - c.decay else c.final + (1 - c.final) * (1 - p) / c.decay


def _v3(c: ScheduleConfig, p: float) -> float:
    """Of 14.8T tokens: constant to 10T, half a cosine to a tenth until 14.3T, a tenth to 14.633T, then a thirtieth."""
    constant, fallen, tail = 10 / 14.8, 14.3 / 14.8, 14.633 / 14.8
    if p < constant:
        return 1.0
    if p < fallen:
        return 0.1 + 0.9 * (1 + cos(pi * (p - constant) / (fallen - constant))) / 2
    return 0.1 if p < tail else 7.3e-6 / 2.2e-4


def mtp_weight(c: LossConfig, p: float) -> float:
    """λ: 0 while the multi-token modules rest."""
    if p < c.mtp_from:
        return 0.0
    return c.mtp_weight if p < c.mtp_until else c.mtp_final


def bias_speed(c: LossConfig, p: float) -> float:
    return c.bias_speed if p < c.bias_until else 0.0


def context(config: PretrainConfig, p: float) -> int:
    """Tokens of a window."""
    return config.first_context if p < config.growth.until else config.batch.context


def phases(config: PretrainConfig) -> dict[tuple[int, bool], float]:
    """Of a run, the share in windows of so many tokens, with multi-token modules at work or at rest."""
    c = config.loss
    shares: dict[tuple[int, bool], float] = {}
    for start, end in pairwise(sorted({0.0, config.growth.until, c.mtp_from, c.mtp_until, 1.0})):
        kind = context(config, start), config.model.n_mtp > 0 and mtp_weight(c, start) > 0
        shares[kind] = shares.get(kind, 0.0) + end - start
    return shares
