"""From minutes to a plan: how many tokens, in which batches, of which model, fit the time and the memory given.

One real step is measured and everything else follows from it:

    seconds = start + scores + steps · (accumulation · micro_seconds + update_seconds)

`start` is what fitting the weights to begin with takes, `scores` what scoring held-out text on the way does; what comes
after the last step is not part of the minutes. The batch follows DeepSeek's own law for the best batch at a compute
budget of C FLOPs, B = 0.292 · C^0.3271 tokens (DeepSeek LLM, arXiv 2401.02954, section 3), fitted at 1e17 and above;
small budgets stretch it, so a run never takes fewer than `FEWEST_STEPS` steps while a batch can still be made smaller.
Other models' times are foretold by scaling the measured step with their FLOPs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shoal.errors import ResourceError
from shoal.model.config import ModelConfig
from shoal.model.counts import count_parameters
from shoal.plan import cost, flops, memory
from shoal.plan.hardware import Machine

FEWEST_STEPS = 1000  # that a batch may leave
LEAST_STEPS = 5  # below that nothing is learned, and a run is refused


@dataclass(frozen=True)
class Measured:
    """One real step of a model here: forward and backward of one micro batch, and the optimizer's update.

    Where windows grow, or multi-token modules rest for a part of the run, `micro_seconds` and `context` are means over
    the run, and `mtp_share` is the rest of it. `start_seconds` are spent once, before the first step.
    """

    model: ModelConfig
    context: float
    micro_tokens: int
    micro_seconds: float
    update_seconds: float
    mtp_share: float = 1.0
    start_seconds: float = 0.0

    def step_seconds(self, accumulation: int) -> float:
        return accumulation * self.micro_seconds + self.update_seconds

    def scaled_to(self, model: ModelConfig) -> "Measured":
        """The same step for another model: products grow with its FLOPs, the update with its parameters."""
        work = self.flops_of(model) / self.flops_of(self.model)
        size = memory.numbers(model).total / memory.numbers(self.model).total
        micro, update = self.micro_seconds * work, self.update_seconds * size
        return replace(self, model=model, micro_seconds=micro, update_seconds=update)

    def flops_of(self, model: ModelConfig) -> float:
        return flops.training(model, self.context, self.mtp_share).total


@dataclass(frozen=True)
class Plan:
    """What will be done, and why, in sentences a user can check."""

    account: cost.Account
    why: tuple[str, ...]


def plan(
    measured: Measured, machine: Machine, minutes: float, step: memory.Step, scores: float, accumulation: int
) -> Plan:
    """Fill `minutes` with training and `scores` seconds of scores. Raises ResourceError where memory does not hold a
    step, or time not `LEAST_STEPS` of them.
    """
    need = memory.check(measured.model, step, machine.memory_bytes)
    seconds, each = minutes * 60 - scores - measured.start_seconds, measured.step_seconds(accumulation)
    steps = int(seconds / each)
    if steps < LEAST_STEPS:
        raise ResourceError(
            f"{minutes:g} minutes leave {max(seconds, 0):.0f} s for steps after {measured.start_seconds:.0f} s for the "
            f"start and {scores:.0f} s of scores on the way, and one step takes {each:.1f} s",
            f"time for at least {LEAST_STEPS} steps",
            f"give at least {(60 * minutes - seconds + LEAST_STEPS * each) / 60 + 0.01:.2f} minutes, or take a smaller "
            "model or batch",
        )
    account = cost.account(
        measured.model,
        measured.context,
        tokens=steps * accumulation * measured.micro_tokens,
        seconds=60 * minutes - seconds + steps * each,
        machine=machine,
        dtype=step.dtype,
        mtp_share=measured.mtp_share,
        steps=steps,
        peak_memory_bytes=int(need.total * memory.OVERHEAD),
    )
    micro, update = measured.micro_seconds, measured.update_seconds
    rate = f"{measured.micro_tokens:,} tokens took {micro:.2f} s here, {measured.micro_tokens / micro:,.0f} tokens/s"
    aside = f"{scores:.0f} s for scores on the way and {measured.start_seconds:.0f} s for the start"
    rest = f"{minutes:g} minutes less {aside} hold {steps:,} steps of {each:.2f} s"
    return Plan(account, (f"{rate}; the update takes {update:.2f} s more", rest))


def accumulate(measured: Measured, seconds: float) -> int:
    """Micro batches a step: DeepSeek's batch for this budget, halved until the run has `FEWEST_STEPS` steps."""
    tokens = seconds * measured.micro_tokens / measured.micro_seconds
    budget = tokens * measured.flops_of(measured.model)
    best = min(0.292 * budget**0.3271, tokens / FEWEST_STEPS)
    power = 1
    while 2 * power * measured.micro_tokens <= best:
        power *= 2
    return power


def largest(
    models: Mapping[str, ModelConfig],
    measured: Measured,
    machine: Machine,
    minutes: float,
    step: memory.Step,
    wanted: float,
) -> str:
    """The name of the largest model that fits in memory and still reads `wanted` tokens for each active parameter.

    Raises ResourceError where not even the smallest fits; time alone never refuses, the smallest is the answer then.
    """
    by_work = sorted(models, key=lambda name: flops.training(models[name], measured.context).total)
    memory.check(models[by_work[0]], step, machine.memory_bytes)
    for name in reversed(by_work):
        fits = memory.of_training(models[name], step).total * memory.OVERHEAD <= machine.memory_bytes
        if fits and tokens_per_active(models[name], measured, minutes) >= wanted:
            return name
    return by_work[0]


def tokens_per_active(model: ModelConfig, measured: Measured, minutes: float) -> float:
    """Tokens that a model would read in these minutes, for each of its active parameters."""
    rate = measured.micro_tokens / measured.scaled_to(model).step_seconds(1)
    return minutes * 60 * rate / count_parameters(model).active
