"""What fails in the engine fails alone: guides, sinks, steps, books, its thread, and numbers that aren't finite."""

import logging
import time
from dataclasses import replace
from threading import Event

import pytest
import torch

from shoal.engine.engine import LocalEngine
from shoal.engine.request import Sampling, Step
from shoal.engine.runner import Runner
from shoal.engine.speculate import Speculator
from shoal.errors import RequestError, StorageError
from shoal.model.transformer import Transformer
from tests.engine.models import (
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


def test_a_failing_guide_or_sink_fails_alone(made, caplog):
    engine = made()

    def broken(step: Step) -> None:
        raise OSError("gone")

    with caplog.at_level(logging.CRITICAL):
        engine.submit(request(prompt(9, 1), 50, sink=broken))
        bad, good, never = engine.generate(
            [
                request(prompt(9), 20, guide=Script(breaks_at=3)),
                request(prompt(9), 20),
                request(prompt(9), 20, guide=Script(masks={0: []})),
            ]
        )
        idle(engine)
    assert (bad.finish, never.finish) == ("error", "error") and bad.error
    assert good.finish == "length" and ids(good) == expected(model(), prompt(9), 20)


def test_a_failing_step_ends_who_was_in_it(made, monkeypatch, caplog):
    engine, run, calls = made(), Runner.run, []

    def sometimes(self, work, chosen=None):
        calls.append(work)
        if len(calls) == 4:
            raise RuntimeError("secret/path")
        return run(self, work, chosen)

    monkeypatch.setattr(Runner, "run", sometimes)
    with caplog.at_level(logging.CRITICAL):
        results = engine.generate([request(prompt(70, i), 20) for i in range(2)])
    assert "error" in [r.finish for r in results]
    assert all(r.error and "secret" not in r.error for r in results if r.finish == "error")
    assert ids(engine.generate([request(prompt(70), 20)])[0]) == expected(model(), prompt(70), 20)


def test_what_was_computed_while_files_changed_is_not_told(made, monkeypatch, caplog):
    changed, run = [], Runner.run

    def unchanged() -> None:
        if changed:
            raise StorageError("a file was changed", "one that stays", "open it again")

    def meanwhile(self, work, chosen=None):
        changed.append(work)
        return run(self, work, chosen)

    engine = made(unchanged=unchanged)
    with caplog.at_level(logging.CRITICAL), monkeypatch.context() as fault:
        fault.setattr(Runner, "run", meanwhile)
        (result,) = engine.generate([request(prompt(70), 5)])
    assert not result.tokens and "could not be read from the disk" in str(result.error)
    changed.clear()
    again = engine.generate([request(prompt(70), 5)])[0]
    assert ids(again) == expected(model(), prompt(70), 5) and again.usage.cached == 0


def test_books_that_went_wrong_are_begun_anew(made, monkeypatch, caplog):
    engine = made()

    def broken(*_):
        monkeypatch.undo()
        raise AssertionError("books")

    with caplog.at_level(logging.CRITICAL):
        monkeypatch.setattr(engine._scheduler, "schedule", broken)
        assert engine.generate([request(prompt(9), 5)])[0].finish == "error"
    assert ids(engine.generate([request(prompt(9), 5)])[0]) == expected(model(), prompt(9), 5)


@pytest.mark.parametrize("death", [AssertionError, MemoryError, SystemExit])
def test_what_kills_the_thread_ends_everybody_and_it_lives_on(made, monkeypatch, caplog, death: type[BaseException]):
    engine, ended = made(), []

    def broken(*_):
        raise death

    def sink(step: Step) -> None:
        ended.append(step.finish)
        raise death

    with caplog.at_level(logging.CRITICAL):
        for _ in range(3):
            monkeypatch.setattr(engine._scheduler, "schedule", broken)
            with engine._wake:
                for _ in range(2):
                    engine.submit(request(prompt(9), 5, sink=sink))
            while engine._live or engine._scheduler.schedule is broken:
                time.sleep(0.01)
    assert ended == ["error"] * 6
    assert ids(engine.generate([request(prompt(9), 5)])[0]) == expected(model(), prompt(9), 5)


def down(engine: LocalEngine) -> bool:
    try:
        engine.stats()
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("how", ["raises", "not finite"])
def test_a_model_that_keeps_failing_takes_the_engine_down_for_a_while(made, monkeypatch, caplog, how: str):
    engine, run = made(), Runner.run
    monkeypatch.setattr("shoal.engine.engine.LONGEST_REST", 0.3)

    def broken(self, work, chosen=None):
        if how == "raises":
            raise RuntimeError("CUDA error")
        hidden_TD, logits_RV = run(self, work, chosen)
        return hidden_TD, logits_RV * torch.nan

    def failing() -> None:
        assert engine.generate([request(prompt(9), 5)])[0].finish == "error"

    with caplog.at_level(logging.CRITICAL), monkeypatch.context() as fault:
        fault.setattr(Runner, "run", broken)
        failing()
        failing()
        assert not down(engine)
        for _ in range(2):
            failing()
            assert down(engine)
            with pytest.raises(RuntimeError, match="down"):
                engine.submit(request(prompt(9), 5))
            while down(engine):
                time.sleep(0.01)
    assert ids(engine.generate([request(prompt(9), 5)])[0]) == expected(model(), prompt(9), 5)
    with monkeypatch.context() as fault:
        fault.setattr(Runner, "run", broken)
        failing()
        assert not down(engine), "a whole step makes up for what was"


def test_a_request_that_fails_among_others_takes_nobody_down(made, monkeypatch, caplog):
    """Each time alone in its step, with whole steps of others between."""
    engine, run, running = made(), Runner.run, Event()
    others = request(prompt(9, 1), 200, sink=lambda step: running.set())

    def poisoned(self, work, chosen=None):
        hidden_TD, logits_RV = run(self, work, chosen)
        bad = [w.stream.request.salt == "bad" for w in work for _ in range(w.draws)]
        logits_RV[torch.tensor(bad, dtype=torch.bool)] = torch.nan
        return hidden_TD, logits_RV

    monkeypatch.setattr(Runner, "run", poisoned)
    engine.submit(others)
    assert running.wait(10)
    for _ in range(10):
        assert engine.generate([request(prompt(9), 5, salt="bad")])[0].finish == "error"
        assert not down(engine)
    engine.cancel(others)
    idle(engine)


def test_it_can_be_closed_while_it_is_down(monkeypatch, caplog):
    engine = LocalEngine(model())
    with caplog.at_level(logging.CRITICAL):
        monkeypatch.setattr(Runner, "run", lambda *_: 1 / 0)
        for _ in range(3):
            engine.generate([request(prompt(9), 5)])
    assert down(engine)
    engine.close()
    with pytest.raises(RequestError, match="closed"):
        engine.submit(request(prompt(9), 5))


def test_a_step_that_hangs_holds_up_nobody_who_closes_it(monkeypatch, caplog):
    engine, run, entered, go_on, told = LocalEngine(model()), Runner.run, Event(), Event(), []

    def hanging(self, work, chosen=None):
        entered.set()
        go_on.wait(20)
        return run(self, work, chosen)

    monkeypatch.setattr(Runner, "run", hanging)
    engine.submit(request(prompt(9), 5, sink=told.append))
    assert entered.wait(10)
    with caplog.at_level(logging.CRITICAL):
        engine.close(0.01)
    assert "stuck" in caplog.text and not told
    go_on.set()
    engine.close()
    assert told[-1].finish == "cancelled"


def test_tokens_that_were_never_told_are_not_counted(made, monkeypatch, caplog):
    engine, follow, calls = made(depth=1, max_batch_tokens=64), Speculator.follow, []

    def sometimes(self, streams, drafting):
        calls.append(streams)
        if len(calls) == 4:
            raise RuntimeError
        follow(self, streams, drafting)

    monkeypatch.setattr(Speculator, "follow", sometimes)
    with caplog.at_level(logging.CRITICAL):
        result = engine.generate([request(prompt(9), 50)])[0]
    assert result.finish == "error" and result.usage.completion == len(result.tokens) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_not_finite_stay_with_their_request(made, kind: str):
    m = Transformer(replace(KINDS[kind], tie_embeddings=False)).init_weights(0)
    m.embed.weight.data[7] = torch.nan
    engine, clean = made(m, memory_bytes=pages(made(m), 4)), tuple(t for t in prompt(70) if t != 7)
    poisoned = (*clean[:20], 7, *clean[20:60])
    right = expected(m, clean, 9)
    assert 7 not in right
    for _ in range(2):  # the second time on pages that held the poison
        asked = [request(poisoned, 9, Sampling(logprobs=2)), request(clean, 9, Sampling(0, top_p=0.5))]
        bad, good = engine.generate(asked)
        assert bad.finish == "error" and "finite" in (bad.error or "")
        assert ids(good) == right
    assert all(kept.isfinite().all() for layer in engine._cache.layers for kept in layer)


def test_poison_is_found_before_anybody_shares_it(made):
    """In the middle of a prompt, steps before its draw: whoever gets its pages next must not inherit it."""
    m = Transformer(replace(LATENT, tie_embeddings=False)).init_weights(0)
    m.embed.weight.data[7] = torch.nan
    engine, clean = made(m, max_batch_tokens=32), tuple(t for t in prompt(200) if t != 7)
    bad = engine.generate([request((*clean[:70], 7, *clean[70:180]), 9)])[0]
    assert (bad.finish, engine.stats().steps) == ("error", 3)
    assert all(kept.isfinite().all() for layer in engine._cache.layers for kept in layer)
    assert engine.generate([request(clean, 2)])[0].usage.cached == 0
