"""The engine from outside: right tokens for everyone, whatever happens to the others, and books that close."""

import time
from dataclasses import replace
from threading import Event

import pytest
import torch

from shoal.engine.engine import LocalEngine
from shoal.engine.gather import silent
from shoal.engine.request import Request, Sampling, Step
from shoal.errors import RequestError, ResourceError
from shoal.model.config import ModelConfig
from shoal.model.transformer import Transformer
from tests.engine.models import (
    GREEDY,
    GROUPED,
    KINDS,
    LATENT,
    Script,
    expected,
    idle,
    ids,
    model,
    pages,
    prompt,
    request,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 16}, {"speculate": 1, "max_batch_tokens": 50}])
def test_a_mixed_batch_says_what_each_would_alone(made, kind: str, options: dict):
    m = model(KINDS[kind])
    engine = made(m, **options)
    prompts = [prompt(n, n) for n in (1, 5, 63, 64, 65, 150)]
    results = engine.generate([request(p, 20) for p in prompts])
    assert [ids(r) for r in results] == [expected(m, p, 20) for p in prompts]
    assert {(r.finish, r.usage.completion) for r in results} == {("length", 20)}
    stats = engine.stats()
    assert (stats.tokens_in, stats.tokens_out) == (sum(map(len, prompts)), 120)


def test_narrow_weights_run():
    for config in KINDS.values():
        m = Transformer(config).init_weights(0).set_dtype(torch.bfloat16)
        engine = LocalEngine(m, speculate=1)
        results = engine.generate([request(prompt(n, n), 9, Sampling(logprobs=1)) for n in (3, 70)])
        assert all(r.finish == "length" and len(r.tokens) == 9 for r in results)
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"speculate": 1}, {"deterministic": True}])
def test_a_known_prefix_is_not_computed_again(made, options: dict):
    engine, start = made(**options), prompt(150)
    first = engine.generate([request(start, 5)])[0]
    longer = start + prompt(20, 9)
    again, other, stranger = engine.generate([request(start, 5), request(longer, 5), request(start, 5, salt="x")])
    assert [r.usage.cached for r in (first, again, other, stranger)] == [0, 128, 128, 0]
    assert ids(first) == ids(again) == ids(stranger) == expected(model(), start, 5)
    assert ids(other) == expected(model(), longer, 5)
    assert engine.stats().tokens_cached == 256
    engine.forget()
    assert engine.generate([request(start, 5)])[0].usage.cached == 0


def test_changed_weights_make_the_cache_void(made):
    m = Transformer(LATENT).init_weights(0)
    engine, begun = made(m), Event()
    stopped = request(prompt(150), 100, sink=lambda step: begun.set())
    engine.submit(stopped)
    begun.wait(10)
    m.load_state_dict(model(LATENT, seed=1).state_dict())
    engine.forget()
    again = engine.generate([request(prompt(150), 9)])[0]
    assert ids(again) == expected(model(LATENT, seed=1), prompt(150), 9)
    engine.cancel(stopped)
    idle(engine)


def test_an_answer_is_a_known_prefix_of_the_next_turn(made):
    engine, start = made(speculate=1), prompt(60)
    answer = ids(engine.generate([request(start, 140)])[0])
    turn = start + tuple(answer) + prompt(5, 3)
    assert engine.generate([request(turn, 5)])[0].usage.cached >= 128


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"speculate": 2}])
def test_a_full_cache_delays_and_changes_nothing(made, options: dict):
    engine = made(memory_bytes=pages(made(**options), 5), **options)
    assert engine.context == 256 and engine.stats().pages == 5
    prompts = [prompt(50, i) for i in range(4)]
    results = engine.generate([request(p, 85) for p in prompts])
    assert [ids(r) for r in results] == [expected(model(), p, 85) for p in prompts]
    assert engine._scheduler.preemptions > 0


def test_priority_goes_first_and_positions_say_so(made):
    engine, order, gate = made(memory_bytes=pages(made(), 4)), [], Event()

    def asked(name: str, priority: int) -> Request:
        def sink(step: Step) -> None:
            gate.wait(10)
            if step.finish:
                order.append(name)

        return request(prompt(180, priority), 60, sink=sink, priority=priority)

    first, batch, chat = asked("first", 0), asked("batch", 5), asked("chat", 1)
    for r in (first, batch, chat):
        engine.submit(r)
    while engine.stats().running == 0:
        time.sleep(0.01)
    assert [engine.position(r) for r in (first, chat, batch)] == [0, 0, 1]
    gate.set()
    idle(engine)
    assert order == ["first", "chat", "batch"]
    assert engine.position(first) == 0


def test_a_cancelled_request_ends_within_a_step(made):
    engine, steps = made(max_batch_tokens=32), []

    def sink(step: Step) -> None:
        steps.append(step)
        if len(steps) == 3:
            engine.cancel(asked)

    asked = request(prompt(40), 200, sink=sink)
    others = [request(prompt(n, n), 12) for n in (30, 100)]
    engine.submit(asked)
    results = engine.generate(others)
    idle(engine)
    assert [s.finish for s in steps] == [None, None, None, "cancelled"]
    assert steps[-1].usage.completion == 3 and engine.stats().pages_used == 0
    assert [ids(r) for r in results] == [expected(model(), r.tokens, 12) for r in others]
    engine.cancel(asked)  # ended long ago


def test_a_cancel_is_for_what_was_under_way(made, monkeypatch):
    """It came too late, and the same request is asked again: that one runs."""
    engine, finishes, advance = made(), [], LocalEngine._advance

    def late(self, w, drawn):
        if not finishes:
            self.cancel(asked)
        return advance(self, w, drawn)

    def sink(step: Step) -> None:
        finishes.append(step.finish)
        if len(finishes) == 1:
            engine.submit(asked)

    monkeypatch.setattr(LocalEngine, "_advance", late)
    asked = request(prompt(9), 1, sink=sink)
    engine.submit(asked)
    while len(finishes) < 2:
        time.sleep(0.01)
    assert finishes == ["length", "length"]


def test_many_come_and_go(made):
    """Cancelled while they wait, in the middle of their prompt, and while they decode."""
    engine, ended = made(memory_bytes=pages(made(), 8), max_batch_tokens=48, speculate=1), []

    def sink(step: Step) -> None:
        ended.extend([step.finish] if step.finish else [])

    asked = [request(prompt(10 + 7 * i, i % 5), 30, sink=sink) for i in range(30)]
    for i, r in enumerate(asked):
        engine.submit(r)
        if i % 2:
            engine.cancel(asked[i // 2])
    time.sleep(0.05)
    for r in asked[::3]:
        engine.cancel(r)
    idle(engine)
    assert len(ended) == 30 and set(ended) <= {"cancelled", "length"} and engine.stats().pages_used == 0


def test_closing_ends_everyone():
    engine, ended = LocalEngine(model()), []
    for i in range(5):
        engine.submit(request(prompt(200, i), 50, sink=lambda s: s.finish and ended.append(s.finish)))
    engine.close()
    assert len(ended) == 5 and "cancelled" in ended
    with pytest.raises(RequestError, match="closed"):
        engine.submit(request(prompt(3), 3))


@pytest.mark.parametrize("options", [{}, {"depth": 3}])
def test_a_guide_steers_and_ends(made, options: dict):
    engine = made(**options)
    guide = Script(forced={0: 7, 5: 9, 6: 9}, masks={1: [3], 8: [4, 5], 20: [2]}, last=25)
    result = engine.generate([request(prompt(20), 60, guide=guide)])[0]
    tokens = ids(result)
    assert guide.seen == tokens and len(tokens) == 25 and result.finish == "stop"
    assert (tokens[0], tokens[1], tokens[5], tokens[6], tokens[20]) == (7, 3, 9, 9, 2) and tokens[8] in (4, 5)
    assert tokens[2:5] == expected(model(), (*prompt(20), 7, 3), 3)  # free again
    always = Script(masks={i: range(500) for i in range(30)})
    assert engine.generate([request(prompt(20), 30, guide=always)])[0].usage.drafted == 0
    assert tokens[9:20] == expected(model(), (*prompt(20), *tokens[:9]), 11)


def test_stop_tokens_are_given_and_end(made):
    tokens = expected(model(), prompt(20), 12)
    stop = frozenset({tokens[6], 511})
    result = made(speculate=2).generate([request(prompt(20), 12, stop_tokens=stop)])[0]
    assert ids(result) == tokens[: tokens.index(tokens[6]) + 1] and result.finish == "stop"


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, dtype",
    [(LATENT, torch.float32), (LATENT, torch.bfloat16), (GROUPED, torch.float32)],
    ids=["latent", "narrow", "grouped"],
)
def test_deterministic_means_to_the_last_bit(made, config: ModelConfig, dtype: torch.dtype):
    """Alone, in company, in chunks, after a cache hit, on few pages, and with drafts: tokens and log-probabilities."""
    m = Transformer(config).init_weights(0).set_dtype(dtype)
    asked = [
        request(prompt(70, 1), 6, replace(GREEDY, logprobs=3)),
        request(prompt(40, 2), 30, Sampling(0.8, top_p=0.9, seed=5, logprobs=1)),
        request(prompt(5, 3), 9, Sampling(seed=6, frequency_penalty=0.5, logprobs=0)),
    ]
    alone = made(m, deterministic=True)
    first = [alone.generate([r])[0].tokens for r in asked]
    hits = alone.generate(asked)
    assert [r.tokens for r in hits] == first and hits[0].usage.cached == 64
    ways = [{"max_batch_tokens": 7}, {"memory_bytes": pages(alone, 4)}, {"depth": 2} if m.config.n_mtp else {}]
    for options in ways:
        engine = made(m, deterministic=True, **options)
        assert [r.tokens for r in engine.generate(asked[::-1])][::-1] == first
    assert engine.stats().drafted > 0 or not m.config.n_mtp


@pytest.mark.parametrize(
    "tokens, n, param, code",
    [
        ((), 5, "prompt", "invalid_request"),
        ((1,), 0, "max_tokens", "invalid_request"),
        ((1,) * 200, 57, "max_tokens", "context_length_exceeded"),
        ((1,) * 300, 1, "prompt", "context_length_exceeded"),
        ((1, 512), 5, "prompt", "invalid_request"),
        ((-1,), 5, "prompt", "invalid_request"),
    ],
)
def test_what_can_never_run_is_refused(made, tokens, n, param, code):
    with pytest.raises(RequestError) as error:
        made().submit(request(tokens, n))
    assert (error.value.param, error.value.code) == (param, code)


def test_the_context_is_what_the_cache_holds(made):
    assert made(memory_bytes=pages(made(), 2)).context == 128
    assert made(context=100).context == 100
    drafting = made(memory_bytes=pages(made(depth=3), 2), depth=3)  # to the last token of the last page
    whole = drafting.generate([request(prompt(100), 28)])[0]
    assert ids(whole) == expected(model(), prompt(100), 28)
    with pytest.raises(ResourceError, match="page"):
        LocalEngine(model(), memory_bytes=100)


def test_steps_add_up_to_the_result(made):
    steps: list[Step] = []
    result = made(speculate=2).generate([request(prompt(30), 20, sink=steps.append)])[0]
    assert tuple(t for s in steps for t in s.tokens) == result.tokens
    assert [s.finish for s in steps[:-1]] == [None] * (len(steps) - 1) and steps[-1].usage == result.usage
    silent(steps[0])
