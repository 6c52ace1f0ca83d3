"""What routers chose for each token that was fed is told at the end, however the tokens were fed."""

from dataclasses import replace

import pytest
import torch

from shoal.engine.engine import LocalEngine
from shoal.engine.native import Native
from shoal.engine.request import Sampling
from shoal.model.attend import Packed
from shoal.model.config import ModelConfig
from shoal.model.transformer import Transformer
from shoal.ops import cpu
from tests.engine.models import GROUPED, LATENT, WIDE, model, pages, prompt, request, speculating

DEEP = replace(LATENT, n_layers=3)


def chosen(m: Transformer, tokens: list[int]) -> torch.Tensor:
    """By the model's forward pass over all but the last: [T, L, K], each token's experts in order."""
    T = len(tokens) - 1
    with torch.inference_mode():
        routes = m.body(m.embed(torch.tensor(tokens[:T])), torch.arange(T), Packed([T]))[1]
    return torch.stack([r.experts_TK for r in routes], 1).sort(-1).values


def told(engine: LocalEngine, m: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
    """Of several requests beside others, cached and drawn by different rules: told, and expected."""
    start = prompt(100)
    engine.generate([request(start, 3)])  # its prefix is known now
    how = [(15, Sampling(seed=3, logprobs=0)), (15, Sampling(0)), (3, Sampling(0.7, top_k=9, seed=1))]
    asked = [request(start[: 30 * i + 9], n, s, routes=True) for i, (n, s) in enumerate(how, 1)]
    *results, other = engine.generate([*asked, request(start, 10)])
    assert other.routes is None and all(r.usage.cached == 0 for r in results)
    ours = [result.routes.sort(-1).values for result in results if result.routes is not None]
    theirs = [chosen(m, [*r.tokens, *(t.id for t in result.tokens)]) for r, result in zip(asked, results)]
    return torch.cat(ours), torch.cat(theirs)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_batch_tokens": 50}, {"depth": 1}, {"deterministic": True}, {"memory": 8}],
)
def test_routes_are_those_of_the_forward_pass(options: dict):
    m = model(DEEP)
    if "memory" in options:  # some are put off, and computed anew
        spare = LocalEngine(m)
        options = {"memory_bytes": pages(spare, options["memory"])}
        spare.close()
    engine = speculating(m, **options) if "depth" in options else LocalEngine(m, **options)
    ours, theirs = told(engine, m)
    engine.close()
    assert torch.equal(ours.long(), theirs)


@pytest.mark.skipif("native" not in cpu.status(), reason=cpu.status())
@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 50}, {"depth": 1}])
def test_native_routes_are_nearly_always_those_of_the_forward_pass(options: dict):
    m = Transformer(replace(WIDE, n_layers=4)).init_weights(0).set_dtype(torch.bfloat16)
    engine = speculating(m, **options) if "depth" in options else LocalEngine(m, **options)
    assert isinstance(engine._runner, Native)
    ours, theirs = told(engine, m)
    engine.close()
    same = (ours == theirs).all(-1).float().mean().item()
    print(f"{same:.2%} of the routes are equal")
    assert same > 0.97


@pytest.mark.parametrize("config, layers", [(GROUPED, 0), (LATENT, LATENT.n_layers - 1)])
def test_as_many_layers_as_have_experts(config: ModelConfig, layers: int):
    engine = LocalEngine(model(config))
    routes = engine.generate([request(prompt(5), 3, routes=True)])[0].routes
    engine.close()
    assert routes is not None and routes.shape[:2] == (7, layers) and routes.dtype is torch.int16
