"""Conversations as token pieces: what turns, reasoning, calls and their results look like to the model.

    document      <bos> <User> prompt <Assistant> <think> reasoning </think> <answer> answer </answer> <eos>
    conversation  <bos> system (<User> text <Assistant> <think> reasoning </think> <answer> text calls </answer> <eos>)…
    results       <User> <answer> result </answer> <answer> result </answer>        in place of a user's text
    completion    <bos> text                <bos> <fim_begin> prefix <fim_hole> suffix <fim_end>

The first is the training text, the second goes on from it, so a model meets one form everywhere. What the model is
given ends after `<think>`, or without thinking after `</think> <answer>`; `</answer>` ends its turn. Reasoning stands
only in turns after the last user's, as with R1; earlier ones keep empty marks. Structure is special tokens, which no
text can spell (`tokenizer.py`): a tool's result can't pose as the user, nor a user as the system. Only calls are text,
`<tool_call>{"name": "f", "arguments": {…}}</tool_call>`, because the vocabulary's special tokens are fixed; nobody but
the model writes into its turn. Functions are described in the system's text, one JSON object a line.

`chat.jinja` says the same to transformers and to other servers, token for token where no text spells a special token,
and lies in every model folder we write. Folders with a template of their own are rendered by it (`template.py`).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from shoal.data.template import Template
from shoal.data.tokenizer import (
    ANSWER,
    ANSWER_END,
    ASSISTANT,
    BOS,
    CHAT_TEMPLATE,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    THINK,
    THINK_END,
    USER,
    Special,
    Tokenizer,
)
from shoal.errors import RequestError

TOOLS_BEFORE = "Functions you can call:"
TOOLS_AFTER = 'To call one, write <tool_call>{"name": NAME, "arguments": {...}}</tool_call>'
CALL = '<tool_call>{{"name": {}, "arguments": {}}}</tool_call>'
Ending = Literal["prompt", "prefix", "whole"]


@dataclass(frozen=True)
class Call:
    """`arguments` is JSON as the model wrote it, which may be none; it is never evaluated."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Message:
    """`call_id`: of the call that a tool's message answers. `prefix`: an assistant's last message, to be continued."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    call_id: str = ""
    prefix: bool = False


def question(prompt: str) -> tuple[str, ...]:
    """What the model is given; it goes on with its reasoning."""
    return USER, prompt, ASSISTANT, THINK


def worked(prompt: str, reasoning: str, answer: str) -> tuple[str, ...]:
    """A question with its worked answer, as training text; BOS and EOS are added where documents are (`corpus.py`)."""
    return *question(prompt), reasoning, THINK_END, ANSWER, answer, ANSWER_END


def filling(prefix: str, suffix: str) -> tuple[str, ...]:
    """The model goes on with what stands between."""
    return joined((BOS, FIM_BEGIN, prefix, FIM_HOLE, suffix, FIM_END))


def render(
    messages: Sequence[Message], tools: Sequence[dict] = (), thinking: bool = True, ending: Ending = "prompt"
) -> tuple[str, ...]:
    """A conversation in our own form; `tools` as in OpenAI's requests.

    The ending "prompt" asks for the assistant's next turn, "prefix" leaves its last one open after what it says, and
    "whole" adds nothing.
    """
    asked = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)
    pieces: list[str] = [BOS, system_text(messages, tools)]
    before = ""
    for i, m in enumerate(messages):
        if m.role == "user":
            pieces += [USER, m.content]
        elif m.role == "tool":
            pieces += [*([] if before == "tool" else [USER]), ANSWER, m.content, ANSWER_END]
        elif m.role == "assistant":
            pieces += assistant_turn(m, m.reasoning if i > asked else "")
        before = before if m.role == "system" else m.role
    if ending == "prompt":
        pieces += [ASSISTANT, THINK] if thinking else [ASSISTANT, THINK, THINK_END, ANSWER]
    elif ending == "prefix":
        last = messages[-1]
        in_reasoning = thinking and last.reasoning and not last.content
        pieces = pieces[: -5 if in_reasoning else -2]
    return joined(pieces)


def system_text(messages: Sequence[Message], tools: Sequence[dict]) -> str:
    parts = ["\n\n".join(m.content for m in messages if m.role == "system" and m.content)]
    if tools:
        described = (json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        parts.append("\n".join([TOOLS_BEFORE, *described, TOOLS_AFTER]))
    return "\n\n".join(part for part in parts if part)


def assistant_turn(message: Message, reasoning: str) -> list[str]:
    calls = (CALL.format(json.dumps(c.name, ensure_ascii=False), c.arguments) for c in message.calls)
    said = message.content + "".join(calls)
    return [ASSISTANT, THINK, reasoning, THINK_END, ANSWER, said, ANSWER_END, EOS]


def joined(pieces: Iterable[str]) -> tuple[str, ...]:
    """Neighbouring texts as one, because tokens may span them, and none that is empty."""
    found: list[str] = []
    for piece in pieces:
        if found and not isinstance(piece, Special) and not isinstance(found[-1], Special):
            found[-1] += piece
        elif piece:
            found.append(piece)
    return tuple(found)


@dataclass(frozen=True)
class CallForm:
    """How calls are spelled: open, `head` with a name in it, JSON arguments, `tail`, close.

    `pattern` finds the name (as JSON, or bare) in a head that somebody else wrote. `marks` are special tokens in some
    vocabularies; their spelling counts as text where calls are looked for. A form without tags can only be told where
    an answer begins, and after a call.
    """

    open: str
    close: str
    head: str  # {} is the name
    pattern: str
    tail: str
    marks: tuple[str, ...]
    leading: bool = False


JSON_CALLS = CallForm(
    open="<tool_call>",
    close="</tool_call>",
    head='{{"name": "{}", "arguments": ',
    pattern=r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*\{',
    tail="}",
    marks=("<tool_call>", "</tool_call>"),
)
DEEPSEEK_MARKS = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>")
DEEPSEEK_CALLS = CallForm(
    open=DEEPSEEK_MARKS[0],
    close=DEEPSEEK_MARKS[1],
    head="function<｜tool▁sep｜>{}\n```json\n",
    pattern=r"\s*function<｜tool▁sep｜>([^\s`]+)\s*```json\s*\{",
    tail="\n```",
    marks=DEEPSEEK_MARKS,
)
BARE_DEEPSEEK_CALLS = replace(  # V3.1
    DEEPSEEK_CALLS, head="{}<｜tool▁sep｜>", pattern=r"\s*([^\s<]+)<｜tool▁sep｜>\s*\{", tail=""
)
LLAMA_CALLS = CallForm(
    open="{",
    close="}",
    head='"name": "{}", "parameters": ',
    pattern=r'\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"parameters"\s*:\s*\{',
    tail="",
    marks=(),
    leading=True,
)
ENDS = (EOS, BOS, USER, "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")


@dataclass(frozen=True)
class Marks:
    """What structures a model's output: token ids, None where its vocabulary has no such token."""

    ends: frozenset[int]
    think: int | None = None
    think_end: int | None = None
    answer: int | None = None
    answer_end: int | None = None
    calls: CallForm | None = None

    def thinking_after(self, tokens: Sequence[int]) -> bool | None:
        """Whether these leave off inside the reasoning; None where their last turn has neither mark."""
        marks = {self.think, self.think_end} | self.ends
        last = next((t for t in reversed(tokens) if t in marks), None)
        return None if last is None or last in self.ends else last == self.think


class Chat:
    """The chat form of one model folder: our own, its template's, or none. Raises ModelError for a bad template."""

    def __init__(self, tokenizer: Tokenizer):
        t = self.tokenizer = tokenizer
        source = t.chat_template
        self.ours = source == CHAT_TEMPLATE
        self.template = Template(source, t) if source and not self.ours else None
        ids = (t.id(name) for name in ENDS)
        self.plain = Marks(frozenset(i for i in (t.eos_id, *ids) if i is not None))
        think, think_end = t.id(THINK), t.id(THINK_END)
        if think is None or think_end is None:
            think = think_end = None
        answer, answer_end = (t.id(ANSWER), t.id(ANSWER_END)) if self.ours else (None, None)
        self.marks = Marks(self.plain.ends, think, think_end, answer, answer_end, self._calls(source or ""))

    def close(self) -> None:
        """End the process that renders a foreign template; whoever asks again starts another."""
        if self.template:
            self.template.child.close()

    def _calls(self, source: str) -> CallForm | None:
        if DEEPSEEK_MARKS[0] in source:
            return DEEPSEEK_CALLS if "```json" in source else BARE_DEEPSEEK_CALLS
        if JSON_CALLS.open in source:
            return JSON_CALLS
        return LLAMA_CALLS if '{"name": ' in source and '"parameters": ' in source else None

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict] = (), thinking: bool = True) -> list[int]:
        """Tokens after which the assistant goes on: with its next turn, or with the last message where that is a
        prefix. Raises RequestError.
        """
        ending: Ending = "prefix" if messages[-1].prefix else "prompt"
        if tools and self.marks.calls is None:
            raise RequestError(
                "tools", "none: this model's chat template has no place for them", "leave them out", "tools"
            )
        if self.ours:
            return self.tokenizer.encode_pieces(render(messages, tools, thinking, ending))
        if self.template is None:
            got = "a conversation for a model without a chat template"
            raise RequestError(got, "text to complete", "use /v1/completions, or serve a chat model", "messages")
        pieces = self.template.render([as_dict(m) for m in messages], tools, ending, thinking)
        return self.tokenizer.encode_pieces(pieces)

    def taught(self, messages: Sequence[Message], tools: Sequence[dict] = ()) -> tuple[list[int], list[int]]:
        """What the model is given before the last message, an assistant's, and what it should then say: reasoning,
        answer, end marks. Without reasoning, the model is given what asks for none. Raises RequestError.
        """
        *before, last = messages
        assert last.role == "assistant" and not last.prefix, last
        given = self.prompt(before, tools, bool(last.reasoning))
        if self.ours:
            turn = assistant_turn(last, last.reasoning)
            return given, self.tokenizer.encode_pieces(joined(turn[2 if last.reasoning else 5 :]))
        return given, self.tokenizer.encode_pieces(joined(self._foreign_turn(last, self.marks.thinking_after(given))))

    def _foreign_turn(self, last: Message, thinking: bool | None) -> list[str]:
        """A turn by R1's habit, for a prompt that leaves off `thinking` or not, ended by the vocabulary's EOS."""
        eos = self.tokenizer.name(self.tokenizer.eos_id)
        if last.calls or eos is None or (last.reasoning and self.marks.think is None):
            got = "calls" if last.calls else "an end of a turn" if eos is None else "reasoning"
            got = f"{got} to learn, for a chat template and a vocabulary that don't say how it is written"
            raise RequestError(got, "a model in our own chat form", "leave it out, or add the tokens", "messages")
        if not last.reasoning and not thinking:
            return [last.content, Special(eos)]
        opening = [] if thinking else [THINK, "\n"]
        return [*opening, last.reasoning, "\n", THINK_END, "\n\n", last.content, Special(eos)]

    def completion(self, text: str, suffix: str | None = None) -> list[int]:
        """Tokens of a plain text, or of one with a hole before `suffix`. Raises RequestError."""
        t = self.tokenizer
        if suffix is None:
            return ([] if t.bos_id is None else [t.bos_id]) + t.encode(text)
        if any(t.id(mark) is None for mark in (BOS, FIM_BEGIN, FIM_HOLE, FIM_END)):
            got = "a suffix for a model without fill-in-the-middle tokens"
            raise RequestError(got, "a prompt alone", "leave out suffix", "suffix")
        return t.encode_pieces(filling(text, suffix))


def as_dict(m: Message) -> dict:
    """The form that chat templates know."""
    found: dict = {"role": m.role, "content": m.content}
    if m.reasoning:
        found["reasoning_content"] = m.reasoning
    if m.calls:
        functions = ({"name": c.name, "arguments": c.arguments} for c in m.calls)
        found["tool_calls"] = [{"id": c.id, "type": "function", "function": f} for c, f in zip(m.calls, functions)]
    if m.call_id:
        found["tool_call_id"] = m.call_id
    return found
