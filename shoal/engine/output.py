"""From tokens to what a client sees, and back: what may come next. One state machine for every kind of answer.

    before ──<think>──▶ thinking ──</think>──▶ answering ──end, stop string, grammar complete──▶ over
       └──────────────── any other token ─────────▶┘

    answering: token ─▶ bytes ─▶ whole characters ─▶ stop strings ─▶ calls ─▶ deltas

Each stage holds back what may still turn into something else: half a character, the start of a stop string, the start
of a call. How the text was cut into tokens, and tokens into steps, therefore changes no concatenated delta. Marks count
as tokens only: `</think>` spelled in characters is text. A stop string is found in the answer, not in the reasoning;
the first to be complete counts, and neither it nor anything after it is shown.

`Output` is a request's `Guide`, on the engine's thread. Its deltas wait, token by token, until `feed` fetches those of
the tokens that a step has brought, on whichever thread: so nothing is shown before its step was seen (and journaled).
"""

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from shoal.data.chat import Marks
from shoal.data.tokenizer import Tokenizer
from shoal.engine.calls import CallDelta, Calls, overlap
from shoal.engine.request import MOST_STOP_CHARS, MOST_STOPS, Step, Token
from shoal.errors import RequestError

if TYPE_CHECKING:
    from shoal.engine.grammar import Grammar


@dataclass(frozen=True)
class Delta:
    """One more piece of an answer. A tool call starts with `call_id` and `name`; its arguments follow as text.

    `tokens` spelled it, together with what was held back before it.
    """

    kind: Literal["content", "reasoning", "tool"]
    text: str = ""
    index: int = 0  # of the tool call
    call_id: str | None = None
    name: str | None = None
    tokens: tuple[Token, ...] = ()


class Text:
    """Tokens to characters, as soon as their bytes make whole ones; bytes that never do become U+FFFD."""

    def __init__(self, spellings: Sequence[bytes]):
        self.spellings = spellings
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self.decoder.decode(self.spellings[token]) if token < len(self.spellings) else ""

    def flush(self) -> str:
        text = self.decoder.decode(b"", final=True)
        self.decoder.reset()
        return text


class Stops:
    """Text up to the first stop string that is complete. Raises RequestError for stop strings no client needs."""

    def __init__(self, stops: Iterable[str]):
        self.stops = tuple(stops)
        self.held, self.found = "", False
        if len(self.stops) > MOST_STOPS or not all(0 < len(s) <= MOST_STOP_CHARS for s in self.stops):
            got = f"{len(self.stops):,} stop strings of {min(map(len, self.stops))} to {max(map(len, self.stops)):,}"
            expected = f"at most {MOST_STOPS}, of 1 to {MOST_STOP_CHARS} characters"
            raise RequestError(f"{got} characters", expected, "give fewer and shorter ones", "stop")

    def feed(self, text: str) -> str:
        """What can be shown. `found` says whether a stop string has come."""
        whole = self.held + text
        ends = [(at + len(stop), at) for stop in self.stops if (at := whole.find(stop)) >= 0]
        if ends:
            self.held, self.found = "", True
            return whole[: min(ends)[1]]
        held = max((overlap(whole, stop) for stop in self.stops), default=0)
        self.held = whole[len(whole) - held :]
        return whole[: len(whole) - held]

    def flush(self) -> str:
        text, self.held = self.held, ""
        return text


class Output:
    """Follows one choice of one request. `spellings`: what each token shows of itself (`shown`). `thinking`: whether
    the prompt leaves off inside the reasoning, None where it has no mark of it. `budget`: tokens of reasoning, after
    which it is closed. `tag` makes the ids of calls unique.
    """

    def __init__(
        self,
        spellings: Sequence[bytes],
        marks: Marks,
        vocab_size: int,
        thinking: bool | None = None,
        stops: Iterable[str] = (),
        budget: int | None = None,
        grammar: "Grammar | None" = None,
        tag: str = "",
    ):
        self.marks, self.vocab_size, self.budget, self.grammar = marks, vocab_size, budget, grammar
        self.text = Text(spellings)
        self.stops = Stops(stops)
        self.calls = Calls(marks.calls, tag) if marks.calls else None
        self.reasoning_tokens = 0
        self.state = (
            "thinking" if thinking else "before" if thinking is None and marks.think is not None else "answering"
        )
        self.due: int | None = None  # a mark that must come next
        self.leading = False  # blank lines between the reasoning and the answer are neither's
        self.told: deque[tuple[bool, list[Delta]]] = deque()  # for each token: is it text, and what it adds
        self.held: list[Token] = []
        self._open: Tensor | None = None

    @property
    def guide(self) -> "Output":
        return self

    def accept(self, token: int) -> bool:
        assert self.state != "over", "a token after the end"
        assert self.due in (None, token), (self.due, token)
        self.due = None
        is_text, deltas = self._step(token)
        self.told.append((is_text, deltas))
        return self.state != "over"

    def _step(self, token: int) -> tuple[bool, list[Delta]]:
        marks = self.marks
        if token in marks.ends:
            self.state = "over"
            return False, []
        if self.state == "before":
            self.state = "thinking" if token == marks.think else "answering"
            if self.state == "thinking":
                return False, []
        if self.state == "thinking":
            return self._think(token)
        if token in (marks.answer, marks.think_end):
            return False, []
        if token == marks.answer_end:
            self.state = "over"
            return False, []
        return True, self._answer(token)

    def _think(self, token: int) -> tuple[bool, list[Delta]]:
        if token == self.marks.think_end:
            self.state, self.due, self.leading = "answering", self.marks.answer, True
            return False, reasoning(self.text.flush())
        self.reasoning_tokens += 1
        return True, reasoning(self.text.feed(token))

    def _answer(self, token: int) -> list[Delta]:
        if self.grammar:
            self.grammar.accept(token)
            if self.grammar.complete:
                self.state = "over"
        return self._shown(self.text.feed(token))

    def _shown(self, text: str) -> list[Delta]:
        if self.leading:
            text = text.lstrip("\r\n")
            self.leading = not text
        text = self.stops.feed(text)
        if self.stops.found:
            self.state = "over"
        return self._split(text)

    def _split(self, text: str) -> list[Delta]:
        if self.calls is None:
            return [Delta("content", text)] if text else []
        return [delta_of(piece) for piece in self.calls.feed(text)]

    def forced(self) -> int | None:
        if self.due is not None:
            return self.due
        if self.state == "thinking":
            return self.marks.think_end if self.budget is not None and self.reasoning_tokens >= self.budget else None
        return self.grammar.forced() if self.grammar and self.state == "answering" else None

    def mask(self) -> Tensor | None:
        if self.grammar is None or self.state == "over":
            return None
        if self.state == "thinking":
            return self._unending()
        mask = self.grammar.mask()
        extra = self.marks.think if self.state == "before" else self.marks.answer_end
        if extra is not None:
            mask = mask.clone()
            mask[extra] = self.state == "before" or self.grammar.matcher.is_accepting()
        return mask

    def _unending(self) -> Tensor:
        """bool [V]: all but the tokens that end a turn; an answer is owed."""
        if self._open is None:
            self._open = torch.ones(self.vocab_size, dtype=torch.bool)
            self._open[list(self.marks.ends)] = False
        return self._open

    def feed(self, step: Step) -> list[Delta]:
        """What the step's tokens add; with its `finish`, also what was held back until then."""
        found: list[Delta] = []
        for token in step.tokens:
            if not self.told:
                break  # it was drawn and never accepted
            is_text, deltas = self.told.popleft()
            if is_text:
                self.held.append(token)
            if deltas:
                deltas[-1] = replace(deltas[-1], tokens=tuple(self.held))
                self.held = []
            found += deltas
        if step.finish is not None and not self.told:
            rest = self._rest()
            if rest:
                rest[-1] = replace(rest[-1], tokens=tuple(self.held))
            found += rest
        return merged(found)

    def _rest(self) -> list[Delta]:
        """What was held back; after a stop string, nothing but the start of a call that never came."""
        if self.state == "thinking":
            return reasoning(self.text.flush())
        self.state = "over"
        found = [] if self.stops.found else self._shown(self.text.flush())
        found += self._split(self.stops.flush())
        return found + [Delta("content", text) for text in (self.calls.flush() if self.calls else ())]

    def finish(self, step: Step) -> str:
        """`finish_reason`, once `step` has ended it."""
        assert step.finish is not None
        return "tool_calls" if step.finish == "stop" and self.calls and self.calls.count else step.finish


def shown(tokenizer: Tokenizer, marks: Marks) -> list[bytes]:
    """What each token shows of itself: its text. Special tokens show nothing, unless calls are spelled with them."""
    table = list(tokenizer.spellings)
    seen = marks.calls.marks if marks.calls else ()
    for i, token in tokenizer.full.get_added_tokens_decoder().items():
        table[i] = b"" if token.special and token.content not in seen else token.content.encode()
    return table


def reasoning(text: str) -> list[Delta]:
    return [Delta("reasoning", text)] if text else []


def delta_of(piece: str | CallDelta) -> Delta:
    if isinstance(piece, str):
        return Delta("content", piece)
    return Delta("tool", piece.arguments, piece.index, piece.id, piece.name)


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """Neighbours of one kind as one; a call's first delta begins anew."""
    found: list[Delta] = []
    for d in deltas:
        if found and (found[-1].kind, found[-1].index) == (d.kind, d.index) and d.call_id is None:
            last = found.pop()
            d = replace(last, text=last.text + d.text, tokens=last.tokens + d.tokens)
        found.append(d)
    return found
