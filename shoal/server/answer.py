"""The shapes of answers: whole ones and the chunks of a stream, for chat and for plain completions."""

import base64
import json
import math
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shoal.engine.request import Token
from shoal.server.ledger import NANO, Prices

if TYPE_CHECKING:
    from shoal.engine.output import Delta
    from shoal.engine.turns import Turns

DONE = b"data: [DONE]\n\n"
encode = json.JSONEncoder(ensure_ascii=False).encode  # `dumps` would make an encoder for each token


@dataclass(frozen=True)
class Spent:
    """What a request used, all choices together."""

    prompt: int
    cached: int
    completion: int
    reasoning: int
    prices: Prices

    def fields(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_cache_hit_tokens": self.cached,
            "prompt_cache_miss_tokens": self.prompt - self.cached,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
            "cost_usd": self.prices.cost(self.prompt, self.cached, self.completion) / NANO,
        }


@dataclass
class Written:
    """What one choice has said so far."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tools: dict[int, dict[str, Any]] = field(default_factory=dict)
    tokens: list[Token] = field(default_factory=list)
    hidden: tuple[float, ...] = ()
    prompt: tuple[Token, ...] = ()  # where it is to be echoed
    end: tuple[Token, ...] = ()

    def add(self, delta: "Delta") -> None:
        self.tokens += delta.tokens
        if delta.kind == "content":
            self.content.append(delta.text)
        elif delta.kind == "reasoning":
            self.reasoning.append(delta.text)
        else:
            call = self.tools.setdefault(delta.index, {"id": delta.call_id, "name": delta.name, "arguments": ""})
            call["arguments"] += delta.text


class Answer:
    """One answer's shape: its id, time and model are in every chunk. `logprobs`: whether they were asked for."""

    def __init__(self, turns: "Turns", chat: bool, answer_id: str, created: int, model: str, logprobs: bool):
        self.turns, self.chat, self.logprobs = turns, chat, logprobs
        kind = "chat.completion" if chat else "text_completion"
        self.head = {"id": answer_id, "object": kind, "created": created, "model": model}
        chunk = self.head | {"object": "chat.completion.chunk" if chat else kind}
        self.start = json.dumps(chunk)[:-1] + ', "choices": '
        self.offsets: dict[int, int] = {}  # characters of each plain completion so far

    def whole(self, choices: Sequence[tuple[Written, str]], spent: Spent) -> bytes:
        shape = self.chat_choice if self.chat else self.text_choice
        found = [shape(i, written, finish) for i, (written, finish) in enumerate(choices)]
        return encode(self.head | {"choices": found, "usage": spent.fields()}).encode()

    def chat_choice(self, index: int, written: Written, finish: str) -> dict[str, Any]:
        content = "".join(written.content)
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not written.tools else None}
        if written.reasoning:
            message["reasoning_content"] = "".join(written.reasoning)
        if written.tools:
            message["tool_calls"] = [called(call) for _, call in sorted(written.tools.items())]
        logprobs = {"content": self.chat_logprobs(written.tokens)} if self.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def text_choice(self, index: int, written: Written, finish: str) -> dict[str, Any]:
        logprobs = (
            self.text_logprobs(index, [*written.prompt, *written.tokens, *written.end]) if self.logprobs else None
        )
        echoed = b"".join(self.turns.piece(t.id) for t in written.prompt).decode(errors="replace")
        text = echoed + "".join(written.content)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> bytes:
        """The role comes first, alone, as OpenAI's streams begin."""
        if not self.chat:
            return b""
        return self.event([self.chunk_choice(index, {"role": "assistant", "content": ""}, (), None)])

    def piece(self, index: int, delta: "Delta") -> bytes:
        if not self.chat:
            return self.event([self.text_chunk(index, delta.text, delta.tokens, None)])
        if delta.kind == "content":
            said: dict[str, Any] = {"content": delta.text}
        elif delta.kind == "reasoning":
            said = {"reasoning_content": delta.text}
        else:
            said = {"tool_calls": [tool_piece(delta)]}
        return self.event([self.chunk_choice(index, said, delta.tokens, None)])

    def ending(self, index: int, finish: str, spent: Spent | None) -> bytes:
        chunk = self.chunk_choice(index, {}, (), finish) if self.chat else self.text_chunk(index, "", (), finish)
        return self.event([chunk], spent)

    def usage(self, spent: Spent) -> bytes:
        return self.event([], spent)

    def chunk_choice(
        self, index: int, said: Mapping[str, Any], tokens: Sequence[Token], finish: str | None
    ) -> dict[str, Any]:
        logprobs = {"content": self.chat_logprobs(tokens)} if self.logprobs and tokens else None
        return {"index": index, "delta": said, "logprobs": logprobs, "finish_reason": finish}

    def text_chunk(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        logprobs = self.text_logprobs(index, tokens) if self.logprobs and tokens else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def event(self, choices: list[dict[str, Any]], spent: Spent | None = None) -> bytes:
        usage = f', "usage": {json.dumps(spent.fields())}' if spent else ""
        return f"data: {self.start}{encode(choices)}{usage}}}\n\n".encode()

    def chat_logprobs(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        return [
            self.scored(t.id, t.logprob) | {"top_logprobs": [self.scored(i, value) for i, value in t.top]}
            for t in tokens
        ]

    def scored(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self.turns.piece(token)
        return {"token": data.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(data)}

    def text_logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        texts = [self.turns.piece(t.id).decode(errors="replace") for t in tokens]
        offset, offsets = self.offsets.get(index, 0), []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self.offsets[index] = offset
        return {
            "tokens": texts,
            "token_logprobs": [finite(t.logprob) for t in tokens],
            "top_logprobs": [
                None  # the first of a prompt
                if t.logprob is None
                else {self.turns.piece(i).decode(errors="replace"): finite(value) for i, value in t.top}
                for t in tokens
            ],
            "text_offset": offsets,
        }


class Vectors(Answer):
    """Embeddings: of unit length, so that a dot product is the cosine."""

    def __init__(self, turns: "Turns", answer_id: str, model: str, encoding: str):
        super().__init__(turns, False, answer_id, 0, model, False)
        self.encoding = encoding

    def whole(self, choices: Sequence[tuple[Written, str]], spent: Spent) -> bytes:
        found = [
            {"object": "embedding", "index": i, "embedding": self.vector(written.hidden)}
            for i, (written, _) in enumerate(choices)
        ]
        usage = {name: spent.fields()[name] for name in ("prompt_tokens", "total_tokens", "cost_usd")}
        return json.dumps({"object": "list", "model": self.head["model"], "data": found, "usage": usage}).encode()

    def vector(self, hidden: Sequence[float]) -> list[float] | str:
        length = math.hypot(*hidden) or 1.0
        unit = array("f", (x / length for x in hidden))
        if self.encoding == "float":
            return [float(f"{x:.9g}") for x in unit]
        if sys.byteorder == "big":
            unit.byteswap()
        return base64.b64encode(unit).decode()


def finite(logprob: float | None) -> float | None:
    """JSON has no minus infinity; clients of this API know −9999 as "cannot happen"."""
    return None if logprob is None else max(logprob, -9999.0)


def called(call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments stay the string that the model wrote; nothing here reads them."""
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {"id": call["id"], "type": "function", "function": function}


def tool_piece(delta: "Delta") -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": delta.text}
    if delta.call_id is None:
        return {"index": delta.index, "function": function}
    named = {"name": delta.name} | function
    return {"index": delta.index, "id": delta.call_id, "type": "function", "function": named}
