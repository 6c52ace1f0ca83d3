"""Who computes what in the next step: continuous batching with chunked prompts.

Every step has a budget of tokens. Decoding streams come first, one token each and their drafts as far as the budget
goes; the rest of the budget goes to prompts, in chunks, in order of priority and then of arrival. No more streams run
than the budget has tokens, so none waits for a step that others fill.

A stream is admitted when the cache has room for all its tokens so far, and a page more for each one running. It is
passed over while one before it computes the prefix that both begin with: many answers to one prompt compute it once.
Where a decoding stream finds no page to grow into, the last in order gives all of its pages back and waits; when it
returns it computes again what can't be found in the cache. A prompt whose next unit is on the disk computes nothing
until the engine has read it. Nothing can block for ever: the first in order may take every page from the others, all
pages together hold the longest request, and who waits holds nothing.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import NamedTuple

from shoal.engine.pages import UNIT, Key, Pages, units
from shoal.engine.stream import Stream


class Work(NamedTuple):
    """Tokens of a stream to feed, the first at position `start`, and how many of the last rows to draw from."""

    stream: Stream
    start: int
    tokens: list[int]
    draws: int


def order(stream: Stream) -> tuple[int, int]:
    return stream.order


class Scheduler:
    def __init__(
        self,
        pages: Pages,
        max_batch_tokens: int,
        lookahead: int = 0,
        on_disk: Callable[[Key], bool] = lambda key: False,
    ):
        """`lookahead`: positions behind the last token that drafts, or steps taken together, may write to."""
        assert max_batch_tokens > 0 and lookahead >= 0, (max_batch_tokens, lookahead)
        self.pages, self.max_batch_tokens, self.lookahead, self.on_disk = pages, max_batch_tokens, lookahead, on_disk
        self.waiting: list[Stream] = []  # both in order
        self.running: list[Stream] = []
        self.preemptions = 0

    def add(self, stream: Stream) -> None:
        assert units(stream.limit) <= self.pages.n, f"{stream.limit} tokens never fit {self.pages.n} pages"
        insort(self.waiting, stream, key=order)

    def remove(self, stream: Stream) -> None:
        if stream in self.running:
            self.running.remove(stream)
            self._release(stream)
        else:
            self.waiting.remove(stream)

    def position(self, stream: Stream) -> int:
        """Streams that wait before this one; 0 where it runs."""
        return 0 if stream in self.running else bisect_left(self.waiting, stream.order, key=order)

    def schedule(self) -> list[Work]:
        """The next step, the fewest tokens first. Empty only where nothing waits or runs, or all that runs `loads`."""
        before = self.preemptions
        work = self._decode([s for s in self.running if s.decoding])
        budget = self.max_batch_tokens - sum(len(w.tokens) for w in work)
        full = len(self.running) == self.max_batch_tokens
        for stream in sorted([*(s for s in self.running if not s.decoding), *self.waiting], key=order):
            if not budget:
                break
            if not stream.pages:
                if full or self.preemptions != before or self._shared_soon(stream):
                    continue
                full = not self._admit(stream) or len(self.running) == self.max_batch_tokens
            if stream.pages:
                budget -= self._prefill(stream, budget, work)
        if self.preemptions != before:
            work = [w for w in work if w.stream.pages]
        return sorted(work, key=lambda w: len(w.tokens))

    def _decode(self, streams: list[Stream]) -> list[Work]:
        spare, work = self.max_batch_tokens - len(self.running), []
        for stream in streams:
            if not stream.pages:
                continue  # an earlier one took them
            stream.drafts = stream.drafts[: max(spare, 0)]
            tokens = [stream.tokens[-1], *(draft.token for draft in stream.drafts)]
            if self._grow(stream, stream.computed + len(tokens)):
                spare -= len(stream.drafts)
                work.append(Work(stream, stream.computed, tokens, len(tokens)))
        return work

    def loads(self, stream: Stream) -> bool:
        """Whether the unit that the stream needs next is on the disk."""
        unit, inside = divmod(stream.computed, UNIT)
        waits = unit < stream.findable and not inside and not stream.pending
        return waits and self.on_disk(stream.key(unit))

    def _prefill(self, stream: Stream, budget: int, work: list[Work]) -> int:
        if self.loads(stream):
            return 0
        tokens = stream.tokens[stream.computed : stream.computed + budget]
        if tokens:
            whole = stream.computed + len(tokens) == len(stream.tokens)
            work.append(Work(stream, stream.computed, tokens, int(whole)))
        return len(tokens)

    def _missing(self, stream: Stream, tokens: int, pages: int) -> int:
        """Pages to add to `pages` so that so many tokens fit, and what is ahead of them."""
        return max(0, units(min(tokens + self.lookahead, stream.limit)) - pages)

    def _grow(self, stream: Stream, tokens: int) -> bool:
        missing = self._missing(stream, tokens, len(stream.pages))
        while missing and self.pages.available < missing:
            last = self.running[-1]
            self._preempt(last)
            if last is stream:
                return False
        if missing:
            stream.pages += self.pages.take(missing)
        return True

    def _shared_soon(self, stream: Stream) -> bool:
        """Whether a running prompt before this one is about to compute the next unit that it needs."""
        unit = self.pages.known(stream.keys())
        if unit >= stream.findable:
            return False
        ahead = (s for s in self.running if s.order < stream.order and not s.decoding and not s.request.embed)
        return any(s.key(unit) == stream.key(unit) for s in ahead if (unit + 1) * UNIT <= len(s.tokens))

    def _admit(self, stream: Stream) -> bool:
        shared = self.pages.share(stream.keys())
        missing = self._missing(stream, len(stream.tokens), len(shared))
        while self.pages.available < missing + len(self.running):
            if not self.running or self.running[-1].request.priority <= stream.request.priority:
                break
            self._preempt(self.running[-1])
        if self.pages.available < missing + len(self.running):
            self.pages.give(shared)
            return False
        self.waiting.remove(stream)
        insort(self.running, stream, key=order)
        stream.hold(shared + self.pages.take(missing), len(shared) * UNIT)
        return True

    def forget(self) -> None:
        """Nothing in the cache holds any more: all streams begin anew, behind the tokens they have."""
        for stream in reversed(self.running.copy()):
            self._preempt(stream)
        self.pages.forget()

    def _preempt(self, stream: Stream) -> None:
        self.preemptions += 1
        self.running.remove(stream)
        self._release(stream)
        insort(self.waiting, stream, key=order)

    def _release(self, stream: Stream) -> None:
        self.pages.give(stream.pages)
        stream.hold([], 0)

    def check(self) -> None:
        self.pages.check(stream.pages for stream in self.running)
        assert self.waiting == sorted(self.waiting, key=order) and self.running == sorted(self.running, key=order)
        for stream in self.waiting:
            assert not stream.pages and not stream.computed and not stream.drafts
        for stream in self.running:
            assert stream.computed <= len(stream.pages) * UNIT, (stream.computed, stream.pages)
            assert stream.kept * UNIT <= stream.computed < len(stream.tokens)
