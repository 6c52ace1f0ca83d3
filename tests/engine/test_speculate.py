"""Drafts change how fast tokens come, and never which: greedy the same ones, sampled the same distribution."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from shoal.engine.engine import LocalEngine
from shoal.engine.pages import UNIT
from shoal.engine.request import Sampling
from shoal.engine.speculate import GATES, Worth
from shoal.engine.stream import Stream
from shoal.model.attend import Packed
from shoal.model.transformer import Transformer
from tests.engine.models import LATENT, expected, foresighted, ids, model, prompt, request, speculating


@pytest.mark.parametrize("depth", [1, 3])
def test_greedy_tokens_are_those_of_plain_decoding(depth: int):
    engine = speculating(model(), depth, max_batch_tokens=100)
    prompts = [prompt(n, n) for n in (1, 60, 63, 64, 150)]
    results = engine.generate([request(p, 40) for p in prompts])
    assert [ids(r) for r in results] == [expected(model(), p, 40) for p in prompts]
    assert all(r.usage.drafted > r.usage.accepted for r in results)
    engine.close()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_good_drafts_save_steps(depth: int):
    m = foresighted()
    engine = speculating(m, depth)
    result = engine.generate([request(prompt(20, 0, 16), 61)])[0]
    assert ids(result) == expected(m, prompt(20, 0, 16), 61)
    assert result.usage.accepted == result.usage.drafted == 60 * depth // (depth + 1)
    assert engine.stats().steps == 1 + 60 // (depth + 1)
    engine.close()


@pytest.mark.parametrize(
    "penalty",
    [{"presence_penalty": 1.0}, {"frequency_penalty": 0.7}, {"repetition_penalty": 1.4}],
)
def test_26_penalties_count_the_drafts_that_stood(penalty: dict):
    m, tokens, sampling = foresighted(), prompt(20, 0, 16), Sampling(temperature=0, **penalty)
    plain, drafting = LocalEngine(m), speculating(m, 3)
    asked = request(tokens, 40, sampling)
    right, found = (engine.generate([asked])[0] for engine in (plain, drafting))
    assert ids(found) == ids(right) != expected(m, tokens, 40) and found.usage.accepted > 0
    plain.close()
    drafting.close()


@pytest.mark.slow
@pytest.mark.parametrize("sampling, gate", [(Sampling(), 0.0), (Sampling(0.7, top_p=0.9), 0.55)])
def test_sampled_sequences_keep_their_distribution(sampling: Sampling, gate: float):
    """All 3⁴ continuations of a prompt against the model's own probabilities; drafts right and wrong, two deep."""
    n, V, start = 2000, 3, (1, 2, 0)
    m = Transformer(replace(LATENT, vocab_size=V, init_std=0.12)).init_weights(6)
    p = continuations(m, start, 4, sampling)
    engine = speculating(m, 2, gate, max_batch_tokens=1 << 14, memory_bytes=1 << 29)
    results = engine.generate([request(start, 4, sampling) for _ in range(n)])
    counts = torch.zeros_like(p)
    for result in results:
        counts[tuple(ids(result))] += 1
    assert p.sum().item() == pytest.approx(1) and (counts[p == 0] == 0).all()
    common = p * n >= 5
    chi = ((counts - p * n).square() / (p * n))[common].sum().item()
    freedom = int(common.sum())
    assert freedom > 10 and chi < freedom + 4 * (2 * freedom) ** 0.5
    stats = engine.stats()
    assert stats.drafted > (0.3 if gate else 1.5) * n and 0.2 < stats.accepted / stats.drafted < 0.95
    engine.close()


@torch.no_grad()
def continuations(m: Transformer, start: tuple[int, ...], n: int, s: Sampling) -> torch.Tensor:
    """The probability of each of the V^n continuations, from one plain forward over all of them: [V] * n, fp64."""
    V, L = m.config.vocab_size, len(start) + n
    all_of_them = list(product(range(V), repeat=n))
    tokens_T = torch.tensor([t for then in all_of_them for t in start + then])
    logits = m(tokens_T, torch.arange(L).repeat(V**n), Packed([L] * V**n)).double().view(V**n, L, V)
    p, order = (logits[:, len(start) - 1 : -1] / s.temperature).softmax(-1).sort(descending=True)
    p[p.cumsum(-1) - p >= s.top_p] = 0
    p = torch.zeros_like(p).scatter(-1, order, p / p.sum(-1, keepdim=True))
    chosen = p.gather(-1, torch.tensor(all_of_them)[..., None])[..., 0]
    return chosen.prod(-1).view([V] * n)


def test_a_seed_means_the_same_tokens_with_drafts_and_without():
    """In every batch too."""
    sampling = Sampling(0.9, top_p=0.95, presence_penalty=0.5, seed=11, logprobs=1)
    for m, V in ((model(), 512), (foresighted(), 16)):
        asked = [request(prompt(30, i, V), 25, sampling) for i in range(3)]
        plain, drafting = LocalEngine(m), speculating(m, 2)
        alone = [ids(plain.generate([r])[0]) for r in asked]
        assert [ids(r) for r in drafting.generate(asked)] == alone
        assert drafting.stats().drafted > 0
        plain.close()
        drafting.close()


class Kept(Packed):
    """Remembers what a cache should hold."""

    def __init__(self, n: int):
        super().__init__([n])
        self.rows: dict[int, torch.Tensor] = {}

    def latent(self, layer, q_nope_THN, q_rope_THR, c_TC, k_rope_TR, up, scale):
        self.rows[layer] = torch.cat([c_TC, k_rope_TR], -1)
        return super().latent(layer, q_nope_THN, q_rope_THR, c_TC, k_rope_TR, up, scale)


@torch.no_grad()
@pytest.mark.parametrize("m, V", [(model(), 512), (foresighted(), 16)], ids=["wrong", "right"])
def test_the_modules_rows_are_as_if_computed_in_one_pass(m: Transformer, V: int):
    """Through drafts accepted and refused."""
    engine = speculating(m, 3, max_batch_tokens=40)
    asked = request(prompt(90, 5, V), 110)
    result = engine.generate([asked])[0]
    tokens = list(asked.tokens) + ids(result)
    attend, positions = Kept(199), torch.arange(199)
    hidden, _ = m.body(m.embed(torch.tensor(tokens[:-1])), positions, attend)
    m.mtp[0](hidden, m.embed(torch.tensor(tokens[1:])), positions, attend)
    stream = Stream(replace(asked, tokens=tuple(tokens)), 0, 0)
    pages = engine._scheduler.pages.share(stream.keys())
    assert len(pages) == 3 and len(engine._cache.layers) == m.config.n_layers + 1
    for layer, (latent_PUW,) in enumerate(engine._cache.layers):
        kept = latent_PUW[pages].flatten(0, 1)
        torch.testing.assert_close(kept, attend.rows[layer][: 3 * UNIT], atol=2e-4, rtol=1e-3)
    assert result.usage.drafted > 0
    engine._scheduler.pages.give(pages)
    engine.close()


@pytest.mark.slow
def test_a_rest_costs_nothing_and_a_trial_begins_with_some_context():
    m, V = foresighted(), 16
    engine = speculating(m, 1, gate=None, max_batch_tokens=40)
    told, runs, module = [], [], engine._runner.module
    engine._runner.module = lambda *a: runs.append(len(a[1])) or module(*a)  # type: ignore[method-assign]

    def sink(step) -> None:
        told.extend(step.tokens)
        if len(told) >= 100:
            engine._speculator.worth.way = 0.0  # type: ignore[union-attr]

    result = engine.generate([request(prompt(90, 5, V), 160, sink=sink)])[0]
    assert ids(result) == expected(m, prompt(90, 5, V), 160)
    assert UNIT - 40 < runs[0] <= UNIT + 1 and sum(runs) < UNIT + 70
    assert result.usage.accepted == result.usage.drafted > 25
    engine.close()


def test_an_unsure_module_keeps_quiet():
    engine = speculating(model(), 2, gate=1.0)
    result = engine.generate([request(prompt(9), 20)])[0]
    assert result.usage.drafted == 0 and ids(result) == expected(model(), prompt(9), 20)
    engine.close()


def test_a_model_without_modules_decodes_plainly():
    m = Transformer(replace(LATENT, n_mtp=0)).init_weights(0)
    engine = LocalEngine(m, speculate=2)
    assert ids(engine.generate([request(prompt(9), 9)])[0]) == expected(m, prompt(9), 9)
    engine.close()


@pytest.mark.parametrize("best", [None, *GATES])
def test_the_best_way_is_found_and_the_others_tried_again(best: float | None):
    worth, ways, n = Worth(), [], 8000
    for _ in range(n):
        ways.append(worth(4))
        worth.record(4, 4, 0.5 if ways[-1] == best else 1.0)
    assert 0.96 < ways.count(best) / n < 0.995
    assert set(ways[1000:]) == {None, *GATES}
    assert ways.count(best) + 2 * (n - ways.count(best)) < 1.04 * n  # seconds, in those of the best way


def test_the_speedup_is_that_of_the_latest_batch_size():
    worth = Worth()
    assert worth.speedup == 1.0
    for streams, gain in ((1, 1.5), (8, 0.9)):
        for _ in range(400):
            worth.record(streams, streams, 1.0 if worth(streams) is None else 1 / gain)
        assert worth.speedup == pytest.approx(max(gain, 1.0))


def test_it_changes_its_mind_and_each_batch_size_has_its_own():
    worth, ways = Worth(), []
    for step in range(8000):
        ways.append(worth(1))
        worth.record(1, 1, 1.0 if ways[-1] is None else 2.0 if step < 4000 else 0.5)
        worth.record(32, 32, 1.0 if worth(32) is None else 0.5)
        if step == 3900:
            assert worth(32) is not None
    assert ways[2000:4000].count(None) > 1900 and ways[6000:].count(None) < 100
