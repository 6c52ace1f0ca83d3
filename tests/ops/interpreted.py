"""Where tests of Triton's kernels run: on a GPU where there is one, elsewhere on the CPU, in Triton's interpreter.

The interpreter runs the same source with numpy. It finds wrong arithmetic, masks and strides, not what a compiler or a
chip does. Where its numbers are not the hardware's, `hardware_numbers` puts them right. Import this first.
"""

import os

import pytest
import torch
from torch import Tensor

from shoal.ops.quant import FP8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

# 3.6's interpreter takes no numpy of 2.4 or later; its compiler is fine.
pytest.importorskip("triton", "3.7" if DEVICE == "cpu" else None, "no Triton here: pip install -e '.[gpu]'")
tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")


@pytest.fixture
def hardware_numbers(monkeypatch):
    """To bf16 and E4M3 by rounding to nearest, ties to even; products of bf16 numbers, not of their bits."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    narrow = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (FP8, torch.uint8)}

    def rounded(data, source, target, how):
        if source != tl.float32 or target not in narrow:
            return convert(data, source, target, how)
        dtype, bits = narrow[target]
        return torch.from_numpy(data.view("float32")).to(dtype).view(bits).numpy()

    def product(self, a, b, *more):
        wide = lambda x: self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x  # noqa: E731
        return dot(self, wide(a), wide(b), *more)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", product)


def bf16(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of very different sizes, as activations have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).mul(2).exp()
    return x.bfloat16().to(DEVICE)


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
