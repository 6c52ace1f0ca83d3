"""Training leaves whose operands stay in 8 bits, as on a GPU, learn what the leaves of any machine learn."""

import pytest
import torch
from torch import Tensor, nn

from tests.ops.interpreted import DEVICE, hardware_numbers, relative_error  # isort: skip  (before any kernel)

from shoal.model.layers import Linear, RMSNorm, SwiGLU
from shoal.model.moe import Experts
from shoal.model.presets import PRESETS
from shoal.ops import fp8_tiles, triton_gemm
from shoal.precision.fp8 import Fp8Experts, Fp8Linear, Fp8Norm, Fp8SwiGLU
from shoal.train.config import BatchConfig, OptimConfig, PretrainConfig
from shoal.train.step import TrainState, train_step
from tests.train.batches import batch_of

pytestmark = pytest.mark.usefixtures(hardware_numbers.__name__)
BITS = 5e-3  # bf16's rounding of results, and the few codes that it moves behind them


@pytest.fixture
def products(monkeypatch) -> list[str]:
    """The kernels that ran: a test of two ways should see both."""
    ran: list[str] = []
    for name in ("linear", "gradient"):
        kernel = getattr(triton_gemm, name)
        monkeypatch.setattr(triton_gemm, name, lambda *a, name=name, kernel=kernel: ran.append(name) or kernel(*a))
    return ran


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)


def filled(leaf: nn.Module) -> nn.Module:
    for i, p in enumerate(leaf.parameters()):
        p.data = drawn(*p.shape, seed=i) / 8
    return leaf


def both_ways(leaf: nn.Module, x: Tensor, monkeypatch, *more: Tensor) -> None:
    """The result, and the gradients of x and of each parameter."""
    found = []
    for gpu in (False, True):
        monkeypatch.setattr(fp8_tiles, "on_gpu", lambda _, gpu=gpu: gpu)
        leaf.zero_grad()
        mine = x.clone().requires_grad_()
        y = leaf(mine, *more)
        y.backward(drawn(*y.shape, seed=7))
        found.append([y, mine.grad, *(p.grad for p in leaf.parameters())])
    for expected, made in zip(*found, strict=True):
        assert made.dtype is expected.dtype and relative_error(made, expected) < BITS


@pytest.mark.parametrize("scales, kept", [("ue8m0", "fp8"), ("fp32", "e5m6")])
def test_linear(scales, kept, products, monkeypatch):
    leaf = Fp8Linear(filled(Linear(144, 48)), scales, kept)  # type: ignore[arg-type]
    both_ways(leaf, drawn(70, 144, seed=3), monkeypatch)
    assert products == ["linear", "linear", "gradient"]


def test_a_norm_makes_the_tiles_that_leaves_ask_for(products, monkeypatch):
    """From rows of a wider tensor, as the latents' norm reads them; of other rows they make their own."""
    norm, leaf = Fp8Norm(filled(RMSNorm(144, 1e-6)), "ue8m0"), Fp8Linear(filled(Linear(144, 48)), "ue8m0", "fp8")  # type: ignore[arg-type]
    both_ways(nn.Sequential(Columns(), norm, leaf), drawn(20, 160, seed=3), monkeypatch)
    assert products == ["linear", "linear", "gradient"]
    rows, kept_rows = [], fp8_tiles.kept_rows
    monkeypatch.setattr(fp8_tiles, "kept_rows", lambda x, scales: rows.append(x) or kept_rows(x, scales))
    y = norm(drawn(20, 144, seed=3))
    leaf(y)
    assert not rows
    leaf(y + 1)
    assert len(rows) == 1


class Columns(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :144]


@pytest.mark.parametrize("hidden, in_8_bits", [(128, 6), (96, 4)])
def test_gate_and_up_one_above_the_other(hidden, in_8_bits, products, monkeypatch):
    """Where up's first row is no multiple of 128 their two products are of dequantised operands."""
    both_ways(Fp8SwiGLU(filled(SwiGLU(64, hidden)), "ue8m0"), drawn(40, 64, seed=3), monkeypatch)  # type: ignore[arg-type]
    assert len(products) == in_8_bits


def test_experts(products, monkeypatch):
    leaf = Fp8Experts(filled(Experts(3, 64, 128)), "ue8m0")  # type: ignore[arg-type]
    both_ways(leaf, drawn(45, 64, seed=3), monkeypatch, torch.tensor([40, 0, 5], device=DEVICE))
    assert len(products) == 6


def test_weights_that_are_one_above_the_other_already_are_not_copied(monkeypatch):
    monkeypatch.setattr(fp8_tiles, "on_gpu", lambda _: True)
    made, blocks = [], fp8_tiles.blocks
    monkeypatch.setattr(fp8_tiles, "blocks", lambda w, scales: made.append(blocks(w, scales)) or made[-1])
    gates_and_ups = drawn(2, 2, 128, 64, seed=1)
    together = fp8_tiles.stacked([gates_and_ups], 2, "ue8m0")
    assert together.shape == (2, 256, 64) and together.codes.data_ptr() == made[0].codes.data_ptr()  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_whole_step(products, monkeypatch):
    """Of every leaf together: latent attention, experts, the multi-token module. First moments are the gradients; what
    tensor cores' short sums change in them (test_triton_fp8.close) has many layers to spread through."""
    config = PretrainConfig(
        PRESETS["tiny"], batch=BatchConfig(32, 1), optim=OptimConfig(lr=3e-3), steps=50, precision="fp8", threads=1
    )
    ended = []
    for gpu in (False, True):
        monkeypatch.setattr(fp8_tiles, "on_gpu", lambda _, gpu=gpu: gpu)
        state = TrainState(config, DEVICE)
        train_step(state, [batch_of([20, 12])])
        ended.append([slot.first for slot in state.optimizer.slots])
    most = BITS if DEVICE == "cpu" else 0.05
    assert len(products) > 80 and all(relative_error(made, expected) < most for expected, made in zip(*ended))
