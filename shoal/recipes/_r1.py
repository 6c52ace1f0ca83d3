"""R1's five stages in their order. `recipes/r1.py` says what each is for, with the numbers; `shoal r1` reads flags."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from shoal import runtime
from shoal.data.draws import mix
from shoal.recipes import _lessons
from shoal.recipes._job import typed
from shoal.recipes._pipeline import Budget, Pipeline, Stopped
from shoal.recipes._stages import compare, reinforce, sample, tune
from shoal.recipes._teller import Teller
from shoal.recipes.r1 import SHARES, R1Config
from shoal.run import Run
from shoal.tasks.catalog import GENERAL, resolve


def r1(p: Pipeline, c: R1Config, base: Path) -> Path:
    """The checkpoint that R1 ends with. Each stage is given what the one before it made."""
    c = seeded(c)
    solutions = partial(_lessons.cold_start, resolve(c.tasks), c.levels, c.lessons, c.cold_start.seed)

    started = tune(p, "cold_start", c.cold_start, base, solutions)
    reasoner = reinforce(p, "reasoning", c.reasoning, started)
    lessons = sample(p, "samples", c.samples, c.tasks, c.levels, reasoner)
    tuned = tune(p, "tuning", c.tuning, base, lessons)
    made = reinforce(p, "r1", c.r1, tuned)

    p.note(model=p.relative(made.parent.parent))
    return made


def seeded(c: R1Config) -> R1Config:
    """Tasks and levels in every stage, and a seed of its own, so that no two of them draw the same problems."""
    names = ("cold_start", "reasoning", "samples", "tuning", "r1")
    stages = {name: replace(getattr(c, name), seed=mix(c.seed, i, 4) >> 1) for i, name in enumerate(names)}
    everything = ",".join([c.tasks, *GENERAL])
    for name, tasks in (("reasoning", c.tasks), ("r1", everything)):
        stages[name] = replace(stages[name], tasks=tasks, levels=c.levels)
    return replace(c, **stages)


def run_r1(c: R1Config, run: Run, teller: Teller) -> int:
    """`shoal r1`: 0 when all is done, 130 when it was asked to stop. The caller holds the run's lock."""
    setup = runtime.setup(c.threads or run.env().get("threads"), c.seed)
    run.write_env(threads=setup.threads)
    p = Pipeline(run, Budget(SHARES, c.minutes, c.steps), teller, setup.device, setup.threads)
    teller.say(f"stages   {p.budget}")
    try:
        models = {"base": Path(c.model), "R1": r1(p, c, Path(c.model))}
    except Stopped:
        teller.say(f"stopped; continue with: shoal r1 --resume {typed(run)}")
        return 130
    compare(p, models, c.tasks, c.levels, c.seed, c.r1.rollout.max_tokens)
    teller.say(f"next     shoal chat {typed(run)}")
    return 0
