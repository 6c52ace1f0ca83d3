"""Tiles of E4M3 and their products on a GPU equal quant.py's and quant_tiles.py's: codes and scales bit for bit."""

import pytest
import torch
from torch import Tensor

from tests.ops.interpreted import DEVICE, bf16, hardware_numbers  # isort: skip  (before any kernel)

from shoal.ops import quant_tiles, reference, triton_gemm, triton_quant
from shoal.ops.quant import Quantised
from shoal.ops.quant_tiles import UE8M0, Scales

pytestmark = [pytest.mark.usefixtures(hardware_numbers.__name__)]
WAYS = pytest.mark.parametrize("engine, scales", [(True, "fp32"), (False, "ue8m0")])
BOTH = pytest.mark.parametrize("scales", ["fp32", "ue8m0"])


def same(made: Quantised, expected: Quantised) -> None:
    """Bit for bit."""
    assert made.block == expected.block and made.codes.shape == expected.codes.shape
    assert made.scales.dtype is expected.scales.dtype
    assert torch.equal(made.scales.float(), expected.scales.float())
    assert torch.equal(made.codes.view(torch.uint8), expected.codes.view(torch.uint8))


@BOTH
@pytest.mark.parametrize("T, K", [(1, 16), (37, 208), (33, 256)])
def test_activations_in_tiles(T: int, K: int, scales: Scales):
    x = bf16(T, K)
    x[0] = 0  # a tile of zeros
    same(triton_quant.rows(x, scales), quant_tiles.row_tiles(x, scales))
    wide = bf16(T, 2 * K + 16)[:, 16 : 16 + K]
    same(triton_quant.rows(wide, scales), quant_tiles.row_tiles(wide, scales))


@BOTH
def test_a_tile_with_a_nan_or_an_infinity_has_nothing_else(scales: Scales):
    x = bf16(3, 256)
    x[0, 5], x[1, 200] = torch.nan, -torch.inf
    restored = triton_quant.rows(x, scales).dequantise()
    expected = quant_tiles.row_tiles(x, scales).dequantise()
    torch.testing.assert_close(restored, expected, rtol=0, atol=0, equal_nan=True)
    assert restored[0, :128].isnan().all() and restored[1, 128:].isnan().all() and restored[2].isfinite().all()


@BOTH
@pytest.mark.parametrize("shape", [(160, 208), (3, 130, 128)])
def test_weights_in_blocks(shape: tuple[int, ...], scales: Scales):
    weight = bf16(*shape)
    same(triton_quant.blocks(weight, scales), quant_tiles.block_tiles(weight, scales))


@BOTH
def test_norm_and_swiglu_fused_with_tiles(scales: Scales):
    """Against the reference rounded once, from fp32; a sum in another order may move a number over a boundary."""
    x, weight = bf16(19, 304), 1 + bf16(304, seed=1).float() / 8
    near(triton_quant.rms_norm(x, weight, 1e-6, scales), reference.rms_norm(x.float(), weight, 1e-6))
    gate, up = bf16(19, 608).chunk(2, -1)
    near(triton_quant.swiglu(gate, up, scales), reference.swiglu(gate.float(), up.float()))


def near(made: Quantised, exact: Tensor) -> None:
    expected = quant_tiles.row_tiles(exact, "ue8m0" if made.scales.dtype is UE8M0 else "fp32")
    torch.testing.assert_close(made.scales.float(), expected.scales.float(), rtol=1e-6, atol=0)
    moved = made.codes.view(torch.uint8) != expected.codes.view(torch.uint8)
    assert moved.float().mean() < 1e-3
    torch.testing.assert_close(made.dequantise()[moved], expected.dequantise()[moved], rtol=0.15, atol=0)


@BOTH
@pytest.mark.parametrize("counts", [[70], [0, 130, 1, 0, 128, 40]])
def test_columns_of_each_expert_in_tiles_of_its_own(counts: list[int], scales: Scales):
    x = bf16(sum(counts), 144)
    made = triton_quant.columns(x, torch.tensor(counts, device=DEVICE), scales)
    expected = quant_tiles.column_tiles(x, counts, scales)
    slots = [slice(start, start + n) for n, start in zip(counts, starts(counts))]
    restored = made.dequantise().mT
    assert torch.equal(torch.cat([restored[rows] for rows in slots]), expected)


def starts(counts: list[int]) -> list[int]:
    """The first slot of each expert."""
    lengths = [-(-n // 128) * 128 for n in counts]
    return [sum(lengths[:e]) for e in range(len(counts))]


@WAYS
def test_products_under_block_scales(engine: bool, scales: Scales, monkeypatch):
    choose(engine, monkeypatch)
    for M, N, K in [(37, 160, 208), (1, 48, 128)]:
        x, weight = triton_quant.rows(bf16(M, K), scales), triton_quant.blocks(bf16(N, K, seed=1), scales)
        y = triton_gemm.linear(x, weight, dtype=torch.float32)
        close(y, x.dequantise() @ weight.dequantise().mT, x, weight)
        dy = triton_quant.rows(bf16(M, N, seed=2), scales)
        dx = triton_gemm.linear(dy, triton_gemm.turned(weight), dtype=torch.float32)
        close(dx, dy.dequantise() @ weight.dequantise(), dy, triton_gemm.turned(weight))


@WAYS
def test_products_of_each_expert(engine: bool, scales: Scales, monkeypatch):
    choose(engine, monkeypatch)
    counts, (N, K) = [70, 0, 65], (80, 144)
    M, E, counts_E = sum(counts), len(counts), torch.tensor(counts, device=DEVICE)
    x_MK, dy_MN, weight_ENK = bf16(M, K), bf16(M, N, seed=1), triton_quant.blocks(bf16(E, N, K, seed=2), scales)
    x = triton_quant.rows(x_MK, scales)
    y = triton_gemm.linear(x, weight_ENK, counts_E, torch.float32)
    parts = zip(x.dequantise().split(counts), weight_ENK.dequantise())
    close(y, torch.cat([part @ w.mT for part, w in parts]), x, weight_ENK)

    dw = triton_gemm.gradient(
        triton_quant.columns(dy_MN, counts_E, scales), triton_quant.columns(x_MK, counts_E, scales), counts_E
    )
    sides = (quant_tiles.column_tiles(side, counts, scales).split(counts) for side in (dy_MN, x_MK))
    expected = torch.stack([dy.mT @ x for dy, x in zip(*sides)])
    torch.testing.assert_close(dw, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert not dw[1].any()


def choose(engine: bool, monkeypatch) -> None:
    """Tiles through descriptors or by plain loads."""
    if engine and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no copy engine for tiles")
    monkeypatch.setattr(triton_gemm, "has_copy_engine", lambda _: engine)


def close(y: Tensor, expected: Tensor, x: Quantised, weight: Quantised) -> None:
    """fp32 sums of K products in two orders: each off by at most K · 2⁻²⁴ of the sum of magnitudes."""
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
