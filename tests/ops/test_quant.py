"""Few bits and back: how far a number may move, and that codes lie as published files have them."""

import pytest
import torch

from shoal.ops import quant
from shoal.ops.quant import FP8_MOST, Quantised


@pytest.mark.parametrize("shape", [(128, 256), (130, 300), (3, 256, 128)])
def test_fp8_moves_a_number_by_a_sixteenth_at_most(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = quant.quantise(w, "fp8")
    off = (q.dequantise() - w).abs()
    step = quant.spread(q.scales, q.block, tuple(shape)) * 2.0**-9  # the distance of the smallest codes
    assert (off <= torch.maximum(w.abs() / 16, step) * 1.001).all()
    assert q.scales.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))


def test_the_largest_number_of_a_block_is_exact_in_fp8():
    w = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
    q = quant.quantise(w, "fp8")
    assert q.codes.float().abs().max() == FP8_MOST


@pytest.mark.parametrize("form, group", [("int8", 256), ("int8", 32), ("int4", 32), ("int4", 128)])
def test_integers_move_a_number_by_half_a_step(form, group):
    w = torch.randn(48, 256, generator=torch.Generator().manual_seed(2))
    q = quant.quantise(w, form, group)
    step = quant.spread(q.scales, q.block, (48, 256))
    assert ((q.dequantise() - w).abs() <= step * 0.51).all()
    assert q.shape == w.shape


def test_int4_lies_low_half_first_with_eight_for_zero():
    q = Quantised(
        "int4", torch.tensor([[0xF8, 0x70]], dtype=torch.uint8), torch.ones(1, 1, dtype=torch.bfloat16), (1, 4)
    )
    assert q.dequantise().tolist() == [[0, 7, -8, -1]]


def test_a_least_number_is_added_to_codes_from_zero():
    scales, least = torch.full((1, 1), 0.5), torch.full((1, 1), -1.0)
    q = Quantised("int4", torch.tensor([[0x21]], dtype=torch.uint8), scales, (1, 2), least)
    assert q.dequantise().tolist() == [[-0.5, 0.0]]


def test_zeros_stay_zeros_in_every_form():
    for form in ("fp8", "int8", "int4"):
        q = quant.quantise(torch.zeros(16, 128), form)
        assert (q.dequantise() == 0).all() and q.scales.float().min() > 0
