"""What a stage of reinforcement learning is asked to do. Torch-free; recipes fill it, flags and files override it."""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from shoal.errors import ConfigError
from shoal.post.rewards import RewardConfig
from shoal.train.config import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    CheckpointConfig,
    OptimConfig,
    SafetyConfig,
    ScheduleConfig,
    require,
)


@dataclass(frozen=True)
class RolloutConfig:
    """A step sees `prompts` prompts with `group` answers each, of at most `max_tokens`, drawn at temperature 1.

    Prompts of more than `prompt_tokens` are passed over: the engine's cache has room for so many beside each answer.
    `slice` bounds how many tokens of an answer one step draws; longer ones are carried over and finished by the next
    weights. None: answers are finished in their step, and a variant that wants them gets `refills`.
    """

    prompts: int = 32
    group: int = 16
    max_tokens: int = 128
    prompt_tokens: int = 256
    slice: int | None = None
    refills: int = 2  # rounds of further prompts in place of groups that teach nothing

    def __post_init__(self):
        require(self, "rollout.", prompts=AT_LEAST_ONE, max_tokens=AT_LEAST_ONE, prompt_tokens=AT_LEAST_ONE)
        require(self, "rollout.", slice=AT_LEAST_ONE, refills=NOT_NEGATIVE)
        if self.group < 2:
            got = f"rollout.group = {self.group}"
            raise ConfigError(got, "2 or more: an answer is judged beside others", "set --rollout.group 16")


@dataclass(frozen=True)
class PolicyConfig:
    """`minibatches` are updates a step; `kl_weight` β draws to a reference, renewed every `reference_steps` steps.

    `importance` truncates the engine-to-trainer weight. `most_gap` is the mean |Δ log p| between the two at which
    training stops: they don't hold the same weights then.
    """

    variant: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "dapo"
    minibatches: int = 1
    kl_weight: float = 0.0
    reference_steps: int = 400
    importance: float = 2.0
    replay_routes: bool = True
    mtp_weight: float = 0.1
    balance_alpha: float = 1e-4
    bias_speed: float = 1e-3
    micro_tokens: int = 8192  # tokens that go through the model at once
    most_gap: float = 0.05

    def __post_init__(self):
        require(self, "policy.", minibatches=AT_LEAST_ONE, reference_steps=AT_LEAST_ONE, micro_tokens=AT_LEAST_ONE)
        require(self, "policy.", kl_weight=NOT_NEGATIVE, mtp_weight=NOT_NEGATIVE, balance_alpha=NOT_NEGATIVE)
        require(self, "policy.", bias_speed=NOT_NEGATIVE, importance=POSITIVE, most_gap=POSITIVE)


@dataclass(frozen=True)
class JudgeConfig:
    """Who says which answers are preferred: any OpenAI-compatible `url`, or "" for the rules of `judge.py`.

    `model` is its name there, `key_env` the environment's variable with the API key.
    """

    url: str = ""
    model: str = ""
    key_env: str = ""
    concurrency: int = 8
    timeout_seconds: float = 60.0
    tries: int = 3

    def __post_init__(self):
        require(self, "judge.", concurrency=AT_LEAST_ONE, tries=AT_LEAST_ONE, timeout_seconds=POSITIVE)


@dataclass(frozen=True)
class RLConfig:
    """`model` is what to start from; `tasks` are names with commas between them, of `levels` (None: all they have).

    `curriculum` prefers tasks and levels that are right now and then, which teach most.
    """

    model: str = ""
    tasks: str = "chain_sum,countdown"
    levels: tuple[int, ...] | None = None
    curriculum: bool = True
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optim: OptimConfig = field(default_factory=partial(OptimConfig, matrices="adamw", lr=1e-4, weight_decay=0.0))
    schedule: ScheduleConfig = field(default_factory=partial(ScheduleConfig, warmup=0.02, decay=0.3))
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    steps: int | None = None
    minutes: float | None = 10.0
    dtype: Literal["bf16", "fp32"] = "bf16"
    recompute: bool = False
    threads: int | None = None
    seed: int = 0

    def __post_init__(self):
        if (self.steps is None) == (self.minutes is None):
            got = f"steps {self.steps} and minutes {self.minutes}"
            raise ConfigError(got, "one of the two", "give --steps N or --minutes M, and the other as none")
        require(self, "", steps=AT_LEAST_ONE, minutes=POSITIVE, threads=AT_LEAST_ONE)
