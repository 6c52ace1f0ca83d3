"""What is chosen is said: a misspelt wish fails, and a kernel that cannot be built names its reason."""

import pytest
import torch

from shoal.errors import ConfigError
from shoal.ops import cpu, dispatch
from shoal.runtime import cpu_flags

choose = cpu._library.__wrapped__  # without its memory of the first answer


def test_an_unknown_wish_for_kernels_is_refused(monkeypatch):
    monkeypatch.setenv("SHOAL_KERNELS", "refrence")
    with pytest.raises(ConfigError, match="refrence"):
        choose()
    monkeypatch.setenv("SHOAL_KERNELS", "reference")
    assert choose() == (None, "reference (SHOAL_KERNELS=reference)")


@pytest.mark.skipif(not cpu_flags() >= cpu.NEEDED, reason="this processor has no native kernels")
@pytest.mark.parametrize(
    "script, words",
    [(None, "install gcc or clang"), ("echo boot; echo 'x.c:3: error: unknown -march' >&2; exit 1", "x.c:3: error")],
)
def test_kernels_that_cannot_be_built_say_why(monkeypatch, tmp_path, script, words):
    if script:
        (tmp_path / "cc").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    library, status = choose()
    assert library is None and words in status and "\n" not in status


def test_no_rows_are_no_trouble_for_the_reference_either():
    x = torch.empty(0, 30, requires_grad=True)
    places = dispatch.sort_by_expert(torch.empty(0, 2, dtype=torch.int64), 4)
    rows = dispatch.gather_rows(dispatch.rms_norm(x, torch.ones(30), 1e-6), places)
    rows = dispatch.grouped_linear(dispatch.swiglu(rows, rows), torch.ones(4, 30, 30), places.counts_E)
    dispatch.weigh_rows(rows, torch.empty(0, 2), places).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 30)
    assert dispatch.cross_entropy_(torch.empty(0, 30), torch.empty(0, dtype=torch.int64), 1.0).shape == (0,)


def test_norms_with_narrow_weights_take_the_reference():
    """The kernel reads fp32 weights; a bf16 one must not be read as such."""
    x, weight = torch.randn(4, 32).bfloat16(), torch.full((32,), 2.0, dtype=torch.bfloat16)
    torch.testing.assert_close(dispatch.rms_norm(x, weight, 1e-6), dispatch.rms_norm(x, weight.float(), 1e-6))
