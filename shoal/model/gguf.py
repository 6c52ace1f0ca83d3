"""GGUF files: llama.cpp's models, by our names.

`GGUF(path)` opens one (gguf_file), translates its settings (gguf_config) and holds names and shapes against the model;
each matrix is found by the name it has in Hugging Face folders (hf_names), in the bits it is stored in (gguf_blocks).
To `hf.opened` it is what hf_stored.Stored is of a folder, so whatever opens folders opens files. What llama.cpp's
converter did to some tensors is undone:

- Experts are stacked, [E, rows, columns] each of gate, up and down, or gate and up in one: one expert's rows are read.
- The up-projection of the latent is split by head, into keys, transposed so that they can be absorbed into the query,
  and values: put together again, in fp32. Older files have it whole, some have both.
- Queries and keys of `llama` have their rotary halves interleaved: rows are put back. qwen2's and deepseek2's lie as in
  DeepSeek's own files.
- A multi-token module is a block after the last one, with `nextn.` before what a layer has not. Copies of embedding and
  head beside it are passed over: quantised another way, they needn't be equal.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from shoal.errors import ModelError
from shoal.model.config import GQAConfig, Llama3RopeConfig, MLAConfig, ModelConfig
from shoal.model.gguf_blocks import GROUP, GROUP_BYTES, decoded, in_few_bits, joined
from shoal.model.gguf_config import FIX, Settings, model_config
from shoal.model.gguf_file import AGAIN, Entry, GGUFFile
from shoal.model.gguf_names import FREQUENCIES, merged_name, split_name, stored_name
from shoal.model.hf_names import Piece, copies, pieces
from shoal.model.rope import frequencies
from shoal.model.transformer import Transformer
from shoal.ops.quant import Quantised

MOST_EXPERTS = 2**18  # in all layers; V3 has 15,616
NUMBERS_AT_ONCE = 2**19  # that are unpacked together


class GGUF:
    """A checked file: `config`, `metadata`, and every tensor of the model by its name in Hugging Face folders."""

    def __init__(self, path: Path | str):
        """`path` of a .gguf, the first one where there are several. Raises ModelError."""
        self.path = Path(path)
        self.files = GGUFFile(self.path)
        self.metadata, self.entries = self.files.metadata, self.files.entries
        self.config = self._config()
        self._is_as_large_as_it_says()
        with torch.device("meta"):
            state = Transformer(self.config).state_dict()
        self.pieces = {p.name: p for p in pieces(self.config, ((name, tuple(x.shape)) for name, x in state.items()))}
        self._check()

    def place(self, piece: Piece) -> tuple[int, int]:
        """Where it lies: the number of a file, and a byte of it."""
        (name, _), *_ = self._stored(piece)
        return self.entries[name].file, self.entries[name].start

    def n_bytes(self, piece: Piece) -> int:
        """Of what `quantised` makes."""
        (name, _), *_ = self._stored(piece)
        return math.prod(piece.shape) // GROUP * GROUP_BYTES[self.entries[name].kind.name]

    def in_few_bits(self, piece: Piece) -> bool:
        return any(self.entries[name].kind.block > 1 for name, _ in self._stored(piece))

    def quantised(self, piece: Piece, mapped: bool = False) -> Quantised:
        """The matrix in few bits, in memory, since blocks lie in another order than ours: what has no form of ours is
        rounded to int8 (gguf_blocks)."""
        return joined([in_few_bits(rows) for _, rows in self._some_rows(piece)])

    def copy(self, piece: Piece, place: Tensor) -> None:
        """place = the piece's numbers."""
        target = place.view(rows_of(piece.shape), -1)
        for first, rows in self._some_rows(piece):
            target[first : first + rows.shape[0]].copy_(rows.dequantise() if isinstance(rows, Quantised) else rows)

    def _some_rows(self, piece: Piece) -> Iterator[tuple[int, Tensor | Quantised]]:
        """A piece in parts that stay in the processor's cache while they are computed; the row each begins with."""
        N, at_once = rows_of(piece.shape), max(1, NUMBERS_AT_ONCE // piece.shape[-1])
        if len(list(self._stored(piece))) > 1:
            at_once = N
        for first in range(0, N, at_once):
            yield first, self._rows(piece, first, min(at_once, N - first))

    def _config(self) -> ModelConfig:
        s = Settings(self.metadata, str(self.path))
        embedding = self._entry("token_embd.weight")
        n_mtp = s.get("nextn_predict_layers") or 0
        blocks = s.whole("block_count")
        if type(n_mtp) is not int or not 0 <= n_mtp < blocks:
            raise s.bad("nextn_predict_layers", f"fewer than the {blocks} blocks")
        if n_mtp and f"blk.{blocks - n_mtp}.nextn.eh_proj.weight" not in self.entries:
            n_mtp = 0  # settings of the whole model, tensors of its trunk
        tied = "output.weight" not in self.entries
        config = model_config(self.metadata, str(self.path), embedding.shape[0], tied, n_mtp)
        return self._stretched(config) if s.architecture == "llama" and FREQUENCIES in self.entries else config

    def _stretched(self, config: ModelConfig) -> ModelConfig:
        """With Llama-3.1's stretching where its factors are those of the file."""
        factors = self._dense(FREQUENCIES)
        plain, _ = frequencies(config)
        stretched = replace(config, rope_scaling=Llama3RopeConfig(factor=max(1.0, factors.max().item())))
        if config.rope_scaling is None and factors.shape == plain.shape:
            theirs, _ = frequencies(stretched)
            if torch.allclose(plain / factors, theirs, rtol=1e-4):
                return stretched
        expected = "those of Llama-3.1: original 8192, low 1, high 4"
        raise ModelError(f"{self.path}: {FREQUENCIES} has other factors", expected, FIX)

    def _is_as_large_as_it_says(self) -> None:
        """Before anything is made for each layer and expert."""
        c = self.config
        for layer in range(c.n_layers):
            self._entry(f"blk.{layer}.attn_norm.weight")
        if c.moe and c.n_layers * c.moe.n_routed_experts > MOST_EXPERTS:
            got = f"{self.path} says {c.n_layers} layers of {c.moe.n_routed_experts} experts"
            raise disagrees(got, f"at most {MOST_EXPERTS:,} experts")

    def _check(self) -> None:
        used = {FREQUENCIES} if isinstance(self.config.rope_scaling, Llama3RopeConfig) else set()
        for piece in self.pieces.values():
            for name, shape in self._stored(piece):
                found = self._entry(name).shape
                if (1,) * (len(shape) - len(found)) + found != shape:  # ggml drops outer dimensions of one
                    raise disagrees(f"{name} has shape {list(found)}", f"{list(shape)}")
                used.add(name)
        for copy in copies(self.config):
            used.add(stored_name(copy.name))
        used |= {split_name(name, half) for name in used for half in "kv"}  # some files have both
        if extra := sorted(self.entries.keys() - used):
            raise disagrees(f"{self.path} holds {len(extra)} tensors the model has no place for: {extra[0]}", "none")

    def _stored(self, piece: Piece) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The tensors of the file that hold a piece, with the shapes they must have."""
        c, a, name = self.config, self.config.attention, stored_name(piece.name)
        if piece.expert is not None:
            assert c.moe is not None
            rows, columns = piece.shape
            merged = merged_name(name) != name and merged_name(name) in self.entries
            yield merged_name(name) if merged else name, (c.moe.n_routed_experts, rows * (1 + merged), columns)
        elif name.endswith("attn_kv_b.weight") and name not in self.entries:
            assert isinstance(a, MLAConfig)
            yield split_name(name, "k"), (a.n_heads, a.kv_lora_rank, a.qk_nope_head_dim)
            yield split_name(name, "v"), (a.n_heads, a.v_head_dim, a.kv_lora_rank)
        else:
            yield name, piece.shape

    def _entry(self, name: str) -> Entry:
        found = self.entries.get(name)
        if found is None:
            raise disagrees(f"{self.path} has no tensor {name}", "one")
        return found

    def _rows(self, piece: Piece, first: int, n: int) -> Tensor | Quantised:
        """[n, columns] of a piece from its row `first` on."""
        (name, _), *more = stored = list(self._stored(piece))
        if more:
            assert n == rows_of(piece.shape), (piece, first, n)
            keys_HCN, values_HVC = (self._dense(name).view(shape) for name, shape in stored)
            return torch.cat((keys_HCN.mT, values_HVC), 1).flatten(0, 1)
        if piece.expert is not None:
            first += piece.expert * self.entries[name].shape[-2] + (piece.first_row if "gate_up" in name else 0)
        rows = self.files.rows(name, first, n)
        if self.metadata["general.architecture"] == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            assert isinstance(self.config.attention, GQAConfig)
            places = interleaved(rows_of(piece.shape), self.config.attention.head_dim)
            rows = self.files.rows(name, 0, len(places))[places[first : first + n]]
        return decoded(rows, self.entries[name].kind, name)

    def _dense(self, name: str) -> Tensor:
        """A whole tensor: floats as they are, all else in fp32."""
        e = self._entry(name)
        found = decoded(self.files.rows(name, 0, rows_of(e.shape)), e.kind, name)
        return (found.dequantise() if isinstance(found, Quantised) else found).view(e.shape)


def interleaved(n_rows: int, head_dim: int) -> Tensor:
    """Where llama's files keep each row of a query or key matrix: rotary pairs are neighbours there, halves here."""
    return torch.arange(n_rows).view(-1, head_dim // 2, 2).mT.flatten()


def rows_of(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


def disagrees(got: str, expected: str) -> ModelError:
    return ModelError(got, f"{expected}: settings and tensors must agree", AGAIN)
