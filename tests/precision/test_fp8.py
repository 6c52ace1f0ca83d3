"""Training leaves in 8 bits: their products against the specification, what they keep, and whole runs."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from shoal.model import hf
from shoal.model.layers import Linear, SwiGLU
from shoal.model.moe import Experts
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.ops import fp8_tiles, quant_tiles
from shoal.ops.quant import FP8
from shoal.precision import fp8, policy
from shoal.precision.fp8 import Fp8Experts, Fp8Linear, Fp8SwiGLU
from shoal.train.checkpoint import newest, save
from shoal.train.config import BatchConfig, Fp8Config, OptimConfig, PretrainConfig
from shoal.train.step import TrainState, train_step
from tests.train.batches import batch_of

CONFIG = PretrainConfig(
    PRESETS["tiny"], batch=BatchConfig(32, 2), optim=OptimConfig(lr=3e-3), steps=50, precision="fp8", threads=1
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def linear(n_in: int, n_out: int, seed: int = 9, bias: bool = False) -> Linear:
    leaf = Linear(n_in, n_out, bias)
    leaf.weight.data = drawn(n_out, n_in, seed=seed)
    if leaf.bias is not None:
        leaf.bias.data = drawn(n_out, seed=seed + 1)
    return leaf


def experts(E: int, dim: int, hidden: int) -> Experts:
    leaf = Experts(E, dim, hidden)
    leaf.gate_up.data, leaf.down.data = drawn(E, 2 * hidden, dim, seed=1) / 8, drawn(E, dim, hidden, seed=2) / 8
    return leaf


def close(ours: Tensor | None, spec: Tensor) -> None:
    """But for a bf16 rounding of the result."""
    assert ours is not None
    torch.testing.assert_close(ours.float(), spec.float(), rtol=2**-7, atol=2**-7 * spec.float().abs().mean().item())


@pytest.mark.parametrize("kept", ["fp8", "e5m6"])
@pytest.mark.parametrize("scales", ["ue8m0", "fp32"])
def test_forward_dgrad_and_wgrad_are_those_of_the_specification(scales, kept):
    leaf = linear(160, 48, bias=True)
    x, dy = drawn(200, 160).requires_grad_(), drawn(200, 48, seed=3)
    y = Fp8Linear(leaf, scales, kept)(x)
    y.backward(dy)
    q = partial(quant_tiles.row_tiles, scales=scales)
    w = quant_tiles.block_tiles(leaf.weight.detach(), scales).dequantise()
    first = quant_tiles.e5m6(x.detach()).dequantise(torch.float32) if kept == "e5m6" else q(x.detach()).dequantise()
    across = [quant_tiles.column_tiles(t, [200], scales) for t in (dy, first)]
    close(y, q(x.detach()).dequantise() @ w.T + leaf.bias.float())  # type: ignore[union-attr]
    close(x.grad, q(dy).dequantise() @ w)
    close(leaf.weight.grad, across[0].T @ across[1])
    assert leaf.bias is not None
    close(leaf.bias.grad, dy.float().sum(0))


def test_experts_are_feed_forwards_side_by_side():
    leaf, counts = experts(4, 64, 96), torch.tensor([40, 0, 3, 150])
    stacked = Fp8Experts(leaf, "ue8m0")
    x, dy = drawn(193, 64).requires_grad_(), drawn(193, 64, seed=4)
    y = stacked(x, counts)
    y.backward(dy)
    gate_up, down, dx = leaf.gate_up.grad, leaf.down.grad, x.grad
    assert gate_up is not None and down is not None and dx is not None
    assert (gate_up[1] == 0).all() and (down[1] == 0).all()
    for e, start, n in ((0, 0, 40), (2, 40, 3), (3, 43, 150)):
        one = SwiGLU(64, 96)
        for name, matrix in zip(("gate", "up", "down"), (*leaf.gate_up[e].chunk(2), leaf.down[e])):
            getattr(one, name).weight.data = matrix.detach().clone()
        mine = x.detach()[start : start + n].clone().requires_grad_()
        alone = Fp8SwiGLU(one, "ue8m0")(mine)
        alone.backward(dy[start : start + n])
        close(y[start : start + n], alone)
        close(dx[start : start + n], mine.grad)  # type: ignore[arg-type]
        close(gate_up[e], torch.cat([one.gate.weight.grad, one.up.weight.grad]))  # type: ignore[list-item]
        close(down[e], one.down.weight.grad)  # type: ignore[arg-type]


def kept_by(run) -> dict[int, Tensor]:
    """Every storage that `run()` leaves behind for backward."""
    kept = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        kept[-1] = run()  # the graph must live while storages are compared
    del kept[-1]
    return kept


def test_what_is_kept_for_backward_is_in_few_bits_and_kept_once():
    M, D, F = 256, 128, 128
    x, dense = drawn(M, D).requires_grad_(), SwiGLU(D, F)
    for child in (dense.gate, dense.up, dense.down):
        child.weight.data = drawn(*child.weight.shape)
    own = {p.untyped_storage().data_ptr() for p in dense.parameters()}
    kept = [t for at, t in kept_by(lambda: Fp8SwiGLU(dense, "ue8m0")(x)).items() if at not in own]
    in_eight = sorted(t.numel() for t in kept if t.dtype is FP8)
    assert in_eight == [M * D, M * 2 * F]  # the input; gate and up; SwiGLU's output not at all
    assert sum(t.nbytes for t in kept) == (M * D + M * 2 * F) * 129 // 128 + 8  # and how many rows
    a, b = (Fp8Linear(linear(D, 32, seed), "ue8m0", "fp8") for seed in (1, 2))
    shared = kept_by(lambda: (a(x), b(x)))
    assert sum(t.nbytes for t in shared.values() if t.dtype is FP8) == M * D
    out = kept_by(lambda: Fp8Linear(linear(D, 32), "ue8m0", "e5m6")(x))
    assert sum(t.nbytes for t in out.values() if t.dtype is torch.uint8) == M * D * 3 // 2


def test_an_input_that_changed_is_tiled_anew():
    leaf, x = Fp8Linear(linear(32, 32), "ue8m0", "fp8"), drawn(4, 32)
    before = leaf(x)
    x.mul_(2)
    assert torch.equal(leaf(x), 2 * before)


def test_leaves_stand_over_the_same_parameters_and_go_again():
    model = Transformer(PRESETS["tiny"]).init_weights(0).set_dtype(torch.bfloat16)
    before = dict(model.named_parameters())
    kinds = {name: type(m) for name, m in model.named_modules()}
    fp8.swap(model)
    assert [*dict(model.named_parameters())] == [*before]
    assert all(p is before[name] for name, p in model.named_parameters())
    eight = {name for name, m in model.named_modules() if isinstance(m, Fp8Linear | Fp8SwiGLU | Fp8Experts)}
    moved = {name for name in before if any(name.startswith(f"{leaf}.") for leaf in eight)}
    assert moved == {name for name in before if policy.of(name).precision == "fp8"}
    assert type(model.head) is Linear and "mtp.0.proj" not in eight
    fp8.restore(model)
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert all(p is before[name] for name, p in model.named_parameters())


def test_a_run_says_whether_its_products_are_in_8_bits(monkeypatch):
    state = TrainState(CONFIG, "cpu")
    assert state.note and "not its speed" in state.note
    monkeypatch.setattr(fp8_tiles, "on_gpu", lambda _: True)
    assert state.note == fp8.AS_THEY_ARE and TrainState(replace(CONFIG, precision="plain"), "cpu").note is None


def test_a_nan_skips_the_step():
    state = TrainState(CONFIG, "cpu")
    state.model.layers[1].attn.out.weight.data[0, 0] = float("nan")  # type: ignore[union-attr, index]
    result = train_step(state, [batch_of([64])])
    assert result.skipped is not None and "nan" in result.skipped


def weights(state: TrainState) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in state.model.state_dict().items()}


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_a_resumed_run_ends_bit_equal_and_its_checkpoint_opens_as_any_other(tmp_path, matrices):
    config = replace(CONFIG, optim=OptimConfig(matrices, lr=3e-3))
    batches = [batch_of([40, 24], seed=i) for i in range(3)]
    whole = TrainState(config, "cpu")
    train_step(whole, [batches[0]])
    assert all(s.first.dtype is torch.bfloat16 for s in whole.optimizer.slots)

    def write_model(folder):
        hf.save_state(config.model, whole.model.state_dict(), folder)

    save(tmp_path, 1, write_model, whole.tensors(), whole.saved_counters(), keep=1)
    found, _ = newest(tmp_path)
    assert found is not None
    opened = hf.load(found.path, torch.bfloat16)
    assert all(type(m) is not Fp8Linear for m in opened.modules())
    again = TrainState(config, "cpu")
    again.model.load_state_dict(opened.state_dict())
    again.load(found.tensors(), found.counters)
    for batch in batches[1:]:
        train_step(whole, [batch])
        train_step(again, [batch])
    expected, tensors = weights(whole), whole.tensors()
    assert all(torch.equal(value, expected[name]) for name, value in weights(again).items())
    assert all(torch.equal(value, tensors[name]) for name, value in again.tensors().items())


def test_recomputed_activations_and_accumulation_give_the_same_step():
    plain, again = TrainState(CONFIG, "cpu"), TrainState(replace(CONFIG, recompute=True), "cpu")
    for state in (plain, again):
        train_step(state, [batch_of([64], seed=1), batch_of([64], seed=2)])
    expected = weights(plain)
    assert all(torch.equal(value, expected[name]) for name, value in weights(again).items())


def test_moments_are_as_wide_as_asked():
    wide = TrainState(replace(CONFIG, fp8=Fp8Config(moments="fp32")), "cpu")
    assert {s.first.dtype for s in wide.optimizer.slots} == {torch.float32}


@pytest.mark.slow
def test_8_bits_learn_what_16_learn():
    eight, sixteen = (TrainState(replace(CONFIG, precision=p), "cpu") for p in ("fp8", "plain"))
    batch = batch_of([32, 32])
    for _ in range(50):
        ends = [train_step(state, [batch]).loss for state in (eight, sixteen)]
    assert ends[0] == pytest.approx(ends[1], rel=0.05)
