"""What is embedded is the mean of the hidden states, however the prompt was cut, and nothing else is touched by it."""

import time

import pytest
import torch

from shoal.engine.engine import LocalEngine
from shoal.engine.request import Request, Step
from shoal.model.attend import Packed
from tests.engine.models import GROUPED, LATENT, expected, ids, model, prompt, request, speculating


def mean_hidden(m, tokens) -> torch.Tensor:
    T = len(tokens)
    with torch.inference_mode():
        return m.body(m.embed(torch.tensor(tokens)), torch.arange(T), Packed([T]))[0].float().mean(0)


def embedded(engine: LocalEngine, *prompts) -> list[Step]:
    last: dict[int, Step] = {}
    asked = [
        Request(tokens, 0, lambda step, i=i: last.__setitem__(i, step), embed=True) for i, tokens in enumerate(prompts)
    ]
    engine.generate(asked)
    return [last[i] for i in range(len(prompts))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, options",
    [
        (LATENT, {}),
        (LATENT, {"max_batch_tokens": 48}),
        (LATENT, {"depth": 1, "max_batch_tokens": 100}),
        (LATENT, {"deterministic": True}),
        (GROUPED, {"max_batch_tokens": 100}),
    ],
)
def test_the_mean_of_the_hidden_states_beside_others_who_draw(config, options):
    m = model(config)
    prompts = [prompt(n, seed=n) for n in (1, 2, 64, 65, 200)]
    engine = speculating(m, **options) if "depth" in options else LocalEngine(m, **options)
    try:
        for _ in range(2):  # the second time the cache could know them
            others = request(prompts[3], 12)
            engine.submit(others)
            for tokens, step in zip(prompts, embedded(engine, *prompts)):
                assert (step.finish, step.usage.prompt, step.usage.cached) == ("stop", len(tokens), 0)
                assert step.usage.completion == 0 and not step.tokens
                assert (torch.tensor(step.hidden) - mean_hidden(m, tokens)).abs().max() < 1e-4
        assert ids(engine.generate([request(prompts[4], 8)])[0]) == expected(m, prompts[4], 8)
        engine._scheduler.check()
    finally:
        engine.close()
    assert engine.stats().pages_used == 0


def test_a_preempted_one_begins_anew():
    m, steps, tokens = model(), [], prompt(200, 1)
    engine = LocalEngine(m, max_batch_tokens=4)
    try:
        engine.submit(Request(tokens, 0, steps.append, embed=True))
        while engine.stats().steps < 3:
            time.sleep(1e-3)
        engine.forget()
        while not steps:
            time.sleep(1e-3)
        assert engine._scheduler.preemptions == 1
        assert (torch.tensor(steps[-1].hidden) - mean_hidden(m, tokens)).abs().max() < 1e-4
    finally:
        engine.close()


def test_a_context_full_of_tokens_to_embed():
    engine = LocalEngine(model(), context=128)
    try:
        assert len(embedded(engine, prompt(128))[0].hidden) == LATENT.dim
    finally:
        engine.close()
