"""An engine that reads from a script, on a thread of its own, and a language of bytes. No model, no torch.

A prompt is its bytes; the answer is the script's, a token a byte. THINK_END splits thinking from the answer, CALL
begins a call of the first tool, END ends. What the engine did is on record for the tests: requests, cancels.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from shoal.engine.request import Form, Request, Stats, Step, Token, Usage
from shoal.errors import RequestError

BOS, END, THINK_END, CALL = 256, 257, 258, 259
VOCAB = 260
UNIT = 64


@dataclass(eq=False)
class Running:
    request: Request
    script: list[int]
    cached: int
    at: int = 0

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.tokens), self.cached, self.at)


def hello(request: Request) -> list[int]:
    return [*b"Hello, world.", END]


@dataclass(eq=False)
class FakeEngine:
    """`slots` requests run at once; each gets `per_step` tokens a step, a step takes `pause` seconds."""

    script: Callable[[Request], list[int]] = hello
    slots: int = 8
    pause: float = 0.0
    per_step: int = 1
    context: int = 4096
    requests: list[Request] = field(default_factory=list)  # as they came
    started: list[Request] = field(default_factory=list)  # as they were admitted
    cancelled: list[float] = field(default_factory=list)
    dead: bool = False

    def __post_init__(self) -> None:
        self.lock = threading.Condition()
        self.waiting: list[Request] = []
        self.running: list[Running] = []
        self.asked_to_end: set[Request] = set()
        self.prefixes: set[tuple[str, tuple[int, ...]]] = set()
        self.closing, self.steps, self.out = False, 0, 0
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> None:
        if not request.tokens:
            raise RequestError("no tokens", "at least one", "give a prompt", "prompt")
        assert all(0 <= t < VOCAB for t in request.tokens) and len(request.tokens) + request.max_tokens <= self.context
        with self.lock:
            if self.dead:
                raise RuntimeError("dead")
            self.requests.append(request)
            self.waiting.append(request)
            self.waiting.sort(key=lambda r: r.priority)
            self.lock.notify()

    def cancel(self, request: Request) -> None:
        with self.lock:
            self.cancelled.append(time.monotonic())
            self.asked_to_end.add(request)
            self.lock.notify()

    def position(self, request: Request) -> int:
        with self.lock:
            return self.waiting.index(request) + 1 if request in self.waiting else 0

    def stats(self) -> Stats:
        with self.lock:
            if self.dead:
                raise RuntimeError("dead")
            return Stats(len(self.running), len(self.waiting), 100, len(self.running), 0, 0, self.out, 0, 0, self.steps)

    def die(self) -> None:
        """As a crash would have it: no more steps, nobody is told."""
        with self.lock:
            self.dead = True

    def close(self) -> None:
        with self.lock:
            self.closing = True
            self.lock.notify()
        self.thread.join()

    @property
    def idle(self) -> bool:
        with self.lock:
            return not self.waiting and not self.running

    def loop(self) -> None:
        while True:
            with self.lock:
                while (not self.waiting and not self.running) or self.dead:
                    if self.closing:
                        return
                    self.lock.wait(0.2)
                told = self.turn()
                if self.closing:
                    return
            for request, step in told:
                request.sink(step)
            time.sleep(self.pause)

    def turn(self) -> list[tuple[Request, Step]]:
        told, self.steps = [], self.steps + 1
        for request in [r for r in self.waiting if r in self.asked_to_end]:
            self.waiting.remove(request)
            told.append((request, Step((), "cancelled", Usage(len(request.tokens)))))
        while self.waiting and len(self.running) < self.slots:
            request = self.waiting.pop(0)
            self.started.append(request)
            self.running.append(Running(request, self.script(request), self.found(request)))
        for run in list(self.running):
            told.append((run.request, self.step(run)))
            if told[-1][1].finish:
                self.running.remove(run)
        return told

    def step(self, run: Running) -> Step:
        request = run.request
        if request in self.asked_to_end:
            return Step((), "cancelled", run.usage)
        if request.embed:  # how often each of the first letters stands in it
            counts = tuple(float(request.tokens.count(letter)) for letter in b"abcd")
            return Step((), "stop", run.usage, hidden=counts)
        tokens: list[Token] = []
        for token in run.script[run.at : run.at + self.per_step]:
            run.at, self.out = run.at + 1, self.out + 1
            top = ((token, -0.5), (65, -2.0))
            n = request.sampling.logprobs
            tokens.append(Token(token, None if n is None else -0.5, top[: n or 0]))
            goes_on = request.guide is None or request.guide.accept(token)
            if token in request.stop_tokens or not goes_on:
                return Step(tuple(tokens), "stop", run.usage, prompt=self.echoed(request))
            if run.at == request.max_tokens:
                return Step(tuple(tokens), "length", run.usage, prompt=self.echoed(request))
        return Step(tuple(tokens), None, run.usage)

    def echoed(self, request: Request) -> tuple[Token, ...]:
        first, *rest = request.tokens
        return (Token(first), *(Token(t, -0.25, ((t, -0.25),)) for t in rest)) if request.echo else ()

    def found(self, request: Request) -> int:
        """Whole units of the prompt that a request of the same salt had before."""
        units = range(UNIT, len(request.tokens), UNIT)
        hit = max((n for n in units if (request.salt, request.tokens[:n]) in self.prefixes), default=0)
        self.prefixes |= {(request.salt, request.tokens[:n]) for n in units}
        return hit


class Bytes:
    """Turns of the byte language."""

    vocab_size = VOCAB
    stop_tokens = frozenset({END})

    def render(self, messages: Sequence[Mapping[str, Any]], form: Form) -> list[int]:
        return [BOS, *"\n".join(m.get("content") or "" for m in messages).encode()]

    def document(self, text: str) -> list[int]:
        return [BOS, *text.encode()]

    def infill(self, prefix: str, suffix: str) -> list[int]:
        return [BOS, *suffix.encode(), *prefix.encode()]

    def output(self, form: Form, chat: bool, prompt: Sequence[int]) -> "ByteOutput":
        return ByteOutput(form)

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


@dataclass(frozen=True)
class Said:
    kind: Literal["content", "reasoning", "tool"]
    text: str = ""
    index: int = 0
    call_id: str | None = None
    name: str | None = None
    tokens: tuple[Token, ...] = ()


class ByteOutput:
    """Characters as they are whole, up to the first stop string; no half of one is held back across steps."""

    guide = None

    def __init__(self, form: Form):
        self.kind: Literal["content", "reasoning", "tool"]
        self.form, self.kind, self.held = form, "reasoning" if form.thinking else "content", b""
        self.reasoning_tokens, self.called = 0, False

    def feed(self, step: Step) -> list[Said]:
        found = []
        for token in step.tokens:
            if token.id == THINK_END:
                self.kind = "content"
            elif token.id == CALL:
                self.kind, self.called = "tool", True
                found.append(Said("tool", "", 0, "call_1", self.form.tools[0]["function"]["name"]))
            elif token.id < 256:
                self.reasoning_tokens += self.kind == "reasoning"
                self.held += bytes([token.id])
                try:
                    found.append(Said(self.kind, self.held.decode(), tokens=(token,)))
                    self.held = b""
                except UnicodeDecodeError:
                    continue
        return found

    def finish(self, step: Step) -> str:
        assert step.finish
        return "tool_calls" if self.called and step.finish == "stop" else step.finish
