"""What a pretraining run is asked to do. Torch-free; recipes fill it, flags and files override it."""

from dataclasses import dataclass, field
from math import inf
from typing import Literal, NamedTuple

from shoal.data.config import DataConfig
from shoal.errors import ConfigError
from shoal.model.config import ModelConfig


class Range(NamedTuple):
    """Numbers from `low` to `high`; an end that is `open` does not belong to it. NaN and infinity never do."""

    low: float
    high: float = inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, x: object) -> bool:
        assert isinstance(x, int | float)
        low = self.low < x if self.open_low else self.low <= x
        return low and x < inf and (x < self.high if self.open_high else x <= self.high)

    def __str__(self) -> str:
        low = f"a number {'above' if self.open_low else 'from'} {self.low:g}"
        return low + ("" if self.high == inf else f" {'to below' if self.open_high else 'to'} {self.high:g}")


POSITIVE, NOT_NEGATIVE, AT_LEAST_ONE = Range(0, open_low=True), Range(0), Range(1)
SHARE, BELOW_ONE = Range(0, 1), Range(0, 1, open_high=True)


def require(config: object, path: str, **ranges: Range) -> None:
    """ConfigError for the first of these fields that is outside its range; None is a field not used."""
    for name, allowed in ranges.items():
        value = getattr(config, name)
        if value is not None and value not in allowed:
            raise ConfigError(f"{path}{name} = {value:g}", str(allowed), f"set --{path}{name} to such a number")


def require_bf16(precision: str, dtype: str) -> None:
    """8-bit products stand between bf16 activations."""
    if precision == "fp8" and dtype != "bf16":
        raise ConfigError(f"precision fp8 with dtype {dtype}", "dtype bf16", "set --dtype bf16, or --precision plain")


@dataclass(frozen=True)
class BatchConfig:
    """A step sees `context · samples · accumulate` tokens; `samples` windows go through the model at once."""

    context: int = 512
    samples: int = 8
    accumulate: int = 1

    def __post_init__(self):
        require(self, "batch.", context=AT_LEAST_ONE, samples=AT_LEAST_ONE, accumulate=AT_LEAST_ONE)

    @property
    def tokens(self) -> int:
        return self.context * self.samples * self.accumulate


@dataclass(frozen=True)
class GrowthConfig:
    """Until the share `until` of a run, windows have `context` tokens where batch.context is more, and a step more of
    them.
    """

    context: int | None = None
    until: float = 0.0

    def __post_init__(self):
        require(self, "growth.", context=AT_LEAST_ONE, until=BELOW_ONE)
        if (self.context is None) != (self.until == 0):
            got = f"growth.context {self.context} and growth.until {self.until:g}"
            raise ConfigError(
                got, "both or neither", "set --growth.context none and --growth.until 0, or give the other"
            )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW throughout, or Muon for the matrices inside blocks (each expert's on its own) and AdamW for the rest.

    Muon's updates are scaled to the size of AdamW's (RMS `muon_rms`, arXiv 2502.16982), so `lr` and `weight_decay` mean
    the same for both. Weights decay only inside blocks: an embedding row that is seldom seen would fade. `embed_lr`
    and `head_lr` multiply `lr` for the two ends of the model.
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
    newton_schulz_steps: int = 4
    muon_rms: float = 0.2
    clip: float = 1.0

    def __post_init__(self):
        require(self, "optim.", lr=POSITIVE, embed_lr=NOT_NEGATIVE, head_lr=NOT_NEGATIVE, weight_decay=NOT_NEGATIVE)
        require(self, "optim.", beta1=BELOW_ONE, beta2=BELOW_ONE, momentum=BELOW_ONE, eps=POSITIVE, clip=POSITIVE)
        require(self, "optim.", newton_schulz_steps=AT_LEAST_ONE, muon_rms=POSITIVE)


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

    def __post_init__(self):
        require(self, "schedule.", warmup=SHARE, decay=SHARE, final=SHARE)


@dataclass(frozen=True)
class InitConfig:
    """Standard deviations other than the model's `init_std`, and what to write down instead of learning it.

    `embed_std` is the embedding's, `out_std` that of what writes into the residual stream. With `pair_steps` above 0,
    embedding and head are fitted by so many updates to how often each token follows each in the text (pairs.py). With
    `look_back` above 0, the first layer's heads start by attending to the last tokens, so strongly (offsets.py).
    """

    embed_std: float | None = None
    out_std: float | None = None
    pair_steps: int = 0
    look_back: float = 0.0

    def __post_init__(self):
        require(self, "init.", embed_std=NOT_NEGATIVE, out_std=NOT_NEGATIVE)
        require(self, "init.", pair_steps=NOT_NEGATIVE, look_back=NOT_NEGATIVE)


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

    @property
    def mtp_share(self) -> float:
        """Of the run, in which multi-token modules take part."""
        until = max(self.mtp_from, self.mtp_until)
        return (until - self.mtp_from) * (self.mtp_weight > 0) + (1 - until) * (self.mtp_final > 0)

    def __post_init__(self):
        require(self, "loss.", mtp_weight=NOT_NEGATIVE, mtp_final=NOT_NEGATIVE, mtp_until=SHARE, mtp_from=SHARE)
        require(self, "loss.", balance_alpha=NOT_NEGATIVE, bias_speed=NOT_NEGATIVE, bias_until=SHARE)


@dataclass(frozen=True)
class EvalConfig:
    """Held-out text: `tokens` of it after each 1/`times` of a run, at its end `final_tokens` (None: all of it)."""

    times: int = 10
    tokens: int = 32768
    final_tokens: int | None = None
    context: int | None = None  # None: the training context

    def __post_init__(self):
        require(self, "eval.", times=NOT_NEGATIVE, tokens=AT_LEAST_ONE, final_tokens=AT_LEAST_ONE, context=AT_LEAST_ONE)


@dataclass(frozen=True)
class CheckpointConfig:
    minutes: float = 5.0
    steps: int | None = None  # save every so many steps instead
    keep: int = 2

    def __post_init__(self):
        require(self, "checkpoint.", minutes=POSITIVE, steps=AT_LEAST_ONE, keep=AT_LEAST_ONE)


@dataclass(frozen=True)
class SafetyConfig:
    """A step is skipped whose loss or gradient is not finite, or whose loss is `spike_nats` above its running mean.

    The mean is trusted from the 20th update on.
    """

    spike_nats: float = 2.0
    most_skips: int = 5  # in a row, then training stops

    def __post_init__(self):
        require(self, "safety.", spike_nats=POSITIVE, most_skips=AT_LEAST_ONE)


@dataclass(frozen=True)
class Fp8Config:
    """What precision "fp8" means beside E4M3 operands. Scales are powers of two, one byte each, under which a product
    in bf16 is exact, or fp32, whose products on a CPU are fp32 and slow. `moments` are the optimizer's.
    """

    scales: Literal["ue8m0", "fp32"] = "ue8m0"
    moments: Literal["bf16", "fp32"] = "bf16"


@dataclass(frozen=True)
class PretrainConfig:
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    init: InitConfig = field(default_factory=InitConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    steps: int | None = None  # how long to train: so many steps,
    minutes: float | None = None  # or so long on the clock, the number of steps being corrected as it goes
    dtype: Literal["bf16", "fp32"] = "bf16"
    precision: Literal["plain", "fp8"] = "plain"  # products in blocks: as `dtype` has them, or with 8-bit operands
    fp8: Fp8Config = field(default_factory=Fp8Config)
    recompute: bool = False  # rebuild each layer's activations in the backward pass
    threads: int | None = None
    seed: int = 0

    def __post_init__(self):
        if (self.steps is None) == (self.minutes is None):
            got = f"steps {self.steps} and minutes {self.minutes}"
            raise ConfigError(got, "one of the two", "give --steps N or --minutes M, and the other as none")
        require(self, "", steps=AT_LEAST_ONE, minutes=POSITIVE, threads=AT_LEAST_ONE)
        require_bf16(self.precision, self.dtype)
        if self.batch.context > self.model.max_positions:
            got = f"a context of {self.batch.context} for a model of {self.model.max_positions} positions"
            raise ConfigError(got, "batch.context at most model.max_positions", "lower one or raise the other")
        if self.batch.context % self.first_context:
            got = f"growth.context {self.growth.context} and a batch.context of {self.batch.context}"
            fix = "set --growth.context none and --growth.until 0, or another context"
            raise ConfigError(got, "a divisor of batch.context", fix)
        if self.init.pair_steps and self.model.tie_embeddings:
            got = f"init.pair_steps {self.init.pair_steps} and tied embeddings"
            raise ConfigError(got, "an embedding and a head of their own", "set init.pair_steps 0, or untie them")

    @property
    def first_context(self) -> int:
        """Tokens of a window before it grows."""
        return min(self.growth.context or self.batch.context, self.batch.context)
