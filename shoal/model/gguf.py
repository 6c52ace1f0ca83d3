"""GGUF files: llama.cpp's models, by our names.

`GGUF(path)` opens one (gguf_file), translates its settings (gguf_config) and holds names and shapes against the model;
`tensor` gives each matrix by the name it has in Hugging Face folders (hf_names), in the bits it is stored in
(gguf_blocks). To `hf.opened` it is what hf_stored.Stored is of a folder, so whatever opens folders opens files. What
llama.cpp's converter did to some tensors is undone:

- Experts are stacked, [E, rows, columns] each of gate, up and down, or gate and up in one: one expert's rows are read.
- The up-projection of the latent is split by head, into keys, transposed so that they can be absorbed into the query,
  and values: put together again, in fp32. Older files have it whole, some have both.
- Queries and keys of `llama` have their rotary halves interleaved: rows are put back. qwen2's and deepseek2's lie as in
  DeepSeek's own files.
- A multi-token module is a block after the last one, with `nextn.` before what a layer has not. Copies of embedding and
  head beside it are passed over: quantised another way, they needn't be equal.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from shoal.errors import ModelError
from shoal.model.config import GQAConfig, Llama3RopeConfig, MLAConfig, ModelConfig
from shoal.model.gguf_blocks import decoded, in_few_bits
from shoal.model.gguf_config import FIX, Settings, model_config
from shoal.model.gguf_file import AGAIN, Entry, GGUFFile
from shoal.model.hf_names import Piece, copies, pieces
from shoal.model.rope import frequencies
from shoal.model.transformer import Transformer
from shoal.ops.quant import Quantised

OUTER = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "eh_proj": "nextn.eh_proj",
    "shared_head.norm": "nextn.shared_head_norm",
    "shared_head.head": "nextn.shared_head_head",
    "embed_tokens": "nextn.embed_tokens",
}
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
OF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
FREQUENCIES = "rope_freqs.weight"
NUMBERS_AT_ONCE = 2**24  # that `copy` computes in fp32


class GGUF:
    """A checked file: `config`, `metadata`, and every tensor of the model by its name in Hugging Face folders."""

    def __init__(self, path: Path | str):
        """`path` of a .gguf, the first one where there are several. Raises ModelError."""
        self.path = Path(path)
        self.files = GGUFFile(self.path)
        self.metadata, self.entries = self.files.metadata, self.files.entries
        self.config = self._config()
        with torch.device("meta"):
            state = Transformer(self.config).state_dict()
        self.pieces = {p.name: p for p in pieces(self.config, ((name, tuple(x.shape)) for name, x in state.items()))}
        self._check()

    def tensor(self, name: str) -> Tensor | Quantised:
        """As it is stored where we have a form for it, else fp32. Stored floats are the mapped file: reading only."""
        piece = self.pieces[name]
        found = self._rows(piece, 0, rows_of(piece.shape))
        return found if isinstance(found, Quantised) else found.view(piece.shape)

    def place(self, piece: Piece) -> tuple[int, int]:
        """Where it lies: the number of a file, and a byte of it."""
        (name, _), *_ = self._stored(piece)
        return self.entries[name].file, self.entries[name].start

    def in_few_bits(self, piece: Piece) -> bool:
        return any(self.entries[name].kind.block > 1 for name, _ in self._stored(piece))

    def quantised(self, piece: Piece) -> Quantised:
        """The matrix in few bits, in memory: what has no form of ours is rounded to int8 (gguf_blocks)."""
        return in_few_bits(self.tensor(piece.name))

    def copy(self, piece: Piece, place: Tensor) -> None:
        """place = the piece's numbers, some rows at a time."""
        N, at_once = rows_of(piece.shape), max(1, NUMBERS_AT_ONCE // piece.shape[-1])
        if piece.name.endswith("kv_b_proj.weight"):
            at_once = N
        target = place.view(N, -1)
        for first in range(0, N, at_once):
            rows = self._rows(piece, first, min(at_once, N - first))
            target[first : first + at_once].copy_(rows.dequantise() if isinstance(rows, Quantised) else rows)

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

    def _check(self) -> None:
        used = {FREQUENCIES} if isinstance(self.config.rope_scaling, Llama3RopeConfig) else set()
        for piece in self.pieces.values():
            for name, shape in self._stored(piece):
                found = self._entry(name).shape
                if (1,) * (len(shape) - len(found)) + found != shape:  # ggml drops outer dimensions of one
                    raise disagrees(f"{name} has shape {list(found)}", f"{list(shape)}")
                used.add(name)
        for copy in copies(self.config):
            used.add(self._name(copy.name))
        used |= {name.replace("attn_kv_b", f"attn_{x}_b") for name in used for x in "kv" if "attn_kv_b" in name}
        if extra := sorted(self.entries.keys() - used):
            raise disagrees(f"{self.path} holds {len(extra)} tensors the model has no place for: {extra[0]}", "none")

    def _stored(self, piece: Piece) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The tensors of the file that hold a piece, with the shapes they must have."""
        rest = piece.name.partition("model.layers.")[2].partition(".")[2]
        if expert := EXPERT.fullmatch(rest):
            c = self.config
            assert c.moe is not None
            name = self._stack(piece.name, expert[2])
            rows, columns = piece.shape
            yield name, (c.moe.n_routed_experts, rows * (2 if "gate_up" in name else 1), columns)
        elif (name := self._name(piece.name)).endswith("attn_kv_b.weight") and name not in self.entries:
            a = self.config.attention
            assert isinstance(a, MLAConfig)
            yield name.replace("kv_b", "k_b"), (a.n_heads, a.kv_lora_rank, a.qk_nope_head_dim)
            yield name.replace("kv_b", "v_b"), (a.n_heads, a.v_head_dim, a.kv_lora_rank)
        else:
            yield name, piece.shape

    def _name(self, name: str) -> str:
        """Of the tensor that a piece has to itself."""
        found = OF_LAYER.fullmatch(name)
        if found is None:
            return f"{OUTER[name]}.weight"
        if found[2] == "mlp.gate.e_score_correction_bias":
            return f"blk.{found[1]}.exp_probs_b.bias"
        module, _, leaf = found[2].rpartition(".")
        return f"blk.{found[1]}.{LAYER[module]}.{leaf}"

    def _stack(self, name: str, which: str) -> str:
        """Of all experts' matrices."""
        layer = f"blk.{name.split('.')[2]}"
        merged = f"{layer}.ffn_gate_up_exps.weight"
        return merged if which != "down" and merged in self.entries else f"{layer}.ffn_{which}_exps.weight"

    def _entry(self, name: str) -> Entry:
        found = self.entries.get(name)
        if found is None:
            raise disagrees(f"{self.path} has no tensor {name}", "one")
        return found

    def _rows(self, piece: Piece, first: int, n: int) -> Tensor | Quantised:
        """[n, columns] of a piece from its row `first` on."""
        name, *values = (name for name, _ in self._stored(piece))
        if values:
            assert n == rows_of(piece.shape), (piece, first, n)
            return self._key_value_up(name, *values)
        if piece.expert is not None:
            first += piece.expert * self.entries[name].shape[-2] + (piece.first_row if "gate_up" in name else 0)
        rows = self.files.rows(name, first, n)
        if self.metadata["general.architecture"] == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            rows = self.files.rows(name, 0, rows_of(piece.shape))[self._interleaved(piece)[first : first + n]]
        return decoded(rows, self.entries[name].kind, name)

    def _interleaved(self, piece: Piece) -> Tensor:
        """Where each row of a query or key matrix is kept: rotary pairs are neighbours there, halves of a head here."""
        assert isinstance(self.config.attention, GQAConfig)
        head_dim = self.config.attention.head_dim
        return torch.arange(piece.shape[0]).view(-1, head_dim // 2, 2).mT.flatten()

    def _key_value_up(self, keys: str, values: str) -> Tensor:
        """[H·(N+V), C] from [H, C, N] and [H, V, C]."""
        up_k_HCN, up_v_HVC = self._dense(keys), self._dense(values)
        return torch.cat((up_k_HCN.mT, up_v_HVC), 1).flatten(0, 1)

    def _dense(self, name: str) -> Tensor:
        """A whole tensor: floats as they are, all else in fp32."""
        e = self._entry(name)
        found = decoded(self.files.rows(name, 0, rows_of(e.shape)), e.kind, name)
        return (found.dequantise() if isinstance(found, Quantised) else found).view(e.shape)


def rows_of(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


def disagrees(got: str, expected: str) -> ModelError:
    return ModelError(got, f"{expected}: settings and tensors must agree", AGAIN)
