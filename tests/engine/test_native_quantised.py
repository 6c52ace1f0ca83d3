"""The model as a program with leaves in few bits equals its forward pass with what they stand for."""

from copy import deepcopy
from ctypes import byref, c_int64
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shoal.engine import native
from shoal.engine.attend import Span
from shoal.engine.cache import Cache
from shoal.engine.engine import LocalEngine
from shoal.engine.native import Native, takes
from shoal.engine.request import Sampling
from shoal.model.attend import Packed
from shoal.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from shoal.model.layers import Linear
from shoal.model.moe import Experts
from shoal.model.transformer import Transformer
from shoal.ops import cpu, quant
from shoal.ops.quant import Form
from shoal.plan import fit
from shoal.precision.weights import ABSORBED, QuantisedExperts, QuantisedLinear, replace_leaf
from tests.engine.models import ids, prompt, request

pytestmark = pytest.mark.skipif("native" not in cpu.status(), reason=cpu.status())

LATENT = ModelConfig(
    vocab_size=512,
    dim=96,
    n_layers=2,
    hidden_dim=128,
    attention=MLAConfig(4, 32, 16, 16, 16, q_lora_rank=64),
    moe=MoEConfig(8, 1, 3, 64, n_group=4, topk_group=2, routed_scaling_factor=2.5),
    n_mtp=1,
    max_positions=512,
    init_std=0.1,
)
GROUPED = replace(LATENT, attention=GQAConfig(4, 2, 32, bias=True), moe=None, n_mtp=0)
MOSTLY_EXPERTS = MoEConfig(8, 1, 3, 192, n_dense_layers=0)
DEEP = replace(LATENT, attention=MLAConfig(4, 128, 16, 16, 64), moe=MOSTLY_EXPERTS)
FORMS: list[tuple[Form, int]] = [("fp8", 0), ("int8", 32), ("int4", 32)]
N = 100


def in_few_bits(m: Transformer, form: Form, group: int) -> Transformer:
    for name, leaf in [*m.named_modules()]:
        if isinstance(leaf, Experts):
            F = leaf.down.shape[2]
            parts = [w for g in leaf.gate_up.data for w in g.split(F)] + [*leaf.down.data]
        elif isinstance(leaf, Linear) and not name.endswith((ABSORBED, "head")):
            parts = [leaf.weight.data]
        else:
            continue
        replace_leaf(m, name, [quant.quantise(w, form, group) for w in parts])
    head = quant.quantise(m.head.weight.data, "int8", m.config.dim)
    replace_leaf(m, "head", [head]) if form != "fp8" else None
    return m


def widened(m: Transformer) -> Transformer:
    """With the numbers that codes stand for."""
    m = deepcopy(m).float()
    for name, leaf in [*m.named_modules()]:
        if isinstance(leaf, QuantisedLinear):
            N, K = leaf.weight.shape
            new = Linear(K, N)
            new.weight.data, new.bias = leaf.weight.dequantise(), leaf.bias  # type: ignore[assignment]
        elif isinstance(leaf, QuantisedExperts):
            new = Experts(len(leaf), *leaf.down[0].shape)
            gate_up = [torch.cat([g.dequantise(), u.dequantise()]) for g, u in zip(leaf.gate, leaf.up)]
            new.gate_up.data = torch.stack(gate_up)
            new.down.data = torch.stack([d.dequantise() for d in leaf.down])
        else:
            continue
        above, _, last = name.rpartition(".")
        setattr(m.get_submodule(above), last, new)
    return m


def built(config: ModelConfig, form: Form, group: int, invariant: bool = True) -> tuple[Transformer, Native]:
    m = in_few_bits(Transformer(config).init_weights(0).set_dtype(torch.bfloat16), form, group)
    cache = Cache(config, config.n_layers + config.n_mtp, 8, torch.bfloat16, torch.device("cpu"))
    assert takes(m)
    return m, Native(m, cache, invariant)


def median_error(a: Tensor, b: Tensor) -> Tensor:
    return ((a.double() - b.double()).norm(dim=-1) / b.double().norm(dim=-1)).median()


@torch.no_grad()
@pytest.mark.parametrize("invariant", [True, False])
@pytest.mark.parametrize("config", [LATENT, GROUPED], ids=["latent", "grouped"])
@pytest.mark.parametrize("form, group", FORMS)
def test_a_program_equals_the_forward_pass(config: ModelConfig, form: Form, group: int, invariant: bool):
    m, runner = built(config, form, group, invariant)
    tokens, positions, attend = torch.tensor(prompt(N)), torch.arange(N), Packed([N])
    wide = widened(m)
    plain = widened(m).set_dtype(torch.bfloat16)
    exact, narrow = (x.body(x.embed(tokens), positions, attend)[0] for x in (wide, plain))
    pages, ids = [5, 2], tokens.tolist()
    hidden = torch.cat([runner.body(ids[:7], [Span(0, 7, pages)]), runner.body(ids[7:], [Span(7, N - 7, pages)])])
    coarse = form != "fp8" and not invariant  # chunks' inputs have 8 bits
    assert median_error(hidden, exact) < (3 if coarse else 1.7) * median_error(narrow, exact)
    assert median_error(runner.head(hidden), wide.head(hidden.float())) < 0.01
    if config.n_mtp:
        following = wide.embed(tokens[1:])
        expected = wide.mtp[0](hidden[:-1].float(), following, positions[:-1], Packed([N - 1]))[0]
        ours = runner._module(hidden[:-1], ids[1:], [Span(0, N - 1, pages)])
        assert median_error(ours, expected) < (0.04 if coarse else 0.02)


@torch.no_grad()
@pytest.mark.parametrize("form, group", FORMS)
def test_a_row_is_the_same_in_any_company(form: Form, group: int):
    _, runner = built(LATENT, form, group)
    a, b, at, mixed = prompt(N, 1), prompt(N, 2), 0, []
    whole = runner.body(a, [Span(0, N, [0, 1])])
    for n in (1, 2, 3, 4, 5, 40, 1, N - 56):
        mixed.append(runner.body([*a[at : at + n], b[at]], [Span(at, n, [6, 3]), Span(at, 1, [5, 7])])[:-1])
        at += n
    assert at == N and torch.equal(torch.cat(mixed), whole)
    assert torch.equal(torch.cat([runner.head(whole[i : i + 1]) for i in range(5)]), runner.head(whole)[:5])


def test_streams_say_together_what_each_says_alone():
    engine = LocalEngine(built(LATENT, "int4", 32)[0], deterministic=True)
    asked = [request(prompt(3 + 5 * i, i), 12, Sampling(i % 3 / 2, seed=i, logprobs=0)) for i in range(20)]
    together = engine.generate(asked)
    assert [engine.generate([r])[0].tokens for r in asked[::6]] == [r.tokens for r in together[::6]]
    engine.close()


@pytest.mark.parametrize("few_bits", [True, False])
@pytest.mark.parametrize("config", [LATENT, GROUPED, DEEP], ids=["latent", "grouped", "deep"])
def test_a_threads_room_is_the_one_that_is_planned(config: ModelConfig, few_bits: bool):
    """Of a chunk as long as calls may be; rows of weights in bf16 need none to be arranged in."""
    config = replace(config, n_mtp=0)
    m = Transformer(config).init_weights(0).set_dtype(torch.bfloat16)
    cache = Cache(config, config.n_layers, 8, torch.bfloat16, torch.device("cpu"))
    runner = Native(in_few_bits(m, "int4", 32) if few_bits else m, cache)
    (rows,) = runner._parts(prompt(fit.ROWS), [Span(0, fit.ROWS, list(range(8)))])
    code, n, step = runner._body._whole(), runner._before_head, runner._body._step
    held, longest = runner._body._bring(rows), fit.ROWS
    assert cpu.call("room_for", code, n, byref(step), longest) == fit.attention_room(config, longest)
    arranged = cpu.call("room_for_arranged", code, n, byref(step), byref(c_int64()))
    assert arranged == (fit.arranged_room(config) if few_bits else 0)
    del held


def test_rows_of_body_and_drafter_are_no_more_than_planned():
    config = replace(LATENT, hidden_dim=256)
    m = Transformer(config).init_weights(0).set_dtype(torch.bfloat16)
    runner = Native(m, Cache(config, config.n_layers + 1, 8, torch.bfloat16, torch.device("cpu")))
    assert runner._drafter
    for p in (runner._body, runner._drafter[0]):
        taken, planned = sum(rows.nbytes for rows in p._buffers.values()), fit.rows_bytes(config)
        assert planned / 2 < taken <= planned


def test_leaves_that_kernels_dont_read_are_not_taken():
    m, _ = built(GROUPED, "int8", 32)
    leaf = m.layers[0].get_submodule("ffn.down")
    assert isinstance(leaf, QuantisedLinear)
    leaf.weight = quant.quantise(leaf.weight.dequantise(), "int8", 16)
    assert not takes(m)
    m, _ = built(LATENT, "int8", 32)
    replace_leaf(m, "layers.0.attn.kv_up", [quant.quantise(m.get_parameter("layers.0.attn.kv_up.weight"), "int8", 32)])
    assert not takes(m)


@pytest.mark.parametrize("names", [("gate", "up"), ("down",)])
@pytest.mark.parametrize("form, group", [("int4", 32), ("int8", None)])
def test_experts_that_differ_in_form_or_group_say_what_modules_say(names, form: Form, group: int | None, monkeypatch):
    """A row is made ready once for all experts that it meets, so a program takes none but those of one form."""
    m = in_few_bits(Transformer(LATENT).init_weights(0).set_dtype(torch.bfloat16), "int8", 32)
    for leaf in m.modules():
        for name in names if isinstance(leaf, QuantisedExperts) else ():
            matrices = getattr(leaf, name)
            others = [quant.quantise(w.dequantise(), form, group or w.shape[1]) for w in matrices[1::2]]
            setattr(leaf, name, tuple(w for pair in zip(matrices[0::2], others) for w in pair))
    said = []
    for runs_natively in (takes, lambda _: False):
        monkeypatch.setattr(native, "takes", runs_natively)
        engine = LocalEngine(m, deterministic=True)
        said.append(ids(*engine.generate([request(prompt(9), 8)])))
        engine.close()
    assert said[0] == said[1] and not takes(m)
