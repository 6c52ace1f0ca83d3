"""R1: a base model becomes a good reasoner that is good to read (arXiv 2501.12948, section 2.3), in five stages.

    cold_start   the base learns some thousand readable solutions             → a first form of thinking
    reasoning    reinforcement: right answers, form, one language             → a reasoner
    samples      its answers, filtered by graders and for readability, and general data
    tuning       the *base* learns those                                      → a clean start
    r1           reinforcement on everything, with a preference besides       → R1

R1 itself: thousands of cold-start samples, 600K reasoning and 200K other samples, two to three epochs of them, 1,700
steps of the last reinforcement, in the last 400 of which the preference counted. Rates and sizes here are for the
models that two cores train in minutes; LOG.md has the trials.
"""

from dataclasses import dataclass, field, replace

from shoal.errors import ConfigError
from shoal.post.config import KeepConfig, SamplingConfig, SftConfig
from shoal.post.rewards import RewardConfig
from shoal.post.rl_config import RLConfig
from shoal.recipes import r1_zero
from shoal.recipes import sft as sft_recipe
from shoal.tasks.catalog import QUICK_LEVELS, QUICK_TASKS
from shoal.train.config import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, require

SHARES = {"cold_start": 0.1, "reasoning": 0.35, "samples": 0.1, "tuning": 0.15, "r1": 0.3}  # of the minutes

EVALUATED_A_MINUTE = 13  # problems, of a budget; at most
EVALUATED, ATTEMPTS, BUDGETS = 200, 4, (0, 8, 16, 32, 64, None)  # problems, samples of each, tokens of thinking


@dataclass(frozen=True)
class SamplesConfig:
    """Rejection sampling: `samples` answers to each of at most `problems` problems, as many as the minutes allow.

    What is right and readable is kept, `keep.per_prompt` of a prompt; `general` questions of no problem are added.
    """

    problems: int = 20_000
    samples: int = 4
    general: float = 0.25
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(1.0, 0.95, max_tokens=128))
    keep: KeepConfig = field(default_factory=lambda: KeepConfig(per_prompt=2, repeats=2, language="prompt"))
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self):
        require(self, "samples.", problems=AT_LEAST_ONE, samples=AT_LEAST_ONE, general=NOT_NEGATIVE, minutes=POSITIVE)


@dataclass(frozen=True)
class R1Config:
    """`model` is the base. The stages get model, tasks, levels, budget, dtype and seed from here, whatever they say."""

    model: str = ""
    tasks: str = ",".join(QUICK_TASKS)
    levels: tuple[int, ...] | None = QUICK_LEVELS
    lessons: int = 4000  # solutions of the cold start
    cold_start: SftConfig = field(default_factory=SftConfig)
    reasoning: RLConfig = field(default_factory=RLConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    tuning: SftConfig = field(default_factory=SftConfig)
    r1: RLConfig = field(default_factory=RLConfig)
    steps: int | None = None
    minutes: float | None = 10.0
    threads: int | None = None
    seed: int = 0

    def __post_init__(self):
        if (self.steps is None) == (self.minutes is None):
            got = f"steps {self.steps} and minutes {self.minutes}"
            raise ConfigError(got, "one of the two", "give --steps N or --minutes M, and the other as none")
        require(self, "", steps=AT_LEAST_ONE, minutes=POSITIVE, threads=AT_LEAST_ONE, lessons=AT_LEAST_ONE)


def recipe() -> R1Config:
    zero, tuned = r1_zero.recipe(), sft_recipe.recipe()
    return R1Config(
        cold_start=tuned,
        reasoning=replace(zero, rewards=RewardConfig(accuracy=1.0, format=0.1, language=0.1)),
        tuning=tuned,
        r1=replace(zero, rewards=RewardConfig(accuracy=1.0, format=0.1, language=0.1, preference=0.1)),
    )
