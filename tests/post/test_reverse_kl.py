"""The chunked loss against autograd on whole logits."""

import pytest
import torch

from shoal.post import reverse_kl as module
from shoal.post.reverse_kl import reverse_kl

T, D, E, V = 23, 8, 6, 37


def parts(dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (T, D), (V, D), (T, E), (V, E)
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def whole(h_TD, weight_VD, h_TE, weight_VE, asked_T, scale):
    log_p = (h_TD @ weight_VD.t()).log_softmax(-1)
    log_q = (h_TE @ weight_VE.t()).log_softmax(-1)
    return scale * (log_p.exp() * (log_p - log_q)).sum(-1)[asked_T].sum()


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_loss_and_gradients_are_those_of_whole_logits(dtype, tolerance, rows, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * V * rows)
    asked_T = torch.arange(T) % 3 > 0
    found = []
    for loss_of in (reverse_kl, whole):
        h, weight, teacher_h, teacher_weight = parts(dtype)
        h, weight = h.requires_grad_(), weight.requires_grad_()
        loss = loss_of(h, weight, teacher_h, teacher_weight, asked_T, 0.25)
        (3 * loss).backward()
        assert h.grad is not None and weight.grad is not None
        found.append((loss.detach(), h.grad, weight.grad))
    for ours, theirs in zip(*found):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    assert not found[0][1][~asked_T].any()


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    h, weight, *_ = parts(torch.float64)
    h.requires_grad_()
    loss = reverse_kl(h, weight, h.detach(), weight, torch.ones(T, dtype=torch.bool), 1.0)
    loss.backward()
    assert loss == 0 and h.grad is not None and h.grad.abs().max() == 0
