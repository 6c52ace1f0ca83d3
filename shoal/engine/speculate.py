"""Drafting by the model's own multi-token module, verified in the same pass as the next decode (DeepSeek-V3, 2.2).

The module turns the hidden state of position i and the token at i + 1 into a guess at i + 2. Its layer has a cache row
for each position, which needs that next token, so it runs one token behind the model, after each draw:

    model    … i-1   i                       feeds t_i, gives h_i; t_i+1 is drawn
    module   … i-1   i                       feeds (h_i, t_i+1), drafts t_i+2
                     i+1                     deeper: the same module on its own output and draft, drafts t_i+3

Rows of deeper drafts are made of guesses; the next real pass over those positions overwrites them. A page goes to the
prefix cache once the module's rows are in it too. The row of a shared page's last token was made with the next token of
whoever filled it: drafts behind it may be a little worse, tokens are never touched by it.

A draft is fed only where the module is sure enough. The gate looks at its largest probability and never at the token
drawn: to drop drafts by their own luck would bend the distribution that the rejection rule keeps.

`Worth` decides whether drafting pays at all. While it rests, the module catches up once in a page instead of each step.

Shapes: T positions the module takes, B streams, D model, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.engine import sampler
from shoal.engine.attend import Span
from shoal.engine.pages import UNIT
from shoal.engine.runner import Runner
from shoal.engine.stream import Stream

GATE = 0.5  # least probability, by the module, that the whole chain of drafts holds


class Speculator:
    def __init__(self, runner: Runner, depth: int):
        self.runner, self.depth = runner, depth
        self.gate = GATE
        self.worth = Worth()

    def follow(self, streams: Sequence[Stream], drafting: bool) -> None:
        """After a step's draws: bring the module's rows up to date where it is time, and draft."""
        due = [s for s in streams if s.pending and (drafting or s.finish or s.computed - s.module_computed >= UNIT)]
        if not due:
            return
        due.sort(key=lambda s: s.computed - s.module_computed)
        spans = [Span(s.module_computed, s.computed - s.module_computed, s.pages) for s in due]
        following = [t for s, span in zip(due, spans) for t in s.tokens[span.start + 1 : span.end + 1]]
        hidden_TD = self.runner.module(torch.cat([h for s in due for h in s.pending]), following, spans)
        last, end = [], 0
        for stream, span in zip(due, spans):
            stream.module_computed, stream.pending = stream.computed, []
            end += span.n
            last.append(end - 1)
        if drafting:
            ready = [b for b, s in enumerate(due) if s.decoding and not s.finish and not s.steered]
            self._draft([due[b] for b in ready], hidden_TD[[last[b] for b in ready]])

    def _draft(self, streams: list[Stream], hidden_BD: Tensor) -> None:
        sure_B = torch.ones(len(streams), device=hidden_BD.device)
        for depth in range(1, self.depth + 1):
            room = [b for b, s in enumerate(streams) if len(s.tokens) + depth < s.limit]
            streams, hidden_BD, sure_B = [streams[b] for b in room], hidden_BD[room], sure_B[room]
            if not streams:
                return
            logits_BV = self.runner.head(hidden_BD)
            sure_B = sure_B * (logits_BV.amax(-1) - logits_BV.logsumexp(-1)).exp()
            through = (sure_B >= self.gate).nonzero()[:, 0].tolist()
            streams, hidden_BD, sure_B = [streams[b] for b in through], hidden_BD[through], sure_B[through]
            if not streams:
                return
            drafts = sampler.propose(logits_BV[through], [sampler.draft_row(s) for s in streams])
            for stream, draft in zip(streams, drafts):
                stream.drafts.append(draft)
            if depth < self.depth:
                spans = [Span(s.computed + depth - 1, 1, s.pages) for s in streams]
                hidden_BD = self.runner.module(hidden_BD, [s.drafts[-1].token for s in streams], spans)


class Worth:
    """Which of two ways, with or without drafts, gives more tokens a second. Each batch size (to a power of two) has
    its own answer; the way that lost is tried again for TRIAL steps in every REST."""

    TRIAL, REST = 8, 256

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
            ways.turn(self.TRIAL, self.REST)

    def _of(self, streams: int) -> "_Ways":
        return self._sizes.setdefault(streams.bit_length(), _Ways(self.TRIAL))


class _Ways:
    def __init__(self, length: int):
        self.drafting, self.length = True, length
        self.speed: dict[bool, float] = {}  # tokens a second when last tried
        self.steps, self.tokens, self.seconds = 0, 0, 0.0

    def turn(self, trial: int, rest: int) -> None:
        """A stretch is over: stay with the better way for long, or try the one that wasn't tried last."""
        self.speed[self.drafting] = self.tokens / max(self.seconds, 1e-9)
        self.steps, self.tokens, self.seconds = 0, 0, 0.0
        if len(self.speed) < 2 or self.length == rest:
            self.drafting, self.length = not self.drafting, trial
        else:
            self.drafting, self.length = self.speed[True] > self.speed[False], rest
