"""The machine itself as a side: one `step` sweeps matrix products and answers the best rate, in bfloat16 or float32."""

import torch

from bench.machine import best_gemm


def missing() -> None:
    return None


def build(dtype: str) -> "Sweep":
    return Sweep(getattr(torch, dtype or "bfloat16"))


class Sweep:
    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def step(self, number: int) -> dict[str, float]:
        return {"flops": best_gemm(self.dtype)[0]}

    def parts(self) -> dict[str, int]:
        return {}
