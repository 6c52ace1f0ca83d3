"""What is written for llama.cpp, read back by the `gguf` package. Whether it computes the same: `bench.agreement`."""

import pytest
import torch

from bench.peers import gguf_file
from shoal.data.tokenizer import Tokenizer
from shoal.model.config import MLAConfig, ModelConfig, MoEConfig
from shoal.model.transformer import Transformer

gguf = pytest.importorskip("gguf")

CONFIG = ModelConfig(
    vocab_size=300,
    dim=32,
    n_layers=2,
    hidden_dim=48,
    attention=MLAConfig(
        n_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12, q_lora_rank=20
    ),
    moe=MoEConfig(n_routed_experts=4, n_shared_experts=1, n_activated=2, moe_dim=24, n_group=2, topk_group=1),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    model = Transformer(CONFIG).init_weights(seed=0).set_dtype(torch.bfloat16)
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"] * 9, 300)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf_file.write(model, tokenizer, path)
    return model, tokenizer, gguf.GGUFReader(path)


def test_every_number_is_written_once_and_as_it_is(written):
    model, _, reader = written
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert sum(t.n_elements for t in reader.tensors) == sum(x.numel() for x in model.state_dict().values())
    for name, x in gguf_file.tensors(model):
        assert list(found[name].shape[::-1]) == list(x.shape), name
        assert found[name].data.tobytes() == gguf_file.as_numpy(x.contiguous()).tobytes(), name


def test_keys_and_values_of_the_latent_are_those_of_the_heads(written):
    model, _, _ = written
    pieces, a = dict(gguf_file.tensors(model)), CONFIG.attention
    assert isinstance(a, MLAConfig)
    latent_C = torch.randn(a.kv_lora_rank).bfloat16()
    ours_HX = model.layers[1].attn.kv_up(latent_C).unflatten(0, (a.n_heads, -1))  # pyright: ignore
    keys_HN = torch.einsum("hcn,c->hn", pieces["blk.1.attn_k_b.weight"], latent_C)
    values_HV = torch.einsum("hvc,c->hv", pieces["blk.1.attn_v_b.weight"], latent_C)
    torch.testing.assert_close(torch.cat([keys_HN, values_HV], 1), ours_HX)


def test_tokens_keep_their_ids_and_special_ones_are_marked(written):
    _, tokenizer, reader = written
    names = reader.get_field("tokenizer.ggml.tokens").contents()
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    assert names == [tokenizer.name(i) for i in range(tokenizer.vocab_size)]
    assert kinds[tokenizer.eos_id] == gguf.TokenType.CONTROL
    assert kinds[-1] == gguf.TokenType.NORMAL
