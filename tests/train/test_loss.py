"""Losses against their plain definitions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from shoal.model.attend import Packed
from shoal.model.moe import Routes
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.train import loss as losses_room
from shoal.train.loss import evaluate, further, linear_cross_entropy, losses, sequence_balance
from tests.train.batches import batch_of

TINY = PRESETS["tiny"]


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 5000])
def test_chunked_cross_entropy_equals_whole_logits(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(losses_room, "CACHED_BYTES", chunk_bytes)
    torch.manual_seed(0)
    h, w, targets = torch.randn(37, 24), torch.randn(50, 24), torch.randint(50, (37,))
    targets[[3, 36]] = -100
    ours, exact = ([x.clone().requires_grad_() for x in (h, w)] for _ in range(2))
    value = linear_cross_entropy(ours[0], ours[1], targets, 1 / 35)
    expected = F.cross_entropy(exact[0] @ exact[1].T, targets)
    (3 * value).backward()
    (3 * expected).backward()
    torch.testing.assert_close(value, expected)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_further_targets_stay_in_their_segment():
    targets = torch.tensor([11, 12, 13, -100, 21, 22, -100])
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    assert further(targets, positions, 1).tolist() == [12, 13, -100, -100, 22, -100, -100]
    assert further(targets, positions, 2).tolist() == [13, -100, -100, -100, -100, -100, -100]


def test_multi_token_loss_is_the_cross_entropy_of_the_token_after_next():
    model = Transformer(replace(TINY, n_mtp=2)).init_weights(0)
    batch = batch_of([20, 12])
    n = int((batch.targets_T >= 0).sum())
    part = losses(model, batch, Packed(batch.lengths), n, mtp_weight=0.3, balance_alpha=0.0, context=32)
    attend = Packed(batch.lengths)
    embedded = model.embed(batch.tokens_T)
    h, _ = model.body(embedded, batch.positions_T, attend)
    main = F.cross_entropy(model.head(h), batch.targets_T, reduction="sum") / n
    total = 0.0
    for k, module in enumerate(model.mtp, start=1):
        h, _ = module(h, torch.cat([embedded[k:], embedded[:k]]), batch.positions_T, attend)
        logits, targets = model.head(h), batch.targets_T
        for t in range(len(targets) - k):
            inside = batch.positions_T[t + k] == batch.positions_T[t] + k
            if inside and targets[t + k] >= 0:
                total = total + F.cross_entropy(logits[t], targets[t + k]) / n
    assert part.mtp is not None
    torch.testing.assert_close(part.main, main)
    torch.testing.assert_close(part.mtp, total / 2)
    torch.testing.assert_close(part.total, main + 0.3 * total / 2)


def test_sequence_balance_equals_the_paper_and_is_least_when_even():
    torch.manual_seed(0)
    S, L, E, K = 3, 8, 6, 2
    scores = torch.rand(S * L, E)
    chosen = scores.topk(K).indices
    expected = 0.0
    for s in range(S):
        rows = range(s * L, (s + 1) * L)
        for e in range(E):
            f = E / (K * L) * sum(int(e in chosen[t]) for t in rows)
            p = sum((scores[t, e] / scores[t].sum()).item() for t in rows) / L
            expected += f * p / S
    routes = Routes(chosen, scores.gather(1, chosen), scores)
    assert sequence_balance(routes, L).item() == pytest.approx(expected, rel=1e-5)
    even = torch.arange(S * L * K).view(S * L, K) % E
    assert sequence_balance(Routes(even, torch.ones(S * L, K), torch.ones(S * L, E)), L).item() == pytest.approx(1.0)


def test_acceptance_counts_guesses_that_equal_the_models_own_next_choice():
    """A module that copies the main model's state one step late accepts exactly where the model repeats its choice."""
    model = Transformer(TINY).init_weights(1)
    batch = batch_of([24, 8])
    score = evaluate(model, [batch], Packed)
    h, _ = model.body(model.embed(batch.tokens_T), batch.positions_T, Packed(batch.lengths))
    best = model.head(h).argmax(-1)
    guess_h, _ = model.mtp[0](h, model.embed(batch.tokens_T.roll(-1)), batch.positions_T, Packed(batch.lengths))
    guess = model.head(guess_h).argmax(-1)
    drafted = [t for t in range(31) if further(batch.targets_T, batch.positions_T, 1)[t] >= 0]
    assert score.drafted == len(drafted)
    assert score.agreed == sum(int(guess[t] == best[t + 1]) for t in drafted)
    nats = F.cross_entropy(model.head(h), batch.targets_T, reduction="sum").item()
    assert score.nats == pytest.approx(nats, rel=1e-4)


def test_layers_and_modules_alike_are_run_by_the_runner():
    model, batch, ran = Transformer(replace(TINY, n_mtp=2)).init_weights(0), batch_of([20, 12]), []

    def run(layer, *args):
        ran.append(layer)
        return layer(*args)

    losses(model, batch, Packed(batch.lengths), 30, 0.3, 0.0, 32, run)
    assert ran == [*model.layers, *model.mtp]
