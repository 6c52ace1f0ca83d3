"""Admission without HTTP: what is refused leaves nothing behind, and what fails is tried so often and no more."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from shoal.server.auth import Key, Keys
from shoal.server.batch import TRIES, Batches, Line
from shoal.server.generation import Generation, engine_failed
from shoal.server.ledger import Ledger
from shoal.server.problem import Problem
from shoal.server.protocol import Ask, read_chat
from shoal.server.service import Service
from tests.server.fake import Bytes, FakeEngine
from tests.server.running import CHAT, NAME


@pytest.fixture
def service(tmp_path) -> Iterator[Service]:
    engine, ledger = FakeEngine(), Ledger(f"sqlite:///{tmp_path}/ledger.db")
    yield Service(engine, Bytes(), NAME, ledger, tmp_path / "journals", Keys(required=True))  # type: ignore[arg-type]
    engine.close()
    ledger.close()


def ask(**fields: Any) -> Ask:
    """A prompt of three tokens."""
    asked = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "thinking": {"type": "disabled"}}
    return read_chat(json.dumps(asked | fields).encode())


@pytest.mark.parametrize("ended", [None, lambda generation: None], ids=["of a client", "of a batch"])
def test_what_the_engine_refuses_leaves_nothing_behind(service, monkeypatch, ended):
    key = Key("a", "t", tokens_per_minute=10)

    def refuse(request: object) -> None:
        raise RuntimeError("it is closing")

    async def refused() -> None:
        await service.start()
        with pytest.raises(Problem, match="the engine failed"):
            await service.admit(ask(), key, "req-1", CHAT, ended=ended)
        assert not service.generations and not service.keys.unsettled and not service.journal.open
        assert service.keys.allowed(key, 0, None, 1) == 1, "its tokens are given back"
        await service.stop()

    monkeypatch.setattr(service.engine, "submit", refuse)
    asyncio.run(refused())


def test_a_budget_has_a_token_for_each_answer_or_refuses_them(service):
    key = Key("a", "t", token_budget=6)

    async def promised(n: int) -> int:
        generation: Generation = await service.admit(ask(n=n), key, "req-1", CHAT)
        return generation.promised

    async def asked() -> None:
        await service.start()
        with pytest.raises(Problem, match="3 tokens left for 4 answers") as refused:
            await promised(4)
        assert refused.value.status == 402 and await promised(3) == 6
        await service.stop()

    asyncio.run(asked())


def test_only_failures_of_the_engine_count_as_tries_of_a_line(service, monkeypatch):
    busy = Problem(429, "later", code="rate_limit_exceeded")
    rounds, put = iter([*[busy] * TRIES, *[engine_failed(), busy] * (TRIES - 1), engine_failed()]), []
    batches = Batches(service)
    row = {"id": "b", "status": "in_progress", "owner": batches.id, "key": ""}

    async def generate(*_: object) -> None:
        raise next(rounds)

    async def at_once(seconds: float) -> None:
        pass

    monkeypatch.setattr(batches, "row", lambda batch_id: row)
    monkeypatch.setattr(batches, "generate", generate)
    monkeypatch.setattr(batches, "put", lambda *answer: put.append(answer))
    monkeypatch.setattr(asyncio, "sleep", at_once)
    asyncio.run(batches.work("b", iter([Line(1, "a", b"")])))
    assert [status for _, _, _, status, *_ in put] == [503] and next(rounds, None) is None
