"""Grammars that a completion must follow: JSON, JSON of a schema, calls of given functions. By llguidance.

A `Grammar` says before each token which ones may come next, and so whatever is drawn, the text parses. Where only one
continuation is possible it names the tokens, and nothing need be drawn.

A schema is a stranger's program: a few bytes of it can mean minutes of compiling. So it is first bounded
(`schema.py`), then compiled in a child process with bounded time and memory (`grammar_child.py`), and only what passed
is compiled here. Each step of a compiled grammar has bounded fuel.

Between JSON's tokens at most one run of 12 blanks may stand, so that no model loses itself in white space, and strings
write their characters as they are, with \\n and the like but without \\u, which can spell halves of characters.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from shoal.data.bounded import Child, Overrun
from shoal.data.chat import CallForm
from shoal.data.tokenizer import Tokenizer
from shoal.engine import schema as bounds
from shoal.errors import RequestError

SCRIPT = Path(__file__).with_name("grammar_child.py")
SECONDS, MEMORY_BYTES = 1.0, 128 * 2**20
KEPT = 64  # compiled grammars
JSON_FORM = {"whitespace_flexible": True, "whitespace_pattern": r"[ \t\n]{1,12}", "json_allowed_escapes": '"\\bfnrt'}
LIMITS = {"max_lexer_states": 20_000, "precompute_large_lexemes": False, "verbose_errors": False}


class Grammars:
    """Compiles for one tokenizer and a model of `vocab_size` rows. Thread-safe; compiling takes up to two seconds."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Iterable[int]):
        self.vocab_size, self.ends = vocab_size, tuple(ends)
        if not self.ends:
            got = "a model without an end token"
            raise RequestError(got, "one that can end its answer", "ask without response_format", "response_format")
        self.vocabulary = LLTokenizer(Vocabulary(tokenizer, vocab_size, self.ends[0]))  # type: ignore[arg-type]
        self.child = Child(SCRIPT, SECONDS, MEMORY_BYTES)
        self.compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self.lock = threading.Lock()

    def json_object(self) -> "Grammar":
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Any) -> "Grammar":
        """Raises RequestError for a schema that is malformed, unsupported, too large or too hard."""
        return self._compile(f"start: %json {json_source(schema, 'response_format')}", [schema], "response_format")

    def calls(self, form: CallForm, tools: Sequence[dict], name: str | None = None, parallel: bool = True) -> "Grammar":
        """One call, or if `parallel` more, each of one of the functions; with a name, one call of that function."""
        chosen = [t["function"] for t in tools if name in (None, t["function"]["name"])]
        if not chosen:
            raise RequestError(f"tool_choice {ascii(name)[:80]}", "a function of tools", "name one", "tool_choice")
        rules = []
        for i, function in enumerate(chosen):
            head, tail = quoted(form.open + form.head.format(function["name"])), quoted(form.tail + form.close)
            schema = json_source(function.get("parameters") or {"type": "object"}, "tools", lenient=True)
            rules += [f"call{i}: {head} arguments{i} {tail}", f"arguments{i}: %json {schema}"]
        either = " | ".join(f"call{i}" for i in range(len(chosen)))
        start = f"start: ({either}){'' if name or not parallel else '+'}"
        return self._compile("\n".join([start, *rules]), [f.get("parameters") or {} for f in chosen], "tools")

    def close(self) -> None:
        self.child.close()

    def _compile(self, lark: str, schemas: list, param: str) -> "Grammar":
        with self.lock:
            matcher = self.compiled.get(lark)
        matcher = matcher or self._checked(lark, schemas, param)
        with self.lock:  # never held while something compiles
            self.compiled[lark] = matcher
            self.compiled.move_to_end(lark)
            if len(self.compiled) > KEPT:
                self.compiled.popitem(last=False)
            return Grammar(matcher.deep_copy(), self.vocab_size, self.ends)

    def _checked(self, lark: str, schemas: list, param: str) -> LLMatcher:
        try:
            fault = self.child.ask({"lark": lark, "schemas": schemas, "limits": LIMITS}).get("error")
        except Overrun as e:
            fault = str(e)
        if not fault:
            matcher = LLMatcher(self.vocabulary, lark, log_level=0, limits=LLParserLimits(**LIMITS))
            fault = matcher.get_error()
            if not fault:
                return matcher
        why = "".join(c if c.isprintable() else " " for c in fault.partition("\n")[0][:300])
        fix = "simplify the schema; docs/chat.md says what is supported"
        raise RequestError(f"a schema that can't be followed: {why}", "one that compiles", fix, param, "invalid_schema")


class Grammar:
    """Where one completion stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, ends: tuple[int, ...]):
        self.matcher, self.vocab_size, self.ends = matcher, vocab_size, ends
        self._mask: Tensor | None = None
        self._ahead: list[int] | None = None

    @property
    def complete(self) -> bool:
        """Nothing can be added to the text."""
        return self.matcher.is_stopped()

    def accept(self, token: int) -> None:
        """One more token of the text stands. Raises RequestError where a step takes more work than it may."""
        self._mask, ahead = None, self._ahead
        self._ahead = ahead[1:] if ahead and ahead[0] == token and len(ahead) > 1 else None
        self.matcher.consume_token(token)
        self._check()

    def forced(self) -> int | None:
        """The next token where the text can go on in one way only."""
        if self._ahead is None:
            self._ahead = [] if self.matcher.is_accepting() else self.matcher.compute_ff_tokens()
        return self._ahead[0] if self._ahead else None

    def mask(self) -> Tensor:
        """bool [V]: what may come next. The same tensor until a token is accepted; not to be written to."""
        if self._mask is None:
            bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
            self._check()
            allowed = np.unpackbits(bits, count=self.vocab_size, bitorder="little")
            self._mask = torch.from_numpy(allowed).view(torch.bool)
            self._mask[list(self.ends)] = self.matcher.is_accepting()
        return self._mask

    def _check(self) -> None:
        if self.matcher.is_error():
            got = f"a schema that takes too much work: {self.matcher.get_error()[:200]}"
            raise RequestError(got, "one that is easier to follow", "simplify the schema", code="invalid_schema")


class Vocabulary:
    """Our tokens as llguidance wants them: bytes of each id; those without text are named, and never allowed."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end: int):
        spelled = [*tokenizer.spellings, *[b""] * (vocab_size - tokenizer.vocab_size)]
        self.tokenizer, self.eos_token_id, self.bos_token_id = tokenizer, end, tokenizer.bos_id
        self.special_token_ids = [i for i, text in enumerate(spelled) if not text]
        self.tokens = [text or f"<unspelled {i}>".encode() for i, text in enumerate(spelled)]

    def __call__(self, text: str | bytes) -> list[int]:
        return self.tokenizer.encode(text if isinstance(text, str) else text.decode())


def json_source(schema: Any, param: str, lenient: bool = False) -> str:
    """The schema in llguidance's notation. Raises RequestError where it is no object, or out of bounds."""
    if not isinstance(schema, dict):
        got, fix = f"a schema that is a {type(schema).__name__}", "give the schema as an object"
        raise RequestError(got, "a JSON schema", fix, param, "invalid_schema")
    bounds.check(schema, param)
    return json.dumps(schema | {"x-guidance": JSON_FORM | {"lenient": lenient}})


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
