"""One model behind an API: who may ask what, tokens in, a `Generation` out. Knows nothing of HTTP.

    admit: model name → key's rates → tokens → context → queue → budget → journal → engine

Every check that can refuse comes before the journal's first line, so a refused request is not billed.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from shoal.engine.request import Engine, Request, Sampling, Stats
from shoal.errors import RequestError
from shoal.server.auth import Key, Keys
from shoal.server.clerk import Clerk, recover
from shoal.server.generation import Choice, Generation, Relay, Watched, engine_failed
from shoal.server.journal import Journal
from shoal.server.ledger import Ledger, Prices, UsageRow
from shoal.server.limits import Limits
from shoal.server.problem import Problem
from shoal.server.protocol import CHAT, REASONER, Ask

if TYPE_CHECKING:
    from shoal.engine.turns import Turns

PULSE_SECONDS = 1.0
MUCH = 2**62
TEXT_THREADS = 8  # a grammar that takes its two seconds must not hold up everyone's tokens
UNRECORDED, DEAD = "usage can't be recorded at the moment", "the engine is not running"
STUCK = "the engine is stuck in a step"
SHUTDOWN = "the server is shutting down"
SEED_STRIDE = 0x9E3779B97F4A7C15  # choices of one seeded request differ, and repeat together

T = TypeVar("T")
Ended = Callable[[Generation], None]
DEFAULTS = Limits()

log = logging.getLogger("shoal.server")


class Service:
    """`start` and everything after it belong to one event loop."""

    def __init__(
        self,
        engine: Engine,
        turns: "Turns",
        name: str,
        ledger: Ledger,
        journals: Path,
        keys: Keys,
        limits: Limits = DEFAULTS,
    ):
        self.engine, self.turns, self.name, self.ledger, self.limits = engine, turns, name, ledger, limits
        self.keys, self.journals = keys, journals
        self.prices = ledger.prices(name) or Prices()
        self.generations: dict[str, Generation] = {}
        self.promised: dict[str, int] = {}  # tokens, by request that has ended and whose row doesn't stand yet
        self.observers: list[Callable[[UsageRow], None]] = []
        self.draining = False
        self.engine_fault: str | None = None  # in words that anyone may read
        self.journal_fault: str | None = None
        self.seen: Stats | None = None
        self.still = 0.0  # seconds that the engine has been seen not to get on with its work
        self.threads = ThreadPoolExecutor(TEXT_THREADS, "shoal-text")

    async def start(self) -> None:
        """Settle what a killed server left, then open for requests."""
        loop = asyncio.get_running_loop()
        if n := recover(self.ledger, self.journals):
            log.warning("settled %d requests that a killed server had left open", n)
        self.journal = Journal(self.journals)
        self.relay = Relay(loop, self.journal, self.journal_broke)
        self.clerk = Clerk(self.ledger, self.keys, loop.call_soon_threadsafe, self.settled)
        self.clerk.start()
        self.pulse = asyncio.create_task(self.watch_engine())

    async def stop(self) -> None:
        """Cancel what still runs, write every row, close the journal."""
        self.pulse.cancel()
        await self.cancel_all()
        for generation in list(self.generations.values()):
            generation.end()
        await asyncio.to_thread(self.clerk.stop)
        self.relay.written()
        self.journal.close()
        self.threads.shutdown(wait=False)

    async def cancel_all(self) -> None:
        """Tell every reader that this is the end, and wait for the engine to let go."""
        for generation in list(self.generations.values()):
            generation.cancel("shutdown", Problem(503, SHUTDOWN, code="shutdown", retry_after=5))
        await self.idle(self.limits.cancel_seconds)

    async def idle(self, seconds: float) -> bool:
        """Wait until nothing runs. Whether that came to pass."""
        end = asyncio.get_running_loop().time() + seconds
        while self.generations and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        return not self.generations

    @property
    def unready(self) -> str | None:
        """Why new requests are refused, in words that anyone may read."""
        if self.draining:
            return SHUTDOWN
        return self.engine_fault or self.journal_fault or (UNRECORDED if self.clerk.closed is not None else None)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.name, CHAT, REASONER)))

    async def beside(self, size: int, work: Callable[[], T]) -> T:
        """Large inputs are worked on in a thread, so that other streams go on."""
        if size <= self.limits.inline_bytes:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    async def admit(
        self, ask: Ask, key: Key, request_id: str, route: str, priority: int = 0, ended: Ended | None = None
    ) -> Generation:
        """Raises Problem, with nothing queued and nothing billed.

        `ended`: called at its end in place of journal and clerk, for a caller who delivers and settles in one go.
        """
        self.check_open(priority)
        if ask.model not in self.names:
            known = ", ".join(self.names)
            raise Problem(404, f"no such model; there are {known}", "model", "model_not_found")
        most = self.limits.thinking_tokens if ask.form.thinking else self.limits.completion_tokens
        self.keys.allowed(key, 0, None, most)  # rates, before the work of tokenising
        try:
            size = self.bounded(ask)
            prompts = await self.beside(MUCH if ask.chat else size, lambda: self.tokens(ask))  # templates and grammars
            room = self.engine.context - max(map(len, prompts))
            self.check_room(ask, room, max(map(len, prompts)))
            n = len(prompts) * ask.n
            total = sum(map(len, prompts))
            allowed = self.keys.allowed(key, total, None if ask.max_tokens is None else ask.max_tokens * n, most * n)
            if not ask.embed and allowed < n:
                message = f"the key's budget has {allowed:,} tokens left for {n:,} answers"
                raise Problem(402, message, code="insufficient_quota")
            self.check_open(priority)  # again: tokenising took its time
            fits = 0 if ask.embed else min(room, allowed // n)
            buffered = self.limits.buffered_deltas if ended is None else MUCH  # nobody reads those before their end
            generation = self.prepare(ask, key, request_id, route, priority, prompts, fits, buffered)
            if ended is None:
                self.put_down(generation)
            else:
                generation.ended = ended
            self.submit(generation)
            return generation
        except RequestError as e:
            raise Problem.of(e) from None

    def check_open(self, priority: int) -> None:
        if (why := self.unready) is not None:
            raise Problem(503, why, code="unavailable", retry_after=5, close=self.draining)
        waiting = sum(g.first is None and g.priority <= 0 for g in self.generations.values())
        if priority <= 0 and waiting >= self.limits.queue:
            message = f"{waiting} requests are waiting already; try again"
            raise Problem(503, message, code="queue_full", retry_after=max(1, min(30, waiting // 16)))

    def bounded(self, ask: Ask) -> int:
        """Bytes of text to tokenise. Raises Problem where they can't fit, before any is tokenised."""
        size, most = ask.text_bytes, self.engine.context * self.limits.bytes_per_token
        if size > most:
            message = (
                f"a prompt of {size:,} bytes; the context of {self.engine.context:,} tokens takes at most {most:,}"
            )
            raise Problem(400, message, ask.field, "context_length_exceeded")
        return size

    def tokens(self, ask: Ask) -> list[list[int]]:
        if ask.chat:
            return [self.turns.render(ask.messages, ask.form)]
        return [self.prompt_tokens(prompt, ask) for prompt in ask.prompts]

    def prompt_tokens(self, prompt: str | list[int], ask: Ask) -> list[int]:
        if isinstance(prompt, str):
            return self.turns.document(prompt) if ask.suffix is None else self.turns.infill(prompt, ask.suffix)
        if wrong := [token for token in prompt if token >= self.turns.vocab_size]:
            message = f"the token id {wrong[0]}; the vocabulary has {self.turns.vocab_size:,}"
            raise Problem(400, message, ask.field, "token_out_of_range")
        return prompt

    def check_room(self, ask: Ask, room: int, longest: int) -> None:
        context = self.engine.context
        if room < 1:
            message = f"a prompt of {longest:,} tokens; at most {context - 1:,} fit the context of {context:,}"
            raise Problem(400, message, ask.field, "context_length_exceeded")
        if ask.max_tokens is not None and ask.max_tokens > room:
            message = (
                f"a prompt of {longest:,} tokens and max_tokens {ask.max_tokens:,}, the context is {context:,}: "
                f"max_tokens of at most {room:,} fits"
            )
            raise Problem(400, message, "max_tokens", "context_length_exceeded")
        biased = [token for token in ask.sampling.logit_bias if token >= self.turns.vocab_size]
        if biased:
            message = f"the token id {biased[0]}; the vocabulary has {self.turns.vocab_size:,}"
            raise Problem(400, message, "logit_bias", "token_out_of_range")

    def prepare(
        self,
        ask: Ask,
        key: Key,
        request_id: str,
        route: str,
        priority: int,
        prompts: list[list[int]],
        max_tokens: int,
        buffered: int,
    ) -> Generation:
        generation = Generation(
            id=request_id,
            key=key,
            model=self.name,
            route=route,
            prices=self.prices,
            promised=sum(map(len, prompts)) + max_tokens * len(prompts) * ask.n,
            buffered=buffered,
            priority=priority,
            engine=self.engine,
            ended=self.ended,
        )
        for index in range(len(prompts) * ask.n):
            choice = Choice(index, index // ask.n, self.turns.output(ask.form, ask.chat, prompts[index // ask.n]))
            guide = None if ask.embed else choice.output.guide
            choice.guide = None if guide is None else Watched(guide)
            choice.request = Request(
                tokens=tuple(prompts[choice.prompt]),
                max_tokens=max_tokens,
                sink=self.relay.sink(generation, choice),
                sampling=of_choice(ask.sampling, index),
                stop_tokens=self.turns.stop_tokens,
                guide=choice.guide,
                priority=priority,
                salt=key.tenant,
                embed=ask.embed is not None,
                echo=ask.echo,
            )
            generation.choices.append(choice)
        return generation

    def put_down(self, generation: Generation) -> None:
        """The journal's first line of a request. Raises Problem 503 where it can't be written."""
        self.journal.begin(generation.row())
        if not self.relay.written():
            self.journal.open.pop(generation.id, None)
            raise Problem(503, UNRECORDED, code="unavailable", retry_after=5)

    def submit(self, generation: Generation) -> None:
        self.generations[generation.id] = generation
        self.keys.take(generation.key, generation.promised)
        try:
            for choice in generation.choices:
                assert choice.request is not None
                self.engine.submit(choice.request)
        except RequestError:
            self.abandon(generation)
            raise
        except Exception as e:
            log.exception("the engine refused a request")
            self.engine_fault = DEAD
            self.abandon(generation)
            raise engine_failed() from e

    def abandon(self, generation: Generation) -> None:
        """Nothing of it was sent, and nothing is billed. Its end is ours, for the caller never gets it."""
        generation.billed, generation.ended = False, self.ended
        generation.cancel("refused")
        generation.end()

    def ended(self, generation: Generation) -> None:
        if not generation.billed:
            self.account(generation)
            self.keys.settled(generation.key.id, generation.promised, 0)
            self.journal.end([generation.id])
            return
        row = self.account(generation)
        self.promised[row.id] = generation.promised
        self.clerk.settle(row)

    def account(self, generation: Generation) -> UsageRow:
        """What it used, once it has ended; rates and metrics hear of it."""
        self.generations.pop(generation.id, None)
        row = generation.usage_row()
        self.keys.used(generation.key, generation.promised, row.prompt + row.completion if generation.billed else 0)
        if generation.billed:
            for observe in self.observers:
                observe(row)
        return row

    def settled(self, rows: list[UsageRow]) -> None:
        """The clerk says: these stand in the ledger."""
        for row in rows:
            self.keys.settled(row.key, self.promised.pop(row.id, 0), row.prompt + row.completion)
        self.journal.end([row.id for row in rows])
        self.relay.written()

    def journal_broke(self, error: OSError) -> None:
        """Tokens that can't be written down can't be sent: every stream ends, and what was journaled is billed."""
        if self.journal_fault is None:
            log.error("the journal can't be written, no new requests: %s", error.strerror)
        self.journal_fault = UNRECORDED
        for generation in list(self.generations.values()):
            generation.cancel("unrecorded", Problem(503, UNRECORDED, code="unavailable", retry_after=30))

    def try_journal(self) -> None:
        """Open again once a line can be written."""
        if self.journal_fault is not None:
            self.journal.probe()
            if self.relay.written():
                log.warning("the journal can be written again")
                self.journal_fault = None

    async def watch_engine(self) -> None:
        """An engine that can't say how it is, or doesn't get on, is down: its streams end now, and the server is not
        ready until it runs again."""
        while True:
            fault = self.fault_of_engine()
            if fault is None and self.engine_fault is not None:
                log.warning("the engine runs again")
            if self.engine_fault is None and fault is not None:
                log.error("no new requests: %s", fault)
            self.engine_fault = fault
            for generation in list(self.generations.values()) if fault else ():
                generation.fail(engine_failed())
                generation.end()
            self.end_overdue()
            self.try_journal()
            await asyncio.sleep(PULSE_SECONDS)

    def fault_of_engine(self) -> str | None:
        """Looked at once a pulse. Time is counted in pulses: a machine that slept has not waited for its engine."""
        before = self.seen
        try:
            self.seen = now = self.engine.stats()
        except Exception as e:
            if self.engine_fault is None:
                log.error("the engine does not run: %s", e)
            return DEAD
        waits = before is not None and now.running + now.waiting > 0 and progress(now) == progress(before)
        self.still = self.still + PULSE_SECONDS if waits else 0.0
        return STUCK if self.still > self.limits.stuck_seconds else None

    def end_overdue(self) -> None:
        """A cancelled generation whose engine never confirms ends with what was counted."""
        now = asyncio.get_running_loop().time()
        for generation in list(self.generations.values()):
            if generation.why is None:
                continue
            if generation.overdue is None:
                generation.overdue = now + self.limits.cancel_seconds
            elif now > generation.overdue:
                generation.end()


def progress(stats: Stats) -> tuple[int, ...]:
    """Numbers of which one grows while the engine works, also within a step whose experts come from a slow disk."""
    s = stats
    return s.steps, s.tokens_in, s.disk_hits, s.experts_chosen, s.experts_bytes_read


def of_choice(sampling: Sampling, index: int) -> Sampling:
    if sampling.seed is None or index == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + index * SEED_STRIDE) % 2**64)
