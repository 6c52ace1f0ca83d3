"""From minutes to a plan: how many tokens, in which batches, of which model, fit the time and the memory given.

One real step is measured and everything else follows from it:

    seconds = reserve + steps · (accumulation · micro_seconds + update_seconds)

`reserve` is what a run does besides stepping (held-out scores, samples, checkpoints). The batch follows DeepSeek's
own law for the best batch at a compute budget of C FLOPs, B = 0.292 · C^0.3271 tokens (DeepSeek LLM, arXiv 2401.02954,
section 3), fitted at 1e17 and above; small budgets stretch it, so a run never takes fewer than `FEWEST_STEPS` steps
while a batch can still be made smaller. Other models' times are foretold by scaling the measured step with their FLOPs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from shoal.errors import ResourceError
from shoal.model.config import ModelConfig
from shoal.model.counts import count_parameters
from shoal.plan import cost, flops, memory
from shoal.plan.hardware import Machine

FEWEST_STEPS = 1000


@dataclass(frozen=True)
class Measured:
    """One real step of a model here: forward and backward of one micro batch, and the optimizer's update."""

    model: ModelConfig
    context: int
    micro_tokens: int
    micro_seconds: float
    update_seconds: float

    def scaled_to(self, model: ModelConfig) -> "Measured":
        """The same step for another model: products grow with its FLOPs, the update with its parameters."""
        work = flops.training(model, self.context).total / flops.training(self.model, self.context).total
        size = memory.numbers(model).total / memory.numbers(self.model).total
        return Measured(model, self.context, self.micro_tokens, self.micro_seconds * work, self.update_seconds * size)


@dataclass(frozen=True)
class Plan:
    """What will be done, and why, in sentences a user can check."""

    steps: int
    accumulation: int  # micro batches a step
    batch_tokens: int
    account: cost.Account
    memory: memory.Bytes
    why: tuple[str, ...]


def plan(
    measured: Measured,
    machine: Machine,
    minutes: float,
    step: memory.Step,
    reserve_seconds: float = 0.0,
    batch_tokens: int | None = None,
) -> Plan:
    """Fill `minutes` with training. Raises ResourceError where memory does not hold a step, or time not even one."""
    need = memory.check(measured.model, step, machine.memory_bytes)
    seconds = minutes * 60 - reserve_seconds
    accumulation = accumulate(measured, seconds) if batch_tokens is None else batch_tokens // measured.micro_tokens
    assert accumulation >= 1, (batch_tokens, measured.micro_tokens)
    step_seconds = accumulation * measured.micro_seconds + measured.update_seconds
    steps = int(seconds / step_seconds)
    if steps < 1:
        raise ResourceError(
            f"{minutes:g} minutes leave {max(seconds, 0):.0f} s for training after {reserve_seconds:.0f} s of "
            f"evaluation and saving, and one step takes {step_seconds:.1f} s",
            "time for at least one step",
            f"give at least {(reserve_seconds + step_seconds) / 60:.1f} minutes, or take a smaller model",
        )
    batch = accumulation * measured.micro_tokens
    account = cost.account(
        measured.model,
        measured.context,
        tokens=steps * batch,
        seconds=steps * step_seconds,
        machine=machine,
        dtype=step.dtype,
        steps=steps,
        peak_memory_bytes=int(need.total * memory.OVERHEAD),
    )
    return Plan(steps, accumulation, batch, account, need, reasons(measured, minutes, step_seconds, reserve_seconds))


def reasons(measured: Measured, minutes: float, step_seconds: float, reserve_seconds: float) -> tuple[str, ...]:
    micro, update = measured.micro_seconds, measured.update_seconds
    rate = f"{measured.micro_tokens:,} tokens took {micro:.2f} s here, {measured.micro_tokens / micro:,.0f} tokens/s"
    steps = int((minutes * 60 - reserve_seconds) / step_seconds)
    rest = f"{minutes:g} minutes less {reserve_seconds:.0f} s for evaluation, samples and checkpoints"
    return f"{rate}; the update takes {update:.2f} s more", f"{rest} hold {steps:,} steps of {step_seconds:.2f} s"


def accumulate(measured: Measured, seconds: float) -> int:
    """Micro batches a step: DeepSeek's batch for this budget, halved until the run has `FEWEST_STEPS` steps."""
    tokens = seconds * measured.micro_tokens / measured.micro_seconds
    budget = tokens * flops.training(measured.model, measured.context).total
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
    tokens_per_parameter: float,
) -> str:
    """The name of the largest model that fits in memory and still reads enough tokens for its active parameters.

    Raises ResourceError where not even the smallest fits; time alone never refuses, the smallest is the answer then.
    """
    by_work = sorted(models, key=lambda name: flops.training(models[name], measured.context).total)
    memory.check(models[by_work[0]], step, machine.memory_bytes)
    for name in reversed(by_work):
        model = models[name]
        rate = measured.micro_tokens / measured.scaled_to(model).micro_seconds
        fits = memory.of_training(model, step).total * memory.OVERHEAD <= machine.memory_bytes
        if fits and minutes * 60 * rate >= tokens_per_parameter * count_parameters(model).active:
            return name
    return by_work[0]
