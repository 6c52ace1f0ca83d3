"""What this machine can do at best: matrix products in bf16 and fp32, and reading memory. `python -m bench.machine`

The peak is the best single product over shapes, not an average: it is the denominator of MFU and should flatter nobody.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from bench.record import emit
from bench.shape import THREADS
from bench.table import show
from shoal.runtime import read_bytes_per_s

SHAPES = [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 4096, 4096), (4096, 2048, 512), (4096, 8192, 512)]  # M, N, K


def best_seconds(call: Callable[[], object], budget: float) -> float:
    """The fastest of as many calls as fit into `budget` seconds, at least two; the first warms up."""
    call()
    best, spent = float("inf"), 0.0
    while spent < budget:
        began = time.perf_counter()
        call()
        best, spent = min(best, time.perf_counter() - began), spent + time.perf_counter() - began
    return best


def best_gemm(dtype: torch.dtype, budget: float = 0.3) -> tuple[float, tuple[int, int, int]]:
    """(FLOP/s, shape) of the fastest x @ w.T, as a Linear computes it."""
    rates = {}
    for M, N, K in SHAPES:
        x, w = torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype)
        rates[M, N, K] = 2 * M * N * K / best_seconds(partial(F.linear, x, w), budget)
    shape = max(rates, key=rates.__getitem__)
    return rates[shape], shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    budget = 0.1 if parser.parse_args().quick else 1.0
    torch.set_num_threads(THREADS)
    bf16, bf16_shape = best_gemm(torch.bfloat16, budget)
    fp32, fp32_shape = best_gemm(torch.float32, budget)
    read = read_bytes_per_s(seconds=budget)
    show(
        ["best of", "shape", "measured"],
        [
            ["bf16 product, GFLOP/s", bf16_shape, bf16 / 1e9],
            ["fp32 product, GFLOP/s", fp32_shape, fp32 / 1e9],
            ["reading, GB/s", "256 MiB", read / 1e9],
        ],
    )
    emit(
        "machine",
        rows=["bf16_gflops", "fp32_gflops", "read_gb_per_s"],
        ratio=[None] * 3,
        ours=[bf16 / 1e9, fp32 / 1e9, read / 1e9],
        peer=[None] * 3,
        spread=[None] * 3,
        limit=[None] * 3,
        threads=THREADS,
    )


if __name__ == "__main__":
    main()
