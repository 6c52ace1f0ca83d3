"""Model folders whose matrices are in few bits, as they are published; written tensor by tensor."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from shoal.model import hf, hf_quantisation
from shoal.model.config import ModelConfig
from shoal.model.hf_config import to_hf_config
from shoal.model.hf_files import Planned, write_json, write_tensors
from shoal.model.hf_names import Piece
from shoal.model.transformer import Transformer
from shoal.ops import quant

FP8_SCALES = {"fp8": torch.float32, "fp8-bf16": torch.bfloat16, "fp8-ue8m0": torch.float8_e8m0fnu}  # by form
HIGH = ("embed", "router", "norm", "kv_up")  # stay in high precision


def write(
    folder: Path,
    config: ModelConfig,
    form: str,
    make: Callable[[Piece], Tensor],
    group: int = 32,
    max_shard_bytes: int = 10**9,
) -> Path:
    """`make` gives each piece in high precision; form "bf16" writes them so."""
    folder.mkdir(parents=True)
    model = hf.skeleton(replace(config, n_mtp=0), torch.bfloat16)
    planned = [t for piece in hf.own_pieces(model) for t in tensors(piece, form, make, group)]
    write_tensors(folder, planned, max_shard_bytes)
    raw = to_hf_config(model.config, "bfloat16", None, None)
    if form in FP8_SCALES:
        raw["quantization_config"] = hf_quantisation.write_fp8()
    elif form != "bf16":
        bits = quant.BITS[form]  # type: ignore[index]
        schemes: dict = {hf_quantisation.Scheme(bits, group): ["Linear"], hf_quantisation.Scheme(8, group): ["lm_head"]}
        raw["quantization_config"] = hf_quantisation.write_packed(schemes, [])
    write_json(folder / "config.json", raw)
    return folder


def tensors(piece: Piece, form: str, make: Callable[[Piece], Tensor], group: int) -> Iterator[Planned]:
    made: dict[str, Tensor] = {}

    def part(name: str) -> Tensor:  # a piece is made once, and let go with its last tensor
        if not made:
            made.update(parts(piece, kind, make(piece), group))
        return made.pop(name)

    kind, vector = form_of(piece, form), is_high(piece)
    name, shape = piece.name, piece.shape
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {name: (torch.float32 if vector else torch.bfloat16, shape)}
    if kind in FP8_SCALES:
        blocks = tuple(-(-n // 128) for n in shape)
        found = {name: (quant.FP8, shape), f"{name}_scale_inv": (FP8_SCALES[kind], blocks)}
    elif kind != "bf16":
        N, K = shape[0], shape[-1]
        words, scales = (N, K * (4 if kind == "int4" else 8) // 32), (N, K // group)
        found = {f"{name}_packed": (torch.int32, words), f"{name}_scale": (torch.bfloat16, scales)}
        found[f"{name}_shape"] = (torch.int64, (2,))
    for n, (dtype, size) in found.items():
        yield Planned(n, dtype, size, lambda n=n: part(n))


def is_high(piece: Piece) -> bool:
    return len(piece.shape) < 2 or "router" in piece.ours


def form_of(piece: Piece, form: str) -> str:
    if form == "bf16" or len(piece.shape) < 2 or any(name in piece.ours for name in HIGH):
        return "bf16"
    if piece.ours.startswith("head"):
        return "bf16" if form in FP8_SCALES else "int8"
    return form


def parts(piece: Piece, form: str, x: Tensor, group: int) -> dict[str, Tensor]:
    """The tensors that a piece becomes, by their names."""
    if form == "bf16":
        return {piece.name: x.float() if is_high(piece) else x.bfloat16()}
    if form in FP8_SCALES:
        q = quant.to_fp8(x)
        return {piece.name: q.codes, f"{piece.name}_scale_inv": q.scales.to(FP8_SCALES[form])}
    q = quant.quantise(x, form, group)  # type: ignore[arg-type]
    codes, shape = q.codes.view(torch.int32), torch.tensor(piece.shape)
    return {f"{piece.name}_packed": codes, f"{piece.name}_scale": q.scales, f"{piece.name}_shape": shape}


def of(m: Transformer) -> Callable[[Piece], Tensor]:
    state = m.state_dict()
    return lambda piece: piece.of(state[piece.ours]).detach().clone()
