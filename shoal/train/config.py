"""What a pretraining run is asked to do. Torch-free; recipes fill it, flags and files override it."""

from dataclasses import dataclass, field
from typing import Literal

from shoal.data.config import DataConfig
from shoal.errors import ConfigError
from shoal.model.config import ModelConfig


@dataclass(frozen=True)
class BatchConfig:
    """A step sees `context · samples · accumulate` tokens; `samples` windows go through the model at once."""

    context: int = 512
    samples: int = 8
    accumulate: int = 1

    @property
    def tokens(self) -> int:
        return self.context * self.samples * self.accumulate


@dataclass(frozen=True)
class OptimConfig:
    """AdamW throughout, or Muon for the matrices inside blocks (each expert's on its own) and AdamW for the rest.

    Muon's updates are scaled to the size of AdamW's (RMS `muon_rms`, arXiv 2502.16982), so `lr` and `weight_decay` mean
    the same for both. `embed_lr` and `head_lr` multiply `lr` for the two ends of the model.
    """

    matrices: Literal["muon", "adamw"] = "muon"
    lr: float = 3e-3
    embed_lr: float = 1.0
    head_lr: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.95
    newton_schulz_steps: int = 5
    muon_rms: float = 0.2
    clip: float = 1.0


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, as a share of its peak. `warmup` and `decay` are shares of the run.

    "wsd": warm up, stay, fall linearly to `final`. "cosine": warm up, then a half cosine to `final`.
    "v3": DeepSeek-V3's own (section 4.2): 68% constant, a half cosine to a tenth over 29%, two constant tails.
    """

    kind: Literal["wsd", "cosine", "v3"] = "wsd"
    warmup: float = 0.01
    decay: float = 0.5
    final: float = 0.0


@dataclass(frozen=True)
class LossConfig:
    """Weights beside the next-token loss (V3, section 4.2). λ is `mtp_weight` until `mtp_until`, then `mtp_final`.

    Before `mtp_from` (a share of the run) the multi-token modules rest and cost nothing.
    """

    mtp_weight: float = 0.3
    mtp_final: float = 0.1
    mtp_until: float = 0.67
    mtp_from: float = 0.0
    balance_alpha: float = 1e-4  # sequence-wise balance
    bias_speed: float = 1e-3  # γ of the router bias, until `bias_until` of the run
    bias_until: float = 0.97


@dataclass(frozen=True)
class EvalConfig:
    """Held-out text: `tokens` of it `times` in a run, `final_tokens` at the end (None: all of it)."""

    times: int = 10
    tokens: int = 32768
    final_tokens: int | None = None
    context: int | None = None  # None: the training context


@dataclass(frozen=True)
class CheckpointConfig:
    minutes: float = 5.0
    steps: int | None = None  # save every so many steps instead
    keep: int = 2


@dataclass(frozen=True)
class SafetyConfig:
    """A step whose loss or gradient is not finite, or whose loss is `spike_nats` above its running mean, is skipped."""

    spike_nats: float = 2.0
    most_skips: int = 5  # in a row, then training stops


@dataclass(frozen=True)
class PretrainConfig:
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    steps: int | None = None  # how long to train: so many steps,
    minutes: float | None = None  # or so long on the clock, the number of steps being corrected as it goes
    dtype: Literal["bf16", "fp32"] = "bf16"
    recompute: bool = False  # rebuild each layer's activations in the backward pass
    threads: int | None = None
    seed: int = 0

    def __post_init__(self):
        if (self.steps is None) == (self.minutes is None):
            got = f"steps {self.steps} and minutes {self.minutes}"
            raise ConfigError(got, "one of the two", "give --steps N or --minutes M, and the other as none")
        if self.batch.context > self.model.max_positions:
            got = f"a context of {self.batch.context} for a model of {self.model.max_positions} positions"
            raise ConfigError(got, "batch.context at most model.max_positions", "lower one or raise the other")
