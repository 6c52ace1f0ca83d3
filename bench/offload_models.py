"""Models larger than the memory they get, with random weights, for us and for llama.cpp: the same numbers in both.

Experts are drawn as codes of 4 bits, one after the other, so the writer needs little memory: our folder holds them as
compressed-tensors (groups of 128, scales bf16), the GGUF as q4_0 (groups of 32, the same scale four times). Scales are
powers of two, so no format rounds them. Embedding, norms, routers and up-projections of latents are in high precision.

What writes into the residual stream is a quarter of the usual size. At full size a deep model of random weights forgets
its tokens and chooses the same experts again and again: with two thirds of them in memory, 94% were found.
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import models
from bench.peers import gguf_file
from shoal.data.config import DataConfig
from shoal.data.corpus import prepare as prepare_corpus
from shoal.data.tokenizer import SPECIALS, Tokenizer
from shoal.model import hf, hf_quantisation
from shoal.model.config import MLAConfig, ModelConfig
from shoal.model.hf_config import to_hf_config
from shoal.model.hf_files import Planned, write_json, write_tensors
from shoal.model.hf_names import Piece
from shoal.model.presets import PRESETS
from shoal.model.transformer import WRITERS
from shoal.ops.quant import Quantised

GROUP = 128
HIGH = ("embed", "router", "norm", "kv_up")  # not in few bits
TRAINED = 8192  # tokens of the tokenizer that texts are spelled with; the vocabulary's others are only there
PLAIN = {"n_mtp": 0, "rope_scaling": None, "max_positions": 4096}

LITE = replace(PRESETS["v2-lite-16b"], **PLAIN)
V3 = replace(PRESETS["v3-671b"], **PLAIN, vocab_size=TRAINED)


def slice_of(config: ModelConfig, mixtures: int, dense: int | None = None) -> ModelConfig:
    """Its first dense layers (all, or so many) and so many mixtures."""
    assert config.moe
    dense = config.moe.n_dense_layers if dense is None else dense
    return replace(config, n_layers=dense + mixtures, moe=replace(config.moe, n_dense_layers=dense))


SHAPES = {
    "lite": LITE,
    # llama.cpp takes a query without latent in 27 layers alone
    "lite-quick": replace(slice_of(LITE, 6), attention=replace(LITE.attention, q_lora_rank=768)),
    "v3-layers": slice_of(V3, 2, dense=1),
    "v3-layers-quick": slice_of(V3, 1, dense=1),
}


def folder(name: str) -> Path:
    return models.FOLDER / f"offload-{name}"


def prepare(name: str) -> Path:
    if not folder(name).exists():
        print(f"drawing the weights of {folder(name)}", flush=True)
        fresh = folder(name).with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        write_folder(SHAPES[name], fresh)
        os.replace(fresh, folder(name))
    return folder(name)


def prepare_gguf(name: str) -> Path:
    path = folder(name).with_suffix(".gguf")
    if not path.exists():
        print(f"writing {path}", flush=True)
        fresh = path.with_suffix(".gguf.new")
        write_gguf(SHAPES[name], fresh)
        os.replace(fresh, path)
    return path


def write_folder(config: ModelConfig, path: Path) -> None:
    torch.set_num_threads(1)  # small matrices, one after the other
    path.mkdir(parents=True)
    skeleton = hf.skeleton(config, torch.bfloat16)
    write_tensors(path, [t for piece in hf.own_pieces(skeleton) for t in planned(piece)], 5 * 10**9)
    raw = to_hf_config(config, "bfloat16", None, None)
    schemes = {
        hf_quantisation.Scheme(4, GROUP): ["Linear"],
        hf_quantisation.Scheme(4, GROUP // 2): ["re:.*down_proj$"],
        hf_quantisation.Scheme(8, GROUP): ["lm_head"],
    }
    raw["quantization_config"] = hf_quantisation.write_packed(schemes, [])
    write_json(path / "config.json", raw)
    tokenizer(config).save(path)


def planned(piece: Piece) -> Iterator[Planned]:
    bits = bits_of(piece)
    if not bits:
        dtype = torch.float32 if is_wide(piece) else torch.bfloat16
        yield Planned(piece.name, dtype, piece.shape, lambda: plain(piece))
        return
    N, K = piece.shape[0], piece.shape[-1]
    name, words, groups = piece.name, (N, K * bits // 32), (N, K // group_of(K))
    yield Planned(f"{name}_packed", torch.int32, words, lambda: quantised(piece).codes.view(torch.int32))
    yield Planned(f"{name}_scale", torch.bfloat16, groups, lambda: quantised(piece).scales)
    yield Planned(f"{name}_shape", torch.int64, (2,), lambda: torch.tensor(piece.shape))


def bits_of(piece: Piece) -> int:
    """0: not quantised."""
    if len(piece.shape) == 1 or any(name in piece.ours for name in HIGH):
        return 0
    return 8 if piece.ours.startswith("head") else 4


def group_of(K: int) -> int:
    return GROUP if K % GROUP == 0 else GROUP // 2


def is_wide(piece: Piece) -> bool:
    return len(piece.shape) == 1 or "router" in piece.ours


def generator(piece: Piece) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(piece.name.encode()))


def plain(piece: Piece) -> Tensor:
    """As `models.random_model` draws them."""
    x = torch.empty(piece.shape, dtype=torch.float32 if is_wide(piece) else torch.bfloat16)
    if piece.ours.endswith("norm.weight"):
        return x.uniform_(0.5, 1.5, generator=generator(piece))
    if piece.ours.endswith("router.bias"):
        return x.normal_(0, 0.1, generator=generator(piece))
    return x.normal_(0, 1 if piece.ours.startswith("embed") else piece.shape[-1] ** -0.5, generator=generator(piece))


@lru_cache(maxsize=1)
def quantised(piece: Piece) -> Quantised:
    N, K = piece.shape[0], piece.shape[-1]
    bits, group = bits_of(piece), group_of(K)
    numbers = np.random.default_rng(zlib.crc32(piece.name.encode()))
    drawn = np.frombuffer(numbers.bytes(N * K * bits // 8), dtype=np.uint8).copy()
    codes = torch.from_numpy(drawn).view(N, -1)
    if bits == 8:
        codes[: len(SPECIALS)] = 128  # what ends a text is never the likeliest
    spread = 2**bits / math.sqrt(12)  # of codes, all equally likely
    scale = 2.0 ** round(math.log2(K**-0.5 / spread)) / (4 if piece.ours.endswith(WRITERS) else 1)
    return Quantised("int4" if bits == 4 else "int8", codes, torch.full((N, K // group), scale).bfloat16(), (1, group))


def tokenizer(config: ModelConfig) -> Tokenizer:
    """One that spells texts, and fillers up to the vocabulary's size."""
    trained = prepare_corpus(DataConfig(vocab_size=TRAINED)).tokenizer
    spec = json.loads(trained.text)
    at = trained.vocab_size
    spec["model"]["vocab"] |= {f"filler{i}": i for i in range(at, config.vocab_size)}
    return Tokenizer(json.dumps(spec, ensure_ascii=False))


def write_gguf(config: ModelConfig, path: Path) -> None:
    import gguf

    torch.set_num_threads(1)
    skeleton = hf.skeleton(config, torch.bfloat16)
    writer = gguf.GGUFWriter(path, "deepseek2")
    gguf_file.describe(writer, skeleton)
    gguf_file.add_tokenizer(writer, tokenizer(config))
    pieces: dict[str, list[Piece]] = {}
    for piece in hf.own_pieces(skeleton):
        pieces.setdefault(piece.ours, []).append(piece)
    named = dict(gguf_file.tensors(skeleton))
    ours = {name: own for own, names in theirs(skeleton).items() for name in names}
    named = {name: x for name, x in named.items() if ours[name] in pieces}  # softmax routers have no bias
    found = [(name, x.shape, kind_of(pieces[ours[name]][0])) for name, x in named.items()]
    for name, shape, kind in found:
        numbers, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        dtype = np.dtype(np.float32 if kind == "F32" else np.int16)
        n = math.prod(shape) // numbers * n_bytes
        writer.add_tensor_info(name, shape, dtype, n, gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape, kind in found:
        writer.write_tensor_data(data(config, name, pieces[ours[name]], tuple(shape), kind))
    writer.close()


def theirs(skeleton) -> dict[str, list[str]]:
    """Our tensors' names: the names of what they become there, in the order of `gguf_file.tensors`."""
    found: dict[str, list[str]] = {}
    names = [name for name, _ in gguf_file.tensors(skeleton)]
    for ours in skeleton.state_dict():
        n = 2 if ours.endswith("attn.kv_up.weight") else 1
        found[ours], names = names[:n], names[n:]
    return found


def kind_of(piece: Piece) -> str:
    return {4: "Q4_0", 8: "Q8_0", 0: "F32" if is_wide(piece) else "BF16"}[bits_of(piece)]


def data(config: ModelConfig, name: str, pieces: list[Piece], shape: tuple[int, ...], kind: str) -> np.ndarray:
    if kind in ("Q4_0", "Q8_0"):
        return np.concatenate([blocks(quantised(piece)) for piece in sorted(pieces, key=order)])
    x = plain(pieces[0])
    if "attn_k_b" in name or "attn_v_b" in name:
        a = config.attention
        assert isinstance(a, MLAConfig)
        x_HXC = x.unflatten(0, (a.n_heads, -1))
        N = a.qk_nope_head_dim
        x = x_HXC[:, :N].transpose(1, 2).contiguous() if "attn_k_b" in name else x_HXC[:, N:].contiguous()
    assert tuple(x.shape) == shape, (name, x.shape, shape)
    return gguf_file.as_numpy(x)


def order(piece: Piece) -> tuple[int, int]:
    return piece.expert or 0, piece.first_row


def blocks(q: Quantised) -> np.ndarray:
    """q4_0 or q8_0: for every 32 numbers a scale in fp16 and the codes; of 4 bits the first 16 are the low halves."""
    N, K = q.shape[0], q.shape[1]
    scales = q.scales.float().repeat_interleave(q.block[1] // 32, 1).half().view(torch.uint8).view(N, K // 32, 2)
    if q.form == "int8":
        codes = (q.codes ^ 128).view(N, K // 32, 32)
    else:
        first, second = q.codes.view(N, K // 32, 2, 8).unbind(2)  # two numbers a byte, of the first 16 and the last
        codes = torch.stack((first & 15 | second << 4, first >> 4 | second & 240), -1).flatten(-2)
    return torch.cat([scales, codes], -1).flatten().numpy()
