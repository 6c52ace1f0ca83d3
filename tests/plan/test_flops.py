"""FLOPs and parameters counted from a configuration, against torch's own counter and the published figures."""

from dataclasses import replace

import pytest

from shoal.model.config import GQAConfig, MoEConfig
from shoal.model.counts import count_parameters
from shoal.model.presets import PRESETS
from shoal.plan import flops, memory

TINY, V3 = PRESETS["tiny"], PRESETS["v3-671b"]
V2 = MoEConfig(8, 2, n_activated=2, moe_dim=20, scoring="softmax", norm_topk_prob=False)
MODELS = {
    "v3": replace(TINY, n_mtp=2),
    "v2": replace(TINY, moe=V2, n_mtp=0, attention=replace(TINY.attention, q_lora_rank=None)),
    "llama": replace(TINY, moe=None, attention=GQAConfig(4, 2, 12)),
    "qwen": replace(TINY, moe=None, attention=GQAConfig(4, 2, 12, bias=True), tie_embeddings=True),
}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_flops_equal_those_torch_counts(config, monkeypatch):
    """torch counts attention as if nothing were masked, so here a token of ours meets all T keys."""
    torch = pytest.importorskip("torch")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from shoal.model.attend import Packed
    from shoal.model.transformer import Transformer
    from shoal.ops import dispatch, reference

    monkeypatch.setattr(dispatch, "grouped_linear", reference.grouped_linear)  # the fast twin rounds rows up
    T = 32
    model, attend, positions = Transformer(config).init_weights(0), Packed([T]), torch.arange(T)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        embedded = model.embed(positions)
        h, _ = model.body(embedded, positions, attend)
        loss = model.head(h).sum()
        for module in model.mtp:
            h, _ = module(h, embedded, positions, attend)
            loss = loss + model.head(h).sum()
        assert counter.get_total_flops() == T * flops.of_token(config, T).total
        loss.backward()
    assert counter.get_total_flops() == T * 3 * flops.of_token(config, T).total


@pytest.mark.parametrize("config", [*MODELS.values(), V3], ids=[*MODELS, "v3-671b"])
def test_parameters_are_sorted_as_the_optimizer_treats_them(config):
    """`hidden`: matrices of the layers. `embedding`: with the head. `vectors`: what stays fp32 or is not a matrix."""
    torch = pytest.importorskip("torch")
    from shoal.model.moe import Router
    from shoal.model.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(config)
    routers = {id(m.weight) for m in model.modules() if isinstance(m, Router)}
    found = {"hidden": 0, "embedding": 0, "vectors": 0}
    for name, p in model.named_parameters():
        vector = p.dim() == 1 or id(p) in routers
        kind = "vectors" if vector else "embedding" if name.startswith(("embed.", "head.")) else "hidden"
        found[kind] += p.numel()
    assert memory.numbers(config) == memory.Numbers(**found)


@pytest.mark.parametrize("config", [MODELS["v2"], V3], ids=["v2", "v3-671b"])
def test_training_is_six_times_the_active_parameters_where_context_is_short(config):
    work = flops.training(config, 1)
    assert work.total - work.attention - work.mtp == pytest.approx(6 * count_parameters(config).active, rel=0.01)


def test_causal_attention_grows_with_half_the_context():
    longer, shorter = flops.forward(V3, 4096), flops.forward(V3, 2048)
    assert longer.attention / shorter.attention == pytest.approx(4097 / 2049)
    assert longer.total - longer.attention - longer.mtp == shorter.total - shorter.attention - shorter.mtp
    assert flops.mean_keys([4096]) == flops.mean_keys([4096] * 3) > flops.mean_keys([2048] * 6)
