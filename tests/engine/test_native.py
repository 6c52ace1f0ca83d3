"""The model as a program equals its forward pass, and no row of it depends on another."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shoal.engine import engine as engines
from shoal.engine import native
from shoal.engine.attend import Span
from shoal.engine.cache import Cache
from shoal.engine.engine import LocalEngine
from shoal.engine.native import Native, cut, takes
from shoal.engine.request import Sampling, Token
from shoal.model.attend import Packed
from shoal.model.config import GQAConfig, Llama3RopeConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig
from shoal.model.layers import Linear
from shoal.model.transformer import Transformer
from shoal.ops import cpu
from tests.engine.models import ids, prompt, request, speculating

pytestmark = pytest.mark.skipif("native" not in cpu.status(), reason=cpu.status())

V3 = ModelConfig(
    vocab_size=512,
    dim=80,  # sizes that are multiples of 16 and not of 32
    n_layers=3,
    hidden_dim=112,
    attention=MLAConfig(6, 48, 16, 16, 16, q_lora_rank=48),
    moe=MoEConfig(16, 1, 3, 48, n_group=4, topk_group=2, routed_scaling_factor=2.5),
    n_mtp=1,
    rope_scaling=YarnConfig(4.0, original=64),
    max_positions=512,
    init_std=0.1,
)
V2 = replace(
    V3,
    attention=MLAConfig(2, 32, 32, 32, 48),
    moe=MoEConfig(6, 2, 2, 32, n_group=3, topk_group=1, scoring="softmax", norm_topk_prob=False),
    n_mtp=0,
)
LLAMA = replace(
    V2, attention=GQAConfig(10, 2, 32), moe=None, rope_scaling=Llama3RopeConfig(8.0, original=64), tie_embeddings=True
)
QWEN = replace(LLAMA, attention=GQAConfig(4, 4, 16, bias=True), rope_scaling=None)
NO_SHARED = replace(V3, moe=MoEConfig(4, 0, 1, 32, n_dense_layers=0), n_mtp=0)
MODELS = {"v3": V3, "v2": V2, "llama": LLAMA, "qwen": QWEN, "no shared expert": NO_SHARED}
N = 150  # tokens: more than a call takes, and pages


def built(config: ModelConfig, invariant: bool = True, seed: int = 0) -> tuple[Transformer, Native]:
    """Biases that matter, norms that aren't 1."""
    m = Transformer(config).init_weights(seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*m.parameters(), *m.buffers()]:
            if p.dim() == 1:
                p += 0.2 * torch.randn(p.shape, generator=generator)
    m.set_dtype(torch.bfloat16)
    cache = Cache(config, config.n_layers + config.n_mtp, 8, torch.bfloat16, torch.device("cpu"))
    return m, Native(m, cache, invariant)


def errors(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() - b.double()).norm(dim=-1) / b.double().norm(dim=-1)


def assert_as_exact(made: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Ours are nearly as close to the model in fp32 as its forward pass in bf16 is. Not so every row: a rounding may
    turn a router to another expert, in one model every tenth row of either."""
    at = torch.tensor([0.5, 0.9], dtype=torch.float64)
    ours, narrow = (torch.cat([errors(m[i], m[2]) for m in made]).quantile(at) for i in (0, 1))
    assert (ours < 1.5 * narrow).all(), (ours, narrow)


@torch.no_grad()
@pytest.mark.parametrize("invariant", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_program_equals_the_forward_pass(monkeypatch, name: str, invariant: bool):
    monkeypatch.setattr(native, "MOST", 100)
    bodies, modules = [], []
    for seed in range(8):
        m, runner = built(MODELS[name], invariant, seed)
        tokens = torch.tensor(prompt(N))
        exact = Transformer(m.config)
        exact.load_state_dict(m.state_dict())
        positions, attend = torch.arange(N), Packed([N])
        narrow, wide = (x.body(x.embed(tokens), positions, attend)[0] for x in (m, exact.float()))
        pages, ids = [5, 2, 7], tokens.tolist()
        begin = runner.body(ids[:7], [Span(0, 7, pages)])
        hidden = torch.cat([begin, runner.body(ids[7:], [Span(7, 1, pages), Span(8, N - 8, pages)])])
        bodies.append((hidden, narrow, wide))
        torch.testing.assert_close(runner.head(hidden), m.head(hidden).float(), atol=0.02, rtol=0.02)
        if m.config.n_mtp:
            following = m.embed(tokens[1:])
            narrow, wide = (
                x.mtp[0](hidden[:-1].to(e.dtype), e, positions[:-1], Packed([N - 1]))[0]
                for x, e in ((m, following), (exact, following.float()))
            )
            ours = runner._module(hidden[:-1], ids[1:], [Span(0, N - 1, [5, 2, 7])])
            modules.append((ours, narrow, wide))
            last, logits = runner.module(hidden[-3:-1], ids[-2:], [Span(N - 3, 2, [5, 2, 7])], [True])
            assert errors(last, ours[-1:]) < 0.05 and torch.equal(logits, runner.head(last))
    for made in (bodies, modules):
        if made:
            assert_as_exact(made)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["v3", "llama"])
def test_a_row_is_the_same_in_any_company(name: str, threads: int):
    m, runner = built(MODELS[name])
    a, b = prompt(N, 1), prompt(N, 2)
    whole = runner.body(a, [Span(0, N, [0, 1, 2])])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mixed, at = [], 0
        for n in (1, 2, 3, 4, 5, 64, 1, N - 80):
            spans = [Span(at, n, [6, 3, 4]), Span(at, 1, [5, 7, 0])]
            mixed.append(runner.body([*a[at : at + n], b[at]], spans)[:-1])
            at += n
        assert at == N and torch.equal(torch.cat(mixed), whole)
        assert torch.equal(torch.cat([runner.head(whole[i : i + 1]) for i in range(5)]), runner.head(whole)[:5])
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_chunks_of_several_streams_go_together():
    m, runner = built(V3, invariant=False)
    a, b, pages = prompt(N, 1), prompt(N, 2), ([0, 1, 2], [6, 4, 3])
    alone = []
    for x, p in ((a, pages[0]), (b, pages[1])):
        alone.append([runner.body(x[:90], [Span(0, 90, p)]), runner.body(x[90:], [Span(90, 60, p)])])
    runner.body(b[:90], [Span(0, 90, pages[0])])
    mixed = runner.body([*b[90:], *a[:90]], [Span(90, 60, pages[0]), Span(0, 90, pages[1])])
    assert torch.equal(mixed[:60], alone[1][1]) and torch.equal(mixed[60:], alone[0][0])


def test_spans_are_cut_to_fit():
    spans = [Span(3, 2, [0]), Span(0, 5, [1]), Span(7, 6, [2])]
    parts = [[span[:2] for span in part] for part in cut(spans, 4)]
    assert parts == [[(3, 2), (0, 2)], [(2, 3), (7, 1)], [(8, 4)], [(12, 1)]]


def test_weights_may_change_in_place():
    m, runner = built(LLAMA)
    before = runner.body([1, 2, 3], [Span(0, 3, [0])])
    with torch.no_grad():
        m.get_parameter("layers.1.attn.out.weight").mul_(2)
        after = m.body(m.embed(torch.tensor([1, 2, 3])), torch.arange(3), Packed([3]))[0]
    fresh = runner.body([1, 2, 3], [Span(0, 3, [0])])
    assert errors(fresh, after).max() < 0.02 < errors(before, after).min()


class Packed8(Linear):
    """A leaf put in place from outside."""


def test_models_with_parts_of_others_are_not_taken():
    m, _ = built(LLAMA)
    assert takes(m) and not takes(Transformer(LLAMA).init_weights(0))  # fp32
    m.layers[0].attn.__setattr__("q", Packed8(LLAMA.dim, 320))
    assert not takes(m.set_dtype(torch.bfloat16))
    odd = (GQAConfig(2, 2, 24), MLAConfig(2, 48, 8, 16, 16), MLAConfig(2, 40, 16, 16, 16))
    for attention in odd:
        assert not takes(Transformer(replace(LLAMA, attention=attention)).init_weights(0).set_dtype(torch.bfloat16))
    m, _ = built(LLAMA)
    assert not takes(m.to(torch.bfloat16))  # the norms, too
    m, _ = built(LLAMA)
    m.layers[0].get_parameter("ffn.down.weight").data = torch.zeros(80, 112)
    assert not takes(m)


class Watched:
    """Ends after the token `last`; from the fifth token on forces a 7 behind every 3 tokens."""

    def __init__(self, last: int):
        self.last, self.seen = last, []

    def accept(self, token: int) -> bool:
        self.seen.append(token)
        return len(self.seen) < self.last

    def forced(self) -> int | None:
        return 7 if len(self.seen) > 4 and len(self.seen) % 3 == 0 else None

    def mask(self) -> None:
        return None


def told(engine: LocalEngine, last: int) -> list[tuple[Token, ...]]:
    plain = [request(prompt(n, n), 90) for n in (1, 60, 63, 64)]
    guided = [request(prompt(20, n), 90, guide=Watched(last + n)) for n in range(3)]
    stopped = request(prompt(9), 90, stop_tokens=frozenset(range(0, 512, 9)))
    drawn = [request(prompt(n), 50 + n, Sampling(0.3 * n, seed=n, logprobs=0)) for n in range(1, 5)]
    counted = request(prompt(9), 30, Sampling(temperature=0, logprobs=0))
    steered = request(prompt(9), 30, Sampling(temperature=0, frequency_penalty=1.0))
    alone = [engine.generate([r])[0].tokens for r in (plain[2], stopped, drawn[0])]
    return [r.tokens for r in engine.generate([*plain, *guided, stopped, *drawn, counted, steered])] + alone


def test_steps_taken_together_say_the_same(monkeypatch):
    monkeypatch.setattr(engines, "TOGETHER_SECONDS", 10.0)
    m, _ = built(V3)
    together, single = LocalEngine(m, deterministic=True), LocalEngine(m, deterministic=True)
    single._runner.most_steps = 1
    stretches, steps = [], together._runner.steps  # type: ignore
    together._runner.steps = lambda work, n, *to: stretches.append(n) or steps(work, n, *to)  # type: ignore
    assert told(together, 11) == told(single, 11)
    assert max(stretches) == together._runner.most_steps and together.stats().steps >= 90
    together.close()
    single.close()


def test_more_streams_than_a_product_takes_rows_say_what_each_would_alone():
    m, _ = built(V3)
    engine = LocalEngine(m, deterministic=True)
    asked = [request(prompt(3, i), 12, Sampling(i % 3 / 2, seed=i, logprobs=0)) for i in range(100)]
    together = engine.generate(asked)
    assert engine.stats().steps < 40 and engine._runner.most_drawn == native.MOST  # type: ignore
    assert [engine.generate([asked[i]])[0].tokens for i in range(0, 100, 9)] == [r.tokens for r in together[::9]]
    engine.close()


def test_logits_are_bounded_by_bytes(monkeypatch):
    monkeypatch.setattr(native, "LOGITS_BYTES", 10 * 512 * 4)
    m, runner = built(V3)
    engine = LocalEngine(m, deterministic=True)
    assert runner.most_drawn == 10
    results = engine.generate([request(prompt(3, i), 12, Sampling(seed=i)) for i in range(30)])
    assert [ids(r) for r in results[::7]] == [
        ids(engine.generate([request(prompt(3, i), 12, Sampling(seed=i))])[0]) for i in range(0, 30, 7)
    ]
    engine.close()


def test_a_number_that_is_not_finite_ends_a_stretch_before_it():
    m, _ = built(V3)
    engine = LocalEngine(m, deterministic=True)
    expected = ids(engine.generate([request(prompt(9), 40)])[0])
    engine.close()
    at = next(i for i in range(15, 40) if expected[i] not in expected[:i])
    with torch.no_grad():
        m.embed.weight[expected[at]] = torch.nan
    engine = LocalEngine(m, deterministic=True)
    result = engine.generate([request(prompt(9), 40)])[0]
    assert result.finish == "error" and ids(result) == expected[: at + 1]
    engine.close()


def test_a_rest_of_the_module_is_no_slower_and_keeps_what_a_trial_needs():
    m, _ = built(V3)
    engine, plain = speculating(m, 1, gate=None), LocalEngine(m)
    sink_tokens: list = []

    def sink(step) -> None:
        sink_tokens.extend(step.tokens)
        if len(sink_tokens) > 80:
            engine._speculator.worth.way = 0.0  # type: ignore[union-attr]

    result = engine.generate([request(prompt(30), 120, sink=sink)])[0]
    assert ids(result) == ids(plain.generate([request(prompt(30), 120)])[0])
    assert result.usage.drafted > 0
    engine.close()
    plain.close()


@torch.no_grad()
def test_a_run_may_stop_where_experts_are_chosen_and_wait_for_them():
    m, runner = built(V3)
    p, rows = runner._body, next(runner._parts([1, 2, 3], [Span(0, 3, [0])]))
    whole, first = runner.body([1, 2, 3], [Span(0, 3, [0])]), 0
    parts = [block.get_submodule("ffn.experts") for block in m.layers[1:]]
    for (routed, _, experts), its in zip(p.mixtures, parts, strict=True):
        gate_up, down = (weight.detach().clone() for weight in its.parameters())
        for e in range(16):
            experts.clear(e)
        p.run(rows, routed, first)
        for e in p.busy():
            experts.place(e, gate_up[e, :48], gate_up[e, 48:], down[e])
        assert 3 <= len(p.busy()) <= 9
        first = routed
    p.run(rows, runner._before_head, first)
    assert torch.equal(runner._hidden[:3], whole)
    p.mixtures[-1].experts.clear(p.busy()[0])
    with pytest.raises(AssertionError, match="no place"):
        p.run(rows, runner._before_head)
