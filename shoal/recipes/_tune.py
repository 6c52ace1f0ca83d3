"""A tuning job from end to end: where it runs, what it learns from, how it ended. `shoal sft` and `distill` read flags.

The caller has opened the model and holds the run's lock.
"""

from collections.abc import Callable
from contextlib import contextmanager

import psutil
import torch

from shoal.data.tokenizer import Tokenizer
from shoal.model.transformer import Transformer
from shoal.ops import dispatch as ops
from shoal.plan import memory
from shoal.post.config import TuningConfig
from shoal.post.packing import Samples
from shoal.post.sft import sft
from shoal.recipes._job import typed
from shoal.recipes._plan import memory_step
from shoal.recipes._teller import Teller
from shoal.report import page
from shoal.run import Run
from shoal.train.config import PretrainConfig
from shoal.train.loop import steps_left
from shoal.train.step import TrainState


def teach(
    config: TuningConfig,
    run: Run,
    model: Transformer,
    tokenizer: Tokenizer,
    samples: Samples,
    teller: Teller,
    resume: bool = False,
    verb: str = "sft",
) -> int:
    """Fine-tune. 0 when the run is complete, 130 when it was asked to stop and left a checkpoint."""

    require_memory(config.training(model.config, 1), model)

    def train() -> TrainState:
        return sft(config, run, model, tokenizer, samples, resume, teller.show, teller.say)

    return follow(verb, run, teller, resume, train)


def follow(verb: str, run: Run, teller: Teller, resume: bool, train: Callable[[], TrainState]) -> int:
    """Keep the run's status while `train` works, and say what is next."""
    state = watched(run, teller, resume, train)
    step, seconds = state.counters.step, state.counters.seconds
    if steps_left(state):
        teller.say(f"stopped at step {step}; continue with: shoal {verb} --resume {typed(run)}")
        return 130
    teller.say(f"result   {step} steps in {seconds / 60:.1f} minutes; the model is in {typed(run)}")
    teller.say(f"report   {page.write(run.path)}")
    teller.say(f"next     shoal chat {typed(run)}")
    return 0


def watched(run: Run, teller: Teller, resume: bool, train: Callable[[], TrainState]) -> TrainState:
    """Keep the run's status while `train` works."""
    note_place(run, resume, teller)
    with failures_noted(run):
        run.status(state="training")
        state = train()
    run.status(state="stopped" if steps_left(state) else "done", step=state.counters.step)
    return state


def require_memory(config: PretrainConfig, model: Transformer, beside: int = 0) -> None:
    """Raises ResourceError, which says what would fit, where a step, and so many bytes `beside` it, don't."""
    device = model.embed.weight.device.type
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    memory.check(model.config, memory_step(config, device), max(0, free - beside))


@contextmanager
def failures_noted(run: Run):
    try:
        yield
    except BaseException as error:
        run.status(state="failed", error=str(error) or type(error).__name__)
        raise


def note_place(run: Run, resume: bool, teller: Teller) -> None:
    """Into env.json; a resumed run is told where it is not as it began, for then it is not bit-equal any more."""
    now = {"threads": torch.get_num_threads(), "kernels": ops.describe()}
    began = run.env()
    for name, value in now.items():
        if resume and began.get(name, value) != value:
            teller.say(f"warning  this run began with {name} {began[name]!r} and goes on with {value!r}: not bit-equal")
    run.write_env(**{name: value for name, value in now.items() if name not in began})
