"""GGUF files that the `gguf` package wrote, read back: every number, every layout, every setting."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.parity import our_log_probs, random_config
from shoal.errors import ModelError
from shoal.model import hf
from shoal.model.config import GQAConfig, Llama3RopeConfig, ModelConfig, YarnConfig
from shoal.model.gguf import GGUF
from shoal.model.gguf_blocks import decoded
from shoal.model.gguf_config import model_config
from shoal.model.gguf_file import KINDS
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.ops.quant import Quantised
from shoal.precision import weights

gguf = pytest.importorskip("gguf")
from tests.model import gguf_models  # noqa: E402

Type = gguf.GGMLQuantizationType
LLAMA = ModelConfig(
    vocab_size=96,
    dim=32,
    n_layers=2,
    hidden_dim=64,
    attention=GQAConfig(n_heads=4, n_kv_heads=2, head_dim=16),
    rope_theta=5e5,
    rope_scaling=Llama3RopeConfig(factor=8.0),
    max_positions=1024,
)


def random_model(config: ModelConfig) -> Transformer:
    model = Transformer(replace(config, init_std=0.1)).init_weights(seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            softmax = config.moe is not None and config.moe.scoring == "softmax"  # has no bias
            if name.endswith("norm.weight") or (name.endswith(".bias") and not softmax):
                x.copy_(1 + torch.randn(x.shape, generator=generator) / 8)
    return model


def log_probs(model: Transformer) -> torch.Tensor:
    return our_log_probs(model, torch.arange(3, 60) % model.config.vocab_size)


def readable(config: ModelConfig) -> ModelConfig:
    """mscale isn't kept: it is read as mscale_all_dim, or one; neither is the range of initial weights."""
    yarn = config.rope_scaling
    if isinstance(yarn, YarnConfig):
        config = replace(config, rope_scaling=replace(yarn, mscale=yarn.mscale_all_dim or 1.0))
    return replace(config, init_std=0.02)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("architecture", ["deepseek_v3", "deepseek_v2", "qwen2", "llama"])
def test_a_model_comes_back_as_it_was(tmp_path, architecture, seed):
    config = readable(random_config(architecture, seed))
    if architecture in ("llama", "qwen2"):
        scaling = LLAMA.rope_scaling if architecture == "llama" and config.rope_scaling else None
        config = replace(config, rope_scaling=scaling, rope_theta=LLAMA.rope_theta)
    model = random_model(config)
    gguf_models.write(model, tmp_path / "m.gguf", whole_kv_b=seed == 1, merged=seed == 1)
    again = hf.load(tmp_path / "m.gguf", torch.float32)
    assert again.config == config
    state = again.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert torch.equal(log_probs(model), log_probs(again))


KIND_SETS = {
    "bf16": lambda name: Type.BF16,
    "f16": lambda name: Type.F16,
    "q8_0": lambda name: Type.Q8_0,
    "q4_0": lambda name: Type.Q4_0,
    "mixed": lambda name: Type.Q4_1 if "exps" in name else Type.Q5_0 if "attn" in name else Type.Q5_1,
}


@pytest.mark.parametrize("kinds", KIND_SETS)
@pytest.mark.parametrize("preset", ["tiny", "llama"])
def test_numbers_are_those_that_were_written(tmp_path, kinds, preset):
    config = LLAMA if preset == "llama" else wide(PRESETS["tiny"])
    source = random_model(config)
    numbers = gguf_models.write(source, tmp_path / "m.gguf", KIND_SETS[kinds], merged=kinds == "q4_0")
    model = hf.load(tmp_path / "m.gguf", torch.float32)
    dequantised = Transformer(config)
    dequantised.load_state_dict(source.state_dict() | {n: x for n, x in numbers.items() if n != "rope_freqs"})
    assert torch.equal(log_probs(model), log_probs(dequantised))
    file = GGUF(tmp_path / "m.gguf")
    for piece in hf.own_pieces(dequantised):
        found, expected = torch.empty(piece.shape), piece.of(dequantised.state_dict()[piece.ours])
        file.copy(piece, found)
        assert torch.equal(found, expected), piece.name


def wide(config: ModelConfig) -> ModelConfig:
    """Every row a multiple of 32, as blocks need it."""
    a = replace(config.attention, kv_lora_rank=32, qk_nope_head_dim=32, v_head_dim=32, q_lora_rank=64)
    assert config.moe
    return replace(config, attention=a, moe=replace(config.moe, moe_dim=64))


def test_what_stays_in_few_bits(tmp_path):
    config = wide(PRESETS["tiny"])
    gguf_models.write(random_model(config), tmp_path / "m.gguf", KIND_SETS["q4_0"])
    skeleton, file = hf.opened(tmp_path / "m.gguf", torch.bfloat16)
    assert isinstance(file, GGUF)
    leaves = weights.leaves(skeleton, file)
    forms = {piece.name: file.quantised(piece).form for pieces in leaves.values() for piece in pieces}
    assert forms["model.layers.1.mlp.experts.3.down_proj.weight"] == "int4"
    left = file.pieces.keys() - forms.keys()
    norms = "input_layernorm post_attention_layernorm q_a_layernorm kv_a_layernorm norm enorm hnorm".split()
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in left} == {*norms, "gate", "kv_b_proj", "embed_tokens"}


@pytest.mark.parametrize("number", KINDS)
def test_blocks_are_read_as_the_gguf_package_reads_them(number):
    kind, r = KINDS[number], np.random.default_rng(number)
    blocks = r.integers(0, 256, (6, 4, kind.nbytes), dtype=np.uint8)
    for at in {"q4_K": (0, 2), "q5_K": (0, 2), "q4_1": (0, 2), "q5_1": (0, 2), "q6_K": (208,)}.get(kind.name, (0,)):
        scales = r.normal(0, 0.01, (6, 4, 1)).astype(np.float16)
        blocks[..., at : at + 2] = scales.view(np.uint8)
    if kind.block == 1:
        blocks = r.normal(0, 1, (6, 8)).astype(np.float32).view(np.uint8).reshape(6, -1, kind.nbytes)
        if kind.name == "bf16":
            blocks = blocks.reshape(6, -1, 2)[:, 1::2]
        if kind.name == "f16":
            blocks = r.normal(0, 1, (6, 8)).astype(np.float16).view(np.uint8).reshape(6, 8, 2)
    rows = np.ascontiguousarray(blocks.reshape(6, -1))
    expected = torch.from_numpy(gguf.quants.dequantize(rows, Type(number)))
    found = decoded(torch.from_numpy(rows), kind, "x")
    values = found.dequantise() if isinstance(found, Quantised) else found.float()
    if kind.name != "q4_K":
        assert torch.equal(values, expected)
        return
    assert isinstance(found, Quantised) and found.least is not None
    step = found.scales.float().abs().repeat_interleave(32, -1)
    least = found.least.float().abs().repeat_interleave(32, -1)
    assert ((values - expected).abs() <= (15 * step + least) * 2**-11 + 1e-7).all()


def test_published_settings_translate():
    """What llama.cpp's converter writes of the published models, and the presets."""
    for name in ("v3-671b", "v2-236b", "v2-lite-16b", "r1-qwen-7b"):
        config = replace(PRESETS[name], n_mtp=0, init_std=0.02)
        arch = gguf_models.architecture(config)
        said = {f"{arch}.{k}": v for k, v in gguf_models.described(config).items()}
        said |= {"general.architecture": arch}
        assert model_config(said, name, config.vocab_size, False, 0) == config


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"attention.sliding_window": 512}, "sliding_window is 512"),
        ({"rope.scaling.type": "longrope"}, "scaling.type is longrope"),
        ({"rope.dimension_count": 8}, "dimension_count is 8"),
        ({"expert_count": 8}, "expert_count is 8"),
        ({"attention.head_count": 3}, "num_key_value_heads"),
        ({"block_count": 3}, "no tensor blk.2"),
        ({"block_count": 1}, "no place for: blk.1"),
        ({"feed_forward_length": 128}, "blk.0.ffn_gate.weight has shape"),
        ({"vocab_size": 97}, "token_embd.weight has shape"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps"),
        ({"rope.freq_base": 1e4}, "rope_freqs.weight has other factors"),
        ({"context_length": "long"}, "max_position_embeddings"),
    ],
)
def test_what_would_compute_something_else_is_refused_by_name(tmp_path, settings, match):
    gguf_models.write(random_model(LLAMA), tmp_path / "m.gguf", settings=settings)
    with pytest.raises(ModelError, match=match):
        GGUF(tmp_path / "m.gguf")


def test_a_split_model_is_one(tmp_path):
    source = random_model(LLAMA)
    gguf_models.write(source, tmp_path / "m.gguf", split_max_tensors=5)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) > 2
    assert torch.equal(log_probs(hf.load(files[0], torch.float32)), log_probs(source))
    with pytest.raises(ModelError, match="part 2"):
        GGUF(files[1])
    files[2].unlink()
    with pytest.raises(ModelError, match="No such file"):
        GGUF(files[0])
