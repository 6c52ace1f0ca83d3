"""Presets have the published parameters, and counting them agrees with building them."""

import pytest
import torch

from shoal.model.counts import count_parameters
from shoal.model.hf_config import read_config, to_hf_config
from shoal.model.presets import OURS, PRESETS, STUDENTS
from shoal.model.transformer import Transformer

PUBLISHED = {  # of each model's safetensors files
    "r1-qwen-1.5b": 1_777_088_000,
    "r1-qwen-7b": 7_615_616_512,
    "r1-qwen-14b": 14_770_033_664,
    "r1-qwen-32b": 32_763_876_352,
    "r1-llama-8b": 8_030_261_248,
    "r1-llama-70b": 70_553_706_496,
}


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_the_model_on_the_meta_device(name):
    with torch.device("meta"):
        model = Transformer(PRESETS[name])
    mtp = sum(p.numel() for p in model.mtp.parameters())
    counts = count_parameters(PRESETS[name])
    assert counts.mtp_total == mtp
    assert counts.total == sum(p.numel() for p in model.parameters()) - mtp


@pytest.mark.parametrize("name", STUDENTS)
def test_students_have_exactly_the_published_parameters(name):
    assert count_parameters(PRESETS[name]).total == PUBLISHED[name]


@pytest.mark.parametrize(
    "name, total, active", [("v3-671b", 671.0, 36.7), ("v2-236b", 236, 21), ("v2-lite-16b", 15.7, 2.4)]
)
def test_deepseek_models_have_the_published_parameters(name, total, active):
    counts = count_parameters(PRESETS[name])
    assert counts.total / 1e9 == pytest.approx(total, rel=2e-3)
    assert abs(counts.active / 1e9 - active) < 0.15  # publications round, V2's to whole billions


def test_v3_module_adds_what_was_published_and_the_projection():
    c, counts = PRESETS["v3-671b"], count_parameters(PRESETS["v3-671b"])
    join = 2 * c.dim * c.dim
    assert round((counts.mtp_total - join) / 1e9, 1) == 11.5
    assert round((counts.mtp_active - join) / 1e9, 1) == 2.4
    assert round(counts.embedding / 1e9, 1) == round(counts.head / 1e9, 1) == 0.9


def test_active_parameters_are_those_that_get_a_gradient_from_one_token():
    from shoal.model.attend import Packed

    config = OURS["tiny"]
    model = Transformer(config).init_weights(0)
    model(torch.tensor([3]), torch.tensor([0]), Packed([1])).square().sum().backward()
    touched = sum(expert_rows(n, p) for n, p in model.named_parameters() if n != "embed.weight" and p.grad is not None)
    assert touched == count_parameters(config).active


def expert_rows(name: str, p: torch.nn.Parameter) -> int:
    """Parameters that a gradient reached: whole matrices, but of stacked experts only the chosen ones."""
    assert p.grad is not None
    if ".experts." not in name:
        return p.numel()
    return sum(w.numel() for w, g in zip(p, p.grad) if g.any())


@pytest.mark.parametrize("name", PRESETS)
def test_config_json_brings_a_preset_back(name):
    assert read_config(to_hf_config(PRESETS[name])) == PRESETS[name]
