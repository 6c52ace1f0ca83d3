"""Who is asked for answers: a model in this process, by our engine, all at once; or any OpenAI-shaped URL.

    teacher.ask([(prompt, sample), …])  →  Answers, in the order in which they come

Both know nothing of caches, grading or cost. Closing the iterator stops asking.

The URL's client is a page of the standard library. It sends /chat/completions, takes the reasoning from
`reasoning_content` or `reasoning`, or from `<think>` in the content, waits and tries again where the other side is
busy, gone or slow (429, 5xx, no connection, no whole JSON), and gives up where asking again is of no use (a bad key, no
such model).
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, Protocol

from shoal.data.chat import Chat, Message
from shoal.data.tokenizer import Tokenizer
from shoal.engine import native
from shoal.engine.engine import LocalEngine
from shoal.engine.gather import Result
from shoal.engine.request import Request, Sampling, Step, Token
from shoal.errors import ConfigError, ModelError, ResourceError
from shoal.model.transformer import Transformer
from shoal.post.answers import Answer, parted
from shoal.post.config import EndpointConfig, SamplingConfig

Wanted = tuple[str, int]  # prompt, sample number
MAX_REPLY_BYTES = 64 << 20
LONGEST_WAIT = 60.0  # seconds between two tries
BAD_REQUEST = (400, 413, 422)  # of this prompt alone
AGAIN = (408, 409, 425, 429)  # besides 5xx


class Teacher(Protocol):
    """`name` and `settings` are what an answer depends on; nothing secret is among them."""

    name: str

    @property
    def settings(self) -> dict[str, Any]: ...
    def ask(self, wanted: Sequence[Wanted]) -> Generator[Answer, None, None]: ...


class LocalTeacher:
    """A model here. An answer depends on prompt and sample number alone; but for rounding, where the engine's native
    program doesn't take the model."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, folder: Path, sampling: SamplingConfig,
        instruction: str = "", ends: frozenset[int] = frozenset(), unchanged: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """`instruction` goes behind every prompt, where the chat form isn't ours: that one marks its answers itself.
        `unchanged` is the engine's."""
        self.model, self.tokenizer, self.sampling, self.unchanged = model, tokenizer, sampling, unchanged
        self.chat, self.name = Chat(tokenizer), identity(folder)
        self.instruction = "" if self.chat.ours else instruction
        last = self.chat.marks.answer_end
        self.ends = self.chat.marks.ends | ends | ({last} if last is not None else set())

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self.sampling) | {"instruction": self.instruction}

    def ask(self, wanted: Sequence[Wanted]) -> Generator[Answer, None, None]:
        """Raises ModelError where the model's numbers aren't finite, ConfigError for a prompt beyond its context."""
        made = LocalEngine(self.model, deterministic=native.takes(self.model), unchanged=self.unchanged)
        with closing(self.chat), closing(made) as engine:
            done: SimpleQueue[tuple[Wanted, Request, Result]] = SimpleQueue()
            for one in wanted:
                engine.submit(self.request(one, engine.context, done))
            for _ in wanted:
                yield self.answer(*done.get())

    def request(self, one: Wanted, context: int, done: SimpleQueue) -> Request:
        prompt, sample = one
        tokens = tuple(self.chat.prompt((Message("user", worded(prompt, self.instruction)),)))
        room = min(self.sampling.max_tokens, context - len(tokens))
        if room < 1:
            fix = "leave it out, or take another teacher"
            raise ConfigError(f"a prompt of {len(tokens)} tokens", f"less than the context of {context}", fix)
        drawn: list[Token] = []

        def sink(step: Step) -> None:
            drawn.extend(step.tokens)
            if step.finish:
                done.put((one, request, Result(tuple(drawn), step.finish, step.usage, step.error)))

        seed = int.from_bytes(sha256(f"{sample}:{prompt}".encode()).digest()[:7], "big")
        s = self.sampling
        request = Request(tokens, room, sink, Sampling(s.temperature, s.top_p, seed=seed), self.ends)
        return request

    def answer(self, one: Wanted, request: Request, result: Result) -> Answer:
        if result.error:
            raise ModelError(f"{self.name}: {result.error}", "finite numbers from the teacher", "check its weights")
        opened = "<think>" if self.chat.marks.thinking_after(request.tokens) else ""
        text = opened + self.tokenizer.decode([token.id for token in result.tokens], skip_special=True)
        reasoning, content = parted(text)
        if self.chat.ours and content.startswith("<answer>") and content.endswith("</answer>"):
            content = content.removeprefix("<answer>").removesuffix("</answer>")
        return Answer(*one, reasoning, content, result.finish, len(request.tokens), len(result.tokens))


class Endpoint:
    """A model behind a URL."""

    def __init__(self, url: str, config: EndpointConfig, sampling: SamplingConfig, instruction: str = ""):
        if not config.model:
            raise ConfigError(f"the teacher {url} without a model", "its name there", "give --endpoint.model NAME")
        key = os.environ.get(config.key_env, "") if config.key_env else ""
        if config.key_env and not key:
            fix = "set it, or leave out --endpoint.key_env"
            raise ConfigError(f"no {config.key_env} in the environment", "the API key", fix)
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.config, self.sampling, self.instruction = config, sampling, instruction
        self.name = f"{self.url} {config.model}"
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self.sampling) | {"instruction": self.instruction}

    def ask(self, wanted: Sequence[Wanted]) -> Generator[Answer, None, None]:
        """`concurrency` at a time. Raises ConfigError where it is refused, ResourceError where nobody answers."""
        waiting: SimpleQueue[Wanted] = SimpleQueue()
        done: SimpleQueue[Answer | Exception] = SimpleQueue()
        closed = Event()
        for one in wanted:
            waiting.put(one)

        def work() -> None:
            while not closed.is_set():
                try:
                    done.put(self.answer(waiting.get_nowait(), closed))
                except Empty:
                    return
                except Exception as error:  # the thread ends here; whoever waits hears of it
                    done.put(error)
                    return

        for _ in range(min(self.config.concurrency, len(wanted))):
            Thread(target=work, daemon=True).start()
        try:
            for _ in wanted:
                found = done.get()
                if isinstance(found, Exception):
                    raise found
                yield found
        finally:
            closed.set()

    def answer(self, one: Wanted, closed: Event) -> Answer:
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": worded(one[0], self.instruction)}],
        } | asdict(self.sampling)
        why = ""
        for attempt in range(self.config.tries):
            try:
                return read_reply(one, self.post(body))
            except urllib.error.HTTPError as e:
                why, asked_for = f"status {e.code}", retry_after(e)
                if e.code in BAD_REQUEST:
                    return Answer(*one, "", "", "refused")
                if e.code < 500 and e.code not in AGAIN:
                    said = e.read(300).decode("utf-8", "replace")
                    fix = "look at --endpoint.model, --endpoint.key_env and the URL"
                    raise ConfigError(f"{self.url}: status {e.code}: {said}", "an answer", fix) from None
            except (OSError, HTTPException, ValueError) as e:
                why, asked_for = str(e) or type(e).__name__, 0.0
            if attempt + 1 < self.config.tries and closed.wait(pause(attempt, asked_for)):
                break
        fix = "run it again: what was answered is kept, and only the rest is asked for"
        raise ResourceError(f"{self.url} failed {self.config.tries} times, at last with: {why}", "an answer", fix)

    def post(self, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self.headers)
        deadline = time.monotonic() + self.config.timeout_seconds
        with urllib.request.urlopen(request, timeout=self.config.timeout_seconds) as reply:
            pieces, size = [], 0
            while piece := reply.read1(1 << 16):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_REPLY_BYTES or time.monotonic() > deadline:
                    raise ValueError(f"a reply of more than {size:,} bytes or {self.config.timeout_seconds:g} seconds")
        return json.loads(b"".join(pieces))


def worded(prompt: str, instruction: str) -> str:
    return f"{prompt}\n\n{instruction}" if instruction else prompt


def read_reply(one: Wanted, reply: Any) -> Answer:
    """Raises ValueError for what isn't a chat completion."""
    try:
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        message = choice["message"]
        reasoning, content = (
            message.get("reasoning_content") or message.get("reasoning") or "",
            message.get("content") or "",
        )
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        if not reasoning:
            reasoning, content = parted(content)
        return Answer(*one, reasoning.strip(), content.strip(), str(choice.get("finish_reason") or "stop"), *counts)
    except (LookupError, TypeError, AttributeError) as e:
        raise ValueError(f"no chat completion: {e!r}") from None


def pause(attempt: int, asked_for: float) -> float:
    """Seconds before the next try: twice as long each time, or what the other side asks for."""
    return min(LONGEST_WAIT, max(asked_for, 2.0**attempt - 0.5))


def retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that the other side asks for; 0 where it says nothing, or a date."""
    value = error.headers.get("Retry-After") or ""
    return float(value) if value.isdigit() else 0.0


def identity(folder: Path) -> str:
    """What a model folder holds, in a word: the hash of a checkpoint's manifest, else of its files' names and sizes."""
    manifest = folder / "manifest.json"
    if manifest.exists():
        return "model " + sha256(manifest.read_bytes()).hexdigest()[:16]
    files = sorted((p.name, p.stat().st_size) for p in folder.iterdir() if p.is_file())
    return f"model {folder.resolve()} " + sha256(json.dumps(files).encode()).hexdigest()[:16]
