"""Rotary frequencies against their formulas, written out for one pair at a time."""

from dataclasses import replace
from math import cos, log, pi, sin

import pytest
import torch

from shoal.model.config import GQAConfig, Llama3RopeConfig, MLAConfig, YarnConfig
from shoal.model.presets import PRESETS
from shoal.model.rope import angles, frequencies
from shoal.ops import dispatch as ops

R = 64
MLA = MLAConfig(2, 32, 32, R, 32)
PLAIN = replace(PRESETS["tiny"], attention=MLA, rope_theta=10000.0, rope_scaling=None)


def expected(stretched_share) -> list[float]:
    """Frequencies by the factor-40 rule: share 0 keeps a wavelength, share 1 makes it 40 times as long."""
    base = [10000.0 ** (-2 * i / R) for i in range(R // 2)]
    return [f * (1 - stretched_share(i, f)) + f / 40 * stretched_share(i, f) for i, f in enumerate(base)]


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    """The ramp runs over the pairs that turn 32 times and once within the 4,096 original positions."""
    yarn = YarnConfig(40.0, original=4096)
    low = int(R * log(4096 / (32 * 2 * pi)) / (2 * log(10000)))  # rounded down: 10
    high = -int(-R * log(4096 / (2 * pi)) / (2 * log(10000)) // 1)  # rounded up: 23
    assert (low, high) == (10, 23)  # as DeepSeek-V3's own code has them
    found, amplitude = frequencies(replace(PLAIN, rope_scaling=yarn))
    share = lambda i, f: min(max((i - low) / (high - low), 0), 1)  # noqa: E731
    assert found.tolist() == pytest.approx(expected(share), rel=1e-5)
    assert amplitude == 1.0


def test_yarns_temperature_goes_into_cosines_or_into_the_scale():
    """V2-Lite and V3 set both mscales alike: they cancel in the angles, and softmax takes the square."""
    m = 0.1 * 0.707 * log(40) + 1
    both = replace(PLAIN, rope_scaling=YarnConfig(40.0, mscale=0.707, mscale_all_dim=0.707))
    one = replace(PLAIN, rope_scaling=YarnConfig(40.0, mscale=0.707, mscale_all_dim=0.0))
    assert frequencies(both)[1] == 1.0 and both.softmax_scale == pytest.approx(96**-0.5 * m**2)
    assert frequencies(one)[1] == pytest.approx(m) and one.softmax_scale == pytest.approx(96**-0.5)


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    config = replace(PLAIN, attention=GQAConfig(2, 1, R), rope_scaling=Llama3RopeConfig(40.0, original=8192))

    def share(i: int, f: float) -> float:
        wavelength = 2 * pi / f
        if wavelength < 8192 / 4:
            return 0.0
        if wavelength > 8192:
            return 1.0
        return 1 - (8192 / wavelength - 1) / (4 - 1)

    found, amplitude = frequencies(config)
    assert found.tolist() == pytest.approx(expected(share), rel=1e-5) and amplitude == 1.0
    assert 0 < share(22, 10000.0 ** (-44 / R)) < 1  # the ramp between has pairs in it


def test_pairs_are_neighbours_in_one_layout_and_halves_apart_in_the_other():
    rope = angles(torch.tensor([0, 3]), PLAIN)
    x = torch.zeros(2, 1, R)
    x[:, 0, 0] = 1.0
    pairs, halves = ops.rotate_pairs(x, *rope), ops.rotate_halves(x, *rope)
    assert torch.equal(pairs[0], x[0]) and torch.equal(halves[0], x[0])  # position 0 stays
    assert pairs[1, 0, :2].tolist() == pytest.approx([cos(3), sin(3)])  # the first pair turns a radian a position
    assert (halves[1, 0, 0].item(), halves[1, 0, R // 2].item()) == pytest.approx((cos(3), sin(3)))


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, R, generator=torch.Generator().manual_seed(0)).unbind(0)
    turn = lambda x, at: ops.rotate_pairs(x, *angles(torch.tensor([at]), PLAIN))  # noqa: E731
    near, far = (turn(q, at + 7).flatten() @ turn(k, at).flatten() for at in (0, 500))
    assert near.item() == pytest.approx(far.item(), abs=1e-3)
