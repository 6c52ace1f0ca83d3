"""The model as a native program: what computes the engine's steps wherever the machine can.

The same weights, where they lie, and the same cache; only the calls between them are gone (ops/program.py says why that
matters). Single tokens attend absorbed, one row costs what it costs to read the weights it meets. Chunks of prompts
attend rebuilt. But for the chunks a row's numbers don't depend on the rows beside it: `invariant` has none, and what a
request is told is then the same to the last bit whatever else goes on.

Written from the modules of shoal/model, line by line; their forward pass is the slow twin that tests compare with.
Shapes: T rows, D model, A experts chosen, R rows drawn from, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile

import torch
from torch import Tensor, nn

from shoal.data.draws import MASK
from shoal.engine.attend import FEW, Span
from shoal.engine.cache import Cache
from shoal.engine.experts import Located
from shoal.engine.offload import OffloadedExperts, StoredRows
from shoal.engine.pages import UNIT
from shoal.engine.request import Token
from shoal.engine.runner import Runner, ends, spans_of
from shoal.engine.scheduler import Work
from shoal.engine.segments import FORETOLD, Segments
from shoal.model.block import Block
from shoal.model.config import MLAConfig, ModelConfig
from shoal.model.gqa import GroupedAttention
from shoal.model.layers import Embedding, Linear, RMSNorm, SwiGLU
from shoal.model.mla import LATENT_EPS, LatentAttention
from shoal.model.moe import Experts, Local, MoE, Router
from shoal.model.mtp import MTP
from shoal.model.rope import angles
from shoal.model.transformer import Transformer
from shoal.ops import cpu, program
from shoal.ops.program import Choice, Draws, Matrices, Program, Routing, Rows, Weight
from shoal.ops.quant import Quantised
from shoal.precision.weights import QuantisedExperts, QuantisedLinear

MOST = 512  # rows in a call; more are cut
LOGITS_BYTES = 2**25  # of the rows drawn from in a call
ITS_OWN = {Transformer, Block, MTP, LatentAttention, GroupedAttention, MoE, SwiGLU, nn.ModuleList}
ITS_OWN |= {Embedding, Linear, RMSNorm, Experts, Router, QuantisedLinear, QuantisedExperts}
ITS_OWN |= {StoredRows, OffloadedExperts}
HEAD_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim")


def takes(model: Transformer) -> bool:
    """Whether the model runs as a program here: native kernels, no part of it replaced from outside but by weights in
    few bits, matrices in bf16 with norms and routers in fp32 (as `set_dtype` leaves them), sizes that the kernels take.
    """
    modules, a = list(model.modules()), model.config.attention
    few = [q for m in modules for q in in_few_bits(m)]
    absorbed = all(isinstance(m.kv_up, Linear) for m in modules if isinstance(m, LatentAttention))
    own = all(type(m) in ITS_OWN and isinstance(getattr(m, "dispatcher", None), Local | None) for m in modules)
    high = {id(p) for m in modules if isinstance(m, RMSNorm | Router) for p in m.parameters()}
    typed = all(p.dtype is (torch.float32 if id(p) in high else torch.bfloat16) for p in model.parameters())
    far = [matrix for m in modules if isinstance(m, OffloadedExperts) for matrix in m.like()]
    typed &= all(isinstance(matrix, Quantised) or matrix.dtype is torch.bfloat16 for matrix in far)
    sizes = [size for matrix in far for size in matrix.shape]
    sizes += [size for p in model.parameters() if id(p) not in high and p.dim() > 1 for size in p.shape[-2:]]
    heads = [getattr(a, name, 16) for name in HEAD_SIZES]
    few_taken = all(map(program.takes, few)) and all(map(alike, modules))
    return own and absorbed and typed and few_taken and cpu.takes(model.embed.weight, *sizes, *heads)


def alike(module: nn.Module) -> bool:
    """Whether matrices that meet the same rows are of one form and block, since they share what is made of a row: gate
    and up, of all experts of a mixture; and their downs. Files may mix them."""
    if isinstance(module, SwiGLU):
        return of_one_form([module.gate.weight, module.up.weight])
    if isinstance(module, QuantisedExperts):
        return of_one_form([*module.gate, *module.up]) and of_one_form(module.down)
    if isinstance(module, OffloadedExperts):
        gate, up, down = zip(*module.located)
        return of_one_form([*gate, *up]) and of_one_form(down)
    return True


def of_one_form(matrices: Sequence[Weight | Located]) -> bool:
    return len({None if isinstance(m, Tensor) else (m.form, m.block) for m in matrices}) == 1


def in_few_bits(module: nn.Module) -> Sequence[Quantised]:
    """A leaf's own matrices."""
    if isinstance(module, QuantisedLinear):
        return (module.weight,)
    if isinstance(module, OffloadedExperts):
        return [matrix for matrix in module.like() if isinstance(matrix, Quantised)]
    return (*module.gate, *module.up, *module.down) if isinstance(module, QuantisedExperts) else ()


class Native(Runner):
    most_steps = 16

    def __init__(self, model: Transformer, cache: Cache, invariant: bool = False):
        super().__init__(model, cache)
        assert takes(model)
        self.invariant, self.few = invariant, rows_that_attend_alone(model.config)
        n_positions = len(cache.layers[0][0]) * UNIT
        self.angles = angles(torch.arange(min(n_positions, model.config.max_positions)), model.config)
        for p in model.parameters():
            cpu.collapse(p)
        for kept in (kept for layer in cache.layers for kept in layer):
            cpu.prefer_huge(kept)
        V = model.config.vocab_size
        self.most_drawn = min(MOST, max(1, LOGITS_BYTES // (4 * V)))
        self._logits = torch.zeros(self.most_drawn, V)
        n_chosen = [block.ffn.router.config.n_activated for block in model.layers if isinstance(block.ffn, MoE)]
        self._chosen = torch.zeros(MOST, len(n_chosen), max(n_chosen, default=0), dtype=torch.int16)
        self._body, self._hidden, self._before_head, self._before_draw = self._write_body()
        stored, far = isinstance(model.embed, StoredRows), any(type(m) is OffloadedExperts for m in model.modules())
        self.segments = Segments(model, self._body, self._body.rows("x", model.config.dim), stored) if far else None
        self._head, self._drawn = self._write_head()
        self._drafter = self._write_module() if len(cache.layers) > model.config.n_layers else None

    def run(self, work: Sequence[Work], chosen: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """In one call where all rows are drawn from: that is, while streams decode."""
        n = sum(len(w.tokens) for w in work)
        if n > self.most_drawn or n > sum(w.draws for w in work):
            return super().run(work, chosen)
        (rows,) = self._parts([t for w in work for t in w.tokens], spans_of(work))
        self._run_body(rows, self._before_draw)
        if chosen is not None:
            chosen.append(self._chosen[:n].clone())
        return self._hidden[:n].clone(), self._logits[:n].clone()

    def steps(
        self, work: Sequence[Work], steps: int, states: bool, chosen: list[Tensor] | None = None
    ) -> tuple[list[list[Token]], list[Tensor]]:
        """Up to so many steps in one call, of at most `most_drawn` streams that are `plain`: the tokens of each, and
        its hidden states [n, D] where those are wanted. A stream that ends, or has filled its pages, has fewer; all
        have where numbers aren't finite."""
        streams = [w.stream for w in work]
        how = [s.request.sampling for s in streams]
        draws = Draws(
            [h.temperature for h in how],
            [s.seed & MASK for s in streams],
            [h.logprobs is not None for h in how],
            [min(s.limit - len(s.tokens), len(s.pages) * UNIT - s.computed, steps) for s in streams],
            [s.request.stop_tokens for s in streams],
        )
        (rows,) = self._parts([w.tokens[0] for w in work], spans_of(work))
        keep = [self._hidden] * states + [self._chosen] * (chosen is not None)
        taken, drawn, logprobs, kept = self._body.run_steps(rows, draws, steps, keep)
        parts = [[rows_SN[i, :n] for i, n in enumerate(taken)] for rows_SN in kept]
        if chosen is not None:
            chosen += parts[-1]
        tokens = [
            [*map(Token, its[:n], its_logprobs)] if wanted else [*map(Token, its[:n])]
            for n, its, its_logprobs, wanted in zip(taken, drawn.tolist(), logprobs.tolist(), draws.counted)
        ]
        return tokens, parts[0] if states else []

    def body(self, tokens: Sequence[int], spans: Sequence[Span], chosen: list[Tensor] | None = None) -> Tensor:
        hidden = []
        for rows in self._parts(tokens, spans):
            self._run_body(rows, self._before_head)
            hidden.append(self._hidden[: len(rows.tokens)].clone())
            if chosen is not None:
                chosen.append(self._chosen[: len(rows.tokens)].clone())
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def _run_body(self, rows: Rows, n: int) -> None:
        if self.segments:
            self.segments.run(rows, n)
        else:
            self._body.run(rows, n)

    def module(
        self, hidden_TD: Tensor, following: Sequence[int], spans: Sequence[Span], drawn: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        """In one call where rows are few; those that aren't drawn from then have logits, too."""
        if len(following) > self.most_drawn:
            return super().module(hidden_TD, following, spans, drawn)
        made = self._run_module(hidden_TD, following, spans, with_head=True)
        last = ends(spans, drawn)
        return made[last], self._logits[last]

    def _module(self, hidden_TD: Tensor, following: Sequence[int], spans: Sequence[Span]) -> Tensor:
        return self._run_module(hidden_TD, following, spans, with_head=False)

    def _run_module(
        self, hidden_TD: Tensor, following: Sequence[int], spans: Sequence[Span], with_head: bool
    ) -> Tensor:
        assert self._drafter
        program, given, made, before_head = self._drafter
        hidden = []
        for rows, given_TD in zip(self._parts(following, spans), hidden_TD.split(MOST), strict=True):
            given[: len(given_TD)] = given_TD
            program.run(rows, None if with_head else before_head)
            hidden.append(made[: len(given_TD)].clone())
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def head(self, hidden_RD: Tensor) -> Tensor:
        logits = [hidden_RD.new_empty(0, self.model.config.vocab_size, dtype=torch.float32)]
        for rows in hidden_RD.split(self.most_drawn) if len(hidden_RD) else ():
            self._drawn[: len(rows)] = rows
            self._head.run(Rows(tokens=[0] * len(rows)))
            logits.append(self._logits[: len(rows)].clone())
        return logits[1] if len(logits) == 2 else torch.cat(logits)

    def _parts(self, tokens: Sequence[int], spans: Sequence[Span]) -> Iterator[Rows]:
        """At most MOST rows each; a later part sees what an earlier one left in the cache."""
        at = 0
        for part in cut(spans, MOST):
            n = sum(span.n for span in part)
            few = len(part) if self.invariant else sum(1 for _ in takewhile(lambda span: span.n <= self.few, part))
            yield Rows(
                tokens[at : at + n],
                [i for span in part for i in range(span.start, span.end)],
                [slot for span in part for slot in span.slots(span.start)],
                [s for s, span in enumerate(part) for _ in range(span.n)],
                [span.pages for span in part],
                [span.n for span in part[few:]],
            )
            at += n

    def _write_body(self) -> tuple[Program, Tensor, int, int]:
        p, m = Program(MOST, self.angles), self.model
        x = p.embed(m.embed.weight, "x") if isinstance(m.embed, Embedding) else p.rows("x", m.config.dim)
        chosen, blocks = iter(self._chosen.unbind(1)), [block for block in m.layers if isinstance(block, Block)]
        for block, following, kept in zip(blocks, [*blocks[1:], None], self.cache.layers):
            write_block(p, block, x, kept, next(chosen) if isinstance(block.ffn, MoE) else None, following)
        hidden = p.norm(x, m.norm.weight, m.norm.eps, "hidden")
        before_head = len(p)
        p.linear(hidden, m.head.weight, self._logits)
        before_draw = len(p)
        p.draw(self._logits)
        return p, hidden, before_head, before_draw

    def _write_head(self) -> tuple[Program, Tensor]:
        p = Program(self.most_drawn)
        x = p.rows("x", self.model.config.dim)
        p.linear(x, self.model.head.weight, self._logits)
        return p, x

    def _write_module(self) -> tuple[Program, Tensor, Tensor, int]:
        p, m, module = Program(MOST, self.angles), self.model, self.model.mtp[0]
        assert isinstance(module, MTP)
        D = m.config.dim
        given, both = p.rows("given", D), p.rows("both", 2 * D)
        e = p.embed(m.embed.weight, "e")
        p.norm(e, module.embed_norm.weight, module.embed_norm.eps, both[:, :D], beside=True)
        p.norm(given, module.hidden_norm.weight, module.hidden_norm.eps, both[:, D:])
        x = p.linear(both, module.proj.weight, "x")
        write_block(p, module.block, x, self.cache.layers[m.config.n_layers])
        made = p.norm(x, module.norm.weight, module.norm.eps, "hidden")
        before_head = len(p)
        p.linear(made, m.head.weight, self._logits)
        return p, given, made, before_head


def rows_that_attend_alone(config: ModelConfig) -> int:
    """Of a stream in a step. More are a chunk: for latent attention, where they repay the rebuilding of all keys and
    values; alone, a row takes about twice as long for a multiplication."""
    a = config.attention
    if not isinstance(a, MLAConfig):
        return FEW
    C, R = a.kv_lora_rank, a.qk_rope_head_dim
    return C * (a.qk_nope_head_dim + a.v_head_dim) // (2 * (C + R + C))


def cut(spans: Sequence[Span], most: int) -> Iterator[list[Span]]:
    """The same tokens in the same order, at most so many in a part."""
    part, room = [], most
    for start, n, pages in spans:
        while n:
            taken = min(n, room)
            part.append(Span(start, taken, pages))
            start, n, room = start + taken, n - taken, room - taken
            if not room:
                yield part
                part, room = [], most
    if part:
        yield part


def write_block(
    p: Program,
    block: Block,
    x: Tensor,
    kept: tuple[Tensor, ...],
    chosen_TA: Tensor | None = None,
    following: Block | None = None,
) -> None:
    """model/block.py: x + attention(norm x), then x + feed-forward(norm x). Where experts come and go the `following`
    block's choice is foretold, by its own norm and router on the residual stream as it is then."""
    h = p.norm(x, block.attn_norm.weight, block.attn_norm.eps, "h")
    o = write_attention(p, block.attn, h, kept)
    p.linear(o, block.attn.out.weight, x, add=True)
    foretold = None
    if isinstance(block.ffn, MoE) and isinstance(block.ffn.experts, OffloadedExperts) and following:
        foretold = write_foretold(p, following, x)
    h = p.norm(x, block.ffn_norm.weight, block.ffn_norm.eps, "h")
    if isinstance(block.ffn, MoE):
        write_moe(p, block.ffn, h, x, chosen_TA, foretold)
    else:
        p.linear(p.gated(h, block.ffn.gate.weight, block.ffn.up.weight, "gated"), block.ffn.down.weight, x, add=True)


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


def write_foretold(p: Program, block: Block, x: Tensor) -> Choice:
    """What the block would choose if x came to its feed-forward as it is; see Segments."""
    assert isinstance(block.ffn, MoE)
    h = p.norm(x, block.ffn_norm.weight, block.ffn_norm.eps, "foretold h", beside=True)
    router = block.ffn.router
    foretold_TA = p.rows(FORETOLD, router.config.n_activated, torch.int16)
    return Choice(h, router.weight, router.bias, foretold_TA)


def write_moe(
    p: Program, moe: MoE, h: Tensor, x: Tensor, chosen_TA: Tensor | None, foretold: Choice | None = None
) -> None:
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
    choice = Choice(h, moe.router.weight, moe.router.bias, chosen_TA)
    p.route(choice, r, beside=shared is not None, foretold=foretold)
    if moe.shared and shared is not None:
        shared = p.linear(shared, moe.shared.down.weight, "shared")
    experts = experts_of(moe.experts)
    gated = p.experts_gated(h, experts, c.n_activated, "gated")
    p.weigh(p.experts_down(gated, experts, c.n_activated, "chosen"), shared, c.n_activated, onto=x)


def experts_of(module: Experts | QuantisedExperts | OffloadedExperts) -> Matrices:
    if isinstance(module, OffloadedExperts):
        _, _, down = module.like()
        return Matrices(len(module.down), *down.shape)
    if isinstance(module, Experts):
        return Matrices.stacked(module.gate_up, module.down)
    made = Matrices(len(module), *module.down[0].shape)
    for e, matrices in enumerate(zip(module.gate, module.up, module.down, strict=True)):
        made.place(e, *matrices)
    return made
