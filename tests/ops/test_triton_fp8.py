"""Tiles of E4M3 and their products on a GPU equal quant.py's and quant_tiles.py's: codes and scales bit for bit."""

import pytest
import torch
from torch import Tensor

from tests.ops.interpreted import DEVICE, bf16, hardware_numbers, relative_error  # isort: skip  (before any kernel)

from shoal.ops import quant_tiles, reference, triton_gemm, triton_quant
from shoal.ops.quant import Quantised
from shoal.ops.quant_tiles import Scales

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
    """As if they were not fused; fp32 in another order may move one number in thousands by one bf16 step."""
    x, weight = bf16(19, 304), 1 + bf16(304, seed=1).float() / 8
    y, made = triton_quant.rms_norm(x, weight, 1e-6, scales)
    nearly(made, reference.rms_norm(x, weight, 1e-6), scales)
    same(made, quant_tiles.row_tiles(y, scales))
    gate, up = bf16(19, 608).clamp(-30, 30).chunk(2, -1)
    nearly(triton_quant.swiglu(gate, up, scales), reference.swiglu(gate, up), scales)


def nearly(made: Quantised, exact: Tensor, scales: Scales) -> None:
    expected = quant_tiles.row_tiles(exact, scales)
    moved = made.dequantise() != expected.dequantise()
    assert made.codes.shape == expected.codes.shape and moved.float().mean() < 0.01
    torch.testing.assert_close(made.dequantise(), expected.dequantise(), rtol=1 / 7, atol=0)


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
        close(y, x.dequantise() @ weight.dequantise().mT)
        dy = triton_quant.rows(bf16(M, N, seed=2), scales)
        dx = triton_gemm.linear(dy, triton_gemm.turned(weight), dtype=torch.float32)
        close(dx, dy.dequantise() @ weight.dequantise())


@WAYS
def test_products_of_each_expert(engine: bool, scales: Scales, monkeypatch):
    choose(engine, monkeypatch)
    counts, (N, K) = [70, 0, 65], (80, 144)
    M, E, counts_E = sum(counts), len(counts), torch.tensor(counts, device=DEVICE)
    x_MK, dy_MN, weight_ENK = bf16(M, K), bf16(M, N, seed=1), triton_quant.blocks(bf16(E, N, K, seed=2), scales)
    x = triton_quant.rows(x_MK, scales)
    y = triton_gemm.linear(x, weight_ENK, counts_E, torch.float32)
    parts = zip(x.dequantise().split(counts), weight_ENK.dequantise())
    close(y, torch.cat([part @ w.mT for part, w in parts]))

    dw = triton_gemm.gradient(
        triton_quant.columns(dy_MN, counts_E, scales), triton_quant.columns(x_MK, counts_E, scales), counts_E
    )
    sides = (quant_tiles.column_tiles(side, counts, scales).split(counts) for side in (dy_MN, x_MK))
    close(dw, torch.stack([dy.mT @ x for dy, x in zip(*sides)]))
    assert not dw[1].any()


def choose(engine: bool, monkeypatch) -> None:
    """Tiles through descriptors or by plain loads."""
    if engine and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no copy engine for tiles")
    monkeypatch.setattr(triton_gemm, "has_copy_engine", lambda _: engine)


def close(y: Tensor, expected: Tensor) -> None:
    """The interpreter adds in fp32. Tensor cores first add 128 products in 14 bits (Hopper), then fp32
    takes over: such a sum is off by some 2⁻¹³ of its largest product, and errors of several average out."""
    assert y.shape == expected.shape and relative_error(y, expected) < (1e-3 if DEVICE == "cuda" else 1e-6)


@pytest.mark.gpu
def test_products_at_v3s_shapes():
    x_MK, dy_MN, weight = (
        torch.randn(*shape, device=DEVICE).bfloat16() for shape in ((1000, 7168), (1000, 4096), (4096, 7168))
    )
    x, dy, w = triton_quant.rows(x_MK, "fp32"), triton_quant.rows(dy_MN, "fp32"), triton_quant.blocks(weight, "fp32")
    close(triton_gemm.linear(x, w, dtype=torch.float32), x.dequantise() @ w.dequantise().mT)
    close(triton_gemm.linear(dy, triton_gemm.turned(w), dtype=torch.float32), dy.dequantise() @ w.dequantise())


@pytest.mark.gpu
def test_products_of_v3s_experts():
    """Ragged, some experts without rows."""
    counts_E = torch.randint(0, 300, (64,), device=DEVICE) * (torch.rand(64, device=DEVICE) < 0.8)
    counts, (N, K) = counts_E.tolist(), (2048, 1536)
    x_MK, dy_MN = (torch.randn(sum(counts), width, device=DEVICE).bfloat16() for width in (K, N))
    x, w = triton_quant.rows(x_MK, "ue8m0"), triton_quant.blocks(torch.randn(64, N, K, device=DEVICE), "ue8m0")
    expected = reference.grouped_linear(x.dequantise(), w.dequantise(), counts_E)
    close(triton_gemm.linear(x, w, counts_E, torch.float32), expected)
    dy, x = (triton_quant.columns(side, counts_E, "ue8m0") for side in (dy_MN, x_MK))
    sides = (quant_tiles.column_tiles(side, counts, "ue8m0").split(counts) for side in (dy_MN, x_MK))
    close(triton_gemm.gradient(dy, x, counts_E), torch.stack([a.mT @ b for a, b in zip(*sides)]))
