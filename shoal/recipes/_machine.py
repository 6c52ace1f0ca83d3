"""The machine at hand as plans want it, measured now: `shoal doctor` shows it, runs are planned by it."""

from typing import NamedTuple

import psutil
import torch

from shoal import runtime
from shoal.plan import hardware
from shoal.runtime import Runtime

UNLISTED_WATTS = 350.0  # of a GPU whose data sheet is not in hardware.GPUS: an assumption


class Here(NamedTuple):
    """How this process was set up, and what the machine under it can do."""

    setup: Runtime
    machine: hardware.Machine


def look(threads: int | None = None, seed: int = 0, seconds: float = 1.6) -> Here:
    """Set this process up, then measure for about `seconds`."""
    setup = runtime.setup(threads, seed)
    return Here(setup, measured(setup, seconds))


def measured(setup: Runtime, seconds: float = 1.6) -> hardware.Machine:
    """The best rates seen; price and watts are a data sheet's, or assumptions (see `hardware`)."""
    bf16, fp32 = (runtime.gemm_flops(dtype, setup.device, 0.375 * seconds) for dtype in ("bfloat16", "float32"))
    read = runtime.read_bytes_per_s(setup.device, 0.25 * seconds)
    if setup.device == "cpu":
        free = psutil.virtual_memory().available
        return hardware.cpu(runtime.cpu_model(), bf16, fp32, read, free, setup.threads)
    free, name = torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    listed = next((gpu for key, gpu in hardware.GPUS.items() if key in name), None)
    price, watts = (listed.price_per_hour, listed.watts) if listed else (None, UNLISTED_WATTS)
    return hardware.Machine(name, bf16, fp32, read, free, setup.threads, price, watts)
