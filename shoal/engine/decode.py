"""The model as a program for few rows at a time: every decoding step, and in deterministic mode everything.

The same weights, where they lie, and the same cache; only the calls between them are gone (ops/program.py says why that
matters). One row costs what it costs to read the weights it meets. A row's numbers don't depend on the rows beside it,
so what goes this way is the same in any batch.

Written from the modules of shoal/model, line by line; their forward pass is the slow twin that tests compare with.
Shapes: T rows, D model, R rows drawn from, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shoal.engine.attend import Span
from shoal.engine.cache import Cache
from shoal.engine.pages import UNIT
from shoal.model.block import Block
from shoal.model.gqa import GroupedAttention
from shoal.model.layers import Embedding, Linear, RMSNorm, SwiGLU
from shoal.model.mla import LATENT_EPS, LatentAttention
from shoal.model.moe import Experts, Local, MoE, Router
from shoal.model.mtp import MTP
from shoal.model.rope import angles
from shoal.model.transformer import Transformer
from shoal.ops import cpu
from shoal.ops.program import Program, Routing, Rows

MOST = 64  # rows in a call; more are cut
ITS_OWN = {Transformer, Block, MTP, LatentAttention, GroupedAttention, MoE, SwiGLU, nn.ModuleList}
ITS_OWN |= {Embedding, Linear, RMSNorm, Experts, Router}


def takes(model: Transformer) -> bool:
    """Whether the model runs as a program here: bf16, native kernels, no part of it replaced from outside."""
    own = all(type(m) in ITS_OWN and isinstance(getattr(m, "dispatcher", None), Local | None) for m in model.modules())
    sizes = [size for p in model.parameters() if p.dtype is torch.bfloat16 and p.dim() > 1 for size in p.shape[-2:]]
    a = model.config.attention
    heads = [getattr(a, name, 16) for name in ("kv_lora_rank", "qk_rope_head_dim", "v_head_dim", "head_dim")]
    return own and cpu.takes(model.embed.weight, *sizes, *heads)


class Decoder:
    """Programs over a model's weights and a cache."""

    def __init__(self, model: Transformer, cache: Cache):
        assert takes(model)
        self.model, self.cache = model, cache
        n_positions = len(cache.layers[0][0]) * UNIT
        self.angles = angles(torch.arange(min(n_positions, model.config.max_positions)), model.config)
        self._body, self._hidden = self._write_body()
        self._head, self._drawn, self._logits = self._write_head()
        self._module = self._write_module() if len(cache.layers) > model.config.n_layers else None

    def body(self, tokens: Sequence[int], spans: Sequence[Span]) -> Tensor:
        """Hidden states after the final norm [T, D]; the cache's rows are written."""
        hidden = []
        for part in parts(rows_of(tokens, spans)):
            self._body.run(part)
            hidden.append(self._hidden[: len(part.tokens)].clone())
        return torch.cat(hidden)

    def module(self, hidden_TD: Tensor, following: Sequence[int], spans: Sequence[Span]) -> Tensor:
        """The multi-token module's hidden states [T, D], from the model's and the tokens that follow."""
        assert self._module
        program, given, made = self._module
        out = []
        for part, hidden in zip(parts(rows_of(following, spans)), hidden_TD.split(MOST), strict=True):
            given[: len(hidden)] = hidden
            program.run(part)
            out.append(made[: len(hidden)].clone())
        return torch.cat(out)

    def head(self, hidden_RD: Tensor) -> Tensor:
        """Logits [R, V] in fp32."""
        logits = []
        for rows in hidden_RD.split(MOST):
            self._drawn[: len(rows)] = rows
            self._head.run(Rows(tokens=[0] * len(rows)))
            logits.append(self._logits[: len(rows)].clone())
        return torch.cat(logits) if logits else hidden_RD.new_empty(0, self._logits.shape[1], dtype=torch.float32)

    def _write_body(self) -> tuple[Program, Tensor]:
        p, m = Program(MOST, self.angles), self.model
        x = p.embed(m.embed.weight, "x")
        for block, kept in zip(m.layers, self.cache.layers):
            assert isinstance(block, Block)
            write_block(p, block, x, kept)
        return p, p.norm(x, m.norm.weight, m.norm.eps, "hidden")

    def _write_head(self) -> tuple[Program, Tensor, Tensor]:
        p = Program(MOST)
        x = p.rows("x", self.model.config.dim)
        return p, x, p.linear(x, self.model.head.weight, "logits", wide=True)

    def _write_module(self) -> tuple[Program, Tensor, Tensor]:
        p, m, module = Program(MOST, self.angles), self.model, self.model.mtp[0]
        assert isinstance(module, MTP)
        D = m.config.dim
        given, both = p.rows("given", D), p.rows("both", 2 * D)
        e = p.embed(m.embed.weight, "e")
        p.norm(e, module.embed_norm.weight, module.embed_norm.eps, both[:, :D], beside=True)
        p.norm(given, module.hidden_norm.weight, module.hidden_norm.eps, both[:, D:])
        x = p.linear(both, module.proj.weight, "x")
        write_block(p, module.block, x, self.cache.layers[m.config.n_layers])
        return p, given, p.norm(x, module.norm.weight, module.norm.eps, "hidden")


def rows_of(tokens: Sequence[int], spans: Sequence[Span]) -> Rows:
    return Rows(
        tokens,
        [i for span in spans for i in range(span.start, span.end)],
        [slot for span in spans for slot in span.slots(span.start)],
        [s for s, span in enumerate(spans) for _ in range(span.n)],
        [span.pages for span in spans],
    )


def parts(rows: Rows) -> list[Rows]:
    """At most MOST rows each; a later part sees what an earlier one left in the cache."""
    starts = range(0, len(rows.tokens), MOST)
    return [Rows(*(numbers[at : at + MOST] for numbers in rows[:4]), rows.table) for at in starts]


def write_block(p: Program, block: Block, x: Tensor, kept: tuple[Tensor, ...]) -> None:
    """model/block.py: x + attention(norm x), then x + feed-forward(norm x)."""
    h = p.norm(x, block.attn_norm.weight, block.attn_norm.eps, "h")
    o = write_attention(p, block.attn, h, kept)
    p.linear(o, block.attn.out.weight, onto=x)
    h = p.norm(x, block.ffn_norm.weight, block.ffn_norm.eps, "h")
    if isinstance(block.ffn, MoE):
        write_moe(p, block.ffn, h, x)
    else:
        p.linear(p.gated(h, block.ffn.gate.weight, block.ffn.up.weight, "gated"), block.ffn.down.weight, onto=x)


def write_attention(
    p: Program, attn: LatentAttention | GroupedAttention, h: Tensor, kept: tuple[Tensor, ...]
) -> Tensor:
    if isinstance(attn, LatentAttention):
        return write_latent(p, attn, h, kept[0])
    return write_grouped(p, attn, h, kept[0], kept[1])


def write_latent(p: Program, attn: LatentAttention, h: Tensor, latent_PUW: Tensor) -> Tensor:
    """model/mla.py, its keys and values kept as latents."""
    a = attn.a
    down = p.linear(h, attn.kv_down.weight, "kv_down", beside=True)
    if a.q_lora_rank is None:
        q = p.linear(h, attn.q.weight, "q")
        p.keep_latent(down, attn.kv_norm.weight, LATENT_EPS, latent_PUW)
    else:
        q_down = p.linear(h, attn.q_down.weight, "q_down")
        p.keep_latent(down, attn.kv_norm.weight, LATENT_EPS, latent_PUW, beside=True)
        q = p.linear(p.norm(q_down, attn.q_norm.weight, LATENT_EPS, "q_latent"), attn.q_up.weight, "q")
    return p.attend_latent(q, attn.kv_up.weight, a.n_heads, a.qk_nope_head_dim, latent_PUW, attn.scale, "o")


def write_grouped(p: Program, attn: GroupedAttention, h: Tensor, k_PUGK: Tensor, v_PUGK: Tensor) -> Tensor:
    """model/gqa.py."""
    q = p.linear(h, attn.q.weight, "q", attn.q.bias, beside=True)
    k = p.linear(h, attn.k.weight, "k", attn.k.bias, beside=True)
    v = p.linear(h, attn.v.weight, "v", attn.v.bias)
    p.keep_heads(k, v, k_PUGK, v_PUGK)
    return p.attend_heads(q, k_PUGK, v_PUGK, attn.scale, "o")


def write_moe(p: Program, moe: MoE, h: Tensor, x: Tensor) -> None:
    """model/moe.py: x + Σ weight · expert(h) + shared(h)."""
    c, shared = moe.router.config, None
    r = Routing(
        c.n_routed_experts,
        c.n_activated,
        c.n_group,
        c.topk_group,
        c.scoring == "sigmoid",
        c.norm_topk_prob,
        c.routed_scaling_factor,
    )
    if moe.shared:
        shared = p.gated(h, moe.shared.gate.weight, moe.shared.up.weight, "shared_gated", beside=True)
    p.route(h, moe.router.weight, moe.router.bias, r, beside=shared is not None)
    if moe.shared and shared is not None:
        shared = p.linear(shared, moe.shared.down.weight, "shared")
    gated = p.experts_gated(h, moe.experts.gate_up, c.n_activated, "gated")
    p.weigh(p.experts_down(gated, moe.experts.down, c.n_activated, "chosen"), shared, c.n_activated, onto=x)
