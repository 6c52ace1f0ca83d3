"""FLOPs and parameters counted from a configuration, against torch's own counter and the published figures."""

import pytest

from shoal.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from shoal.plan import flops, memory

LATENT = MLAConfig(n_heads=4, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, q_lora_rank=40)
FULL_QUERY = MLAConfig(n_heads=4, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
SIGMOID = MoEConfig(8, 1, n_activated=3, moe_dim=20, n_group=4, topk_group=2)
SOFTMAX = MoEConfig(8, 2, n_activated=2, moe_dim=20, scoring="softmax", norm_topk_prob=False)
MODELS = {
    "v3": ModelConfig(80, 48, n_layers=3, hidden_dim=72, attention=LATENT, moe=SIGMOID, n_mtp=2),
    "v2": ModelConfig(80, 48, n_layers=3, hidden_dim=72, attention=FULL_QUERY, moe=SOFTMAX),
    "llama": ModelConfig(80, 48, n_layers=2, hidden_dim=72, attention=GQAConfig(4, 2, 12)),
    "qwen": ModelConfig(
        80, 48, n_layers=2, hidden_dim=72, attention=GQAConfig(4, 2, 12, bias=True), tie_embeddings=True
    ),
}
V3 = ModelConfig(
    129280, 7168, n_layers=61, hidden_dim=18432, n_mtp=1,
    attention=MLAConfig(128, 512, 128, 64, 128, q_lora_rank=1536),
    moe=MoEConfig(256, 1, n_activated=8, moe_dim=2048, n_dense_layers=3, n_group=8, topk_group=4),
)  # fmt: skip


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_flops_equal_those_torch_counts(config):
    """torch counts attention as if nothing were masked, so a token of ours meets all T keys for this comparison."""
    torch = pytest.importorskip("torch")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from shoal.model.attend import Packed
    from shoal.model.transformer import Transformer

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


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_parameters_equal_the_models(config):
    pytest.importorskip("torch")
    from shoal.model.transformer import Transformer

    assert memory.numbers(config).total == sum(p.numel() for p in Transformer(config).parameters())


def test_v3_has_its_published_size():
    n = memory.numbers(V3)
    module = sum(memory.stored(V3, V3.n_layers)) + 2 * V3.dim**2 + 3 * V3.dim
    assert round((n.total - module) / 1e9) == 671
    assert module == pytest.approx(11.5e9, rel=0.01)  # published without its projection of two widths into one
    assert round(flops.active_matrices(V3) / 1e9, 1) == 36.6  # the published 37B counts the embedding's look-up too


def test_training_is_six_times_the_active_matrices_where_context_is_short():
    config = MODELS["v2"]
    assert flops.training(config, 1).total == pytest.approx(
        6 * flops.active_matrices(config) + flops.training(config, 1).attention
    )


def test_causal_attention_grows_with_half_the_context():
    longer, shorter = flops.forward(V3, 4096), flops.forward(V3, 2048)
    assert longer.attention / shorter.attention == pytest.approx(4097 / 2049)
    assert longer.total - longer.attention - longer.mtp == shorter.total - shorter.attention - shorter.mtp
    assert flops.mean_keys([4096]) == flops.mean_keys([4096] * 3) > flops.mean_keys([2048] * 6)


def test_absorbed_decoding_meets_longer_keys_but_multiplies_the_same_matrices():
    """Per key 2·512 + 64 numbers a head instead of 192 + 128; folding W_up into the query costs what W_up did."""
    read, written = flops.of_token(V3, 1000), flops.decoding(V3, 999)
    assert written.attention / read.attention == (2 * 512 + 64) / (128 + 64 + 128)
    assert written.projections == read.projections and written.mtp == 0
