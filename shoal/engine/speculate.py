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

`Worth` decides whether drafting pays at all. While it rests the module doesn't run: a stream remembers the hidden
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

GATE = 0.5  # least probability, by the module, that the whole chain of drafts holds
REMEMBERED = 64  # positions of a stream that a resting module can catch up with


class Speculator:
    def __init__(self, runner: Runner, depth: int):
        self.runner, self.depth = runner, depth
        self.gate = GATE
        self.worth = Worth()

    def follow(self, streams: Sequence[Stream], drafting: bool) -> None:
        """After a step's draws: bring the module's rows up to date and draft, or rest."""
        if not drafting:
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
        self._draft([s for s, r in zip(due, ready) if r], hidden_BD, logits_BV)

    def _draft(self, streams: list[Stream], hidden_BD: Tensor, logits_BV: Tensor) -> None:
        """The first drafts by these logits, deeper ones by the module on its own output."""
        sure_B = torch.ones(len(streams), device=hidden_BD.device)
        for depth in range(1, self.depth + 1):
            sure_B = sure_B * (logits_BV.amax(-1) - logits_BV.logsumexp(-1)).exp()
            room = [len(s.tokens) + depth < s.limit for s in streams]
            on = [b for b, sure in enumerate((sure_B >= self.gate).tolist()) if sure and room[b]]
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
    """Which of two ways, with or without drafts, gives more tokens a second. Each batch size (to a power of two) has
    its own answer. The way that lost is tried again for TRIAL steps after REST, and after twice as many each time it
    loses again, up to LONGEST."""

    TRIAL, REST, LONGEST = 8, 256, 1024

    def __init__(self):
        self._sizes: dict[int, _Ways] = {}

    def __call__(self, streams: int) -> bool:
        """Whether this step should draft."""
        return self._of(streams).drafting

    def record(self, streams: int, tokens: int, seconds: float) -> None:
        """What a step of so many decoding streams (and nothing else) gave."""
        ways = self._of(streams)
        ways.steps += 1
        if ways.steps > 1:  # the first verifies what the other way drafted, or nothing
            ways.tokens += tokens
            ways.seconds += seconds
        if ways.steps > ways.length:
            ways.turn()

    def _of(self, streams: int) -> "_Ways":
        return self._sizes.setdefault(streams.bit_length(), _Ways())


class _Ways:
    def __init__(self):
        self.drafting, self.length, self.rest = True, Worth.TRIAL, Worth.REST
        self.speed: dict[bool, float] = {}  # tokens a second when last tried
        self.better: bool | None = None
        self.steps, self.tokens, self.seconds = 0, 0, 0.0

    def turn(self) -> None:
        """A stretch is over: stay with the better way for long, or try the one that wasn't tried last."""
        self.speed[self.drafting] = self.tokens / max(self.seconds, 1e-9)
        self.steps, self.tokens, self.seconds = 0, 0, 0.0
        if len(self.speed) < 2 or self.length > Worth.TRIAL:
            self.drafting, self.length = not self.drafting, Worth.TRIAL
            return
        before, self.better = self.better, self.speed[True] > self.speed[False]
        self.rest = min(2 * self.rest, Worth.LONGEST) if self.better == before else Worth.REST
        self.drafting, self.length = self.better, self.rest
