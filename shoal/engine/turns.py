"""What a server needs of language, for one model: conversations to tokens, tokens to answers.

Everything slow happens in `render`, `document` and `infill`, which may run in threads: rendering, tokenising, and
compiling the grammar of the answer, which `output` then finds.
"""

import json
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shoal.data.chat import Call, Chat, Message
from shoal.data.tokenizer import Tokenizer
from shoal.engine.output import Output, Stops, shown
from shoal.engine.request import Form
from shoal.errors import RequestError

if TYPE_CHECKING:
    from shoal.engine.grammar import Grammar, Grammars

MOST_TOOLS_BYTES = 2**18


class Turns:
    """Raises ModelError for a chat template that doesn't work. `vocab_size` is the model's, rows to spare included."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int] = ()):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.chat = Chat(tokenizer)
        ends = self.chat.plain.ends | frozenset(stop_ids)
        self.marks, self.plain = replace(self.chat.marks, ends=ends), replace(self.chat.plain, ends=ends)
        self.spellings = shown(tokenizer, self.marks)
        self.grammars: Grammars | None = None  # from the first request that needs one on
        self.lock = threading.Lock()
        self.opens = {on: self._opens(on) for on in (True, False)} if tokenizer.chat_template else {}

    def _opens(self, thinking: bool) -> bool | None:
        """Whether a prompt leaves off inside the reasoning. R1's always does, asked to think or not."""
        return self.marks.thinking_after(self.chat.prompt((Message("user", "Hi"),), (), thinking))

    @property
    def stop_tokens(self) -> frozenset[int]:
        return self.marks.ends

    def render(self, messages: Sequence[Mapping[str, Any]], form: Form) -> list[int]:
        """Tokens of a conversation, ready for the answer. Special tokens spelled in text stay text."""
        self._grammar(form)
        return self.chat.prompt(in_call_order([message_of(m) for m in messages]), tools_of(form), form.thinking)

    def document(self, text: str) -> list[int]:
        """Tokens of plain text to continue."""
        return self.chat.completion(text)

    def infill(self, prefix: str, suffix: str) -> list[int]:
        """Tokens that ask for what stands between. Raises RequestError where the model can't."""
        return self.chat.completion(prefix, suffix)

    def output(self, form: Form, chat: bool, prompt: Sequence[int] = ()) -> Output:
        """A fresh state machine. `prompt`: what `render` gave, needed where the last message is a prefix: it may leave
        off before, inside or after the reasoning. Raises RequestError for stop strings or a schema that can't be
        followed.
        """
        if not chat:
            return Output(self.spellings, self.plain, self.vocab_size, stops=form.stop)
        opens = self.marks.thinking_after(prompt) if prompt else self.opens.get(form.thinking)
        if form.continues and (opens is None or not prompt):
            opens = False
        marks = self.marks if form.tools else replace(self.marks, calls=None)
        budget = form.thinking_budget if form.thinking else 0
        grammar, tag = self._grammar(form), uuid.uuid4().hex[:20]
        return Output(self.spellings, marks, self.vocab_size, opens, form.stop, budget, grammar, tag)

    def piece(self, token: int) -> bytes:
        """The bytes that a token spells."""
        return self.spellings[token] if token < len(self.spellings) else b""

    def close(self) -> None:
        """End the child processes."""
        if self.grammars:
            self.grammars.close()
        if self.chat.template:
            self.chat.template.child.close()

    def _grammar(self, form: Form) -> "Grammar | None":
        Stops(form.stop)
        named = form.tool_choice["function"]["name"] if isinstance(form.tool_choice, Mapping) else None
        if form.tools and self.marks.calls and (named or form.tool_choice == "required"):
            return self._grammars.calls(self.marks.calls, tools_of(form), named, form.parallel_calls)
        if form.json and form.schema is not None:
            return self._grammars.json_schema(dict(form.schema))
        return self._grammars.json_object() if form.json else None

    @property
    def _grammars(self) -> "Grammars":
        with self.lock:
            if self.grammars is None:
                try:
                    from shoal.engine.grammar import Grammars
                except ImportError:
                    got, fix = "an answer in JSON or a demanded call", 'pip install "shoal-lm[serve]"'
                    raise RequestError(got, "llguidance, which is not installed here", fix) from None
                self.grammars = Grammars(self.tokenizer, self.vocab_size, self.marks.ends)
            return self.grammars


def message_of(raw: Mapping[str, Any]) -> Message:
    """From the form of OpenAI's and DeepSeek's requests, whose types a server has checked."""
    functions = [(call["function"], call["id"]) for call in raw.get("tool_calls") or ()]
    return Message(
        "system" if raw["role"] == "developer" else raw["role"],
        raw.get("content") or "",
        raw.get("reasoning_content") or "",
        tuple(Call(f["name"], f["arguments"], call_id) for f, call_id in functions),
        raw.get("tool_call_id") or "",
        bool(raw.get("prefix")),
    )


def in_call_order(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Each call answered once, right after it, and in order: a model sees results without ids. Raises RequestError."""
    found: list[Message] = []
    while len(found) < len(messages):
        i, m = len(found), messages[len(found)]
        if m.role == "tool":
            got = f"messages[{i}]: the result of a call that isn't in the message before"
            raise RequestError(got, "results right after their calls", "correct the order or the ids", "messages")
        results = {r.call_id: r for r in messages[i + 1 : i + 1 + len(m.calls)] if r.role == "tool"}
        if [c.id for c in m.calls if c.id in results] != [*dict.fromkeys(c.id for c in m.calls)]:
            got = f"messages[{i}]: {len(m.calls)} calls, and {len(results)} results after it"
            raise RequestError(got, "one tool message for each tool_call_id", "add the results", "messages")
        found += [m, *(results[c.id] for c in m.calls)]
    return tuple(found)


def tools_of(form: Form) -> tuple[dict, ...]:
    """Functions as a chat template wants them: nothing empty, and `strict` is ours alone. Raises RequestError."""
    functions = ({k: v for k, v in t["function"].items() if v is not None and k != "strict"} for t in form.tools)
    tools = tuple({"type": "function", "function": f} for f in functions)
    if (size := len(json.dumps(tools))) > MOST_TOOLS_BYTES:
        got, expected = f"tools of {size:,} bytes", f"at most {MOST_TOOLS_BYTES:,}"
        raise RequestError(got, expected, "give fewer or shorter ones", "tools")
    return tools
