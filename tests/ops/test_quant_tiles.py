"""Tiles of 8-bit training: what a number may become, at the edges too; the C kernels say the same bit for bit."""

import pytest
import torch
from torch import Tensor

from shoal.ops import cpu, fp8_tiles, quant_tiles
from shoal.ops.quant import FP8, FP8_MOST
from shoal.ops.quant_tiles import E5M6_MOST

native = pytest.mark.skipif(not cpu.status().startswith("native"), reason="no native kernels on this machine")
SHAPES = [(5, 128), (130, 208), (3, 16), (129, 384)]


def spread_out(*shape: int, seed: int = 0) -> Tensor:
    """bf16 numbers over 24 powers of two, a row of zeros among them: subnormal codes and zero tiles are met."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x *= torch.exp2(torch.randint(-12, 12, shape, generator=generator).float())
    x[0] = 0
    return x.bfloat16()


def raw(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def e4m3_numbers() -> Tensor:
    every = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    return every[every.isfinite()]


def e5m6_numbers() -> Tensor:
    exponent, size = torch.meshgrid(torch.arange(31), torch.arange(64), indexing="ij")
    value = torch.ldexp((size + 64 * (exponent > 0)).float(), exponent.clamp(min=1) - 21).flatten()
    return torch.cat([value, -value])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_power_of_two_is_the_smallest_that_lets_the_largest_number_in(shape):
    kept = quant_tiles.row_tiles(spread_out(*shape), "ue8m0")
    amax = quant_tiles.block_amax(spread_out(*shape).float(), quant_tiles.ROW_TILE)
    scale = kept.scales.float()
    assert (torch.frexp(scale).mantissa == 0.5).all()
    assert (amax / scale <= FP8_MOST).all() and (amax.clamp(min=1e-4) / scale > FP8_MOST / 2).all()


@pytest.mark.parametrize("scales", ["ue8m0", "fp32"])
def test_a_number_goes_to_the_nearest_that_8_bits_can_hold(scales):
    x = spread_out(6, 128, seed=1).float()
    kept = quant_tiles.row_tiles(x, scales)
    grid = kept.scales.float() * e4m3_numbers()  # [6, 254]
    nearest = (x[:, :, None] - grid[:, None]).abs().amin(-1)
    torch.testing.assert_close((kept.dequantise() - x).abs(), nearest, rtol=1e-6, atol=0)


def test_ties_go_to_the_even_code():
    x = torch.zeros(1, 128)  # its scale is 1; 16, 18 and 20 have codes, and so have 1, 2 and 3 times 2⁻⁹
    x[0, :7] = torch.tensor([448.0, 17, 19, -17, 0.5 * 2**-9, 1.5 * 2**-9, 2.5 * 2**-9])
    expected = [448, 16, 20, -16, 0, 2 * 2**-9, 2 * 2**-9]
    assert quant_tiles.row_tiles(x, "ue8m0").dequantise()[0, :7].tolist() == expected


def test_12_bits_hold_the_nearest_of_five_exponent_and_six_mantissa_bits():
    x = spread_out(4, 128, seed=2).float()
    kept = quant_tiles.e5m6(x)
    assert kept.codes.shape == (4, 192) and kept.codes.dtype is torch.uint8
    grid = kept.scales.float() * e5m6_numbers()
    nearest = (x[:, :, None] - grid[:, None]).abs().amin(-1)
    assert torch.equal((kept.dequantise(torch.float32) - x).abs(), nearest)
    edge = torch.tensor([[E5M6_MOST, 1 + 1 / 128, 1 + 3 / 128, 2.0**-20, 0.5 * 2**-20, -0.0]])
    assert quant_tiles.e5m6(edge).dequantise(torch.float32).tolist() == [[E5M6_MOST, 1, 1 + 2 / 64, 2.0**-20, 0, 0]]


def test_12_bits_lie_two_in_three_bytes_low_half_first():
    kept = quant_tiles.e5m6(torch.tensor([[E5M6_MOST, -1.0]]))
    assert kept.codes.tolist() == [[0xBF, 0x07 | 0x00, 0xBC]]  # 0x7BF, then 0xBC0


@pytest.mark.parametrize("scales", ["ue8m0", "fp32"])
def test_of_a_tile_with_a_nan_or_an_infinity_nothing_is_left(scales):
    x = spread_out(4, 256, seed=3)
    x[1, 3], x[2, 200] = float("nan"), float("-inf")
    expected = torch.zeros(4, 256, dtype=torch.bool)
    expected[1, :128], expected[2, 128:] = True, True
    assert torch.equal(quant_tiles.row_tiles(x, scales).dequantise().isnan(), expected)
    assert torch.equal(quant_tiles.e5m6(x).dequantise().isnan(), expected)
    columns = quant_tiles.column_tiles(x, [2, 2], scales).isnan()
    assert columns.nonzero().tolist() == [[0, 3], [1, 3], [2, 200], [3, 200]]
    assert quant_tiles.block_tiles(x, scales).dequantise().isnan().all()


def test_zero_tiles_stay_zero_and_ragged_ones_are_as_if_alone():
    x = spread_out(4, 200, seed=4)
    whole = quant_tiles.row_tiles(x, "ue8m0")
    assert (whole.dequantise()[0] == 0).all() and whole.scales.shape == (4, 2)
    assert torch.equal(whole.dequantise()[:, 128:], quant_tiles.row_tiles(x[:, 128:], "ue8m0").dequantise())
    rows = spread_out(300, 32, seed=5)
    parts = [quant_tiles.column_tiles(part, [len(part)], "ue8m0") for part in rows.split([130, 40, 130])]
    assert torch.equal(quant_tiles.column_tiles(rows, [130, 0, 40, 130], "ue8m0"), torch.cat(parts))


def test_tiling_anew_moves_no_number_that_the_new_tile_can_hold():
    """1 × 128 → 128 × 1: four significant bits stay, under another power of two; below 2⁻⁶ of its scale bits go."""
    kept = quant_tiles.row_tiles(spread_out(256, 128, seed=6), "ue8m0").dequantise()
    again = quant_tiles.column_tiles(kept, [256], "ue8m0")
    amax = kept.unflatten(0, (2, 128)).abs().amax(1).repeat_interleave(128, 0)
    normal = kept.abs() >= amax * 2.0**-13
    assert torch.equal(again[normal], kept[normal]) and normal.float().mean() > 0.5
    assert not torch.equal(quant_tiles.column_tiles(kept, [256], "fp32")[normal], kept[normal])


def test_products_in_bf16_are_those_of_8_bits():
    """Power-of-two scales: operands are exact in bf16, so only the sum in fp32 rounds."""
    x, w = spread_out(32, 256, seed=7), spread_out(48, 256, seed=8)
    a, b = (fp8_tiles.plain(made) for made in (fp8_tiles.passing_rows(x, "ue8m0"), fp8_tiles.blocks(w, "ue8m0")))
    assert torch.equal(a.float(), quant_tiles.row_tiles(x, "ue8m0").dequantise())
    exact = quant_tiles.row_tiles(x, "ue8m0").dequantise(torch.float64) @ b.double().T
    size = a.double().abs() @ b.double().abs().T
    assert ((a.float() @ b.float().T - exact).abs() <= 256 * 2**-24 * size).all()


@native
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("flush", [False, True])
def test_kernels_equal_the_reference_bit_for_bit(shape, flush):
    x = spread_out(*shape)
    x[-1, 0] = float("nan")
    counts = torch.tensor([shape[0] // 2, 0, shape[0] - shape[0] // 2])
    expected = quant_tiles.row_tiles(x, "ue8m0")
    packed = quant_tiles.e5m6(x)
    torch.set_flush_denormal(flush)
    try:
        operand, kept = fp8_tiles.rows(x, "ue8m0")
        twelve = fp8_tiles.e5m6(x)
        finite = expected.codes.float().isfinite()
        assert torch.equal(raw(kept.codes)[finite], raw(expected.codes)[finite])
        assert torch.equal(raw(kept.scales), raw(expected.scales)) and torch.equal(twelve.codes, packed.codes)
        for made, spec in [
            (operand, expected.dequantise(torch.bfloat16)),
            (fp8_tiles.passing_rows(x, "ue8m0"), expected.dequantise(torch.bfloat16)),
            (fp8_tiles.restored(fp8_tiles.kept_rows(x, "ue8m0"), torch.bfloat16), expected.dequantise(torch.bfloat16)),
            (fp8_tiles.restored(twelve, torch.bfloat16), packed.dequantise()),
            (fp8_tiles.columns(x, counts, "ue8m0"), quant_tiles.column_tiles(x, counts.tolist(), "ue8m0").bfloat16()),
            (fp8_tiles.blocks(x[None], "ue8m0"), quant_tiles.block_tiles(x[None], "ue8m0").dequantise(torch.bfloat16)),
        ]:
            assert torch.equal(made.isnan(), spec.isnan()) and torch.equal(made.nan_to_num(), spec.nan_to_num())
    finally:
        torch.set_flush_denormal(False)
