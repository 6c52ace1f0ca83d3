"""Attention over a latent cache and expert rows on a GPU equal their references."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.ops.interpreted import DEVICE, bf16, hardware_numbers, relative_error  # isort: skip  (before any kernel)

from shoal.ops import dispatch, quant, reference, triton_experts, triton_latent, triton_weights
from shoal.ops.quant import Quantised

pytestmark = pytest.mark.usefixtures(hardware_numbers.__name__)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("H, C, R, splits", [(5, 48, 16, 1), (20, 32, 8, 3), (16, 16, 16, 40)])
def test_latent_attention_over_ragged_pages(H, C, R, splits, dtype, tolerance):
    """Against the reference in fp32: bf16 rounds probabilities before they weigh, and the result."""
    seen_T = torch.tensor([1, 64, 200], device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    table_TP = torch.randperm(40, generator=generator)[:15].view(3, 5)[:, :4].to(DEVICE)
    q, latent = (
        torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in ((3, H, C + R), (40, 64, C + R))
    )
    o = triton_latent.paged_latent_attention(q, latent, table_TP, seen_T, C, 0.3, splits)
    expected = reference.paged_latent_attention(q.float(), latent.float(), table_TP, seen_T, C, 0.3)
    assert o.dtype is dtype and relative_error(o, expected) < tolerance


def test_wide_latents_are_left_to_torch():
    latent, table = torch.zeros(3, 64, 64, device=DEVICE), torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    assert triton_latent.takes(latent.bfloat16(), table) and triton_latent.takes(latent.half(), table)
    assert not triton_latent.takes(latent, table) and not triton_latent.takes(latent.bfloat16(), table.T)
    assert not triton_latent.takes(latent.bfloat16()[:, :, :32], table)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [128, 16])
def test_latent_attention_at_v3s_shape(H: int):
    seen_T = torch.randint(1, 4096, (24,), device=DEVICE)
    table_TP = torch.randperm(24 * 64, device=DEVICE).view(24, 64)
    q, latent = (torch.randn(*shape, device=DEVICE).bfloat16() for shape in ((24, H, 576), (24 * 64, 64, 576)))
    o = triton_latent.paged_latent_attention(q, latent, table_TP, seen_T, 512, 0.1)
    expected = reference.paged_latent_attention(q.float(), latent.float(), table_TP, seen_T, 512, 0.1)
    assert relative_error(o, expected) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_go_out_to_experts_and_come_back(dtype: torch.dtype):
    """Outputs and gradients; sums are fp32 on both sides, rounded once."""
    T, E, K, D = 7, 5, 3, 1100
    choice = torch.rand(T, E, generator=torch.Generator().manual_seed(0)).topk(K).indices.to(DEVICE)
    places = reference.sort_by_expert(choice, E)
    x, rows, weights = bf16(T, D).to(dtype), bf16(T * K, D, seed=1).to(dtype), bf16(T, K, seed=2).float()
    gather = lambda x: triton_experts.GatherRows.apply(x, places.place_TK)  # noqa: E731
    weigh = lambda y, w: triton_experts.WeighRows.apply(y, w, places.place_TK)  # noqa: E731
    twins(gather, lambda x: reference.gather_rows(x, places), [x])
    twins(weigh, lambda y, w: reference.weigh_rows(y, w, places), [rows, weights])


def twins(fast, slow, inputs: list[Tensor]) -> None:
    """Outputs and gradients, the slow one's in fp32 and then rounded."""
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.float().requires_grad_() for x in inputs]
    y, expected = fast(*ours), slow(*exact)
    grad = bf16(*y.shape, seed=9).to(y.dtype)
    y.backward(grad)
    expected.backward(grad.float())
    for a, b in [(y, expected), *((a.grad, b.grad) for a, b in zip(ours, exact))]:
        torch.testing.assert_close(a, b.to(a.dtype), rtol=2**-7 if a.dtype is torch.bfloat16 else 1e-5, atol=1e-4)


def test_kernels_can_be_wished_away(monkeypatch):
    monkeypatch.setenv("SHOAL_KERNELS", "reference")
    assert not dispatch.triton_kernels.__wrapped__()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form, group", [("fp8", 128), ("int8", 256), ("int8", 64)])
def test_products_with_weights_in_8_bits(form, group, dtype):
    against_dequantised(quant.quantise(weights(form), form, group), dtype)


@pytest.mark.parametrize("group, zeros", [(32, False), (128, False), (64, True)])
def test_products_with_weights_in_4_bits(group, zeros):
    weight = quant.quantise(weights("int4"), "int4", group)
    least = -bf16(*weight.scales.shape).abs() if zeros else None
    against_dequantised(replace(weight, least=least), torch.bfloat16)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_rows_of_any_length_may_share_a_scale(form):
    """As the 10,944 of a V2-Lite's dense layer, which is 171 · 64."""
    against_dequantised(quant.quantise(bf16(40, 3 * 64), form, 3 * 64), torch.bfloat16)


@pytest.mark.parametrize("group", [16, 48, 80])
def test_groups_that_steps_dont_divide_are_not_taken(group: int):
    x = bf16(2, 240)
    assert not triton_weights.takes(x, quant.quantise(bf16(16, 240), "int8", group))
    turned = quant.quantise(bf16(240, 240), "int8", 240)
    assert not triton_weights.takes(x, replace(turned, codes=turned.codes.T))


def weights(form: str) -> Tensor:
    """Ragged where the form's blocks may be."""
    return bf16(100, 200 if form == "fp8" else 256)


def against_dequantised(weight: Quantised, dtype: torch.dtype) -> None:
    """bf16: the result's rounding alone, as codes are exact and sums fp32."""
    x = bf16(19, 2 * weight.shape[1], seed=1).to(dtype)[:, weight.shape[1] :]
    y, expected = triton_weights.linear(x, weight), x.float() @ weight.dequantise().mT
    assert y.dtype is dtype and relative_error(y, expected) < (1e-6 if dtype is torch.float32 else 3e-3)
