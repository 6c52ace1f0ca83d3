"""From the engine's thread to the event loop: steps are counted, journaled, and only then given to their readers.

    engine thread   sink(step) → Relay.steps                                   never blocks
    event loop      Relay.deliver: count all → one journal write → Generation.take each

A `Generation` is one API request under way: one or more choices, each an engine `Request` with its `Output`. It ends
when all choices have ended, reader or not, and then its row goes to the ledger: exactly one, whoever left early.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from shoal.engine.request import Engine, Guide, Request, Sink, Step, Token
from shoal.errors import RequestError
from shoal.server.answer import Spent
from shoal.server.auth import Key
from shoal.server.journal import Counts, Journal
from shoal.server.ledger import Prices, UsageRow, now_ms
from shoal.server.problem import Problem

if TYPE_CHECKING:
    from shoal.engine.output import Delta, Output

NOTHING = Counts()
RETRY_SECONDS = 5

log = logging.getLogger("shoal.server")


class Watched:
    """A guide that remembers why it refused to go on: the engine only says that a request failed."""

    def __init__(self, guide: Guide):
        self.guide = guide
        self.refused: RequestError | None = None

    def accept(self, token: int) -> bool:
        return self._told(lambda: self.guide.accept(token))

    def forced(self) -> int | None:
        return self._told(self.guide.forced)

    def mask(self) -> Any:
        return self._told(self.guide.mask)

    def _told(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except RequestError as e:
            self.refused = e
            raise


@dataclass(eq=False)
class Choice:
    index: int
    prompt: int  # which of the request's prompts it continues
    output: "Output"
    request: Request | None = None
    guide: Watched | None = None
    counts: Counts = NOTHING
    finish: str | None = None  # as clients know it

    def count(self, step: Step) -> None:
        """The first token proves that the prompt was read, even if the engine says how long it was only at the end."""
        assert self.request is not None
        prompt = max(self.counts.prompt, step.usage.prompt)
        if step.tokens and not prompt:
            prompt = len(self.request.tokens)
        completion = max(self.counts.completion + len(step.tokens), step.usage.completion)
        self.counts = Counts(prompt, max(self.counts.cached, step.usage.cached), completion)


class Event(NamedTuple):
    """What happened to a choice: more of it, or its end."""

    index: int
    deltas: "tuple[Delta, ...]"
    finish: str | None = None
    hidden: tuple[float, ...] = ()  # of what was embedded
    prompt: tuple[Token, ...] = ()  # of what is echoed
    end: tuple[Token, ...] = ()  # the token that ended what is echoed; it shows nothing


@dataclass(eq=False)
class Generation:
    id: str
    key: Key
    model: str  # as it stands in the ledger
    route: str
    prices: Prices
    promised: int  # tokens reserved of the key's budget
    buffered: int  # deltas that may wait for a slow reader
    priority: int
    engine: Engine
    ended: "Callable[[Generation], None]"
    choices: list[Choice] = field(default_factory=list)
    events: deque[Event] = field(default_factory=deque)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    problem: Problem | None = None  # why it ended before its time
    why: str | None = None  # the same in a word, for the ledger
    billed: bool = True
    done: bool = False
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    waiting: int = 0
    overdue: float | None = None  # when a cancelled one ends without the engine
    at: int = field(default_factory=now_ms)

    def row(self) -> dict[str, str | int]:
        """What the journal has to know to write the ledger's row without us."""
        facts = {"id": self.id, "at": self.at, "key": self.key.id, "tenant": self.key.tenant}
        return facts | {"model": self.model, "route": self.route} | self.prices._asdict()

    @property
    def counts(self) -> Counts:
        """Choices of one prompt share it: it is read once and billed once."""
        firsts = {choice.prompt: choice for choice in reversed(self.choices)}
        return Counts(
            sum(c.counts.prompt for c in firsts.values()),
            sum(c.counts.cached for c in firsts.values()),
            sum(c.counts.completion for c in self.choices),
        )

    def spent(self) -> Spent:
        reasoning = sum(choice.output.reasoning_tokens for choice in self.choices)
        return Spent(*self.counts, reasoning, self.prices)

    def usage_row(self) -> UsageRow:
        finishes = [choice.finish for choice in self.choices if choice.finish]
        now = time.perf_counter()
        return UsageRow(
            **self.row(),  # pyright: ignore[reportArgumentType]
            **self.counts._asdict(),
            reasoning=self.spent().reasoning,
            finish=self.why or (finishes[0] if finishes else "error"),
            first_token_ms=None if self.first is None else round(1000 * (self.first - self.started)),
            ms=round(1000 * (now - self.started)),
        )

    def take(self, choice: Choice, step: Step) -> None:
        if self.done or choice.finish is not None:
            return
        if step.tokens and self.first is None:
            self.first = time.perf_counter()
        try:
            deltas = tuple(choice.output.feed(step))
        except Exception:
            log.exception("%s can't be read", self.id)
            deltas, step = (), Step((), "error", step.usage, "its tokens can't be read")
        if step.finish is not None:
            choice.finish = self.finish(choice, step)
        if deltas or choice.finish:
            self.events.append(
                Event(choice.index, deltas, choice.finish, step.hidden, step.prompt, ending(choice, step))
            )
            self.waiting += len(deltas)
            self.ready.set()
        if self.waiting > self.buffered and self.why is None:
            self.cancel("stalled")
        if all(c.finish for c in self.choices):
            self.end()

    def finish(self, choice: Choice, step: Step) -> str:
        if step.finish == "error":
            log.error("the engine failed on %s: %s", self.id, step.error)
            refused = choice.guide and choice.guide.refused  # a grammar out of fuel is the asker's to mend
            self.fail(Problem.of(refused) if refused else engine_failed())
        return step.finish if step.finish in ("cancelled", "error") else choice.output.finish(step)

    def drained(self) -> list[Event]:
        found = list(self.events)
        self.events.clear()
        self.ready.clear()
        self.waiting = 0
        return found

    def cancel(self, why: str, problem: Problem | None = None) -> None:
        """Ask the engine to stop; the row is written when it has, or after a while if it never says so."""
        if self.done:
            return
        self.why, self.problem = self.why or why, self.problem or problem
        self.ready.set()
        for choice in self.choices:
            if choice.finish is None and choice.request is not None:
                self.engine.cancel(choice.request)

    def fail(self, problem: Problem) -> None:
        self.cancel("error", problem)

    def end(self) -> None:
        if not self.done:
            self.done = True
            self.ready.set()
            self.ended(self)


def ending(choice: Choice, step: Step) -> tuple[Token, ...]:
    """Who counts tokens of an echo counts this one: scores of a text leave out the one token that was drawn."""
    last = step.tokens[-1:] if step.prompt else ()
    return last if choice.request and any(t.id in choice.request.stop_tokens for t in last) else ()


class Relay:
    """Steps of all requests, from the engine's thread to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, journal: Journal, broken: Callable[[OSError], None]):
        self.loop, self.journal, self.broken = loop, journal, broken
        self.steps: deque[tuple[Generation, Choice, Step]] = deque()
        self.awake = False

    def sink(self, generation: Generation, choice: Choice) -> Sink:
        def put(step: Step) -> None:
            self.steps.append((generation, choice, step))
            if not self.awake:
                self.awake = True
                self.wake()

        return put

    def wake(self) -> None:
        try:
            self.loop.call_soon_threadsafe(self.deliver)
        except RuntimeError:  # the loop has ended: nobody is left to send to, and the journal has what was sent
            self.steps.clear()

    def deliver(self) -> None:
        self.awake = False  # first: a step that comes from here on wakes us again
        batch = []
        while self.steps:
            batch.append(self.steps.popleft())
        changed: dict[str, Generation] = {}
        before = [(choice, choice.counts) for _, choice, _ in batch]
        for generation, choice, step in batch:
            if not generation.done:
                choice.count(step)
                changed[generation.id] = generation
        for generation in changed.values():
            if generation.billed and generation.id in self.journal.open:
                self.journal.note(generation.id, generation.counts)
        if self.written():
            for generation, choice, step in batch:
                generation.take(choice, step)
        else:  # not sent, so not counted, whatever the engine will say of them
            for choice, counts in reversed(before):
                choice.counts = counts
            for generation in changed.values():
                generation.end()

    def written(self) -> bool:
        try:
            self.journal.flush()
        except OSError as e:
            self.broken(e)
            return False
        return True


def engine_failed() -> Problem:
    return Problem(503, "the engine failed on this request; try again", code="engine_failed", retry_after=RETRY_SECONDS)
