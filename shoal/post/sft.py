"""Supervised fine-tuning: a model learns what the assistant says in conversations. The loop, as it happens.

`sft` is next-token training on samples (`packing.py`), with the multi-token modules trained along and the experts kept
in balance, as in pretraining. `tune` is the loop alone: whoever has other batches or another loss hands them in, as
on-policy distillation does. Batches and order are functions of the counters, so a resumed run repeats nothing and
leaves nothing out: it ends bit-equal to one that was never stopped.
"""

from collections.abc import Callable, Mapping
from contextlib import closing

from shoal.data.loader import Batch
from shoal.data.tokenizer import Tokenizer
from shoal.errors import DataError
from shoal.model.transformer import Transformer
from shoal.post.config import TuningConfig
from shoal.post.packing import Packer, Samples
from shoal.run import Run
from shoal.train.checkpoint import Saver
from shoal.train.loop import (
    begin,
    keep_evidence,
    measured,
    model_writer,
    replan,
    restore,
    save,
    save_due,
    steps_left,
    stop_after_too_many_skips,
)
from shoal.train.loss import Main, next_token
from shoal.train.step import TrainState, train_step
from shoal.train.stop import Stop

GUESSED_STEPS = 100  # of a run by minutes, until three steps have shown their pace

Say = Callable[[str], None]
Show = Callable[[Mapping[str, float]], None]


def sft(
    config: TuningConfig,
    run: Run,
    model: Transformer,
    tokenizer: Tokenizer,
    samples: Samples,
    resume: bool = False,
    show: Show = lambda metrics: None,
    say: Say = lambda words: None,
) -> TrainState:
    """Teach `samples` to `model`, in place. With `resume` its weights are those of the run's newest checkpoint.

    Raises TrainingError, CheckpointError, ResourceError, and DataError where a resumed run meets other samples.
    """
    require_same_samples(run, samples)
    b = config.batch
    packer = Packer(samples, tokenizer.byte_lengths(), b.context * b.samples, config.seed)
    steps = config.steps if config.epochs is None else -(-packer.batches(config.epochs) // b.accumulate)
    device = model.embed.weight.device
    state = TrainState(config.training(model.config, steps), str(device), model)

    def batches() -> tuple[list[Batch], dict[str, float]]:
        found, start = [], state.counters.samples
        for _ in range(b.accumulate):
            found.append(packer.batch(start))
            start += len(found[-1].ids)
        return found, {"train/epoch": start / len(samples)}

    tune(state, run, tokenizer, batches, next_token, resume, show, say)
    return state


def tune(
    state: TrainState,
    run: Run,
    tokenizer: Tokenizer,
    batches: Callable[[], tuple[list[Batch], dict[str, float]]],
    main_loss: Main = next_token,
    resume: bool = False,
    show: Show = lambda metrics: None,
    say: Say = lambda words: None,
) -> None:
    """Train until the budget is spent, or until asked to stop (then a checkpoint is left and `steps_left` is above 0).

    `batches()` gives those of the coming step, and what else to log of it.
    """
    if state.note:
        say(state.note)
    if resume:
        restore(state, run, say)
    writer = model_writer(state.model.config, tokenizer)
    saver = Saver(run.checkpoints, writer, state.config.checkpoint.keep)
    saved, stall = state.counters.step, {}
    with Stop(say) as stop, closing(saver):
        clock = begin(state, GUESSED_STEPS)
        while steps_left(state) and not stop.asked:
            taught, more = batches()
            result = train_step(state, taught, main_loss)
            clock.stepped()
            replan(state, clock)
            metrics = measured(state, result, taught, clock) | more
            if result.skipped:
                keep_evidence(state, run, taught, result, say)
            run.log(state.counters.step, metrics | stall)
            show({"step": state.counters.step, "total_steps": state.counters.total_steps, **metrics})
            stop_after_too_many_skips(state, result)
            stall = {}
            if save_due(state, clock, saved):
                saved = state.counters.step
                stall = {"time/save_stall": save(saver, state, clock)}
                replan(state, clock)
            saver.check()
        if saved != state.counters.step:
            save(saver, state, clock)
    state.end()


def require_same_samples(run: Run, samples: Samples) -> None:
    """A resumed run must learn what it began with: a sample's index means nothing among others."""
    began = run.env().get("samples", samples.sha256)
    if began != samples.sha256:
        got = f"the samples of {run.id} have changed since it began"
        raise DataError(got, "the same data, tokenizer and batch.context", "restore them, or start a new run")
    run.write_env(samples=samples.sha256)
