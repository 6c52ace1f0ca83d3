"""Rotary positions: which angle each pair of dimensions turns by at each position.

Plain (arXiv 2104.09864), YaRN as DeepSeek uses it (arXiv 2309.00071: fast wavelengths kept, slow ones stretched, a ramp
between), and Llama-3.1's stretching. How pairs lie in memory (interleaved or halves) is the attention layer's business.

Shapes: T tokens, R rope dims.
"""

from math import log, pi
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.model.config import Llama3RopeConfig, ModelConfig, YarnConfig


class Angles(NamedTuple):
    """cos and sin of every position and frequency, fp32, each [T, R/2]."""

    cos_TR2: Tensor
    sin_TR2: Tensor


def angles(positions_T: Tensor, config: ModelConfig) -> Angles:
    inv_freq, amplitude = frequencies(config)
    turn = positions_T[:, None].float() * inv_freq.to(positions_T.device)
    return Angles(turn.cos() * amplitude, turn.sin() * amplitude)


def frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians a position for each of the R/2 pairs (fp32), and the factor that cos and sin are multiplied by."""
    R, scaling = config.rope_dim, config.rope_scaling
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, R, 2, dtype=torch.float32, device="cpu") / R)
    if isinstance(scaling, YarnConfig):
        return _yarn(inv_freq, scaling, R, config.rope_theta), _mscale(scaling)
    if isinstance(scaling, Llama3RopeConfig):
        return _llama3(inv_freq, scaling), 1.0
    return inv_freq, 1.0


def _yarn(inv_freq: Tensor, yarn: YarnConfig, R: int, theta: float) -> Tensor:
    def pair_turning(times: float) -> float:
        """The (fractional) pair that turns this many times within the original context."""
        return R * log(yarn.original / (times * 2 * pi)) / (2 * log(theta))

    low = max(int(pair_turning(yarn.beta_fast) // 1), 0)
    high = min(int(-(-pair_turning(yarn.beta_slow) // 1)), R - 1)
    ramp = (torch.arange(R // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    return inv_freq / yarn.factor * stretched + inv_freq * (1 - stretched)


def _mscale(yarn: YarnConfig) -> float:
    def temperature(m: float) -> float:
        return 0.1 * m * log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0

    return temperature(yarn.mscale) / temperature(yarn.mscale_all_dim)


def _llama3(inv_freq: Tensor, scaling: Llama3RopeConfig) -> Tensor:
    turns = scaling.original * inv_freq / (2 * pi)  # within the original context
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return inv_freq / scaling.factor * (1 - keep) + inv_freq * keep
