"""Products with weights in few bits: the numbers of quant.linear, from the bytes that files have."""

from functools import partial

import pytest
import torch
from torch import Tensor

from shoal.ops import cpu, dispatch, program, quant
from shoal.ops.cpu import PANELS
from shoal.ops.quant import Quantised

pytestmark = pytest.mark.skipif("native" not in cpu.status(), reason=cpu.status())

BF16, HALF = torch.bfloat16, torch.float16
ROUNDED = 2**-8  # of a result in bf16, and what 16-bit inputs add
COARSE = {"fp8": 2**-7, "int8": 2**-4.5, "int4": 2**-4.5}  # of rows in a chunk, whose inputs have 8 bits


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def zeros_anywhere(q: Quantised) -> Quantised:
    """The same codes from a least number on."""
    least = (-7.3 * q.scales.float()).to(q.scales.dtype)
    return Quantised("int4", q.codes, q.scales, q.block, least)


def agrees(x: Tensor, q: Quantised, tolerance: float) -> None:
    y, exact = dispatch.quantised_linear(x, q), x.double() @ q.dequantise().double().T
    size = exact.norm(dim=-1, keepdim=True) * q.shape[0] ** -0.5
    assert y.dtype is x.dtype and ((y.double() - exact).abs() <= tolerance * (size + exact.abs())).all()


CASES = {
    "fp8": [("fp8", 128, BF16, 256, 512), ("fp8", 128, BF16, 144, 208), ("fp8", 128, BF16, 16, 16)],
    "int8": [("int8", g, d, 48, 384) for g, d in ((32, BF16), (64, HALF), (128, BF16), (384, HALF))],
    "int8, ragged": [("int8", 48, BF16, 16, 48), ("int8", 2064, BF16, 16, 2064), ("int8", 32, HALF, 32, 96)],
    "int4": [("int4", g, d, 48, 384) for g, d in ((32, HALF), (64, BF16), (128, HALF), (384, BF16))],
    "int4, ragged": [("int4", 176, BF16, 16, 176), ("int4", 32, BF16, 32, 96), ("int4", 64, HALF, 16, 1216)],
}


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_numbers_that_codes_stand_for(name: str):
    for form, group, dtype, N, K in CASES[name]:
        q = quant.quantise(drawn(1, N, K), form, group, dtype)  # type: ignore[arg-type]
        for matrix in [q, zeros_anywhere(q)] if form == "int4" else [q]:
            assert program.takes(matrix)
            for M in (1, 2, 3, 9, PANELS):
                agrees(drawn(M, M, K).to(BF16), matrix, ROUNDED if M < PANELS else COARSE[form])


def test_shapes_drawn_at_random_agree():
    draw = partial(torch.randint, generator=torch.Generator().manual_seed(3))
    for seed in range(60):
        form = ("fp8", "int8", "int4")[seed % 3]
        group = (32, 64, 128)[int(draw(3, ()))]
        N, K, M = 16 * int(draw(1, 12, ())), group * int(draw(1, 9, ())), int(draw(1, 40, ()))
        K = K + 16 * int(draw(9, ())) if form == "fp8" else K
        q = quant.quantise(drawn(seed, N, K), form, group, (BF16, HALF)[int(draw(2, ()))])
        x = drawn(seed, M, K + 32)[:, :K].to(BF16) * 2.0 ** int(draw(-20, 20, ()))
        agrees(x, q, ROUNDED if M < PANELS else COARSE[form])


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
def test_a_row_doesnt_change_with_the_rows_beside_it(form):
    q, x = quant.quantise(drawn(1, 80, 256), form, 64), drawn(2, 9, 256).to(BF16)
    alone = torch.cat([dispatch.quantised_linear(row, q) for row in x.split(1)])
    for M in range(1, 10):
        assert torch.equal(dispatch.quantised_linear(x[:M], q), alone[:M])


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
def test_one_large_input_costs_the_others_no_more_than_bf16_costs_it(form):
    q, x = quant.quantise(drawn(1, 64, 1024), form, 128), drawn(2, 3, 1024)
    x[:, 17] = 1000.0
    agrees(x.to(BF16), q, ROUNDED)


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_isnt_finite_stays_so(form, value: float):
    q, x = quant.quantise(drawn(1, 64, 128), form, 64), drawn(2, PANELS, 128).to(BF16)
    x[1, 5] = value
    for M in (3, PANELS):
        finite = dispatch.quantised_linear(x[:M], q).isfinite().all(-1)
        assert not finite[1] and finite.sum() == M - 1


@pytest.mark.parametrize("M", [1, PANELS])
def test_every_code_of_fp8_is_read(M: int):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(16, 16)
    q = Quantised("fp8", codes, torch.ones(1, 1), quant.FP8_BLOCK)
    there = codes.float().isfinite().all(1)
    for i, x in enumerate(torch.eye(16).to(BF16)):
        y = dispatch.quantised_linear(x.expand(M, 16).contiguous(), q)[0]
        assert torch.equal(y[there].float(), codes.float()[there, i]) and y[~there].isnan().all()


def test_zeros_are_zeros():
    q = quant.quantise(drawn(1, 16, 64), "int8", 64)
    assert (dispatch.quantised_linear(torch.zeros(2, 64, dtype=BF16), q) == 0).all()
    assert dispatch.quantised_linear(torch.zeros(0, 64, dtype=BF16), q).shape == (0, 16)


def test_what_kernels_dont_take_is_computed_by_the_reference():
    x = drawn(0, 2, 48).to(BF16)
    odd = quant.quantise(drawn(1, 16, 48), "int8", 16)
    narrow = quant.quantise(drawn(1, 8, 48), "int8", 48)
    wide_scales = quant.quantise(drawn(1, 16, 48), "int8", 48, torch.float32)
    for q in (odd, narrow, wide_scales):
        assert not program.takes(q) and torch.equal(dispatch.quantised_linear(x, q), quant.linear(x, q))
    whole = quant.quantise(drawn(1, 16, 48), "int8", 48)
    assert torch.equal(dispatch.quantised_linear(x.float(), whole), quant.linear(x.float(), whole))
    learning = x.clone().requires_grad_()
    dispatch.quantised_linear(learning, whole).sum().backward()
    assert learning.grad is not None
