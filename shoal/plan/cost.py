"""What training costs: tokens into FLOPs, hours, energy and dollars, and the receipt that holds a plan to its word.

    MFU = FLOPs the model needs / (seconds × the machine's best rate of one plain product)

The plan before and the account after a run are the same record, `Account`, so a receipt is two of them side by side.
Energy is watts × hours of `hardware.Machine`, an estimate: nothing here reads a meter.
"""

from dataclasses import dataclass

from shoal.model.config import ModelConfig
from shoal.plan import flops
from shoal.plan.hardware import Machine


@dataclass(frozen=True)
class Account:
    """One stretch of training, planned or done. Written as plan.json and receipt.json; None is "not known"."""

    tokens: int
    seconds: float
    flops: float
    tokens_per_second: float
    mfu: float
    energy_kwh_estimate: float
    usd: float | None
    steps: int | None = None
    peak_memory_bytes: int | None = None
    bits_per_byte: float | None = None


def account(
    config: ModelConfig,
    context: float,
    tokens: int,
    seconds: float,
    machine: Machine,
    dtype: str = "bf16",
    n_machines: int = 1,
    mtp_share: float = 1.0,
    **more,
) -> Account:
    """`seconds` of wall-clock on `n_machines` at work together, for `tokens` in documents of `context`."""
    work = tokens * flops.training(config, context, mtp_share).total
    machine_hours = n_machines * seconds / 3600
    return Account(
        tokens=tokens,
        seconds=seconds,
        flops=work,
        tokens_per_second=tokens / seconds,
        mfu=work / (machine.peak_flops(dtype) * n_machines * seconds),
        energy_kwh_estimate=machine.watts * machine_hours / 1000,
        usd=None if machine.price_per_hour is None else machine.price_per_hour * machine_hours,
        **more,
    )
