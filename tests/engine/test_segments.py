"""A native program whose experts come and go says what the one does whose experts are all there."""

import gc
from dataclasses import replace
from weakref import ref

import pytest
import torch

from shoal.engine import native, split
from shoal.engine.engine import LocalEngine
from shoal.engine.experts import Placed, Store
from shoal.engine.native import Native
from shoal.engine.request import Sampling
from shoal.model.block import Block
from shoal.model.moe import MoE
from shoal.model.transformer import Transformer
from shoal.ops import cpu
from shoal.ops.program import Rows
from shoal.precision import weights
from tests.engine import stored
from tests.engine.models import ids, prompt, request
from tests.engine.test_native import NO_SHARED, V2, V3

pytestmark = pytest.mark.skipif("native" not in cpu.status(), reason=cpu.status())


assert V3.moe
WIDE = replace(
    V3,
    dim=128,
    hidden_dim=128,
    moe=replace(V3.moe, moe_dim=64),
    attention=replace(V3.attention, n_heads=8, q_lora_rank=64),
)


@pytest.mark.parametrize(
    ("config", "form", "n_slots"),
    [
        (V3, "bf16", 3),
        (V2, "fp8", 40),
        (V2, "fp8-bf16", 40),
        (V3, "fp8-ue8m0", 3),
        (NO_SHARED, "bf16", 1),
        (WIDE, "int8", 4),
        (WIDE, "int4", 40),
    ],
)
def test_tokens_are_those_of_the_resident_model(tmp_path, config, form: str, n_slots: int):
    config = replace(config, n_mtp=0)
    m = Transformer(config).init_weights(0)
    path = stored.write(tmp_path / "m", config, form, stored.of(m))
    far, o = split.load(split.examine(path, torch.bfloat16), n_slots, direct=True)
    engines = [LocalEngine(x, deterministic=True) for x in (weights.load(path), far)]
    assert isinstance(engines[1]._runner, Native) and engines[1]._runner.segments
    asked = [request(prompt(n), 9, Sampling(temperature=n % 2, seed=n, logprobs=0)) for n in (20, 3, 70)]
    near, read = ([r.tokens for r in engine.generate(asked)] for engine in engines)
    assert read == near
    s = o.stats()
    assert s.guessed > 0 and (n_slots < 40 or s.found > 0.5 * s.chosen)
    for engine in engines:
        engine.close()
    o.store.close()


def test_experts_of_several_forms_are_left_to_modules(tmp_path, monkeypatch):
    kind = stored.form_of
    monkeypatch.setattr(stored, "form_of", lambda piece, form: "int8" if (piece.expert or 0) % 2 else kind(piece, form))
    config = replace(WIDE, n_mtp=0)
    path = stored.write(tmp_path / "m", config, "int4", stored.of(Transformer(config).init_weights(0)))
    far, o = split.load(split.examine(path, torch.bfloat16), 3, direct=False)
    engines = [LocalEngine(x, deterministic=True) for x in (weights.load(path), far)]
    assert not any(isinstance(engine._runner, Native) for engine in engines)
    near, read = (ids(*engine.generate([request(prompt(9), 6)])) for engine in engines)
    assert read == near
    for engine in engines:
        engine.close()
    o.store.close()


def test_nothing_is_kept_of_experts_that_left(tmp_path, monkeypatch):
    """A budget counts slots, and not what was made of all that were ever in one."""
    made, like = [], Store.like

    def watched(self: Store, expert: int, slot: int = 0) -> Placed:
        found = like(self, expert, slot)
        made.append(ref(found[0]))
        return found

    monkeypatch.setattr(Store, "like", watched)
    config = replace(V2, n_mtp=0)
    path = stored.write(tmp_path / "m", config, "fp8-bf16", stored.of(Transformer(config).init_weights(0)))
    far, o = split.load(split.examine(path, torch.bfloat16), 3, direct=False)
    engine = LocalEngine(far)
    assert isinstance(engine._runner, Native)
    engine.generate([request(prompt(20), 9)])
    gc.collect()
    assert len(made) > 20 and sum(matrix() is not None for matrix in made) <= 3
    engine.close()
    o.store.close()


def test_routes_are_told_and_rows_are_cut(tmp_path, monkeypatch):
    config = replace(V3, n_mtp=0)
    path = stored.write(tmp_path / "m", config, "bf16", stored.of(Transformer(config).init_weights(0)))
    monkeypatch.setattr(native, "MOST", 32)
    far, o = split.load(split.examine(path, torch.bfloat16), 5, direct=False)
    engines = [LocalEngine(x, deterministic=True) for x in (weights.load(path), far)]
    a, b = (engine.generate([request(prompt(70), 5, routes=True)])[0] for engine in engines)
    assert ids(a) == ids(b) and a.routes is not None and b.routes is not None
    assert torch.equal(a.routes, b.routes)
    for engine in engines:
        engine.close()
    o.store.close()


@pytest.mark.parametrize("config", [V3, V2, NO_SHARED])
def test_what_is_foretold_is_the_next_routers_choice_on_the_residual_stream_as_it_is(tmp_path, monkeypatch, config):
    config = replace(config, n_mtp=0)
    path = stored.write(tmp_path / "m", config, "bf16", stored.of(Transformer(config).init_weights(0)))
    far, o = split.load(split.examine(path, torch.bfloat16), 5, direct=False)
    engine = LocalEngine(far, deterministic=True)
    assert isinstance(engine._runner, Native) and engine._runner.segments
    segments, told = engine._runner.segments, []
    mixtures = [block for block in far.layers if isinstance(block, Block) and block.is_moe]
    run, foretell = segments.run, o.foretell

    def running(rows: Rows, n: int):
        told.append(len(rows.tokens))
        run(rows, n)

    def foretelling(mixture: int, experts: set[int]):
        block, x_TD = mixtures[mixture], segments.x_TD[: told[-1]]
        assert isinstance(block.ffn, MoE)
        assert experts == set(block.ffn.router(block.ffn_norm(x_TD)).experts_TK.flatten().tolist())
        told.insert(0, -mixture)
        foretell(mixture, experts)

    monkeypatch.setattr(segments, "run", running)
    monkeypatch.setattr(o, "foretell", foretelling)
    engine.generate([request(prompt(20), 5)])
    assert told.count(20) == 1 and {-n for n in told if n < 0} == set(range(1, len(mixtures)))
    engine.close()
    o.store.close()
