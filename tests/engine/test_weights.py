"""Weights change in place between rollouts: after `forget` nothing computed before is in what an engine says."""

import pytest
import torch

from shoal.engine.engine import LocalEngine
from shoal.engine.native import Native
from shoal.engine.request import Sampling
from shoal.model.config import ModelConfig
from shoal.model.transformer import Transformer
from shoal.ops import cpu
from tests.engine.models import GROUPED, WIDE, ids, prompt, request

NATIVE = "native" in cpu.status()


def said(engine: LocalEngine) -> list[list[int]]:
    """Of prompts that share a prefix of two pages, drawn and greedy."""
    start = prompt(140)
    asked = [request((*start, i), 12, Sampling(i % 2, seed=i, logprobs=0)) for i in range(3)]
    return [ids(r) for r in engine.generate(asked)]


def changed(m: Transformer, seed: int) -> None:
    """All that a model holds, in place: router biases and norms, too."""
    other = Transformer(m.config).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mine, new in zip([*m.parameters(), *m.buffers()], [*other.parameters(), *other.buffers()], strict=True):
            mine.copy_(new if new.dim() > 1 else torch.rand(new.shape, generator=generator) + 0.5)


@pytest.mark.parametrize("config", [WIDE, GROUPED], ids=["latent", "grouped"])
@pytest.mark.parametrize("dtype, speculate", [(torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 1)])
def test_an_engine_follows_weights_as_a_fresh_one_would(config: ModelConfig, dtype: torch.dtype, speculate: int):
    m = Transformer(config).init_weights(0).set_dtype(dtype)
    narrow = dtype is torch.bfloat16  # where roundings by the cut of chunks would turn a draw
    engine = LocalEngine(m, speculate=speculate, deterministic=narrow)
    assert isinstance(engine._runner, Native) == (NATIVE and narrow)
    before = said(engine)
    changed(m, 1)
    engine.forget()
    after, fresh = said(engine), LocalEngine(m, speculate=speculate, deterministic=narrow)
    assert after == said(fresh) and all(a != b for a, b in zip(after, before))
    engine.close()
    fresh.close()


def test_requests_behind_a_forget_meet_the_new_weights_whatever_runs():
    m = Transformer(WIDE).init_weights(0).set_dtype(torch.bfloat16)
    engine, expected = LocalEngine(m, deterministic=True), []
    for seed in range(3):
        changed(m, seed)
        fresh = LocalEngine(m, deterministic=True)
        expected.append(said(fresh))
        fresh.close()
    for seed in (0, 1, 2, 0):
        running = [request(prompt(150, i), 100, Sampling(seed=i)) for i in range(3)]
        for r in running:
            engine.submit(r)
        while engine.stats().running < 3:
            pass
        changed(m, seed)
        engine.forget()
        assert said(engine) == expected[seed]
        for r in running:
            engine.cancel(r)
    engine.close()
