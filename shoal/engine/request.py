"""What is asked of the engine, and what it answers with. Torch-free.

A `Request` is tokens in, and how to go on from them. The engine answers through the request's `sink` with `Step`s, each
holding one or more new tokens (more than one where speculation paid), and at last one whose `finish` is set. What the
tokens mean (text, thinking, tool calls, stop strings, grammars) is the business of the request's `guide`, which sees
each token before the next one is chosen and may narrow, force or end what comes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

MOST_STOPS, MOST_STOP_CHARS = 16, 256  # stop strings of an answer
Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The defaults change nothing: a draw from the model's own distribution.

    In this order: penalties and `logit_bias` on the logits, the guide's mask, `temperature` (0: greedy), then `top_k`,
    `top_p`, `min_p`. With `seed` the draws depend on seed and position only. `logprobs` n asks for the log-probability
    of each token and of the n likeliest, by the model's raw distribution (natural log).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None

    @property
    def edits(self) -> bool:
        """Whether logits are changed before a draw."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalties or self.logit_bias)

    @property
    def plain(self) -> bool:
        """Whether a draw by the raw logits at a temperature is all that is wanted, with its log-probability at most."""
        cut = self.top_k or self.top_p < 1 or self.min_p > 0
        return not (self.edits or cut or self.logprobs)


@dataclass(frozen=True)
class Form:
    """What an answer has to look like. `thinking_budget` in tokens; `schema` is the JSON schema of an object answer."""

    thinking: bool = False
    thinking_budget: int | None = None
    stop: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_calls: bool = True  # whether a demanded call may be several
    json: bool = False
    schema: Mapping[str, Any] | None = None
    continues: str = ""  # the start of the answer that stands already (prefix completion)


class Guide(Protocol):
    """What steers one request, token by token. Called on the engine's thread only."""

    def accept(self, token: int) -> bool:
        """One more token stands. Whether generation goes on."""
        ...

    def forced(self) -> int | None:
        """The only token that may come next, if there is only one (the end of thinking, for example)."""
        ...

    def mask(self) -> Any:
        """A bool tensor [V] of the tokens that may come next; None: any."""
        ...


class Token(NamedTuple):
    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (token, log-probability), likeliest first


class Usage(NamedTuple):
    prompt: int = 0
    cached: int = 0  # of the prompt, found in the prefix cache
    completion: int = 0
    drafted: int = 0  # by the multi-token module
    accepted: int = 0  # of those


class Step(NamedTuple):
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    usage: Usage = Usage()
    error: str | None = None  # what went wrong, for people, when finish is "error"
    hidden: tuple[float, ...] = ()  # at the end of a request to embed: the mean of its tokens' final hidden states
    prompt: tuple[Token, ...] = ()  # at the end of one to echo: its tokens with their log-probabilities
    routes: Any = None  # at the end of a request that asked for them: a tensor int16 [T, L, K]


Sink = Callable[[Step], None]  # called on the engine's thread; must not block


@dataclass(frozen=True, eq=False)
class Request:
    """`priority`: lower goes first. Prefixes are shared only between requests of the same `salt` (a tenant's).

    `embed`: nothing is drawn (`max_tokens` 0); the last Step has the mean hidden state. `echo`: it has the prompt, too,
    with `sampling.logprobs` of each token but the first. `routes`: it has which K experts each of the L routers chose,
    in no order, for every token that was fed (all but the last) when it first was. For any of them each token is
    computed, whatever the prefix cache has.
    """

    tokens: tuple[int, ...]
    max_tokens: int
    sink: Sink
    sampling: Sampling = Sampling()
    stop_tokens: frozenset[int] = frozenset()
    guide: Guide | None = None
    priority: int = 0
    salt: str = ""
    embed: bool = False
    echo: bool = False
    routes: bool = False


@dataclass(frozen=True)
class Stats:
    """The engine at one moment, for health, metrics and queue positions."""

    running: int
    waiting: int
    pages: int
    pages_used: int
    tokens_in: int
    tokens_cached: int
    tokens_out: int
    drafted: int
    accepted: int
    steps: int
    draft_speedup: float = 1.0  # tokens a second with drafts over those without; 1 where they rest
    disk_pages: int = 0
    disk_hits: int = 0
    experts_chosen: int = 0  # from here on where experts come from the disk: see offload.OffloadStats
    experts_found: int = 0
    experts_foretold: int = 0
    experts_read_ahead: int = 0
    experts_guessed: int = 0
    experts_right: int = 0
    experts_bytes_read: int = 0
    experts_seconds_reading: float = 0.0


class Engine(Protocol):
    """What a server needs. All methods may be called from any thread."""

    @property
    def context(self) -> int:
        """Most tokens of prompt and completion together."""
        ...

    def submit(self, request: Request) -> None:
        """Queue it. Raises RequestError for what can never run (empty, too long, token out of range)."""
        ...

    def cancel(self, request: Request) -> None:
        """End it within a step, with finish "cancelled". A finished or unknown one is left alone."""
        ...

    def position(self, request: Request) -> int:
        """Requests that will be admitted before this one; 0 once it runs."""
        ...

    def stats(self) -> Stats: ...
    def close(self) -> None:
        """Cancel all, stop the thread."""
        ...
