"""Calibrated rounding: less error where it counts, for experts that a text hardly meets too, the same every time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.model import hf
from shoal.model.attend import Packed
from shoal.model.moe import Experts, Routes
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.ops import dispatch as ops
from shoal.ops import quant
from shoal.precision import convert, quality
from shoal.precision.calibrate import Calibration, Rows, columns, rounded
from shoal.precision.convert import Kept


def correlated(T: int, K: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, 8, generator=g) @ torch.randn(8, K, generator=g) + 0.1 * torch.randn(T, K, generator=g)


def lost(x: torch.Tensor, w: torch.Tensor, q: torch.Tensor) -> float:
    return ((x @ (w - q).mT).square().sum() / (x @ w.mT).square().sum()).item()


@pytest.mark.parametrize("group", [32, 64])
def test_the_error_that_counts_shrinks(group):
    x, w = correlated(2000, 128), torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    made = rounded(w[None], columns((x.mT @ x)[None]), Kept("int4", group))[0]
    nearest = quant.quantise(w, "int4", group)
    assert made.block == nearest.block and made.codes.shape == nearest.codes.shape
    assert lost(x, w, made.dequantise()) < 0.2 * lost(x, w, nearest.dequantise())


def test_matrices_of_a_stack_are_those_alone():
    x = torch.stack([correlated(500, 64, seed) for seed in (0, 1)])
    w = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))
    both = rounded(w, columns(x.mT @ x), Kept("int4", 32))
    for i in range(2):
        alone = rounded(w[i : i + 1], columns((x[i].mT @ x[i])[None]), Kept("int4", 32))
        assert torch.equal(both.codes[i], alone.codes[0]) and torch.equal(both.scales[i], alone.scales[0])


def test_inputs_that_are_always_zero_do_no_harm():
    x = correlated(500, 64)
    x[:, :40] = 0
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    made = rounded(w[None], columns((x.mT @ x)[None]), Kept("int4", 32))[0].dequantise()
    assert made.isfinite().all() and lost(x, w, made) < 0.5 * lost(x, w, quant.quantise(w, "int4", 32).dequantise())
    assert rounded(w[None], columns(torch.zeros(1, 64, 64)), Kept("int4", 32)).dequantise().isfinite().all()


def test_an_expert_that_no_token_chose_is_calibrated_with_what_the_layer_sees():
    experts, x = Experts(4, 64, 32), correlated(600, 64)
    for p in experts.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(2))
    chosen = torch.zeros(600, 2, dtype=torch.int64)
    chosen[:, 1] = 1
    rows = Rows.of(x, [Routes(chosen, torch.full((600, 2), 0.5), torch.zeros(600, 4))])
    with torch.no_grad():
        for stack, H in ((experts.gate_up, rows.hessians([3])), (experts.down, rows.hessians([3], experts.gate_up))):
            w = stack[3]
            made = rounded(w[None], columns(H), Kept("int4", 32))[0].dequantise()
            seen = x if stack is experts.gate_up else ops.swiglu(*(x @ experts.gate_up[3].mT).chunk(2, -1))
            assert lost(seen, w, made) < 0.6 * lost(seen, w, quant.quantise(w, "int4", 32).dequantise())


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    hf.save(Transformer(replace(PRESETS["tiny"], init_std=0.1)).init_weights(0).set_dtype(torch.bfloat16), folder)
    return folder


TOKENS = torch.randint(0, 512, (6, 64), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_a_model_loses_less_and_the_same_every_time(plain, tmp_path):
    source = convert.Source(plain)
    convert.write(source, tmp_path / "nearest", "int4", 32)
    for name in ("made", "again"):
        convert.write(source, tmp_path / name, "int4", 32, Calibration(plain, TOKENS, 32))
    made, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("made", "again"))
    assert made == again
    ours, nearest = (quality.compare(tmp_path / name, plain, TOKENS, 1000) for name in ("made", "nearest"))
    assert ours.kl < 0.75 * nearest.kl


@pytest.mark.slow
@pytest.mark.parametrize(("form", "group"), [("fp8", None), ("int8", None), ("int4", 64)])
def test_a_model_in_few_bits_is_calibrated_as_what_it_stands_for(plain, tmp_path, form, group):
    few = tmp_path / "few"
    convert.write(convert.Source(plain), few, form, group)
    hf.save(hf.load(few, torch.float32), tmp_path / "wide")
    for name, source in (("made", few), ("expected", tmp_path / "wide")):
        convert.write(convert.Source(source), tmp_path / name, "int4", 32, Calibration(source, TOKENS, 32))
    made, expected = (hf.load(tmp_path / name).state_dict() for name in ("made", "expected"))
    for name in expected:
        assert (made[name] - expected[name]).float().norm() <= 0.02 * expected[name].float().norm(), name


def test_hidden_states_are_held_by_no_graph(plain, monkeypatch):
    calibration, graphs = Calibration(plain, TOKENS, 32), []
    monkeypatch.setattr(calibration, "_layer", lambda name, block, h: graphs.append(h.requires_grad) or h)
    assert len(list(calibration._layers)) == PRESETS["tiny"].n_layers + 1 and not any(graphs)


def test_quality_is_what_whole_models_say(plain, tmp_path):
    convert.write(convert.Source(plain), tmp_path / "out", "int8", None)
    found = quality.compare(tmp_path / "out", plain, TOKENS, 1000)

    def log_probs(model: Transformer) -> torch.Tensor:
        positions_T = torch.arange(64).repeat(6)
        with torch.no_grad():
            return model(TOKENS.flatten(), positions_T, Packed([64] * 6)).log_softmax(-1).unflatten(0, (6, -1))[:, :-1]

    p, q = log_probs(hf.load(plain, torch.bfloat16).float()), log_probs(hf.load(tmp_path / "out", torch.float32))
    kl = (p.exp() * (p - q)).sum(-1).mean().item() / 0.6931471805599453
    assert found.kl == pytest.approx(kl, rel=1e-3) and found.tokens == 6 * 63
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item(), abs=1e-6)
    nll = -q.gather(-1, TOKENS[:, 1:, None]).sum().item() / 0.6931471805599453 / 1000
    assert found.bits_per_byte == pytest.approx(nll, rel=1e-4)
    assert quality.compare(plain, plain, TOKENS, 1000).kl == 0
