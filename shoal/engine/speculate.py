"""Drafting by the model's own multi-token module, verified in the same pass as the next decode (DeepSeek-V3, 2.2).

The module turns the hidden state of position i and the token at i + 1 into a guess at i + 2. Its layer has a cache row
for each position, which needs that next token, so it runs one token behind the model, after each draw:

    model    … i-1   i                       feeds t_i, gives h_i; t_i+1 is drawn
    module   … i-1   i                       feeds (h_i, t_i+1), drafts t_i+2
                     i+1                     deeper: the same module on its own output and draft, drafts t_i+3

Rows of deeper drafts are made of guesses; the next real pass over those positions overwrites them. A row of a shared
page may be missing, or made with the next token of whoever filled it: drafts behind it are a little worse then, tokens
are never touched by it.

A draft is fed only where the module is sure enough. The gate looks at its largest probability and never at the token
drawn: to drop drafts by their own luck would bend the distribution that the rejection rule keeps.

How sure is enough depends on what a row more costs, which experts it wakes and how the machine is used otherwise; so
`Worth` measures it, and whether drafting pays at all. While it doesn't the module rests: a stream remembers the hidden
states of its last positions, so that a trial begins with some context, and forgets those before them.

Shapes: T positions the module takes, B streams, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.engine import sampler
from shoal.engine.attend import Span
from shoal.engine.runner import Runner
from shoal.engine.stream import Stream

GATES = (0.5, 0.2, 0.0)  # least probability, by the module, that the whole chain of drafts holds
REMEMBERED = 64  # positions of a stream that a resting module can catch up with


class Speculator:
    def __init__(self, runner: Runner, depth: int):
        self.runner, self.depth = runner, depth
        self.worth = Worth()

    def follow(self, streams: Sequence[Stream], gate: float | None) -> None:
        """After a step's draws: bring the module's rows up to date and draft, or rest (None)."""
        if gate is None:
            for stream in streams:
                rest(stream)
            return
        due = [s for s in streams if s.pending and not s.finish]
        if not due:
            return
        due.sort(key=lambda s: s.computed - s.module_computed)
        spans = [Span(s.module_computed, s.computed - s.module_computed, s.pages) for s in due]
        following = [t for s, span in zip(due, spans) for t in s.tokens[span.start + 1 : span.end + 1]]
        hidden_TD = torch.cat([h for s in due for h in s.pending])
        for stream in due:
            stream.module_computed, stream.pending = stream.computed, []
        ready = [s.decoding and not s.steered for s in due]
        hidden_BD, logits_BV = self.runner.module(hidden_TD, following, spans, ready)
        self._draft([s for s, r in zip(due, ready) if r], hidden_BD, logits_BV, gate)

    def _draft(self, streams: list[Stream], hidden_BD: Tensor, logits_BV: Tensor, gate: float) -> None:
        """The first drafts by these logits, deeper ones by the module on its own output."""
        sure_B = torch.ones(len(streams), device=hidden_BD.device)
        for depth in range(1, self.depth + 1):
            sure_B = sure_B * (logits_BV.amax(-1) - logits_BV.logsumexp(-1)).exp()
            room = [len(s.tokens) + depth < s.limit for s in streams]
            on = [b for b, sure in enumerate((sure_B >= gate).tolist()) if sure and room[b]]
            if not on:
                return
            streams = [streams[b] for b in on]
            drafts = sampler.propose(logits_BV[on], [sampler.draft_row(s) for s in streams])
            for stream, draft in zip(streams, drafts):
                stream.drafts.append(draft)
            if depth < self.depth:
                spans = [Span(s.computed + depth - 1, 1, s.pages) for s in streams]
                guessed, sure_B = [s.drafts[-1].token for s in streams], sure_B[on]
                hidden_BD, logits_BV = self.runner.module(hidden_BD[on], guessed, spans, [True] * len(on))


def rest(stream: Stream) -> None:
    while stream.computed - stream.module_computed > REMEMBERED:
        stream.module_computed += len(stream.pending.pop(0))


class Worth:
    """Which way gives most tokens a second: no drafts (None), or those that pass one of GATES. Each batch size (to a
    power of two) has its own answer. One of the ways that lost is tried again for TRIAL steps after REST, and after
    twice as many each time it loses again, up to LONGEST."""

    TRIAL, REST, LONGEST = 12, 256, 1024

    def __init__(self):
        self._sizes: dict[int, _Ways] = {}

    def __call__(self, streams: int) -> float | None:
        """The way of this step."""
        return self._of(streams).way

    def record(self, streams: int, tokens: int, seconds: float, steps: int = 1) -> None:
        """What a step (or several) of so many decoding streams and nothing else gave."""
        ways = self._of(streams)
        ways.steps += steps
        if ways.steps > 1:  # the first verifies what another way drafted, or nothing
            ways.tokens += tokens
            ways.seconds += seconds
        if ways.steps > ways.length:
            ways.turn()

    def _of(self, streams: int) -> "_Ways":
        return self._sizes.setdefault(streams.bit_length(), _Ways())


class _Ways:
    def __init__(self):
        self.to_try: list[float | None] = [*GATES, None]
        self.way, self.length, self.rest = self.to_try[0], Worth.TRIAL, Worth.REST
        self.speed: dict[float | None, float] = {}  # tokens a second when last tried
        self.best: float | None = self.way
        self.steps, self.tokens, self.seconds = 0, 0, 0.0

    def turn(self) -> None:
        """A stretch is over: try the next way, or stay with the best for long."""
        self.speed[self.way] = self.tokens / max(self.seconds, 1e-9)
        self.steps, self.tokens, self.seconds = 0, 0, 0.0
        waiting = [way for way in self.to_try if way not in self.speed]
        if waiting or self.length > Worth.TRIAL:
            self.way, self.length = waiting[0] if waiting else self._another(), Worth.TRIAL
            return
        before, self.best = self.best, max(self.speed, key=self.speed.__getitem__)
        self.rest = min(2 * self.rest, Worth.LONGEST) if self.best == before else Worth.REST
        self.way, self.length = self.best, self.rest

    def _another(self) -> float | None:
        """Of the ways that aren't the best, the one tried longest ago."""
        way = next(way for way in self.to_try if way != self.best)
        self.to_try.append(self.to_try.pop(self.to_try.index(way)))
        return way
