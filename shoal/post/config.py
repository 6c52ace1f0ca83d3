"""What fine-tuning and distillation are asked to do. Torch-free; recipes fill it, flags and files override it."""

from dataclasses import dataclass, field
from typing import Literal

from shoal.errors import ConfigError
from shoal.model.config import ModelConfig
from shoal.train.config import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    BatchConfig,
    CheckpointConfig,
    Fp8Config,
    LossConfig,
    OptimConfig,
    PretrainConfig,
    SafetyConfig,
    ScheduleConfig,
    require,
    require_bf16,
)


@dataclass(frozen=True)
class TuningConfig:
    """How a model goes on learning. One of `epochs`, `steps` and `minutes` says how long.

    `batch.context` is the longest sample in tokens; a batch of context · samples tokens is filled with whole samples.
    `levels` are those of tasks, where problems are drawn; None: all they have.
    """

    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(matrices="adamw", lr=1e-4, weight_decay=0.0))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig("cosine", warmup=0.03, final=0.1))
    loss: LossConfig = field(default_factory=lambda: LossConfig(mtp_weight=0.1))
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    epochs: float | None = 2.0
    steps: int | None = None
    minutes: float | None = None
    dtype: Literal["bf16", "fp32"] = "bf16"
    precision: Literal["plain", "fp8"] = "plain"
    fp8: Fp8Config = field(default_factory=Fp8Config)
    recompute: bool = False
    levels: tuple[int, ...] | None = None
    threads: int | None = None
    seed: int = 0

    def __post_init__(self):
        given = [name for name in ("epochs", "steps", "minutes") if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(f"{name} {getattr(self, name):g}" for name in given) or "none of epochs, steps, minutes"
            raise ConfigError(got, "one of the three", "give --epochs E, --steps N or --minutes M, the others as none")
        require(self, "", epochs=POSITIVE, steps=AT_LEAST_ONE, minutes=POSITIVE, threads=AT_LEAST_ONE)
        require_bf16(self.precision, self.dtype)

    def training(self, model: ModelConfig, steps: int | None) -> PretrainConfig:
        """The same for a `TrainState` of this model; `steps` None goes by minutes."""
        return PretrainConfig(
            model, batch=self.batch, optim=self.optim, schedule=self.schedule, loss=self.loss, safety=self.safety,
            checkpoint=self.checkpoint, steps=steps, minutes=self.minutes if steps is None else None,
            dtype=self.dtype, precision=self.precision, fp8=self.fp8, recompute=self.recompute, threads=self.threads,
            seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class SftConfig(TuningConfig):
    """`model` is what to start from, `data` what to learn: a JSONL file, or `tasks:chain_sum,countdown:2000`."""

    model: str = ""
    data: str = ""


@dataclass(frozen=True)
class SamplingConfig:
    """How a teacher is asked. All of it is part of an answer's identity: another temperature is another answer."""

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 1024

    def __post_init__(self):
        require(self, "sampling.", temperature=NOT_NEGATIVE, top_p=SHARE, max_tokens=AT_LEAST_ONE)


@dataclass(frozen=True)
class EndpointConfig:
    """Where the teacher is a URL. `model` is its name there, `key_env` the environment's variable with the API key.

    `instruction` goes before prompts whose answer is graded. Prices are dollars for a million tokens.
    """

    model: str = ""
    key_env: str = ""
    instruction: str = "Put the final answer, and nothing else, between <answer> and </answer>."
    concurrency: int = 8
    timeout_seconds: float = 600.0
    tries: int = 5
    usd_in: float = 0.0
    usd_out: float = 0.0

    def __post_init__(self):
        require(self, "endpoint.", concurrency=AT_LEAST_ONE, tries=AT_LEAST_ONE, timeout_seconds=POSITIVE)
        require(self, "endpoint.", usd_in=NOT_NEGATIVE, usd_out=NOT_NEGATIVE)


@dataclass(frozen=True)
class KeepConfig:
    """Which right answers are worth learning. `language_share` of the words must be in `language`, which may be the
    prompt's own; a line may come `repeats` times; `characters` bounds reasoning and answer together.
    """

    per_prompt: int = 4
    repeats: int = 8
    characters: int = 200_000
    language: Literal["any", "prompt", "en", "ko", "zh"] = "any"
    language_share: float = 0.9

    def __post_init__(self):
        require(self, "keep.", per_prompt=AT_LEAST_ONE, repeats=AT_LEAST_ONE, characters=AT_LEAST_ONE)
        require(self, "keep.", language_share=SHARE)


@dataclass(frozen=True)
class DistillConfig(TuningConfig):
    """`teacher` is a model or a URL, `student` a model or a preset, `prompts` a JSONL file or tasks with a count.

    `answers` names a file to keep the teacher's answers in; without it they lie in the run. `tokenizer` is for a preset
    whose teacher is a URL. `on_policy`: the student writes, `samples` times to each of `group` prompts a step, and the
    teacher judges every token. It draws at temperature 1: of `answers`, `sampling`, `endpoint` and `keep`, which are of
    a teacher's samples, it reads `sampling.max_tokens` alone. `deterministic` lets such a run resume to the bit, and
    costs nothing where the engine's native program takes the model (bf16 on a CPU that has it), much elsewhere.
    """

    teacher: str = ""
    student: str = ""
    prompts: str = ""
    answers: str = ""
    tokenizer: str = ""
    samples: int = 4
    on_policy: bool = False
    group: int = 8
    deterministic: bool = True
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)

    def __post_init__(self):
        super().__post_init__()
        require(self, "", samples=AT_LEAST_ONE, group=AT_LEAST_ONE)
        if self.on_policy and self.precision == "fp8":
            got = "precision fp8 with on_policy, where an engine that computes in bf16 writes what is learnt from"
            raise ConfigError(got, "precision plain", "set --precision plain, or --on_policy false")
