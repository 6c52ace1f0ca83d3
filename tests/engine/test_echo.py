"""What is echoed is the prompt with its log-probabilities, those of a plain forward, however it was cut."""

import time

import pytest
import torch

from shoal.engine.engine import LocalEngine
from shoal.engine.request import Request, Sampling, Step
from shoal.model.score import log_probs
from tests.engine.models import GROUPED, LATENT, expected, ids, model, prompt, request, speculating

SAMPLING = Sampling(temperature=0, logprobs=2)


def echoed(engine: LocalEngine, *prompts) -> list[Step]:
    last: dict[int, Step] = {}
    asked = [
        Request(tokens, 3, lambda step, i=i: last.__setitem__(i, step), SAMPLING, echo=True)
        for i, tokens in enumerate(prompts)
    ]
    engine.generate(asked)
    return [last[i] for i in range(len(prompts))]


def assert_scores(m, tokens, step: Step) -> None:
    assert [t.id for t in step.prompt] == list(tokens) and step.prompt[0].logprob is None
    if len(tokens) > 1:
        found = torch.tensor([t.logprob for t in step.prompt[1:]])
        assert (found - log_probs(m, torch.tensor(tokens), 2048)).abs().max() < 1e-4
    for token in step.prompt[1:]:
        assert len(token.top) == 2 and token.logprob is not None and token.logprob <= token.top[0][1]
        assert token.logprob == dict(token.top).get(token.id, token.logprob)


@pytest.mark.parametrize(
    "config, options",
    [
        (LATENT, {}),
        (LATENT, {"max_batch_tokens": 48}),
        (LATENT, {"depth": 1, "max_batch_tokens": 100}),
        pytest.param(LATENT, {"deterministic": True}, marks=pytest.mark.slow),
        (GROUPED, {"max_batch_tokens": 100}),
    ],
)
def test_the_prompt_is_scored_beside_others(config, options):
    m = model(config)
    prompts = [prompt(n, seed=n) for n in (1, 2, 64, 65, 130)]
    engine = speculating(m, **options) if "depth" in options else LocalEngine(m, **options)
    try:
        for _ in range(2):  # the second time the cache could know them
            engine.submit(request(prompts[3], 12))
            for tokens, step in zip(prompts, echoed(engine, *prompts)):
                assert (step.finish, step.usage.cached, step.usage.completion) == ("length", 0, 3)
                assert_scores(m, tokens, step)
        assert ids(engine.generate([request(prompts[4], 8)])[0]) == expected(m, prompts[4], 8)
        engine._scheduler.check()
    finally:
        engine.close()


def test_a_preempted_one_is_scored_anew():
    m, steps, tokens = model(), [], prompt(200, 1)
    engine = LocalEngine(m, max_batch_tokens=4)
    try:
        engine.submit(Request(tokens, 1, steps.append, SAMPLING, echo=True))
        while engine.stats().steps < 3:
            time.sleep(1e-3)
        engine.forget()
        while not steps:
            time.sleep(1e-3)
        assert engine._scheduler.preemptions == 1
        assert_scores(m, tokens, steps[-1])
    finally:
        engine.close()


def test_nobody_else_is_told_a_prompt():
    engine = LocalEngine(model())
    told: list[Step] = []
    try:
        engine.generate([request(prompt(70), 2, SAMPLING, sink=told.append)])
    finally:
        engine.close()
    assert told and not any(step.prompt for step in told)
