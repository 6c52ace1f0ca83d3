"""The latent cache: time to first token when the prefix is in it, and the bytes it takes of every token.

    python -m bench.cache [--quick]

Time: the 107.5M shape, bf16, a prompt of 2,048 random tokens and 16 more. In every round the prefix is a fresh one; it
is asked for twice, each time with another end: first nothing of it is known, then all of it. The ratio is within a
round. Bytes: the tensors that the engine allocates, over the tokens they hold; they must equal the formula,
(kv_lora_rank + qk_rope_head_dim) numbers a layer, and the peer is what the same heads would need with keys and values
of their own: n_heads · (qk_nope_head_dim + qk_rope_head_dim + v_head_dim).
"""

import argparse
import random
import time
from statistics import median

import torch

from bench.record import emit
from bench.shape import SHAPE, THREADS
from bench.sides import Ratio
from bench.table import show
from shoal import runtime
from shoal.engine.cache import Cache
from shoal.engine.engine import LocalEngine
from shoal.engine.pages import UNIT
from shoal.engine.request import Request, Sampling, Step
from shoal.model.config import MLAConfig, ModelConfig
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer

PREFIX, SUFFIX = 2048, 16
LIMIT = 0.10
SHAPES = {"107.5M": SHAPE, "DeepSeek-V3": PRESETS["v3-671b"]}
DTYPE = torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds instead of nine")
    rounds = 2 if parser.parse_args().quick else 9
    runtime.setup(THREADS, device="cpu")
    engine = LocalEngine(Transformer(SHAPE).set_dtype(DTYPE).init_weights(0), memory_bytes=2**30)
    draws = random.Random(0)
    pairs = [one_round(engine, draws) for _ in range(1 + rounds)][1:]
    engine.close()
    report([miss for miss, _ in pairs], [hit for _, hit in pairs])


def one_round(engine: LocalEngine, draws: random.Random) -> tuple[float, float]:
    """Seconds to the first token: nothing known, then the prefix known."""
    prefix = [draws.randrange(SHAPE.vocab_size) for _ in range(PREFIX)]
    ends = [[first, *(draws.randrange(SHAPE.vocab_size) for _ in range(SUFFIX - 1))] for first in (1, 2)]
    miss, hit = (first_token(engine, prefix + end, cached) for end, cached in zip(ends, (0, PREFIX)))
    print(f"  {miss:.3f} s, cached {hit:.4f} s", flush=True)
    return miss, hit


def first_token(engine: LocalEngine, tokens: list[int], cached: int) -> float:
    came: list[float] = []

    def sink(step: Step) -> None:
        came.append(time.perf_counter())

    began = time.perf_counter()
    [result] = engine.generate([Request(tuple(tokens), 1, sink, Sampling(temperature=0))])
    assert (result.finish, result.usage.cached) == ("length", cached), result
    return came[0] - began


def bytes_a_token(config: ModelConfig) -> tuple[int, int]:
    """As the engine allocates it; and without MLA."""
    a, pages = config.attention, 4
    assert isinstance(a, MLAConfig)
    cache = Cache(config, config.n_layers, pages, DTYPE, torch.device("cpu"))
    allocated = sum(kept.nbytes for layer in cache.layers for kept in layer)
    ours, rest = divmod(allocated, pages * UNIT)
    assert (ours, rest) == ((a.kv_lora_rank + a.qk_rope_head_dim) * config.n_layers * DTYPE.itemsize, 0)
    heads = a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)
    return ours, heads * config.n_layers * DTYPE.itemsize


def report(misses: list[float], hits: list[float]) -> None:
    ratio = Ratio.of(hits, misses)
    show(
        [f"first token after {PREFIX:,} + {SUFFIX}", "median", "least", "most"],
        [
            ["nothing known, s", median(misses), min(misses), max(misses)],
            ["prefix cached, s", median(hits), min(hits), max(hits)],
            ["ratio", ratio.median, *ratio.spread],
        ],
    )
    sizes = {name: bytes_a_token(config) for name, config in SHAPES.items()}
    print()
    show(
        ["bytes a token, bf16", "layers", "latent, a layer", "latent", "heads, a layer", "heads", "ratio"],
        [
            [name, n := SHAPES[name].n_layers, ours // n, ours, heads // n, heads, heads / ours]
            for name, (ours, heads) in sizes.items()
        ],
    )
    emit(
        "cache",
        rows=["cached prefix", *(f"bytes a token, {name}" for name in sizes)],
        ratio=[ratio.median, *(ours / heads for ours, heads in sizes.values())],
        ours=[median(hits), *(ours for ours, _ in sizes.values())],
        peer=[median(misses), *(heads for _, heads in sizes.values())],
        spread=[ratio.spread, *([None] * len(sizes))],
        limit=[LIMIT, *([None] * len(sizes))],
        units=["seconds", *(["bytes"] * len(sizes))],
        rounds=len(hits),
        threads=THREADS,
    )


if __name__ == "__main__":
    main()
