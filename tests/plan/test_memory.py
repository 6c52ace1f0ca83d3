"""Bytes of a step and of a cached token, against published figures and the arithmetic of each part."""

from dataclasses import replace

import pytest

from shoal.errors import ResourceError
from shoal.model.config import GQAConfig, MLAConfig
from shoal.model.presets import PRESETS
from shoal.plan import memory
from shoal.plan.memory import Step

GIB = 2**30
V3 = PRESETS["v3-671b"]
LATENT = MLAConfig(4, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, q_lora_rank=96)
TINY = replace(PRESETS["tiny"], dim=128, attention=LATENT)
DENSE = replace(TINY, moe=None, n_mtp=0, attention=GQAConfig(n_heads=4, n_kv_heads=2, head_dim=32))


def test_cache_bytes_are_the_published_ones():
    assert memory.cache_bytes_per_token(V3) == 70_272
    qwen_72b = replace(V3, n_layers=80, attention=GQAConfig(n_heads=64, n_kv_heads=8, head_dim=128), moe=None)
    assert memory.cache_bytes_per_token(qwen_72b) == 327_680
    llama_405b = replace(V3, n_layers=126, attention=GQAConfig(n_heads=128, n_kv_heads=8, head_dim=128), moe=None)
    assert memory.cache_bytes_per_token(llama_405b) == 516_096


def test_latent_cache_is_far_below_that_of_whole_heads():
    whole = memory.grouped_cache_bytes_per_token(V3, heads_per_group=1)
    assert whole == 2 * 61 * 128 * (192 + 128)
    assert whole / memory.cache_bytes_per_token(V3) > 70


def test_muon_keeps_one_moment_on_the_matrices_it_moves():
    config = TINY
    adamw, muon = (memory.of_training(config, Step(64, optimizer=o)) for o in ("adamw", "muon"))
    assert adamw.moments == 8 * memory.numbers(config).total
    assert adamw.moments - muon.moments == 4 * memory.numbers(config).hidden
    assert replace(adamw, moments=0) == replace(muon, moments=0)


def test_fp32_weights_are_their_own_masters():
    n = memory.numbers(TINY)
    bf16 = memory.of_training(TINY, Step(64))
    fp32 = memory.of_training(TINY, Step(64, dtype="fp32"))
    assert fp32.masters == 0 and fp32.weights == 4 * n.total
    assert bf16.weights + bf16.masters == 6 * (n.hidden + n.embedding) + 4 * n.vectors
    assert fp32.activations == 2 * bf16.activations


def test_recomputation_keeps_less_and_grows_less_with_depth():
    deep = replace(TINY, n_layers=48)
    for config in (TINY, deep):
        kept, rebuilt = (memory.of_training(config, Step(512, recompute=r)).activations for r in (False, True))
        assert rebuilt < kept
    assert memory.of_training(deep, Step(512, recompute=True)).activations < kept / 6


def test_logits_never_stand_whole():
    chunk = memory.of_training(V3, Step(65536, logits_chunk=1024)).logits
    assert chunk == memory.of_training(V3, Step(1024, logits_chunk=1024)).logits == 2 * 4 * 1024 * 129280


def test_a_step_that_does_not_fit_says_what_would():
    with pytest.raises(ResourceError) as e:
        memory.check(V3, Step(4096), 80 * GIB)
    assert "GiB" in e.value.got and "80.00 GiB" in e.value.expected
    assert "smaller preset" in e.value.fix


@pytest.mark.parametrize("recompute", [False, True])
def test_the_advice_fits_and_no_more_would(recompute):
    config = replace(TINY, n_layers=12)
    limit = int(1.5 * memory.OVERHEAD * memory.of_training(config, Step(4096, recompute=recompute)).total)
    step = Step(1 << 20, recompute=recompute)
    tokens = memory.largest_tokens(config, step, limit)
    assert tokens and f"{tokens:,} tokens" in memory.what_fits(config, step, limit)
    memory.check(config, replace(step, tokens=tokens), limit)
    with pytest.raises(ResourceError):
        memory.check(config, replace(step, tokens=tokens + 64), limit)


@pytest.mark.parametrize("precision", ["plain", "fp8"])
@pytest.mark.parametrize("config", [TINY, replace(TINY, n_mtp=0), DENSE], ids=["v3", "no mtp", "dense"])
def test_activations_are_those_autograd_keeps(config, precision):
    """Every tensor that bf16 training saves for backward, each storage once, against the count; fused kernels only."""
    torch = pytest.importorskip("torch")
    from torch.autograd.graph import saved_tensors_hooks

    from shoal.model.attend import Packed
    from shoal.model.transformer import Transformer
    from shoal.ops import cpu
    from shoal.precision import fp8

    if not cpu.status().startswith("native"):
        pytest.skip("the reference's fp32 temporaries are kept here, no fused kernels")
    T = 256
    model = Transformer(config).init_weights(0).set_dtype(torch.bfloat16)
    if precision == "fp8":
        fp8.swap(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        embedded = model.embed(torch.arange(T))
        h, _ = model.body(embedded, torch.arange(T), Packed([T]))
        for module in model.mtp:
            h, _ = module(h, embedded, torch.arange(T), Packed([T]))
    measured = sum(storage.nbytes() for at, storage in kept.items() if at not in weights)
    assert memory.of_training(config, Step(T, precision=precision)).activations == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("moments", ["bf16", "fp32"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_in_fp8_holds_the_tensors_that_were_counted(optimizer, moments):
    pytest.importorskip("torch")
    from shoal.train.config import BatchConfig, Fp8Config, OptimConfig, PretrainConfig
    from shoal.train.step import TrainState, backward
    from tests.train.batches import batch_of

    config = PretrainConfig(
        PRESETS["tiny"], batch=BatchConfig(32, 2), optim=OptimConfig(optimizer), steps=9, precision="fp8",
        fp8=Fp8Config(moments=moments),
    )  # fmt: skip
    state = TrainState(config, "cpu")
    backward(state, batch_of([64]), 64, 64)
    slots = state.optimizer.slots
    plan = memory.of_training(config.model, Step(64, optimizer, precision="fp8", moments=moments))
    assert plan.weights == sum(s.weight.nbytes for s in slots)
    assert plan.masters == sum(s.master.nbytes for s in slots if s.master.dtype != s.weight.dtype)
    assert plan.moments == sum(m.nbytes for s in slots for m in (s.first, s.second) if m is not None)
    assert plan.gradients == sum(s.weight.grad.nbytes for s in slots if s.weight.grad is not None)


def test_accumulated_gradients_stand_beside_those_of_a_batch():
    once, summed = (memory.of_training(TINY, Step(64, accumulates=a)).gradients for a in (False, True))
    assert summed - once == 4 * memory.numbers(TINY).total


def test_kernels_are_foretold_where_experts_run_in_bf16_on_a_cpu():
    def libraries(config, **more):
        return memory.of_training(config, Step(64, **more)).libraries

    assert libraries(TINY) == memory.LIBRARIES
    assert libraries(DENSE) == libraries(TINY, dtype="fp32") == libraries(TINY, device="cuda") == 0
    assert libraries(TINY, own_products=True) == memory.FEW_LIBRARIES


def test_backward_holds_the_gradients_of_one_layer_beside_the_activations():
    twice = replace(TINY, n_layers=2 * TINY.n_layers)
    once, deep = (memory.of_training(config, Step(512)) for config in (TINY, twice))
    assert once.transients == deep.transients < once.activations < deep.activations
