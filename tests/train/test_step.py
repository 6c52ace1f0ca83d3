"""A training step: what it changes, what it must not, and that nothing about how it is computed matters."""

from dataclasses import replace

import pytest
import torch

from shoal.model.presets import PRESETS
from shoal.train import loss
from shoal.train.balance import routers
from shoal.train.config import BatchConfig, LossConfig, OptimConfig, PretrainConfig
from shoal.train.step import TrainState, backward, train_step
from tests.train.batches import batch_of

CONFIG = PretrainConfig(
    PRESETS["tiny"], batch=BatchConfig(context=32, samples=2), optim=OptimConfig(lr=3e-3), dtype="fp32", steps=50
)


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in state.model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("matrices", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_learns_a_batch_by_heart(matrices, dtype):
    state = TrainState(replace(CONFIG, optim=OptimConfig(matrices, lr=5e-3), dtype=dtype), "cpu")
    batch = batch_of([32, 32])
    losses = [train_step(state, [batch]) for _ in range(50)]
    assert losses[0].loss == pytest.approx(torch.tensor(512.0).log().item(), abs=0.2)
    assert losses[-1].loss < 0.3 * losses[0].loss
    first, last = losses[0].mtp_loss, losses[-1].mtp_loss
    assert first is not None and last is not None and last < 0.8 * first


def test_accumulated_micro_batches_equal_one_batch():
    whole, parts = TrainState(CONFIG, "cpu"), TrainState(CONFIG, "cpu")
    a, b = batch_of([32, 20, 12], seed=1), batch_of([64], seed=2)
    both = batch_of([32, 20, 12, 64])
    both.tokens_T[:], both.targets_T[:] = torch.cat([a.tokens_T, b.tokens_T]), torch.cat([a.targets_T, b.targets_T])
    one, two = train_step(whole, [both]), train_step(parts, [a, b])
    assert two.loss == pytest.approx(one.loss, rel=1e-5) and two.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    main = slice(0, -1)  # the multi-token module sees another token behind each batch's last, where it predicts nothing
    assert one.loads_LE is not None and two.loads_LE is not None
    assert torch.equal(one.loads_LE[main], two.loads_LE[main])


def test_recomputed_activations_give_the_same_step():
    plain, again = TrainState(CONFIG, "cpu"), TrainState(replace(CONFIG, recompute=True), "cpu")
    for seed in range(3):
        train_step(plain, [batch_of([40, 24], seed=seed)])
        train_step(again, [batch_of([40, 24], seed=seed)])
    expected = weights(plain)
    assert all(torch.equal(value, expected[name]) for name, value in weights(again).items())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(poison: float):
    state = TrainState(CONFIG, "cpu")
    train_step(state, [batch_of([64])])
    row = state.model.embed.weight.data[7].clone()
    state.model.embed.weight.data[7] = poison
    before, moments = weights(state), {k: v.clone() for k, v in state.tensors().items()}
    batch = batch_of([64])
    batch.tokens_T[10] = 7
    result = train_step(state, [batch])
    assert result.skipped and (state.counters.step, state.counters.updates, state.counters.skips_in_a_row) == (2, 1, 1)
    after = weights(state)
    assert all(torch.equal(after[name], before[name]) for name in before if name != "embed.weight")
    assert all(torch.equal(value, moments[name]) for name, value in state.tensors().items())
    state.model.embed.weight.data[7] = row
    assert train_step(state, [batch_of([64])]).skipped is None and state.counters.skips_in_a_row == 0


def test_a_spike_is_skipped():
    state = TrainState(CONFIG, "cpu")
    for _ in range(30):
        train_step(state, [batch_of([64])])
    assert state.counters.mean_loss < 4
    result = train_step(state, [batch_of([64], seed=5)])
    assert result.skipped is not None and "spiked" in result.skipped


def test_resting_multi_token_modules_cost_nothing_and_stay_put():
    state = TrainState(replace(CONFIG, loss=LossConfig(mtp_from=0.5)), "cpu")
    before = weights(state)
    result = train_step(state, [batch_of([64])])
    after = weights(state)
    assert result.mtp_loss is None
    assert all(torch.equal(after[n], before[n]) for n in before if n.startswith("mtp."))
    assert not torch.equal(after["head.weight"], before["head.weight"])
    state.counters.step, state.counters.progress = 25, 0.5
    assert train_step(state, [batch_of([64])]).mtp_loss is not None


@pytest.mark.slow
def test_the_bias_evens_out_the_experts():
    state = TrainState(replace(CONFIG, loss=LossConfig(bias_speed=0.01), optim=OptimConfig(lr=1e-4)), "cpu")
    for router in routers(state.model):
        router.weight.data *= 10  # scores differ by tenths
        router.bias[:3] = 0.3  # every token chooses among three experts of eight
    ratios = [train_step(state, [batch_of([64, 64], seed=i % 4)]).load_max_over_mean for i in range(80)]
    assert ratios[0] > 2.2 and sum(ratios[-10:]) / 10 < 1.7


def test_tensors_and_counters_carry_a_run_over_bit_for_bit():
    for dtype in ("fp32", "bf16"):
        config = replace(CONFIG, dtype=dtype)
        first = TrainState(config, "cpu")
        for seed in range(4):
            train_step(first, [batch_of([64], seed=seed)])
        second = TrainState(replace(config, seed=9), "cpu")
        second.model.load_state_dict(weights(first))
        second.load({k: v.clone() for k, v in first.tensors().items()}, first.saved_counters())
        for seed in range(4, 8):
            a, b = train_step(first, [batch_of([64], seed=seed)]), train_step(second, [batch_of([64], seed=seed)])
            assert (a.loss, a.grad_norm) == (b.loss, b.grad_norm)
        expected = weights(first)
        assert all(torch.equal(value, expected[name]) for name, value in weights(second).items())


def test_balance_is_weighed_by_tokens_and_not_by_targets(monkeypatch):
    """Of two micro-batches of equal length, the one with few targets is worth half the balance loss all the same."""
    monkeypatch.setattr(loss, "sequence_balance", lambda routes, context: torch.ones(()))
    state = TrainState(replace(CONFIG, loss=LossConfig(mtp_weight=0.0, balance_alpha=0.5)), "cpu")
    few, many = batch_of([32, 32]), batch_of([32, 32])
    few.targets_T[8:] = -100
    parts = [backward(state, batch, n_targets=70, n_tokens=128) for batch in (few, many)]
    weighed = [(part.total - part.main).item() for part in parts]
    assert weighed == pytest.approx([0.25 * len(parts[0].routes)] * 2)
