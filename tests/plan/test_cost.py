"""The arithmetic of cost, held to DeepSeek-V3's own bill (arXiv 2412.19437, table 1)."""

from dataclasses import replace

import pytest

from shoal.model.presets import PRESETS
from shoal.plan import cost, flops, hardware

V3 = PRESETS["v3-671b"]
H800 = hardware.GPUS["H800"]
TOKENS, RATE, GPUS = 14.8e12, 1543, 2048


def test_v3_costs_what_was_published():
    """180K H800 hours a trillion tokens, 2664K for 14.8T: $5.328M at $2, in under two months on 2048 of them."""
    bill = cost.account(V3, 4096, int(TOKENS), TOKENS / RATE / GPUS, H800, n_machines=GPUS)
    gpu_hours = GPUS * bill.seconds / 3600
    assert gpu_hours == pytest.approx(2664e3, rel=0.001)
    assert gpu_hours / 14.8 == pytest.approx(180e3, rel=0.001)
    assert bill.usd and bill.usd == pytest.approx(5.328e6, rel=0.001)
    assert bill.usd / gpu_hours * (gpu_hours + 119e3 + 5e3) == pytest.approx(5.576e6, rel=0.001)
    assert bill.seconds / 86400 < 60
    assert bill.tokens_per_second == pytest.approx(RATE * GPUS)
    assert 0.35 < bill.mfu < 0.45  # of the bf16 peak, although the work was done in FP8


def test_mfu_does_not_depend_on_how_the_work_is_split():
    alone = cost.account(V3, 4096, 10**6, 3600, H800)
    split = cost.account(V3, 4096, 10**6, 900, H800, n_machines=4)
    assert alone.mfu == pytest.approx(split.mfu) and alone.usd == pytest.approx(split.usd)
    assert alone.flops == split.flops == 10**6 * flops.training(V3, 4096).total


def test_energy_is_watts_times_hours_and_an_unknown_price_stays_unknown():
    machine = hardware.cpu("two threads", 8e11, 2e11, 2e10, 8 << 30, threads=2)
    bill = cost.account(V3, 4096, 1000, 1800, machine)
    assert bill.energy_kwh_estimate == pytest.approx(machine.watts / 2000)
    assert bill.usd == pytest.approx(0.05)
    assert cost.account(V3, 4096, 1000, 1800, replace(machine, price_per_hour=None)).usd is None
