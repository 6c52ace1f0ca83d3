"""The names of our tensors in Hugging Face folders: DeepSeek's own, which Llama, Qwen2 and GLM share. Torch-free.

Two things differ besides names. Our experts are stacked ([E, 2F, D] with the gate's rows first, and [E, D, F]), the
files hold each matrix on its own. And a multi-token module is written as a layer after the last one, with copies of the
model's embedding and head beside it, as published; in the model there is one of each.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shoal.model.config import ModelConfig

OUTER = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.q_down": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_layernorm",
    "attn.q_up": "self_attn.q_b_proj",
    "attn.kv_down": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_norm": "self_attn.kv_a_layernorm",
    "attn.kv_up": "self_attn.kv_b_proj",
    "attn.out": "self_attn.o_proj",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "ffn.router": "mlp.gate",
    "ffn.shared.gate": "mlp.shared_experts.gate_proj",
    "ffn.shared.up": "mlp.shared_experts.up_proj",
    "ffn.shared.down": "mlp.shared_experts.down_proj",
}
MODULE = {"embed_norm": "enorm", "hidden_norm": "hnorm", "proj": "eh_proj", "norm": "shared_head.norm"}


@dataclass(frozen=True)
class Piece:
    """One tensor of the files and its place in ours: all of it, or rows of one expert."""

    name: str
    ours: str
    shape: tuple[int, ...]
    expert: int | None = None
    first_row: int = 0

    def of(self, tensor):
        """This piece's part of our tensor, as a view."""
        if self.expert is None:
            return tensor
        return tensor[self.expert, self.first_row : self.first_row + self.shape[0]]


def pieces(config: ModelConfig, ours: Iterable[tuple[str, tuple[int, ...]]]) -> Iterator[Piece]:
    """What the files hold for our tensors, given their names and shapes: `model.state_dict()`'s, tied head and all."""
    softmax = config.moe is not None and config.moe.scoring == "softmax"
    for name, shape in ours:
        if (name == "head.weight" and config.tie_embeddings) or (name.endswith("router.bias") and softmax):
            continue  # the embedding is the head; V2's router has no bias
        yield from parts(config, name, shape)


def parts(config: ModelConfig, ours: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    where, _, rest = ours.partition(".")
    if where not in ("layers", "mtp"):
        yield Piece(f"{OUTER[where]}.{rest}", ours, shape)
        return
    number, _, rest = rest.partition(".")
    layer = f"model.layers.{int(number) + (config.n_layers if where == 'mtp' else 0)}"
    rest = rest.removeprefix("block.")
    if ".experts." in rest:
        yield from experts(f"{layer}.mlp.experts", ours, shape)
        return
    module, _, leaf = rest.rpartition(".")
    their_leaf = "e_score_correction_bias" if (module, leaf) == ("ffn.router", "bias") else leaf
    yield Piece(f"{layer}.{(LAYER | MODULE)[module]}.{their_leaf}", ours, shape)


def experts(prefix: str, ours: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    E, rows, columns = shape
    for e in range(E):
        if ours.endswith("down"):
            yield Piece(f"{prefix}.{e}.down_proj.weight", ours, (rows, columns), e)
        else:
            yield Piece(f"{prefix}.{e}.gate_proj.weight", ours, (rows // 2, columns), e)
            yield Piece(f"{prefix}.{e}.up_proj.weight", ours, (rows // 2, columns), e, first_row=rows // 2)


def copies(config: ModelConfig) -> Iterator[Piece]:
    """What the files hold a second time: each multi-token module's embedding and head."""
    shape = (config.vocab_size, config.dim)
    for layer in range(config.n_layers, config.n_layers + config.n_mtp):
        yield Piece(f"model.layers.{layer}.embed_tokens.weight", "embed.weight", shape)
        yield Piece(f"model.layers.{layer}.shared_head.head.weight", head_name(config), shape)


def head_name(config: ModelConfig) -> str:
    return "embed.weight" if config.tie_embeddings else "head.weight"
