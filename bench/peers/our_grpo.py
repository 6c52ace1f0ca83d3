"""Shoal's own step of reinforcement: the loop of `shoal rl` on one batch after the other, with grading and records.

bf16 weights with fp32 masters, as it always trains. Variants: the most tokens of an answer.
"""

import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

from bench import grpo, models
from bench.shape import THREADS
from shoal.cli.opened import open_model
from shoal.post import judge, rl
from shoal.post.rl_config import PolicyConfig, RLConfig, RolloutConfig
from shoal.run import Run
from shoal.tasks.grading import Graders
from shoal.tasks.task import Item, Made, Task
from shoal.train import loop
from shoal.train.config import OptimConfig
from shoal.train.step import TrainState


def missing() -> None:
    return None


def build(variant: str) -> "OurStep":
    return OurStep(int(variant))


class OurStep:
    def __init__(self, tokens: int):
        config = RLConfig(
            rollout=RolloutConfig(grpo.PROMPTS, grpo.GROUP, tokens),
            policy=PolicyConfig("grpo"),
            optim=OptimConfig("adamw", grpo.LEARNING_RATE, beta1=grpo.BETAS[0], beta2=grpo.BETAS[1], weight_decay=0.0),
            steps=1000,
            minutes=None,
            threads=THREADS,
        )
        opened = open_model(str(models.folder("tiny")), "bfloat16", THREADS)
        rl.reward = lambda config, prompt, text, outcome: grpo.reward(text)
        state = TrainState(rl.train_config(config, opened.model), "cpu", opened.model)
        held = ExitStack()
        run = Run.create(
            "bench", Path(held.enter_context(tempfile.TemporaryDirectory())) / "run", config, {}, ["bench"]
        )
        engine = held.enter_context(closing(rl.engine_for(config, state.model)))
        graders = held.enter_context(Graders())
        self.stage = rl.begun(config, run, state, engine, opened.tokenizer, [TASK], graders, judge.Rules())
        self.stage.rollouts.draw, self.stage.rollouts.stops = item, frozenset()
        self.clock, self.tokens, self.held = loop.begin(state, 1000), tokens, held

    def step(self, number: int) -> dict[str, float]:
        metrics = rl.iterate(self.stage, self.clock)
        assert metrics["rl/length"] == self.tokens and self.stage.state.counters.updates == self.stage.iteration
        names = "time/rollout", "time/update", "rl/reward", "gap/mean", "gap/k3"
        return {name: metrics[name] for name in names}


def make(rng, level: int) -> Made:
    return Made(grpo.prompt(rng.randrange(2**32)), "", "-", "-")


TASK = Task("letters", (1,), make)


def item(index: int) -> Item:
    text = grpo.prompt(index)
    return TASK.item(1, Made(text, "", "-", text))
