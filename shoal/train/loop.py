"""What every stage's visible loop calls: its clock, its metrics, its evidence, its saves.

The loops themselves stay where they can be read from top to bottom (`pretrain.py`, `post/sft.py`); they hand in a
`TrainState`, a run directory, and an `Economy` where somebody has measured what a second here can give.
"""

import json
import resource
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from shoal.data.loader import Batch
from shoal.data.tokenizer import Tokenizer
from shoal.errors import CheckpointError, ResourceError, TrainingError
from shoal.model import hf
from shoal.model.config import ModelConfig
from shoal.run import Run, replace_text
from shoal.train.checkpoint import Saver, newest
from shoal.train.step import Counters, StepResult, TrainState

PACE_STEPS = 21  # the pace of late is the median of so many steps
SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class Economy:
    """What a token takes and a second gives: for MFU and cost. `usd_per_hour` is None where nobody knows.

    `flops_of` a token: in segments of these lengths, with multi-token modules at work or at rest.
    """

    flops_of: Callable[[Sequence[int], bool], float]
    peak_flops: float
    usd_per_hour: float | None = None


def steps_left(state: TrainState) -> int:
    return max(0, state.counters.total_steps - state.counters.step)


class Clock:
    """Wall-clock of training over all sittings, kept in the counters, and the pace of this one.

    `seconds_per_step` is the median of late steps, so that one slow step changes no plan, and with it what a step
    costs in scores and saves. `guess` stands for steps not seen yet.
    """

    def __init__(self, counters: Counters, guess: float | None = None):
        self.counters = counters
        self.last = time.perf_counter()
        self.last_save = counters.seconds
        self.recent = deque([] if guess is None else [guess] * 3, PACE_STEPS)
        self.steps, self.aside, self.stall = 0, 0.0, 0.0

    def stepped(self) -> None:
        self.recent.append(self._elapsed())
        self.steps += 1

    def went_aside(self) -> float:
        """Book what a score or a save took, and return it."""
        seconds = self._elapsed()
        self.aside += seconds
        return seconds

    def _elapsed(self) -> float:
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        self.counters.seconds += elapsed
        return elapsed

    @property
    def seconds_per_step(self) -> float:
        return median(self.recent) + self.aside / max(1, self.steps)


def begin(state: TrainState, planned_steps: int | None) -> Clock:
    """Set how far a run goes, now that it starts or continues: as configured today, whatever a checkpoint says."""
    c, config = state.counters, state.config
    if config.minutes is None:
        assert config.steps is not None
        c.total_steps, c.progress, c.minutes = config.steps, min(1.0, c.step / config.steps), None
        return Clock(c)
    if c.minutes != config.minutes:  # begun now, or continued with another budget
        c.progress, c.minutes = min(c.progress, c.seconds / 60 / config.minutes), config.minutes
    assert c.step or planned_steps, "a run by minutes needs a plan to begin with"
    clock = Clock(c, c.seconds / c.step if c.step else 60 * config.minutes / (planned_steps or 1))
    replan(state, clock)
    if not c.step and not steps_left(state):
        got = f"{config.minutes:g} minutes, of which {c.seconds:.0f} s went into the start"
        raise ResourceError(got, "time for steps", "give more minutes, or set --init.pair_steps 0")
    return clock


def replan(state: TrainState, clock: Clock) -> None:
    """By minutes: correct the number of steps by the clock, so that steps, scores and saves end with the minutes."""
    c, minutes = state.counters, state.config.minutes
    if minutes is not None:
        left = 60 * minutes - c.seconds - clock.stall
        c.total_steps = c.step + max(0, int(left / clock.seconds_per_step + 1e-6))


def measured(
    state: TrainState, result: StepResult, batches: Sequence[Batch], clock: Clock, economy: Economy | None = None
) -> dict[str, float]:
    """The metrics of one step, by their stable names; MFU and cost where an economy is known."""
    c = state.counters
    speed = sum(len(b.tokens_T) for b in batches) / clock.recent[-1]
    metrics = {
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        "train/lr": result.lr,
        "train/tokens": c.tokens,
        "speed/tokens_per_second": speed,
        "memory/peak_gib": peak_gib(state.device),
        "time/seconds": c.seconds,
        "time/eta": steps_left(state) * clock.seconds_per_step,
    }
    if result.mtp_loss is not None:
        metrics["train/mtp_loss"] = result.mtp_loss
    if result.loads_LE is not None:
        metrics["moe/load_max_over_mean"] = result.load_max_over_mean
    if economy is not None:
        lengths = [n for b in batches for n in b.lengths]
        metrics["speed/mfu"] = speed * economy.flops_of(lengths, result.mtp_loss is not None) / economy.peak_flops
    if economy is not None and economy.usd_per_hour is not None:
        metrics["cost/usd"] = c.seconds / 3600 * economy.usd_per_hour
    return metrics


def peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def keep_evidence(
    state: TrainState, run: Run, batches: Sequence[Batch], result: StepResult, say: Callable[[str], None]
) -> None:
    """Write down which samples a skipped step saw, so that it can be replayed: of reinforcement the answers' seeds."""
    step, ids, tokens = state.counters.step, [i for b in batches for i in b.ids], sum(len(b.tokens_T) for b in batches)
    with open(run.logs / SKIPPED, "a") as file:
        file.write(json.dumps({"step": step, "samples": ids, "tokens": tokens, "why": result.skipped}) + "\n")
    say(f"step {step} skipped: {result.skipped}; its {len(ids):,} samples are named in logs/{SKIPPED}")


def forget_evidence(path: Path, step: int) -> None:
    """Drop the lines of a JSONL that are past `step`, which a resumed run meets again, and one torn by a kill."""
    if path.exists():
        whole = path.read_bytes().split(b"\n")[:-1]  # what str.splitlines also cuts at may stand in a text
        kept = [line.decode() + "\n" for line in whole if json.loads(line)["step"] <= step]
        replace_text(path, "".join(kept))


def stop_after_too_many_skips(state: TrainState, result: StepResult) -> None:
    c = state.counters
    if c.skips_in_a_row >= state.config.safety.most_skips:
        raise TrainingError(
            f"{c.skips_in_a_row} steps in a row were skipped, the last because of {result.skipped}",
            "a finite loss near its running mean",
            f"lower optim.lr, look at the samples in logs/{SKIPPED}, then --resume the last checkpoint",
        )


def save_due(state: TrainState, clock: Clock, saved: int) -> bool:
    c, every = state.counters, state.config.checkpoint
    if every.steps is not None:
        return c.step - saved >= every.steps
    return c.seconds - clock.last_save >= every.minutes * 60


def save(saver: Saver, state: TrainState, clock: Clock) -> float:
    """Seconds that training stood still for it."""
    saver.save(state.counters.step, state.model.state_dict(), state.tensors(), state.saved_counters())
    clock.stall = clock.went_aside()
    clock.last_save = state.counters.seconds
    return clock.stall


def model_writer(config: ModelConfig, t: Tokenizer) -> Callable[[dict[str, Tensor], Path], None]:
    """Writes a snapshot of weights as a whole Hugging Face model folder, tokenizer included."""

    def write(weights: dict[str, Tensor], folder: Path) -> None:
        hf.save_state(config, weights, folder, bos_id=t.bos_id, eos_id=t.eos_id)
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
        forget_evidence(run.logs / SKIPPED, 0)
        return
    loaded = hf.load(checkpoint.path, state.model.embed.weight.dtype, state.device)
    state.model.load_state_dict(loaded.state_dict())
    state.load(checkpoint.tensors(), checkpoint.counters)
    run.rewind(checkpoint.step)
    forget_evidence(run.logs / SKIPPED, checkpoint.step)
    say(f"resumed from {checkpoint.path.name}")
