"""The quickstart's chain with everything tiny. As a script it runs one: `python -m tests.recipes.chained FLAGS`."""

import sys
from dataclasses import replace
from typing import Any

from shoal.data.config import DataConfig
from shoal.post.config import SamplingConfig, SftConfig
from shoal.post.rl_config import RLConfig, RolloutConfig
from shoal.recipes import _chain, _stages, quickstart, r1, r1_zero, sft, tiny
from shoal.recipes.r1 import R1Config
from shoal.train.config import CheckpointConfig, PretrainConfig

OFTEN = CheckpointConfig(steps=1, keep=9)


def base() -> PretrainConfig:
    return replace(tiny.recipe(), data=DataConfig(("solutions:800",), vocab_size=512), checkpoint=OFTEN)


def zero(was=r1_zero.recipe) -> RLConfig:
    rollout = RolloutConfig(prompts=2, group=4, max_tokens=24, refills=0)
    return replace(was(), rollout=rollout, checkpoint=OFTEN)


def tuned(was=sft.recipe) -> SftConfig:
    return replace(was(), batch=replace(was().batch, context=256, samples=2), checkpoint=OFTEN)


def stages(was=r1.recipe) -> R1Config:
    c, small = was(), {"rollout": zero().rollout, "checkpoint": OFTEN}
    samples = replace(c.samples, samples=2, sampling=SamplingConfig(1.0, 1.0, 24))
    return replace(
        c, lessons=60, cold_start=tuned(), tuning=tuned(), samples=samples,
        reasoning=replace(c.reasoning, **small), r1=replace(c.r1, **small),
    )  # fmt: skip


SMALL: tuple[tuple[Any, str, Any], ...] = (
    (quickstart, "recipe", base),
    (r1, "EVALUATED", 6),
    (r1, "ATTEMPTS", 2),
    (r1, "BUDGETS", (0, 4, None)),
    (quickstart, "STUDENT", "tiny"),
    (r1_zero, "recipe", zero),
    (sft, "recipe", tuned),
    (r1, "recipe", stages),
    (_chain, "PROBLEMS_A_STEP", 4),
    (_stages, "LEAST_GENERAL", 6),
    (_stages, "CHUNK", 2),
)

if __name__ == "__main__":
    from shoal.cli.main import run_verb

    for module, name, value in SMALL:
        setattr(module, name, value)
    sys.exit(run_verb("quickstart", sys.argv[1:]))
