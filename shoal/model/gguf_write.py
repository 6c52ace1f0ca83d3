"""Models as GGUF files that llama.cpp opens: `write`, tensor by tensor, so that nothing stands in memory twice.

Tensors lie as llama.cpp's converter puts them (gguf.py says what it does to some). Which types they have is decided
here: norms, routers and vectors are f32; of "q4_0" the embedding, the head and the up-projection of the latents are
q8_0; rows that aren't whole blocks are bf16. Numbers are rounded as ggml's reference does, bit for bit. Multi-token
modules are left out, as the converter does.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from struct import pack

import numpy as np
import torch
from torch import Tensor

from shoal.model.config import GQAConfig, Llama3RopeConfig, MLAConfig, ModelConfig
from shoal.model.gguf import interleaved
from shoal.model.gguf_file import KINDS, MAGIC, Entry, Value
from shoal.model.gguf_names import FREQUENCIES, split_name, stored_name
from shoal.model.hf_files import sync
from shoal.model.hf_names import Piece, pieces
from shoal.model.rope import frequencies
from shoal.model.transformer import Transformer

ALIGNMENT = 32
NUMBERS = {kind.name: number for number, kind in KINDS.items()}
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}  # llama.cpp's name of the whole
IN_EIGHT = re.compile(r"(token_embd|output|blk\.\d+\.attn_[kv]_b)\.weight")  # of a file in four bits
ROWS = 4096  # of a matrix that are rounded at once

Read = Callable[[Piece], Tensor]  # a piece's numbers, of any floating type
Make = Callable[[], Iterable[Tensor]]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Planned:
    """A tensor to be written; `make` gives its matrices one after the other."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Make

    @property
    def nbytes(self) -> int:
        return Entry(KINDS[NUMBERS[self.kind]], self.shape, 0, 0).nbytes


def write(path: Path, config: ModelConfig, read: Read, weights: str, settings: Mapping[str, Value]) -> None:
    """`weights` is one of FILE_TYPES; `settings` what gguf_config.settings_of says, and the tokenizer's."""
    tensors = planned(config, read, weights)
    settings = {**settings, "general.quantization_version": 2, "general.file_type": FILE_TYPES[weights]}
    head = MAGIC + pack("<IQQ", 3, len(tensors), len(settings))
    head += b"".join(text(name) + value(x) for name, x in settings.items())
    offset = 0
    for t in tensors:
        head += text(t.name) + pack("<I", len(t.shape)) + b"".join(pack("<Q", n) for n in t.shape[::-1])
        head += pack("<IQ", NUMBERS[t.kind], offset)
        offset += padded(t.nbytes)
    with open(path, "wb") as f:
        f.write(head + bytes(padded(len(head)) - len(head)))
        for t in tensors:
            for matrix in t.make():
                for rows in matrix.split(ROWS):
                    f.write(ENCODERS[t.kind](rows.float()).contiguous().view(torch.uint8).numpy().data)
            f.write(bytes(padded(t.nbytes) - t.nbytes))
        sync(f)


def padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def text(s: str) -> bytes:
    data = s.encode()
    return pack("<Q", len(data)) + data


def value(x: Value) -> bytes:
    """Its type and itself. Whole numbers are 32-bit, of arrays as signed ones."""
    if isinstance(x, bool):
        return pack("<I?", 7, x)
    if isinstance(x, int):
        return pack("<II", 4, x)
    if isinstance(x, float):
        return pack("<If", 6, x)
    if isinstance(x, str):
        return pack("<I", 8) + text(x)
    if isinstance(x, np.ndarray):
        return pack("<IIQ", 9, 5, len(x)) + x.astype("<i4").tobytes()
    return pack("<IIQ", 9, 8, len(x)) + b"".join(map(text, x))


def planned(config: ModelConfig, read: Read, weights: str) -> list[Planned]:
    config = replace(config, n_mtp=0)
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    stacks: dict[str, list[Piece]] = {}
    for piece in pieces(config, ((name, tuple(x.shape)) for name, x in state.items())):
        stacks.setdefault(stored_name(piece.name), []).append(piece)

    found = [made for name, stack in stacks.items() for made in laid_out(name, stack, config, read)]
    if isinstance(config.rope_scaling, Llama3RopeConfig):
        factors = frequencies(replace(config, rope_scaling=None))[0] / frequencies(config)[0]
        found.append((FREQUENCIES, tuple(factors.shape), lambda: [factors]))
    return [Planned(name, kind_of(name, shape, weights), shape, make) for name, shape, make in found]


def laid_out(name: str, stack: list[Piece], config: ModelConfig, read: Read) -> Iterator[tuple[str, Shape, Make]]:
    """What becomes of a piece, or of the pieces of all experts: name, shape and matrices of each tensor."""
    piece, a = stack[0], config.attention
    if piece.expert is not None:
        yield name, (len(stack), *piece.shape), lambda: map(read, stack)
    elif name.endswith("attn_kv_b.weight"):
        assert isinstance(a, MLAConfig)
        H, N, V, C = a.n_heads, a.qk_nope_head_dim, a.v_head_dim, a.kv_lora_rank
        yield split_name(name, "k"), (H, C, N), lambda: read(piece).view(H, N + V, C)[:, :N].mT
        yield split_name(name, "v"), (H, V, C), lambda: read(piece).view(H, N + V, C)[:, N:]
    elif is_llama(config) and name.endswith(("attn_q.weight", "attn_k.weight")):
        assert isinstance(a, GQAConfig)
        places = interleaved(piece.shape[0], a.head_dim).argsort()
        yield name, piece.shape, lambda: [read(piece)[places]]
    else:
        yield name, piece.shape, lambda: [torch.atleast_2d(read(piece))]


def is_llama(config: ModelConfig) -> bool:
    return isinstance(config.attention, GQAConfig) and not config.attention.bias


def kind_of(name: str, shape: tuple[int, ...], weights: str) -> str:
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return "f32"
    kind = "q8_0" if weights == "q4_0" and IN_EIGHT.fullmatch(name) else weights
    return "bf16" if shape[-1] % KINDS[NUMBERS[kind]].block else kind


def inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, 1 / scales)


def q8_0(x: Tensor) -> Tensor:
    """d = amax / 127 in fp16, codes rounded half away from zero by the d of fp32."""
    blocks = x.unflatten(-1, (-1, 32))
    d = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * inverse(d)
    whole = scaled.abs().floor()
    codes = scaled.sign() * (whole + (2 * (scaled.abs() - whole)).floor())
    return torch.cat((d.half().view(torch.uint8), codes.to(torch.int8).view(torch.uint8)), -1)


def q4_0(x: Tensor) -> Tensor:
    """The largest of 32 becomes −8: d = it / −8, codes d⁻¹x + 8 from 0 to 15, number i with number i + 16."""
    blocks = x.unflatten(-1, (-1, 32))
    most = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    d = most / -8
    codes = (blocks * inverse(d) + 8.5).clamp(0, 15).to(torch.uint8)
    return torch.cat((d.half().view(torch.uint8), codes[..., :16] | codes[..., 16:] << 4), -1)


ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "f32": lambda x: x,
    "f16": lambda x: x.half(),
    "bf16": lambda x: x.bfloat16(),
    "q8_0": q8_0,
    "q4_0": q4_0,
}
