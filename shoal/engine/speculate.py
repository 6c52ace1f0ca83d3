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
    power of two) has its own answer.

    A trial lasts TRIAL steps, or fewer where it is hopeless. Whatever it lost against the best way is made up for by a
    rest PATIENCE times as long, at least REST steps, before another way is tried again: so looking for something better
    costs a hundredth at most.
    """

    TRIAL, REST, PATIENCE = 12, 256, 100

    def __init__(self):
        self._sizes: dict[int, _Ways] = {}
        self._last = _Ways()

    @property
    def speedup(self) -> float:
        """Tokens a second of the best way over those without drafts, at the latest batch size; 1 until known."""
        ways = self._last
        best, plain = ways.speed.get(ways.best), ways.speed.get(None)
        return best / plain if best and plain else 1.0

    def __call__(self, streams: int) -> float | None:
        """The way of this step."""
        return self._of(streams).way

    def record(self, streams: int, tokens: int, seconds: float, steps: int = 1) -> None:
        """What a step (or several) of so many decoding streams and nothing else gave."""
        self._last = self._of(streams)
        self._last.record(tokens, seconds, steps)

    def _of(self, streams: int) -> "_Ways":
        return self._sizes.setdefault(streams.bit_length(), _Ways())


class _Ways:
    def __init__(self):
        self.to_try: list[float | None] = [*GATES]
        self.way: float | None = None
        self.best: float | None = None
        self.speed: dict[float | None, float] = {}  # tokens a second when last tried
        self.trial, self.lost = True, 0.0  # lost: seconds that trials since the last rest took too long
        self.fresh, self.steps, self.tokens, self.seconds = True, 0, 0, 0.0

    def record(self, tokens: int, seconds: float, steps: int) -> None:
        if self.fresh:  # verifies what another way drafted, or nothing
            self.fresh = False
            return
        self.steps, self.tokens, self.seconds = self.steps + steps, self.tokens + tokens, self.seconds + seconds
        over = self._trial_is_over if self.trial else self._rest_is_over
        if over():
            self.speed.pop(self.way, None)  # the last one measured stands last
            self.speed[self.way] = self.tokens / max(self.seconds, 1e-9)
            self._turn()

    def _trial_is_over(self) -> bool:
        best = self.speed.get(self.best, 0.0)
        return self.steps >= Worth.TRIAL or (self.steps >= 3 and 2 * self.tokens < best * self.seconds)

    def _rest_is_over(self) -> bool:
        return self.steps >= Worth.REST and self.seconds >= Worth.PATIENCE * self.lost

    def _turn(self) -> None:
        """A stretch is over: try the next way, or stay with the best."""
        if self.trial and self.way != self.best:
            self.lost += max(0.0, self.seconds - self.tokens / self.speed[self.best])
            if self.speed[self.way] > self.speed[self.best]:
                self.best = self.way
        waiting = [way for way in self.to_try if way not in self.speed]
        if waiting or not self.trial:
            self.way, self.trial = waiting[0] if waiting else self._another(), True
            self.lost = self.lost if waiting else 0.0
        else:
            self.way, self.trial = self.best, False
        self.fresh, self.steps, self.tokens, self.seconds = True, 0, 0, 0.0

    def _another(self) -> float | None:
        """Of the ways that aren't the best, the one tried longest ago."""
        ways = [way for way in (*self.to_try, None) if way != self.best]
        return min(ways, key=list(self.speed).index)
