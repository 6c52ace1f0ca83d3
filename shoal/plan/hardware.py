"""What a machine can do, in the numbers plans are made of. Torch-free: whoever measures passes the results in.

A `Machine` is one accelerator, or one computer without any. Rates of a machine at hand are measured (the best matrix
product seen, not a data sheet's); those of `GPUS` are the makers' dense peaks without sparsity, for planning only: a
training run gets 20 to 50% of them. Watts are what the whole machine draws at work. Shoal has no meter, so every
energy derived from them is an estimate, and is called one wherever it is shown.
"""

from dataclasses import dataclass

# What a rented virtual CPU costs (2 of them with 8 GB: about $0.10 an hour at the large clouds) and draws, with its
# share of memory, cooling and power supply. Assumptions, to be replaced by who knows better.
USD_PER_THREAD_HOUR = 0.05
WATTS_PER_THREAD = 8.0


@dataclass(frozen=True)
class Machine:
    """FLOP/s and bytes/s are sustained; `memory_bytes` is what a training run may use; the price is for all of it."""

    name: str
    gemm_bf16_flops: float
    gemm_fp32_flops: float
    read_bytes_per_s: float
    memory_bytes: int
    threads: int
    price_per_hour: float | None  # US dollars; None where nobody knows
    watts: float
    measured: bool = True

    def peak_flops(self, dtype: str) -> float:
        """The denominator of MFU for products of "bf16" or "fp32"."""
        return {"bf16": self.gemm_bf16_flops, "fp32": self.gemm_fp32_flops}[dtype]


def cpu(name: str, bf16: float, fp32: float, read_bytes_per_s: float, memory_bytes: int, threads: int) -> Machine:
    """A computer without an accelerator, priced and powered by the thread."""
    price, watts = threads * USD_PER_THREAD_HOUR, threads * WATTS_PER_THREAD
    return Machine(name, bf16, fp32, read_bytes_per_s, memory_bytes, threads, price, watts)


def gpu(name: str, bf16: float, fp32: float, read: float, gb: float, watts: float, price: float | None) -> Machine:
    """A data sheet's row, in TFLOP/s, GB/s and GB."""
    return Machine(name, bf16 * 1e12, fp32 * 1e12, read * 1e9, int(gb * 1e9), 1, price, watts, measured=False)


# Makers' data sheets: dense bf16 with fp32 accumulation, plain fp32, memory, board power. DeepSeek's own $2 for H800.
GPUS = {
    g.name: g
    for g in (
        gpu("RTX 3090", 71, 35.6, 936, 24, 350, None),
        gpu("RTX 4090", 165, 82.6, 1008, 24, 450, None),
        gpu("L40S", 181, 91.6, 864, 48, 350, None),
        gpu("A100", 312, 19.5, 2039, 80, 400, None),
        gpu("H800", 989, 67, 3350, 80, 700, 2.0),
        gpu("H100", 989, 67, 3350, 80, 700, None),
        gpu("H200", 989, 67, 4800, 141, 700, None),
        gpu("B200", 2250, 80, 8000, 180, 1000, None),
    )
}

# Sustained bytes/s where nobody has measured: two channels of DDR5, a PCIe 4.0 slot of 16 lanes, and disks by kind.
RAM_RATE, BUS_RATE = 50e9, 25e9
DISK_RATES = {"nvme": 3.0e9, "sata": 0.5e9, "hdd": 0.15e9}
GPU_RATE = 900e9  # of a card of which only the size is known
