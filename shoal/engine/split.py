"""A model folder opened in two parts: what meets every token is read into memory, routed experts stay on the disk.

`examine` says what the parts weigh before anything is read, so that a budget can be divided; `load` then makes the
model of it, its experts' leaves replaced by `OffloadedExperts` and its embedding by `StoredRows`. The multi-token
module is left out: drafting would meet other experts, and wait for them.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from shoal.engine.experts import Expert, Located, Store, slot_bytes
from shoal.engine.offload import Offload, OffloadedExperts, StoredRows
from shoal.errors import ModelError
from shoal.model import hf
from shoal.model.gguf_config import is_gguf
from shoal.model.hf_files import AGAIN, Entry
from shoal.model.hf_names import Piece
from shoal.model.hf_stored import INTEGERS, PACKED, SCALE, SCALE_INV, WORD_BITS, Stored
from shoal.model.moe import Experts, MoE
from shoal.model.transformer import Transformer
from shoal.ops.quant import FP8
from shoal.precision.weights import LargePages, leaves, put, replace_leaf


class Parts(NamedTuple):
    """A folder that was checked, and what its parts take in memory."""

    model: Transformer  # without memory
    stored: Stored
    experts: list[Expert]  # mixture by mixture
    near_bytes: int  # all but experts and embedding
    embedding_bytes: int  # 0 where it is the head too, and counts there
    slot_bytes: int  # of one expert
    module_bytes: int  # of what is left out, the multi-token module


def examine(folder: Path, dtype: torch.dtype) -> Parts:
    """Raises ModelError."""
    if is_gguf(folder):
        fix = f"write it as one first: shoal import {folder} FOLDER --weights int8"
        raise ModelError(f"a memory budget for {folder}", "a folder, whose matrices can be read one at a time", fix)
    model, stored = hf.opened(folder, dtype)
    assert isinstance(stored, Stored)
    beyond = tuple(f"model.layers.{model.config.n_layers + k}." for k in range(model.config.n_mtp))
    in_module = sum(e.end - e.start for name, e in stored.files.entries.items() if name.startswith(beyond))
    model.mtp, model.config = nn.ModuleList(), replace(model.config, n_mtp=0)
    experts = list(located_experts(model, stored, dtype))
    embedding = 0 if model.config.tie_embeddings else model.embed.weight.nbytes
    near = sum(near_bytes(model, stored)) - embedding
    return Parts(model, stored, experts, near, embedding, slot_bytes(experts) if experts else 0, in_module)


def near_bytes(model: Transformer, stored: Stored) -> Iterator[int]:
    """Of every tensor that isn't an expert's, the embedding among them, in the form it has in memory."""
    few = {piece.ours: piece for pieces in leaves(model, stored).values() for piece in pieces}
    for name, t in model.state_dict().items():
        if ".experts." not in name and not (name == "head.weight" and model.config.tie_embeddings):
            yield located(stored, few[name], t.dtype).nbytes if name in few else t.nbytes


def located_experts(model: Transformer, stored: Stored, dtype: torch.dtype) -> Iterator[Expert]:
    """Gate, up and down of each expert, layer by layer."""
    found: dict[tuple[str, int], dict[str, Located]] = {}
    for piece in hf.own_pieces(model):
        if piece.expert is not None:
            kind = piece.name.rpartition(".experts.")[2].split(".")[1]
            layer = piece.ours.rpartition(".")[0]
            found.setdefault((layer, piece.expert), {})[kind] = located(stored, piece, dtype)
    for matrices in found.values():
        yield matrices["gate_proj"], matrices["up_proj"], matrices["down_proj"]


def located(stored: Stored, piece: Piece, dtype: torch.dtype) -> Located:
    """Where a matrix lies, in few bits or in `dtype`."""
    entries, N, K = stored.files.entries, piece.shape[0], piece.shape[1]
    codes = entries.get(piece.name) or entries[piece.name + PACKED]
    if codes.dtype == FP8:
        rows, columns = stored.quantisation.block  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        return aligned(Located(codes, entries[piece.name + SCALE_INV], "fp8", (rows, columns), (N, K)))
    if piece.name not in entries:
        scales = entries[piece.name + SCALE]
        form = INTEGERS[codes.shape[1] * WORD_BITS // K]
        return aligned(Located(codes, scales, form, (1, K // scales.shape[1]), (N, K)))
    if codes.dtype != dtype:
        raise ModelError(f"{piece.name} is {codes.dtype} on the disk", f"{dtype}, or few bits", "use another --dtype")
    return aligned(Located(codes))


def aligned(m: Located) -> Located:
    for e in m.entries():
        if e.start % e.dtype.itemsize:
            raise ModelError(
                f"{e.file}: a tensor begins at byte {e.start:,}", f"a multiple of {e.dtype.itemsize}", AGAIN
            )
    return m


def load(
    parts: Parts, n_slots: int, direct: bool, device: torch.device | str = "cpu", ceiling: int | None = None
) -> tuple[Transformer, Offload]:
    """The model, ready to run. At no time is there more in memory than at the end, but for one dequantised matrix."""
    model, stored = parts.model, parts.stored
    moe, dtype = model.config.moe, model.embed.weight.dtype
    assert moe
    mixtures = [block.ffn for block in model.layers if isinstance(block.ffn, MoE)]
    keep = LargePages().keep if torch.device(device).type == "cpu" else lambda x: x.to(device)
    for name, pieces in leaves(model, stored).items():
        if not isinstance(model.get_submodule(name), Experts):
            replace_leaf(model, name, [put(stored.quantised(piece, mapped=False), keep) for piece in pieces])
    for mixture in mixtures:
        mixture.experts = nn.Module()  # pyright: ignore[reportAttributeAccessIssue]
    if entry := lookup(parts):
        model.embed = StoredRows(stored.files, entry, dtype, device)  # pyright: ignore[reportAttributeAccessIssue]
    hf.allocate(model, device)
    hf.fill(model, stored)
    store = Store(stored.files, parts.experts, n_slots, direct)
    offload = Offload(store, n_slots, moe.n_routed_experts, moe.n_activated, ceiling)
    for i, mixture in enumerate(mixtures):
        mixture.experts = OffloadedExperts(offload, i)  # pyright: ignore[reportAttributeAccessIssue]
    return model, offload


def lookup(parts: Parts) -> Entry | None:
    """The embedding in the files, where its rows can be looked up there."""
    entry = parts.stored.files.entries.get("model.embed_tokens.weight")
    return entry if entry and not parts.model.config.tie_embeddings else None
