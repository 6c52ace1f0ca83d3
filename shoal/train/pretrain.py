"""Pretraining: the loop, as it happens. Batches in, steps, now and then a score or a checkpoint, a way to stop.

What the loop needs from other rooms is handed in: an open corpus, a run directory, and an `Economy` (what a token costs
here), so that nothing in it depends on how a run was planned or is shown.
"""

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shoal.data.corpus import Corpus, Split
from shoal.data.loader import Batch, Loader, eval_batches
from shoal.errors import CheckpointError, TrainingError
from shoal.model import hf
from shoal.model.attend import Packed
from shoal.run import Run
from shoal.train.checkpoint import Saver, newest
from shoal.train.config import PretrainConfig
from shoal.train.loss import Score, evaluate
from shoal.train.step import StepResult, TrainState, train_step
from shoal.train.stop import Stop

FIRST_GUESS = 40  # steps before the clock says how many a run will have
EVAL_TOKENS = 4096  # held-out tokens at a time


@dataclass(frozen=True)
class Economy:
    """What a token takes and a second gives: for MFU and cost. `usd_per_hour` is None where nobody knows."""

    flops_per_token: float
    peak_flops: float
    usd_per_hour: float | None = None


def pretrain(
    config: PretrainConfig,
    run: Run,
    corpus: Corpus,
    economy: Economy,
    device: str = "cpu",
    resume: bool = False,
    show: Callable[[Mapping[str, float]], None] = lambda metrics: None,
    say: Callable[[str], None] = lambda words: None,
) -> TrainState:
    """Train until the budget is spent, or until asked to stop (then a checkpoint is left and `steps_left` is above 0).

    `show` gets every logged line, `say` what a user should read. Raises TrainingError, ResourceError, CheckpointError.
    """
    corpus.check_vocabulary(config.model.vocab_size)
    state = TrainState(config, device)
    if resume:
        restore(state, run, say)
    loader = training_loader(config, corpus)
    saver = Saver(run.checkpoints, model_writer(config, corpus), config.checkpoint.keep)
    clock = Clock(state)
    saved, stall = state.counters.step, {}
    with Stop(say) as stop:
        while steps_left(state) and not stop.asked:
            batches = next_batches(state, loader)
            result = train_step(state, batches)
            clock.tick()
            if config.minutes is not None:
                replan(state, clock)
            metrics = measured(state, result, batches, clock, economy)
            if result.skipped:
                keep_evidence(state, run, batches, result, say)
            if score_due(state):
                metrics |= scored(state.model, corpus.val, corpus, config, config.eval.tokens)
                clock.tick()
            run.log(state.counters.step, metrics | stall)  # before the save: a resumed run never lacks a line
            show({"step": state.counters.step, "total_steps": state.counters.total_steps, **metrics})
            stall = {}
            if save_due(state, clock, saved):
                saved = state.counters.step
                stall = {"time/save_stall": save(saver, state, clock)}  # goes into the next line
            saver.check()
        if saved != state.counters.step:
            save(saver, state, clock)
        saver.close()
    return state


def steps_left(state: TrainState) -> int:
    c, minutes = state.counters, state.config.minutes
    if minutes is None or c.total_steps:
        return max(0, c.total_steps - c.step)
    c.total_steps = FIRST_GUESS
    return FIRST_GUESS


def next_batches(state: TrainState, loader: Loader) -> list[Batch]:
    b = state.config.batch
    return [loader.batch(state.counters.samples + i * b.samples) for i in range(b.accumulate)]


def training_loader(config: PretrainConfig, corpus: Corpus) -> Loader:
    b, d = config.batch, config.data
    lengths, fim = corpus.tokenizer.byte_lengths(), corpus.tokenizer.fim_ids() if d.fim_rate else None
    return Loader(corpus.train, lengths, b.context, b.samples, config.seed, d.mask_documents, d.fim_rate, fim)


class Clock:
    """Wall-clock of training over all sittings, kept in the counters; `pace` is the recent seconds a step."""

    def __init__(self, state: TrainState):
        self.counters = state.counters
        self.last = time.perf_counter()
        self.last_save = self.counters.seconds
        self.pace: float | None = None
        self.step_seconds = 0.0
        self.seen = self.counters.step

    def tick(self) -> None:
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        self.counters.seconds += elapsed
        if self.counters.step > self.seen:  # a step, not a score or a save
            self.seen, self.step_seconds = self.counters.step, elapsed
            self.pace = elapsed if self.pace is None else 0.9 * self.pace + 0.1 * elapsed


def replan(state: TrainState, clock: Clock) -> None:
    """Correct the number of steps by the clock: what is left of the minutes, at the pace of late, scores included."""
    c, minutes = state.counters, state.config.minutes
    assert minutes is not None and clock.pace is not None
    left = minutes * 60 - c.seconds
    overhead = c.seconds / max(c.step, 1) if c.step >= FIRST_GUESS else clock.pace
    c.total_steps = max(c.step, c.step + int(left / max(clock.pace, overhead)))


def measured(
    state: TrainState, result: StepResult, batches: list[Batch], clock: Clock, economy: Economy
) -> dict[str, float]:
    """The metrics of one step, by their stable names."""
    c = state.counters
    speed = sum(len(b.tokens_T) for b in batches) / clock.step_seconds
    metrics = {
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        "train/lr": result.lr,
        "train/tokens": c.tokens,
        "speed/tokens_per_second": speed,
        "speed/mfu": speed * economy.flops_per_token / economy.peak_flops,
        "memory/peak_gib": peak_gib(state.device),
        "time/seconds": c.seconds,
        "time/eta": (c.total_steps - c.step) * (clock.pace or 0.0),
    }
    if result.mtp_loss is not None:
        metrics["train/mtp_loss"] = result.mtp_loss
    if result.loads_LE is not None:
        metrics["moe/load_max_over_mean"] = result.load_max_over_mean
    if economy.usd_per_hour is not None:
        metrics["cost/usd"] = c.seconds / 3600 * economy.usd_per_hour
    return metrics


def peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def score_due(state: TrainState) -> bool:
    """After the steps at which another 1/times of the run is over; the end is scored by whoever reports."""
    c, times = state.counters, state.config.eval.times
    return times > 0 and (c.step * times // c.total_steps > (c.step - 1) * times // c.total_steps)


def scored(model, split: Split, corpus: Corpus, config: PretrainConfig, tokens: int | None) -> dict[str, float]:
    """Held-out bits per byte, and how often a second token would be accepted."""
    score = held_out_score(model, split, corpus, config, tokens)
    found = {"eval/bits_per_byte": score.bits_per_byte}
    return found if score.mtp_accept is None else found | {"train/mtp_accept": score.mtp_accept}


def held_out_score(model, split: Split, corpus: Corpus, config: PretrainConfig, tokens: int | None) -> Score:
    context = config.eval.context or config.batch.context
    lengths = corpus.tokenizer.byte_lengths()
    batches = eval_batches(split, lengths, context, max(context, EVAL_TOKENS), tokens)
    return evaluate(model, batches, Packed)


def keep_evidence(state: TrainState, run: Run, batches: list[Batch], result: StepResult, say) -> None:
    """Write down which samples a skipped step saw, so that it can be replayed; stop after too many in a row."""
    c, ids = state.counters, [i for b in batches for i in b.ids]
    with open(run.logs / "skipped.jsonl", "a") as file:
        file.write(f'{{"step": {c.step}, "samples": {ids}, "why": "{result.skipped}"}}\n')
    say(f"step {c.step} skipped: {result.skipped}; samples {ids[0]}–{ids[-1]} are kept in logs/skipped.jsonl")
    if c.skips_in_a_row >= state.config.safety.most_skips:
        raise TrainingError(
            f"{c.skips_in_a_row} steps in a row were skipped, the last because of {result.skipped}",
            "a finite loss near its running mean",
            "lower optim.lr, look at the samples in logs/skipped.jsonl, then --resume the last checkpoint",
        )


def save_due(state: TrainState, clock: Clock, saved: int) -> bool:
    c, every = state.counters, state.config.checkpoint
    if every.steps is not None:
        return c.step - saved >= every.steps
    return c.seconds - clock.last_save >= every.minutes * 60


def save(saver: Saver, state: TrainState, clock: Clock) -> float:
    """Seconds that training stood still for it."""
    began = time.perf_counter()
    saver.save(state.counters.step, state.model.state_dict(), state.tensors(), state.saved_counters())
    clock.tick()
    clock.last_save = state.counters.seconds
    return time.perf_counter() - began


def model_writer(config: PretrainConfig, corpus: Corpus) -> Callable[[dict[str, Tensor], Path], None]:
    """Writes a snapshot of weights as a whole Hugging Face model folder, tokenizer included."""

    def write(weights: dict[str, Tensor], folder: Path) -> None:
        t = corpus.tokenizer
        hf.save_state(config.model, weights, folder, bos_id=t.bos_id, eos_id=t.eos_id)
        t.save(folder)

    return write


def restore(state: TrainState, run: Run, say: Callable[[str], None]) -> None:
    """Continue from the newest whole checkpoint, and say which ones were refused."""
    checkpoint, refused = newest(run.checkpoints)
    for path, why in refused:
        say(f"refused {path.name}: {why}")
    if checkpoint is None:
        if refused:
            got = f"no whole checkpoint in {run.checkpoints}"
            raise CheckpointError(got, "one to continue from", "restore one, or start a new run")
        say("no checkpoint yet: starting from step 0")
        run.rewind(0)
        return
    loaded = hf.load(checkpoint.path, state.model.embed.weight.dtype, state.device)
    state.model.load_state_dict(loaded.state_dict())
    state.load(checkpoint.tensors(), checkpoint.counters)
    run.rewind(checkpoint.step)
    say(f"resumed from {checkpoint.path.name}")
