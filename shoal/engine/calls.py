"""Tool calls in the text of an answer, told as they come: first the name, then the arguments piece by piece.

Arguments are text. Nothing here parses them, let alone runs them: brackets and quotes are counted to see where they
end, so `</tool_call>` inside a string ends nothing. What begins like a call and isn't one is content after all. Calls
are read character by character, so how the text was cut into pieces changes nothing.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from shoal.data.chat import CallForm

MOST_HEAD_CHARS = 4096  # before the arguments begin; more is no call
BETWEEN = "}` \t\r\n"  # may stand between the arguments and the end of a call


@dataclass(frozen=True)
class CallDelta:
    """`id` and `name` come once, with the first delta of a call."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class Calls:
    """Splits text into content and calls. `tag` makes ids unique."""

    def __init__(self, form: CallForm, tag: str):
        self.form, self.tag = form, tag
        self.head = re.compile(form.pattern)
        self.count = 0
        self.state = self._content
        self.buffer = ""  # of content: what may become a mark; of a call: its head or tail
        self.after_call = False
        self.spoken = False  # something that is no call has come
        self.depth, self.in_string, self.escaped = 0, False, False

    def feed(self, text: str) -> Iterator[str | CallDelta]:
        """Content as text, calls as deltas, in their order."""
        while text:
            text = yield from self.state(text)

    def flush(self) -> Iterator[str]:
        """What was held back, when nothing more comes."""
        if self.state == self._head:
            yield self.form.open + self.buffer
        elif self.state in (self._content, self._tail) and self.buffer:
            yield self.buffer
        self.buffer = ""

    def _content(self, text: str):
        if self.after_call:
            text = text.lstrip()
            self.after_call = not text
        whole = self.buffer + text
        if self.form.leading:
            begins = whole.lstrip()
            if not begins.startswith(self.form.open) or self.spoken:
                self.spoken = self.spoken or bool(begins)
                self.buffer = "" if self.spoken else whole
                yield from [whole] * self.spoken
                return ""
            whole = begins
        before, found, rest = whole.partition(self.form.open)
        if found:
            self.buffer, self.state = "", self._head
        else:
            held = overlap(whole, self.form.open)
            before, self.buffer = whole[: len(whole) - held], whole[len(whole) - held :]
        if before:
            yield before
        return rest

    def _head(self, text: str):
        for i, char in enumerate(text, 1):
            self.buffer += char
            if char == "{" and (found := self.head.fullmatch(self.buffer)):
                yield self._begun(found[1])
                self.buffer, self.state = "", self._arguments
                self.depth, self.in_string, self.escaped = 0, False, False
                return text[i - 1 :]
            if self.buffer.endswith(self.form.close):
                self.spoken = True
                yield self._in_another_order(self.buffer.removesuffix(self.form.close))
                self.buffer, self.state = "", self._content
                return text[i:]
            if len(self.buffer) > MOST_HEAD_CHARS:
                self.spoken = True
                yield self.form.open + self.buffer
                self.buffer, self.state = "", self._content
                return text[i:]
        return ""

    def _begun(self, name: str, arguments: str = "") -> CallDelta:
        self.count += 1
        with suppress(ValueError):  # where it is bare
            name = str(json.loads(name))
        return CallDelta(self.count - 1, arguments, f"call_{self.tag}_{self.count - 1}", name)

    def _in_another_order(self, call: str) -> str | CallDelta:
        """A call that is whole JSON but doesn't begin with the name, or what is no call, as content."""
        try:
            value = json.loads(call)
            name, arguments = value["name"], value["arguments"]
        except (ValueError, TypeError, LookupError, RecursionError):
            return self.form.open + call + self.form.close
        self.after_call = True
        given = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return self._begun(json.dumps(str(name)), given)

    def _arguments(self, text: str):
        for i, char in enumerate(text, 1):
            if self.escaped:
                self.escaped = False
            elif self.in_string:
                self.escaped, self.in_string = char == "\\", char != '"'
            elif char == '"':
                self.in_string = True
            elif char in "{[":
                self.depth += 1
            elif char in "}]":
                self.depth -= 1
                if self.depth == 0:
                    self.state = self._tail
                    yield CallDelta(self.count - 1, text[:i])
                    return text[i:]
        yield CallDelta(self.count - 1, text)
        return ""

    def _tail(self, text: str):
        for i, char in enumerate(text, 1):
            self.buffer = (self.buffer + char).lstrip(BETWEEN.replace(self.form.close, ""))
            if self.buffer == self.form.close:
                self.buffer, self.state, self.after_call = "", self._content, True
                return text[i:]
            if not self.form.close.startswith(self.buffer):
                rest, self.buffer, self.state = self.buffer, "", self._content
                return rest + text[i:]
        yield from ()
        return ""


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that `mark` begins with, the whole mark excluded."""
    for start in range(max(0, len(text) - len(mark) + 1), len(text)):
        if mark.startswith(text[start:]):
            return len(text) - start
    return 0
