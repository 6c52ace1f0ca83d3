"""One training step, and the state it advances. Every stage's loop calls it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoal.data.loader import Batch
from shoal.model.attend import Attend, Packed
from shoal.model.moe import Routes
from shoal.model.transformer import Transformer
from shoal.precision import fp8
from shoal.train import balance, optim, schedule
from shoal.train.config import PretrainConfig
from shoal.train.loss import Losses, Main, losses, next_token
from shoal.train.optim import Optimizer

STAGE = "stage."  # before the names of a stage's tensors
MOMENTS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Counters:
    """Where a run stands; plain numbers, saved as JSON. `samples` is the global sample index that comes next."""

    step: int = 0
    updates: int = 0  # steps that were not skipped
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training, over all sittings
    total_steps: int = 0  # of the whole run; a guess, corrected by the clock, where a run goes by minutes
    progress: float = 0.0  # share of the run that is over; never falls
    minutes: float | None = None  # of the budget that progress was reckoned with
    skips_in_a_row: int = 0
    mean_loss: float = 0.0  # running, of steps that were not skipped
    stage: dict[str, Any] = field(default_factory=dict)  # what a stage's own loop must remember


@dataclass(frozen=True)
class StepResult:
    """`loss` and `mtp_loss` in nats a token; `skipped` says why no update was made."""

    loss: float
    mtp_loss: float | None
    grad_norm: float
    lr: float
    loads_LE: Tensor | None  # tokens each expert got, by mixture layer
    skipped: str | None

    @property
    def load_max_over_mean(self) -> float:
        return 1.0 if self.loads_LE is None else balance.max_over_mean(self.loads_LE)


class TrainState:
    """Model, optimizer and counters: all that a resumed run needs."""

    def __init__(self, config: PretrainConfig, device: str, model: Transformer | None = None):
        """`model` is one to go on from; without it, a new one is drawn."""
        self.config = config
        self.device = torch.device(device)
        if model is None:
            model = Transformer(config.model).to(self.device)
            model.init_weights(config.seed, config.init.embed_std, config.init.out_std)
        self.model = model.set_dtype(torch.bfloat16 if config.dtype == "bf16" else torch.float32)
        moments = torch.float32
        if config.precision == "fp8":
            fp8.swap(self.model, config.fp8.scales)
            moments = MOMENTS[config.fp8.moments]
        self.optimizer = Optimizer(self.model, config.optim, moments)
        self.counters = Counters(total_steps=config.steps or 0)
        self.stage: dict[str, Tensor] = {}  # what a stage's own loop must remember, besides counters.stage

    @property
    def note(self) -> str | None:
        """What a user should know about how this computes."""
        return fp8.note(self.model.head.weight) if self.config.precision == "fp8" else None

    def end(self) -> None:
        """Training is over: the model computes in its dtype again, as wherever its checkpoint is opened."""
        fp8.restore(self.model)

    def tensors(self) -> dict[str, Tensor]:
        return self.optimizer.tensors() | {STAGE + name: t for name, t in self.stage.items()}

    def load(self, tensors: dict[str, Tensor], counters: dict) -> None:
        """After the model's weights were loaded: masters, moments, the stage's own, and counters."""
        self.stage = {name.removeprefix(STAGE): t for name, t in tensors.items() if name.startswith(STAGE)}
        self.optimizer.load_tensors({name: t for name, t in tensors.items() if not name.startswith(STAGE)})
        self.counters = Counters(**counters)

    def saved_counters(self) -> dict:
        return asdict(self.counters)

    def count_idle(self) -> None:
        """A step that had nothing to learn from."""
        self.counters.progress = self.next_progress
        self.counters.step += 1

    @property
    def next_progress(self) -> float:
        """Progress at the end of the coming step.

        By minutes, each step covers an equal share of what is left, so a corrected number of steps moves nothing back.
        """
        c = self.counters
        if self.config.steps is not None:
            return min(1.0, (c.step + 1) / c.total_steps)
        return c.progress + (1 - c.progress) / max(1, c.total_steps - c.step)


def by_segment(batch: Batch) -> Attend:
    return Packed(batch.lengths)


def train_step(
    state: TrainState,
    batches: Sequence[Batch],
    main_loss: Main = next_token,
    attend: Callable[[Batch], Attend] = by_segment,
) -> StepResult:
    """Forward and backward over the micro-batches of one step, then one update, unless something is wrong with it.

    A stage with another loss than the next token's hands it in; it is a mean over the targets of the whole step. So it
    does with what attends to what, where a batch isn't segments end to end.
    """
    n_targets = sum(int((b.targets_T >= 0).sum()) for b in batches)
    n_tokens = sum(len(b.tokens_T) for b in batches)
    parts, gradients = [], None
    for batch in batches:
        parts.append(backward(state, batch, n_targets, n_tokens, main_loss, attend))
        if len(batches) > 1:
            gradients = summed(state.optimizer, gradients)
    gradients = gradients or state.optimizer.gradients()
    norm = optim.norm(gradients)
    loss = sum(part.main.item() for part in parts)
    loads_LE = torch.stack([balance.loads(part.routes) for part in parts]).sum(0) if parts[0].routes else None
    skipped, lr = fault(state, loss, norm), update_rate(state)
    if skipped is None:
        update(state, gradients, lr, norm, loads_LE)
    state.optimizer.zero_grad()
    count(state, batches, loss, skipped)
    return StepResult(
        loss=loss,
        mtp_loss=None if parts[0].mtp is None else sum(part.mtp.item() for part in parts if part.mtp is not None),
        grad_norm=norm,
        lr=lr,
        loads_LE=loads_LE,
        skipped=skipped,
    )


def backward(
    state: TrainState,
    batch: Batch,
    n_targets: int,
    n_tokens: int,
    main_loss: Main = next_token,
    attend: Callable[[Batch], Attend] = by_segment,
) -> Losses:
    """Gradients of one micro-batch, a part of a step of so many targets and tokens, onto the parameters."""
    c, model, batch = state.config, state.model, batch.to(state.device)
    weight = schedule.mtp_weight(c.loss, state.counters.progress)
    alpha = c.loss.balance_alpha * len(batch.tokens_T) / n_tokens
    run, context = recomputed if c.recompute else None, schedule.context(c, state.counters.progress)
    part = losses(model, batch, attend(batch), n_targets, weight, alpha, context, run, main_loss)
    part.total.backward()
    return part


def recomputed(layer: nn.Module, *args) -> tuple[Tensor, Routes | None]:
    """Run a layer, keeping only its input: its activations are rebuilt in the backward pass."""
    return checkpoint(layer, *args, use_reentrant=False)  # type: ignore[return-value]


def summed(optimizer: Optimizer, sums: list[Tensor | None] | None) -> list[Tensor | None]:
    """The gradients of one more micro-batch added to fp32 sums; the parameters' own are cleared."""
    new = optimizer.gradients()
    optimizer.zero_grad()
    if sums is None:
        return [None if g is None else g.float() for g in new]
    return [s if s is None or g is None else s.add_(g) for s, g in zip(sums, new, strict=True)]


def update_rate(state: TrainState) -> float:
    """The learning rate of this step: the schedule at the end of it, so that the first one is not zero."""
    c = state.config
    return c.optim.lr * schedule.learning_rate(c.schedule, state.next_progress)


def update(state: TrainState, gradients: list[Tensor | None], lr: float, norm: float, loads_LE: Tensor | None) -> None:
    c = state.config
    state.counters.updates += 1
    clip_factor = min(1.0, c.optim.clip / (norm + 1e-6))
    state.optimizer.step(gradients, state.counters.updates, lr, clip_factor)
    if loads_LE is not None:
        balance.move_biases(state.model, loads_LE, schedule.bias_speed(c.loss, state.counters.progress))


def count(state: TrainState, batches: Sequence[Batch], loss: float, skipped: str | None) -> None:
    c = state.counters
    if skipped is None:
        c.mean_loss = loss if c.updates == 1 else 0.95 * c.mean_loss + 0.05 * loss
    c.skips_in_a_row = 0 if skipped is None else c.skips_in_a_row + 1
    c.progress = state.next_progress
    c.step += 1
    c.samples += sum(len(b.ids) for b in batches)
    c.tokens += sum(len(b.tokens_T) for b in batches)


def fault(state: TrainState, loss: float, norm: float) -> str | None:
    """Why this step must not change the weights; None when all is well."""
    c, safety = state.counters, state.config.safety
    if not isfinite(loss) or not isfinite(norm):
        return f"loss {loss}, gradient norm {norm}"
    if c.updates >= 20 and loss > c.mean_loss + safety.spike_nats:
        return f"loss {loss:.3f} spiked above its running mean {c.mean_loss:.3f}"
    return None
