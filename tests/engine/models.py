"""Tiny models of both kinds, what they should say by the slow twin, and requests for them."""

import time
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from shoal.engine.engine import LocalEngine
from shoal.engine.gather import silent
from shoal.engine.request import Engine, Request, Sampling
from shoal.engine.speculate import Worth
from shoal.model.attend import Packed
from shoal.model.config import GQAConfig, ModelConfig
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer

LATENT = replace(PRESETS["tiny"], init_std=0.2)  # latent attention, experts, a multi-token module
GROUPED = replace(
    LATENT, attention=GQAConfig(4, 2, 16, bias=True), moe=None, n_mtp=0, rope_scaling=None, tie_embeddings=True
)
KINDS = {"latent": LATENT, "grouped": GROUPED}
WIDE = replace(PRESETS["mini"], vocab_size=512, max_positions=256)  # as LATENT, of sizes that the native program takes
GREEDY = Sampling(temperature=0)


@cache
def model(config: ModelConfig = LATENT, seed: int = 0) -> Transformer:
    return Transformer(config).init_weights(seed)


@cache
def foresighted(vocab_size: int = 16) -> Transformer:
    """The next token depends on the last one alone, and the module knows it as well as the model does."""
    m = Transformer(replace(LATENT, vocab_size=vocab_size, init_std=0.3)).init_weights(1)
    with torch.no_grad():
        for name, p in m.named_parameters():
            if name.endswith(("attn.out.weight", ".down.weight", "experts.down")):
                p.zero_()
        D = m.config.dim
        m.get_parameter("mtp.0.proj.weight").copy_(torch.cat([torch.eye(D), torch.zeros(D, D)], 1))
    return m


def prompt(n: int, seed: int = 0, vocab_size: int = 512) -> tuple[int, ...]:
    return tuple(torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def request(tokens: tuple[int, ...], n: int, sampling: Sampling = GREEDY, **more: Any) -> Request:
    return Request(tokens, n, more.pop("sink", silent), sampling, **more)


@cache
def expected(m: Transformer, tokens: tuple[int, ...], n: int) -> list[int]:
    """Greedy, the whole sequence through the model again for every token: slow, and right by construction."""
    sequence = list(tokens)
    for T in range(len(tokens), len(tokens) + n):
        with torch.inference_mode():
            embedded_TD = m.embed(torch.tensor(sequence))
            hidden_TD = m.body(embedded_TD, torch.arange(T), Packed([T]))[0]
            sequence.append(int(m.head(hidden_TD[-1:]).argmax()))
    return sequence[len(tokens) :]


class Fixed(Worth):
    """One way, whatever it brings."""

    def __init__(self, way: float | None):
        super().__init__()
        self.way = way

    def __call__(self, streams: int) -> float | None:
        return self.way


def speculating(m: Transformer, depth: int, gate: float | None = 0.0, **more) -> LocalEngine:
    engine = LocalEngine(m, speculate=depth, **more)
    assert engine._speculator is not None
    engine._speculator.worth = Fixed(gate)
    return engine


def pages(engine: LocalEngine, n: int) -> int:
    """Bytes of so many pages."""
    return n * 64 * engine.bytes_per_token


def ids(result: Any) -> list[int]:
    return [token.id for token in result.tokens]


def idle(engine: Engine) -> None:
    """Wait until nothing runs or waits."""
    for _ in range(1000):
        s = engine.stats()
        if not s.running + s.waiting:
            return
        time.sleep(0.01)
    raise AssertionError(engine.stats())


class Script:
    """A guide that forces, masks, leaves free and ends, by the number of tokens so far."""

    def __init__(self, forced=None, masks=None, last: int = 99, breaks_at: int = 99):
        self.seen, self._forced, self._masks = [], forced or {}, masks or {}
        self._last, self._breaks_at = last, breaks_at

    def accept(self, token: int) -> bool:
        self.seen.append(token)
        assert len(self.seen) != self._breaks_at
        return len(self.seen) < self._last

    def forced(self) -> int | None:
        return self._forced.get(len(self.seen))

    def mask(self):
        allowed = self._masks.get(len(self.seen))
        return None if allowed is None else torch.isin(torch.arange(512), torch.tensor([*allowed], dtype=torch.int64))
