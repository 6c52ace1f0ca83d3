"""bench.kernels goes through all its parts: it meets a GPU rarely, and then it has to work."""

import pytest
import torch

from tests.ops.interpreted import DEVICE, hardware_numbers  # isort: skip  (before any kernel)

from bench import kernels
from shoal.ops import triton_latent

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures(hardware_numbers.__name__)]


@pytest.fixture
def small(monkeypatch):
    sizes = {"TOKENS": 40, "EXPERTS": 3, "EXPERT_ROWS": 32, "EXPERT_SHAPES": [(64, 160)], "HEADS": {"small": 20}}
    sizes |= {"STREAMS": 3, "CONTEXT": 128, "C": 32, "R": 16, "DEVICE": DEVICE, "FEW": (1, 3)}
    sizes |= {"seconds": lambda calls, rounds: [[2.0, 1.0] for _ in calls if calls[0]() is not None]}
    for name, value in sizes.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernels, "SHAPES", [(160, 128)] * 4 + [(48, 256), (64, 160), (160, 64)])
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_latent, "how_many", lambda programs, pages, device: 2)


def test_every_part_agrees_with_its_reference_and_has_its_rows(small):
    rows, failed = kernels.measured(kernels.parts(2, kernels.SHAPES[-2:]))
    assert not failed
    assert len(rows) == 2 * 2 + 4 + 2 + 1 + 6 + 2 and all(
        row.ratio.median == 1 for row in rows if row.against != "memory"
    )


def test_a_part_that_fails_is_named_and_costs_the_others_nothing(small, monkeypatch):
    monkeypatch.setattr(kernels, "ERROR", 0.0)
    rows, failed = kernels.measured(kernels.parts(2, [])[-2:])
    assert list(failed) == ["normed"] and "nothing is timed" in failed["normed"]
    assert [row.name for row in rows] == ["SwiGLU and tiles"]


def test_without_a_gpu_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in (kernels.lacking() or "")
