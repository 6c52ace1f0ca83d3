"""Log-probabilities against transformers, fp32, random weights: `python -m bench.parity [--quick]`.

For each architecture several random configurations, sequences past the context before stretching. Both directions: a
folder that transformers writes, opened here; and what we write again, opened by transformers. FP8: a block-scaled
folder read against dequantising by hand. The limit is 1e-4 on the largest difference of any log-probability; FP8 must
be equal. `ratio` is ours over the limit, `spread` the smallest and largest over a row's configurations.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from bench.record import emit
from shoal.model import hf
from shoal.model.attend import Packed
from shoal.model.config import GQAConfig, Llama3RopeConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig
from shoal.model.hf_files import Planned, write_json, write_safetensors
from shoal.model.hf_stored import SCALE_INV
from shoal.model.transformer import Transformer

LIMIT = 1e-4
ARCHITECTURES = ("deepseek_v2", "deepseek_v3", "glm4_moe", "qwen2", "llama")


def random_config(architecture: str, seed: int) -> ModelConfig:
    """A small configuration; seeds alternate what the architecture leaves open (query latent, groups, stretching)."""
    r = random.Random(f"{architecture} {seed}")
    latent = architecture.startswith("deepseek")
    a = random_latent(r, q_lora=seed % 2 == 0) if latent else random_grouped(r, architecture)
    yarn = YarnConfig(
        r.choice([2.0, 8.0, 40.0]), r.choice([24, 48]), 32, 1, *r.choice([(1, 1), (0.707, 0.707), (1, 0)])
    )
    llama3 = Llama3RopeConfig(factor=8, original=r.choice([32, 64]))
    return ModelConfig(
        vocab_size=r.choice([160, 257]),
        dim=a.n_heads * r.choice([16, 24]),
        n_layers=r.choice([3, 4]),
        hidden_dim=r.choice([72, 128]),
        attention=a,
        moe=random_moe(r, architecture, grouped=seed % 4 < 2) if latent or architecture == "glm4_moe" else None,
        n_mtp=seed % 2 if architecture == "deepseek_v3" else 0,
        tie_embeddings=not latent and seed % 2 == 1,
        rope_theta=r.choice([1e4, 5e5]),
        rope_scaling=(yarn if latent else llama3) if seed % 3 < 2 else None,
        norm_eps=r.choice([1e-6, 1e-5]),
        max_positions=1024,
    )


def random_latent(r: random.Random, q_lora: bool) -> MLAConfig:
    return MLAConfig(
        n_heads=r.choice([2, 4]),
        kv_lora_rank=r.choice([16, 28]),
        qk_nope_head_dim=r.choice([12, 16]),
        qk_rope_head_dim=r.choice([8, 12]),
        v_head_dim=r.choice([12, 20]),
        q_lora_rank=20 if q_lora else None,
    )


def random_grouped(r: random.Random, architecture: str) -> GQAConfig:
    n_kv = r.choice([1, 2])
    bias = architecture == "qwen2" or (architecture == "glm4_moe" and r.random() < 0.5)
    return GQAConfig(n_kv * r.choice([1, 2, 3]), n_kv, head_dim=r.choice([8, 12]), bias=bias)


def random_moe(r: random.Random, architecture: str, grouped: bool) -> MoEConfig:
    v2 = architecture == "deepseek_v2"
    return MoEConfig(
        n_routed_experts=16,
        n_shared_experts=r.choice([1, 2]),
        n_activated=r.choice([2, 3, 6]),
        moe_dim=r.choice([24, 40]),
        n_dense_layers=r.choice([0, 1]),
        n_group=4 if grouped else 1,
        topk_group=2 if grouped else 1,
        scoring="softmax" if v2 else "sigmoid",
        norm_topk_prob=not v2 and r.random() < 0.7,
        routed_scaling_factor=r.choice([1.0, 2.5]),
    )


@torch.no_grad()
def our_log_probs(model: Transformer, tokens_T: Tensor) -> Tensor:
    T = len(tokens_T)
    return model(tokens_T, torch.arange(T), Packed([T])).log_softmax(-1)


def both_ways(config: ModelConfig, seed: int, length: int, folder: Path) -> tuple[float, float]:
    """Largest differences (ours from their folder, theirs from our folder) over every position and token."""
    from bench.peers.transformers_model import log_probs, open_folder, random_peer

    tokens_T = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))
    peer = random_peer(config, seed)
    peer.save_pretrained(folder / "theirs", max_shard_size="200KB")
    model = hf.load(folder / "theirs", torch.float32)
    hf.save(model, folder / "ours", max_shard_bytes=200_000)
    ours, theirs = our_log_probs(model, tokens_T), log_probs(peer, tokens_T)
    again = log_probs(open_folder(folder / "ours"), tokens_T)
    return (ours - theirs).abs().max().item(), (ours - again).abs().max().item()


def write_fp8(source: Path, target: Path, block: int, seed: int) -> dict[str, Tensor]:
    """Rewrite a folder with its projections in FP8 blocks of random scale; returns, by hand, what each stands for."""
    generator = torch.Generator().manual_seed(seed)
    files, written, expected = hf.TensorFolder(source), [], {}
    for name in files.entries:
        weight = files.read(name)
        if name.endswith("_proj.weight") or name.endswith("_proj_with_mqa.weight"):
            rows, columns = (-(-n // block) for n in weight.shape)
            scale = 0.01 + torch.rand(rows, columns, generator=generator)
            weight = (weight * 64).to(torch.float8_e4m3fn)
            wide = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
            expected[name] = weight.float() * wide[: weight.shape[0], : weight.shape[1]]
            written.append(constant(name + SCALE_INV, scale))
        written.append(constant(name, weight))
    target.mkdir()
    write_safetensors(target / "model.safetensors", written)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    write_json(target / "config.json", config)
    return expected


def constant(name: str, value: Tensor) -> Planned:
    return Planned(name, value.dtype, tuple(value.shape), lambda: value)


def fp8_difference(config: ModelConfig, seed: int, folder: Path) -> float:
    """The largest difference of any weight between reading an FP8 folder and dequantising it by hand. Must be zero."""
    model = Transformer(config).init_weights(seed)
    hf.save(model, folder / "plain")
    expected = write_fp8(folder / "plain", folder / "fp8", block=16, seed=seed)
    state = hf.load(folder / "fp8", torch.float32).state_dict()
    return max(
        (p.of(state[p.ours]) - expected[p.name]).abs().max().item() for p in hf.own_pieces(model) if p.name in expected
    )


def row(name: str, n_configs: int, length: int) -> list[float]:
    found = []
    for seed in range(n_configs):
        with tempfile.TemporaryDirectory() as folder:
            if name == "fp8":
                found.append(fp8_difference(random_config("deepseek_v3", seed), seed, Path(folder)))
            else:
                found.extend(both_ways(random_config(name, seed), seed, length, Path(folder)))
    return found


def main() -> None:
    n_configs, length = (2, 150) if "--quick" in sys.argv[1:] else (12, 600)
    rows = {name: row(name, n_configs, length) for name in (*ARCHITECTURES, "fp8")}
    print(f"{'architecture':14} {'configs':>7} {'length':>6} {'smallest':>9} {'largest':>9} {'limit':>7}")
    limits = [0.0 if name == "fp8" else LIMIT for name in rows]
    for (name, found), limit in zip(rows.items(), limits, strict=True):
        print(f"{name:14} {n_configs:7} {length:6} {min(found):9.1e} {max(found):9.1e} {limit:7.0e}")
    ours = [max(found) for found in rows.values()]
    emit(
        name="parity",
        ratio=[found / LIMIT for found in ours],
        ours=ours,
        peer="transformers",
        spread=[[min(found), max(found)] for found in rows.values()],
        limit=limits,
        rows=list(rows),
        configs=n_configs,
        length=length,
    )


if __name__ == "__main__":
    main()
