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
from shoal.recipes._tune import failures_noted, note_place
from shoal.report import page
from shoal.run import Run
from shoal.tasks.grading import Graders
from shoal.tasks.task import Task
from shoal.train.loop import steps_left

HELD_OUT, ATTEMPTS = 200, 4  # problems, and samples of each, before and after
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
    note_place(run, resume, teller)
    with failures_noted(run):
        before = solved(config, run, model, tokenizer, tasks, "before") if not resume else None
        if before is not None:
            teller.say(f"before   {before:.1%} of held-out problems")
        run.status(state="training")
        guess = int(60 * (config.minutes or 0) / GUESSED_SECONDS)
        device = str(model.embed.weight.device)
        state = rl.reinforce(
            config, run, model, tokenizer, tasks, guess, device, resume, teller.show, teller.say
        )  # fmt: skip
        step = state.counters.step
        if steps_left(state):
            run.status(state="stopped", step=step)
            teller.say(f"stopped at step {step}; continue with: shoal rl --resume {typed(run)}")
            return 130
        after = solved(config, run, state.model, tokenizer, tasks, "after", step)
        teller.say(f"after    {after:.1%} of held-out problems, {state.counters.seconds / 60:.1f} minutes later")
        run.status(state="done", step=step, pass_at_1=after)
        teller.say(f"report   {page.write(run.path)}")
        teller.say(f"next     shoal samples {typed(run)}")
    return 0


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
