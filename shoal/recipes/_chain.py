"""The quickstart: a base model, what it learns by reinforcement alone, R1, and a student, evaluated and reported.

The run itself is the base's pretraining; every other stage lies in its `stages/`. In order, on one screen.
"""

from dataclasses import replace
from pathlib import Path

from shoal.data.draws import mix
from shoal.model.presets import PRESETS
from shoal.post.distill import fresh_student
from shoal.recipes import _job, quickstart, r1_zero
from shoal.recipes import r1 as r1_recipe
from shoal.recipes import sft as sft_recipe
from shoal.recipes._machine import Here
from shoal.recipes._pipeline import Budget, Pipeline, Stopped, checkpoint_of
from shoal.recipes._r1 import r1
from shoal.recipes._stages import compare, opened, reinforce, sample, tune
from shoal.recipes._teller import Teller
from shoal.recipes.r1 import R1Config
from shoal.run import Run
from shoal.tasks.catalog import QUICK_LEVELS, QUICK_TASKS
from shoal.train.config import PretrainConfig

TASKS = ",".join(QUICK_TASKS)
PROBLEMS_A_STEP = 32  # sampled, where the budget is steps


def run_chain(
    config: PretrainConfig, run: Run, teller: Teller, resume: bool = False, here: Here | None = None, *, budget: Budget
) -> int:
    """0 when all is done, 130 when it was asked to stop; `--resume` then goes on where it stopped."""
    here = here or _job.place(config, run, resume)
    p = Pipeline(run, budget, teller, here.setup.device, here.setup.threads)
    teller.say(f"chain    {budget}")
    if run.status().get("base") != "done":
        on_the_way = Teller(lambda words: None if words.startswith("next ") else teller.say(words), teller.show)
        if code := _job.run_job(config, run, on_the_way, resume, here, "quickstart"):
            return code
        run.status(base="done")
    try:
        chain(p, checkpoint_of(run), config.seed)
    except Stopped:
        teller.say(f"stopped; continue with: shoal quickstart --resume {_job.typed(run)}")
        return 130
    teller.say(f"next     shoal chat {_job.typed(run)}")
    return 0


def chain(p: Pipeline, base: Path, seed: int) -> None:
    zero_config = replace(r1_zero.recipe(), tasks=TASKS, levels=QUICK_LEVELS, seed=mix(seed, 0, 3) >> 1)
    r1_config = fitting(r1_recipe.recipe(), p.budget, mix(seed, 1, 3) >> 1)
    teaching = replace(r1_config.samples, seed=mix(seed, 2, 3) >> 1)

    zero = reinforce(p, "r1_zero", zero_config, base)
    reasoner = r1(p, r1_config, base)
    answers = sample(p, "teaching", teaching, TASKS, QUICK_LEVELS, reasoner)
    student = tune(p, "student", sft_recipe.recipe(), reasoner, answers, lambda: fresh(p, reasoner, seed))

    models = {"base": base, "R1-Zero": zero, "R1": reasoner, "student": student}
    compare(p, models, TASKS, QUICK_LEVELS, seed, zero_config.rollout.max_tokens)


def fitting(c: R1Config, budget: Budget, seed: int) -> R1Config:
    """With steps for a budget, a few problems are sampled for each of them."""
    samples = c.samples if budget.steps is None else replace(c.samples, problems=PROBLEMS_A_STEP * budget.steps)
    return replace(c, samples=samples, seed=seed)


def fresh(p: Pipeline, teacher: Path, seed: int):
    """A smaller model of random weights that speaks the teacher's tokens."""
    model, _ = opened(p, teacher, "bf16")
    preset = quickstart.STUDENT
    return fresh_student(preset, model.config.vocab_size, seed, PRESETS[preset].max_positions)
