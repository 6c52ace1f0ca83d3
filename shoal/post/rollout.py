"""Answers for reinforcement learning, drawn by the engine that also serves, on the trainer's own weights.

    prompts (a pure function of seed and index, or of the curriculum) → groups of streams → the engine → graded groups

Every token is stamped with the version of the weights that drew it. With `slice`, a step draws at most so many tokens
of an answer, so that nobody waits for the longest; what isn't finished is gone on with by the next weights (partial
rollouts). A group is handed out when all of its answers are finished: whole, once, in the order they were begun. A
prompt that is too long for an answer beside it is passed over.

All of it follows from seed, index and weights: a draw depends on its stream's seed and position alone, so a resumed run
draws what the uninterrupted one drew. `state` holds all there is to remember.
"""

import logging
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from shoal.data.chat import question
from shoal.data.draws import mix
from shoal.data.tokenizer import ANSWER_END, BOS, Tokenizer
from shoal.engine.engine import LocalEngine
from shoal.engine.gather import silent
from shoal.engine.request import Request, Sampling
from shoal.errors import ConfigError, TrainingError
from shoal.post.rl_config import RolloutConfig
from shoal.tasks.task import Item, Outcome

log = logging.getLogger(__name__)

MOST_PASSED_OVER = 1000  # prompts in a row


@dataclass
class Sample:
    """One answer under way or finished. `logprobs` are the engine's; `versions` say which weights drew each token."""

    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: str | None = None  # "stop", or "length" at the most tokens an answer may have
    routes_TLK: Tensor | None = None  # experts of every token fed, where they are replayed
    text: str = ""  # once it is graded, as outcome and reward
    outcome: Outcome | None = None
    reward: float = 0.0


@dataclass
class Group:
    """All answers to one prompt. `index` is the prompt's number in the run."""

    index: int
    item: Item
    prompt: tuple[int, ...]
    samples: list[Sample]

    @property
    def finished(self) -> bool:
        return all(sample.finish for sample in self.samples)


class Rollouts:
    """`draw(index)` makes the item of a prompt's number; it must be a pure function for a run to be resumable."""

    def __init__(
        self,
        engine: LocalEngine,
        tokenizer: Tokenizer,
        config: RolloutConfig,
        seed: int,
        draw: Callable[[int], Item],
        routes: bool = False,
    ):
        self.engine, self.tokenizer, self.config, self.seed, self.draw = engine, tokenizer, config, seed, draw
        self.routes = routes
        self.next_index = 0
        self.version = 0
        self.pending: list[Group] = []
        ends = (tokenizer.id(ANSWER_END), tokenizer.eos_id)
        self.stops = frozenset(t for t in ends if t is not None)

    def synchronise(self, version: int) -> None:
        """The weights have changed; what the engine computed before must not count."""
        self.version = version
        self.engine.forget()

    def collect(self, n: int) -> list[Group]:
        """`n` finished groups. With `slice`, about n a step: those that are finished after the next slice of all."""
        first = self.next_index
        begun = [self._begun() for _ in range(n if self.config.slice else n - len(self.pending))]
        if passed := sorted({*range(first, self.next_index)} - {group.index for group in begun}):
            log.warning("prompts %s leave no room for an answer and are passed over", ", ".join(map(str, passed)))
        self.pending += begun
        while True:
            self._draw([s for group in self.pending for s in group.samples if not s.finish])
            if done := [group for group in self.pending if group.finished]:
                self.pending = [group for group in self.pending if not group.finished]
                return done

    def _begun(self) -> Group:
        """The next prompt that leaves room for an answer. Raises ConfigError where none is near."""
        room = min(self.config.prompt_tokens, self.engine.context - self.config.max_tokens)
        for index in range(self.next_index, self.next_index + MOST_PASSED_OVER):
            item = self.draw(index)
            if len(prompt := self.prompt_of(item)) <= room:
                self.next_index = index + 1
                samples = [Sample(mix(self.seed, index, number)) for number in range(self.config.group)]
                return Group(index, item, prompt, samples)
        got = f"{MOST_PASSED_OVER:,} prompts in a row of more than {room} tokens"
        fix = "raise --rollout.prompt_tokens, or lower --rollout.max_tokens where the model's context is what is short"
        raise ConfigError(got, "prompts that leave room for an answer", fix)

    def prompt_of(self, item: Item) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode_pieces((BOS, *question(item.prompt))))

    def _draw(self, samples: Sequence[Sample]) -> None:
        prompts = {id(s): group.prompt for group in self.pending for s in group.samples}
        requests = [self._request(prompts[id(s)], s) for s in samples]
        for sample, result in zip(samples, self.engine.generate(requests), strict=True):
            if result.finish == "error":
                got = f"the engine failed on a rollout: {result.error}"
                raise TrainingError(got, "finite weights and a running engine", "look at the log, then --resume")
            sample.tokens += [token.id for token in result.tokens]
            sample.logprobs += [p for _, p, _ in result.tokens if p is not None]
            sample.versions += [self.version] * len(result.tokens)
            assert len(sample.logprobs) == len(sample.tokens)
            sample.routes_TLK = result.routes
            if result.finish == "stop" or len(sample.tokens) >= self.config.max_tokens:
                sample.finish = "stop" if result.finish == "stop" else "length"

    def _request(self, prompt: tuple[int, ...], s: Sample) -> Request:
        left = self.config.max_tokens - len(s.tokens)
        most = min(left, self.config.slice or left)
        return Request(
            (*prompt, *s.tokens), most, silent, Sampling(seed=s.seed, logprobs=0), self.stops, routes=self.routes
        )

    def completion(self, s: Sample) -> str:
        return self.tokenizer.decode(s.tokens, skip_special=True)

    def state(self) -> dict[str, Any]:
        """Plain numbers: where the prompts stand, and every answer under way."""
        pending = []
        for g in self.pending:
            samples = [_plain(s) for s in g.samples]
            pending.append({"index": g.index, "task": g.item.task, "level": g.item.level, "samples": samples})
        return {"next_index": self.next_index, "version": self.version, "pending": pending}

    def load(self, state: dict[str, Any], item: Callable[[int, str, int], Item]) -> None:
        """`item(index, task, level)` makes the items of groups under way, as they were drawn."""
        self.next_index, self.version = state["next_index"], state["version"]
        self.pending = []
        for g in state["pending"]:
            its = item(g["index"], g["task"], g["level"])
            self.pending.append(Group(g["index"], its, self.prompt_of(its), [_sample(s) for s in g["samples"]]))


def _plain(s: Sample) -> dict[str, Any]:
    """As JSON. Routes of what goes on are computed anew; those of a finished answer are kept as bytes."""
    routes = s.routes_TLK if s.finish else None
    kept = None if routes is None else [b64encode(routes.numpy().tobytes()).decode(), list(routes.shape)]
    return asdict(replace(s, routes_TLK=None)) | {"routes_TLK": kept}


def _sample(plain: dict[str, Any]) -> Sample:
    sample, kept = Sample(**plain), plain["routes_TLK"]
    if kept:
        sample.routes_TLK = torch.frombuffer(bytearray(b64decode(kept[0])), dtype=torch.int16).view(kept[1])
    return sample
