"""A job of reinforcement from end to end: held-out problems before, the loop, held-out problems after, the report.

`shoal rl` reads flags; the caller has opened the model and holds the run's lock.
"""

from collections.abc import Sequence
from contextlib import closing

from shoal.data.tokenizer import Tokenizer
from shoal.engine.engine import LocalEngine
from shoal.evals import record
from shoal.evals.harness import Rules, problems, sweep
from shoal.model.transformer import Transformer
from shoal.post import rl
from shoal.post.rl_config import RLConfig
from shoal.recipes._job import typed
from shoal.recipes._teller import Teller
from shoal.recipes._tune import failures_noted, require_memory, watched
from shoal.report import page
from shoal.run import Run
from shoal.tasks.grading import Graders
from shoal.tasks.task import Task
from shoal.train.loop import steps_left
from shoal.train.step import TrainState

HELD_OUT, ATTEMPTS = 200, 4  # problems, and samples of each, before and after
BEFORE, AFTER = "before", "after"  # names of the evaluations
GUESSED_SECONDS = 2.0  # a step, until the run has its own pace


def reinforce(
    config: RLConfig,
    run: Run,
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    teller: Teller,
    resume: bool = False,
) -> int:
    """0 when the run is complete, 130 when it was asked to stop and left a checkpoint."""
    if not (run.evals / f"{BEFORE}.json").exists() and not any(run.checkpoints.glob("step-*")):
        with failures_noted(run):
            before = solved(config, run, model, tokenizer, tasks, BEFORE)
        teller.say(f"before   {before:.1%} of held-out problems")
    state = trained(config, run, model, tokenizer, tasks, teller, resume)
    step = state.counters.step
    if steps_left(state):
        teller.say(f"stopped at step {step}; continue with: shoal rl --resume {typed(run)}")
        return 130
    with failures_noted(run):
        after = solved(config, run, state.model, tokenizer, tasks, AFTER, step)
    run.status(pass_at_1=after)
    teller.say(f"after    {after:.1%} of held-out problems, {state.counters.seconds / 60:.1f} minutes later")
    teller.say(f"report   {page.write(run.path)}")
    teller.say(f"next     shoal samples {typed(run)}")
    return 0


def trained(
    config: RLConfig,
    run: Run,
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    teller: Teller,
    resume: bool,
) -> TrainState:
    """The loop alone, its status kept. Raises ResourceError where a step and the cache of its answers don't fit."""
    require_memory(rl.largest(config, model), model, rl.cache_bytes(config, model))
    guess, device = int(60 * (config.minutes or 0) / GUESSED_SECONDS), str(model.embed.weight.device)

    def loop() -> TrainState:
        return rl.reinforce(
            config, run, model, tokenizer, tasks, guess, device, resume, teller.show, teller.say
        )  # fmt: skip

    return watched(run, teller, resume, loop)


def solved(
    config: RLConfig,
    run: Run,
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    name: str,
    step: int | None = None,
) -> float:
    """pass@1 on held-out problems of these tasks and levels, kept under evals/."""
    items = problems(tasks, HELD_OUT, config.seed, config.levels)
    rules = Rules(samples=ATTEMPTS, max_tokens=config.rollout.max_tokens, seed=config.seed)
    with closing(LocalEngine(model)) as engine, Graders() as graders:
        attempts = sweep(engine, tokenizer, items, graders, rules, [None])[0]
    found = record.record(name, [(None, attempts)], rules, step)
    record.write(run.evals, name, found, [(None, attempts)])
    return found["value"]
