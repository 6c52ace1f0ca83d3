"""What fits where: bytes against the counts, speeds against hand arithmetic, and refusals that name what would work."""

from dataclasses import replace
from math import floor

import pytest

from shoal.errors import ResourceError
from shoal.model.config import ModelConfig
from shoal.model.counts import count_parameters
from shoal.model.presets import PRESETS
from shoal.plan import fit as plan
from shoal.plan.fit import Hardware, divide, fit, layer_seconds, weights
from shoal.plan.memory import cache_bytes_per_token

GIB = 2**30
LITE, V3 = PRESETS["v2-lite-16b"], PRESETS["v3-671b"]
LAPTOP = Hardware(6 * GIB, 25e9, 1.5e9)


@pytest.mark.parametrize("name", PRESETS)
def test_in_bf16_all_parameters_are_counted_once(name):
    config = replace(PRESETS[name], n_mtp=0)
    w, counts = weights(config, "bf16"), count_parameters(config)
    tied = counts.embedding if config.tie_embeddings else 0
    in_fp32 = plan.numbers(config).vectors
    assert w.total == 2 * (counts.total + tied) + 2 * in_fp32


def test_v3_has_the_bytes_that_were_published():
    """671B in FP8 are about 671 GB, embedding and head in bf16; a token meets 8 of 256 experts in 58 layers."""
    w = weights(V3, "fp8")
    assert w.total == pytest.approx(674e9, rel=0.01)
    assert (w.n_experts, w.chosen) == (58 * 256, 58 * 8)
    assert weights(V3, "int4").experts == pytest.approx(w.experts / 2, rel=0.05)


def test_bytes_in_all_places_are_within_what_they_hold():
    for form in plan.FORMS:
        f = fit(LITE, form, LAPTOP, 4096)
        assert f.runs and sum(f.places["RAM"].values()) <= LAPTOP.ram_bytes
        experts = sum(n for parts in f.places.values() for name, n in parts.items() if "experts" in name)
        assert experts == f.weights.experts


def test_a_token_waits_for_its_near_part_and_layer_by_layer_for_the_slower_of_reading_and_computing_experts():
    f = fit(LITE, "int4", LAPTOP, 1000)
    w, cache = f.weights, 1000 * cache_bytes_per_token(LITE)
    chosen = 26 * 6 * w.expert
    computed, read = chosen / LAPTOP.ram_rate, (1 - f.hit_rate) * chosen / LAPTOP.disk_rate
    assert f.limit == "disk" and read > computed
    experts = 1 / f.tokens_per_s - (w.near + cache) / LAPTOP.ram_rate
    assert read < experts < read + computed
    assert all(bound >= f.tokens_per_s for bound in f.bounds().values())
    known = fit(LITE, "int4", LAPTOP, 1000, hit_rate=1.0)
    assert 1 / known.tokens_per_s == pytest.approx((w.near + cache + chosen) / LAPTOP.ram_rate)


def test_a_layer_waits_for_what_it_misses_as_often_as_it_misses():
    assert layer_seconds(2, 0.75, 1.0, 3.0) == pytest.approx((0.75**2) * 2 + 2 * 0.75 * 0.25 * 3 + (0.25**2) * 6)
    assert layer_seconds(8, 1.0, 1.0, 0.0) == layer_seconds(8, 0.0, 1.0, 1.0) == 8.0


def test_what_fits_whole_reads_nothing_from_the_disk():
    f = fit(LITE, "int4", replace(LAPTOP, ram_bytes=12 * GIB), 4096)
    assert f.hit_rate == 1 and "disk" not in f.places and f.limit == "RAM"
    card = fit(LITE, "int4", Hardware(4 * GIB, 25e9, 0, 24 * GIB, 900e9, 25e9), 4096)
    assert card.limit == "GPU memory" and card.tokens_per_s > 10 * f.tokens_per_s


def test_a_card_holds_the_near_part_and_ram_the_experts():
    f = fit(V3, "int4", Hardware(64 * GIB, 50e9, 3e9, 24 * GIB, 900e9, 25e9), 4096)
    assert f.runs and f.places["GPU"]["always-on weights"] == f.weights.near
    assert "always-on weights" not in f.places["RAM"] and f.limit == "disk"
    assert f.seconds["bus"] < f.seconds["RAM"] < f.seconds["disk"]


def on_card(config: ModelConfig, form: plan.Form, n_bytes: int) -> plan.Fit:
    """In 1 TiB of RAM, beside a card with so many bytes for weights."""
    taken = plan.GPU_PROCESS_BYTES + 4096 * cache_bytes_per_token(config)
    taken += plan.buffer_bytes(config, 4096, few_bits=form != "bf16")
    gpu_bytes = floor((taken + n_bytes) / (1 - plan.MARGIN)) + 1
    return fit(config, form, Hardware(2**40, 50e9, 3e9, gpu_bytes, 900e9, 25e9), 4096)


def test_beside_a_card_the_embedding_is_looked_up_on_the_disk():
    w = weights(LITE, "int4")
    f = on_card(LITE, "int4", w.near)
    assert f.places["disk"] == {"embedding": w.embedding} and f.hit_rate == 1
    assert f.places["GPU"]["always-on weights"] == w.near and "embedding" not in f.places["GPU"]
    assert "GPU" not in on_card(LITE, "int4", w.near - 2**20).places


def test_a_card_for_all_of_a_model_has_room_for_its_modules_too():
    w = weights(V3, "fp8")
    assert on_card(V3, "fp8", w.total + w.modules).places["GPU"]["weights"] == w.total + w.modules
    assert "weights" not in on_card(V3, "fp8", w.total).places["GPU"]


def test_a_module_in_memory_has_rows_of_its_own():
    machine = replace(LAPTOP, ram_bytes=2**40)
    drafting, plain = (fit(config, "int4", machine, 4096) for config in (V3, replace(V3, n_mtp=0)))
    assert drafting.places["RAM"]["buffers"] - plain.places["RAM"]["buffers"] == plan.rows_bytes(V3)


def test_without_experts_it_is_all_on_the_card_or_nothing():
    config = PRESETS["r1-llama-8b"]
    w = weights(config, "int8")
    assert w.embedding and "GPU" not in on_card(config, "int8", w.near).places
    assert "weights" in on_card(config, "int8", w.total).places["GPU"]


@pytest.mark.parametrize("form", plan.FORMS)
def test_the_smallest_memory_is_the_smallest(form):
    smallest = fit(LITE, form, replace(LAPTOP, ram_bytes=GIB // 2), 4096)
    assert not smallest.runs and "MiB" in smallest.why_not
    assert fit(LITE, form, replace(LAPTOP, ram_bytes=smallest.smallest), 4096).runs
    below = replace(LAPTOP, ram_bytes=smallest.smallest - (3 << 20))
    assert not fit(LITE, form, below, 4096).runs


def test_without_a_disk_or_without_experts_all_must_fit():
    for config in (LITE, PRESETS["r1-llama-8b"]):
        f = fit(config, "int8", Hardware(6 * GIB, 25e9, 0), 4096)
        assert not f.runs and f.smallest > f.weights.total
        assert fit(config, "int8", Hardware(f.smallest, 25e9, 0), 4096).hit_rate == 1


def test_a_budget_is_divided_to_the_last_expert_and_refused_with_one_that_works():
    parts = {"process": 100 << 20, "near": 50 << 20, "cache": 10 << 20, "buffers": 5 << 20}
    experts = {"expert": 4 << 20, "n_experts": 100, "least": 6}
    d = divide(300 << 20, **parts, **experts)
    assert d.total <= 300 << 20 < d.total + (4 << 20) + (300 << 20) * plan.MARGIN + 1
    assert d.hit_rate == d.slots / 100 and divide(GIB, **parts, **experts).slots == 100
    with pytest.raises(ResourceError, match="at least 193MiB") as e:
        divide(190 << 20, **parts, **experts)
    assert "--memory 193MiB" in e.value.fix
    assert divide(193 << 20, **parts, **experts).slots == 6
