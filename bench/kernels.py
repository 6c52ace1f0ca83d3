"""GPU kernels at DeepSeek-V3's shapes: checked, then measured against torch's library and the chip's own memory.

    python -m bench.kernels [--quick]

Products in FP8 under block scales, dense and grouped by expert, forward and to both gradients, in TFLOP/s: against
torch's FP8 product (one scale a row) and its bf16 one. Latent attention of one new token a stream, over ragged
contexts, in GB/s of cache: against copying memory. Few rows against weights in 8 and 4 bits, and tiles fused with the
norm and SwiGLU, likewise and without a limit.

Everything is compiled and tuned on first use, and held against its reference before it is timed; the sides of a ratio
are timed in turns, by the GPU's events, its cache flushed in between. What fails is named, and the others are measured
all the same: GPUs are lent for minutes. Without one nothing is measured.
"""

import argparse
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.record import emit
from bench.sides import Ratio
from bench.table import show
from shoal.engine.pages import UNIT
from shoal.ops import dispatch, quant, quant_tiles, reference
from shoal.ops.quant import FP8, FP8_MOST

DEVICE = "cuda"
# outputs and inputs of q_up, kv_down and q_down in one, out, the dense gate and up, its down, the shared expert's
SHAPES = [(24576, 1536), (2112, 7168), (7168, 16384), (36864, 7168), (7168, 18432), (4096, 7168), (7168, 2048)]
TOKENS = 4096
EXPERTS, EXPERT_ROWS, EXPERT_SHAPES = 32, 256, [(4096, 7168), (7168, 2048)]
STREAMS, CONTEXT, C, R = 64, 8192, 512, 64
HEADS = {"V3": 128, "V2-Lite": 16}
FORMS: tuple[quant.Form, ...] = ("fp8", "int8", "int4")
FEW = 1, 16  # rows that meet weights in these forms
OF_LIBRARY, OF_BF16, OF_MEMORY = 0.8, 1.3, 0.7
ERROR = 4e-3  # of a result in bf16, after sums in a tensor core's 14 bits or with weights in bf16
ERROR_OF_8_BITS = 0.04  # a number is off by 1/16 of itself at most, 1/40 as things go


class Row(NamedTuple):
    name: str
    against: str
    ours: float  # TFLOP/s or GB/s
    peer: float
    ratio: Ratio
    limit: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes of each kind, three rounds instead of seven")
    quick = parser.parse_args().quick
    if (lack := lacking()) is not None:
        raise SystemExit(f"bench.kernels measured nothing and recorded nothing: {lack}")
    torch.manual_seed(0)
    rows, failed = measured(parts(3, SHAPES[-2:]) if quick else parts(7, SHAPES))
    if rows:
        record(rows, failed)
    if failed:
        raise SystemExit(f"bench.kernels: {len(failed)} parts failed: {', '.join(failed)}")


def parts(rounds: int, shapes: Sequence[tuple[int, int]]) -> list[partial[list[Row]]]:
    """What is measured, each by itself."""
    return [
        *(partial(dense, N, K, rounds) for N, K in shapes),
        partial(backward, *SHAPES[-1], rounds),
        *(partial(grouped, N, K, rounds) for N, K in EXPERT_SHAPES),
        *(partial(attention, name, H, rounds) for name, H in HEADS.items()),
        *(partial(streamed, form, M, rounds) for form in FORMS for M in FEW),
        partial(normed, rounds),
        partial(gated, rounds),
    ]


def measured(each: Sequence[partial[list[Row]]]) -> tuple[list[Row], dict[str, str]]:
    """The rows of all parts, told as they come, and by part why one has none."""
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for part in each:
        name, began = " ".join(map(str, (part.func.__name__, *part.args[:-1]))), time.perf_counter()
        try:
            made = part()
        except Exception as e:  # whatever it is, it mustn't cost the others their turn on a GPU
            traceback.print_exc()
            failed[name], made = f"{type(e).__name__}: {e}"[:300], []
        for row in made:
            print(f"{row.name}, against {row.against}: {row.ratio.median:.3f}", flush=True)
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
        rows += made
    return rows, failed


def record(rows: Sequence[Row], failed: dict[str, str]) -> None:
    cells = [[r.name, r.against, r.ours, r.peer, r.ratio.median, *r.ratio.spread, r.limit] for r in rows]
    show(["kernel", "against", "ours", "peer", "ratio", "least", "most", "limit"], cells)
    emit(
        "kernels",
        rows=[f"{r.name}, against {r.against}" for r in rows],
        ratio=[r.ratio.median for r in rows],
        ours=[r.ours for r in rows],
        peer=[r.peer for r in rows],
        spread=[r.ratio.spread for r in rows],
        limit=[r.limit for r in rows],
        unit="TFLOP/s against products, GB/s against memory",
        chip=torch.cuda.get_device_name(),
        tiles=chosen(),
        failed=failed,
    )


def lacking() -> str | None:
    """What this machine would need, or None."""
    if not torch.cuda.is_available():
        return "there is no GPU here. tests/ops/test_triton*.py check the kernels in Triton's interpreter."
    if not dispatch.knows_fp8(torch.device(DEVICE)):
        return f"{torch.cuda.get_device_name()} has no FP8 units; a 4090, an L40S, an H100 or later has."
    return None if find_spec("triton") else "Triton is not installed: pip install -e '.[gpu]'"


def dense(N: int, K: int, rounds: int) -> list[Row]:
    """y = x Wᵀ."""
    from shoal.ops import triton_gemm, triton_quant

    x, w = random(TOKENS, K), random(N, K)
    tiles, weight = triton_quant.rows(x, "fp32"), triton_quant.blocks(w, "fp32")
    ours = lambda: triton_gemm.linear(tiles, weight)  # noqa: E731
    agree(ours(), tiles.dequantise() @ weight.dequantise().mT, ERROR)
    return products(f"linear {TOKENS} × {N} × {K}", TOKENS * N * K, ours, library(x, w), lambda: x @ w.mT, rounds)


def backward(N: int, K: int, rounds: int) -> list[Row]:
    """dx = dy W and dW = dyᵀ x."""
    from shoal.ops import triton_gemm, triton_quant

    x, w, dy, all_rows = random(TOKENS, K), random(N, K), random(TOKENS, N), torch.tensor([TOKENS], device=DEVICE)
    tiles, turned = triton_quant.rows(dy, "fp32"), triton_gemm.turned(triton_quant.blocks(w, "fp32"))
    to_input = lambda: triton_gemm.linear(tiles, turned)  # noqa: E731
    agree(to_input(), tiles.dequantise() @ turned.dequantise().mT, ERROR)
    dy_columns, x_columns = (triton_quant.columns(side, all_rows, "fp32") for side in (dy, x))
    to_weight = lambda: triton_gemm.gradient(dy_columns, x_columns, all_rows, torch.bfloat16)  # noqa: E731
    expected = [quant_tiles.column_tiles(side, [TOKENS], "fp32") for side in (dy, x)]
    agree(to_weight()[0], expected[0].mT @ expected[1], ERROR)
    peers = library(dy, w.mT.contiguous()), library(dy.mT.contiguous(), x.mT.contiguous())
    name, macs = f"{TOKENS} × {N} × {K}", TOKENS * N * K
    return [
        *products(f"to the input {name}", macs, to_input, peers[0], lambda: dy @ w, rounds),
        *products(f"to the weight {name}", macs, to_weight, peers[1], lambda: dy.mT @ x, rounds),
    ]


def grouped(N: int, K: int, rounds: int) -> list[Row]:
    """y = x Wᵀ of each expert's rows, their numbers ragged in steps of 16, which the library wants."""
    from shoal.ops import triton_gemm, triton_quant

    counts_E = torch.randint(1, 2 * EXPERT_ROWS // 16, (EXPERTS,), device=DEVICE) * 16
    M, ends_E = int(counts_E.sum()), counts_E.cumsum(0, dtype=torch.int32)
    x, w = random(M, K), random(EXPERTS, N, K)
    tiles, weight = triton_quant.rows(x, "fp32"), triton_quant.blocks(w, "fp32")
    ours = lambda: triton_gemm.linear(tiles, weight, counts_E)  # noqa: E731
    agree(ours(), reference.grouped_linear(tiles.dequantise(), weight.dequantise(), counts_E), ERROR)
    (x8, x_scales), (w8, w_scales) = by_row(x), by_row(w)
    peer = lambda: torch._scaled_grouped_mm(  # noqa: E731  # pyright: ignore[reportPrivateImportUsage]
        x8, w8.mT, x_scales, w_scales, offs=ends_E, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    plain = lambda: F.grouped_mm(x, w.mT, offs=ends_E)  # noqa: E731
    return products(f"{EXPERTS} experts {M} × {N} × {K}", M * N * K, ours, peer, plain, rounds)


def products(name: str, macs: int, ours: Callable, library: Callable, bf16: Callable, rounds: int) -> list[Row]:
    times = seconds([ours, library, bf16], rounds)
    rate = lambda side: 2 * macs / min(times[side]) / 1e12  # noqa: E731
    peers = ((1, "FP8 library", OF_LIBRARY), (2, "bf16", OF_BF16))
    return [Row(name, against, rate(0), rate(i), Ratio.of(times[i], times[0]), limit) for i, against, limit in peers]


def attention(name: str, H: int, rounds: int) -> list[Row]:
    """One new token of each stream over contexts between half and one and a half times CONTEXT."""
    from shoal.ops import triton_latent

    seen_T = torch.randint(CONTEXT // 2, CONTEXT * 3 // 2, (STREAMS,), device=DEVICE)
    pages = CONTEXT * 3 // 2 // UNIT
    table_TP = torch.randperm(STREAMS * pages, device=DEVICE).view(STREAMS, pages)
    latent_PUW, q_THW = random(STREAMS * pages, UNIT, C + R), random(STREAMS, H, C + R)
    ours = lambda: triton_latent.paged_latent_attention(q_THW, latent_PUW, table_TP, seen_T, C, 0.1)  # noqa: E731
    alone = [(q_THW[t : t + 1].float(), latent_PUW, table_TP[t : t + 1], seen_T[t : t + 1]) for t in range(STREAMS)]
    expected = [reference.paged_latent_attention(*one, C, 0.1) for one in alone]  # all at once need 4 GB and more
    agree(ours(), torch.cat(expected), ERROR)
    read = int(seen_T.sum()) * (C + R) * 2
    return [against_memory(f"{name}'s attention, {STREAMS} streams at {CONTEXT}", ours, read, rounds, OF_MEMORY)]


def streamed(form: quant.Form, M: int, rounds: int) -> list[Row]:
    """Few rows against a weight of a dense layer, kept in few bits: what decoding waits for."""
    from shoal.ops import triton_weights

    N, K = SHAPES[4]
    x, weight = random(M, K), quant.quantise(random(N, K), form)
    ours = lambda: triton_weights.linear(x, weight)  # noqa: E731
    agree(ours(), quant.linear(x, weight), ERROR)
    return [against_memory(f"{form} weights {N} × {K}, {M} rows", ours, weight.nbytes, rounds, None)]


def normed(rounds: int) -> list[Row]:
    """The norm before attention, with the tiles of its result."""
    from shoal.ops import triton_quant

    x, weight = random(4 * TOKENS, SHAPES[-2][1]), torch.ones(SHAPES[-2][1], device=DEVICE)
    ours = lambda: triton_quant.rms_norm(x, weight, 1e-6, "fp32")  # noqa: E731
    (y, tiles), expected = ours(), reference.rms_norm(x.float(), weight, 1e-6)
    agree(y, expected, ERROR)
    agree(tiles.dequantise(), expected, ERROR_OF_8_BITS)
    return [against_memory("norm and tiles", ours, x.nbytes + y.nbytes + tiles.nbytes, rounds, None)]


def gated(rounds: int) -> list[Row]:
    """The tiles of the shared expert's SwiGLU."""
    from shoal.ops import triton_quant

    both = random(4 * TOKENS, 2 * SHAPES[-1][1])
    gate, up = both.chunk(2, -1)
    ours = lambda: triton_quant.swiglu(gate, up, "fp32")  # noqa: E731
    agree(ours().dequantise(), reference.swiglu(gate.float(), up.float()), ERROR_OF_8_BITS)
    return [against_memory("SwiGLU and tiles", ours, both.nbytes + ours().nbytes, rounds, None)]


def against_memory(name: str, ours: Callable, nbytes: int, rounds: int, limit: float | None) -> Row:
    """Bytes a second against those that a copy of 2 GiB reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    mine, copy = seconds([ours, lambda: target.copy_(source)], rounds)
    rates = [nbytes / t for t in mine], [2 * source.nbytes / t for t in copy]
    return Row(name, "memory", max(rates[0]) / 1e9, max(rates[1]) / 1e9, Ratio.of(*rates), limit)


def seconds(calls: list[Callable], rounds: int) -> list[list[float]]:
    """Of each call, the median of each round; rounds go in turns."""
    from triton.testing import do_bench

    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, mine in zip(calls, times):
            mine.append(do_bench(call, warmup=10, rep=100, return_mode="median") / 1e3)
    return times


def library(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    """torch's FP8 product, a scale a row of each side, its sums in the tensor core's own few bits."""
    (x8, x_scales), (w8, w_scales) = by_row(x), by_row(w)
    scales = {"scale_a": x_scales[:, None], "scale_b": w_scales[None]}
    return lambda: torch._scaled_mm(x8, w8.mT, **scales, out_dtype=torch.bfloat16, use_fast_accum=True)  # pyright: ignore


def by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.abs().amax(-1).float().clamp(min=1e-4) / FP8_MOST
    return (x / scales[..., None]).to(FP8), scales


def agree(y: Tensor, expected: Tensor, tolerance: float) -> None:
    error = ((y.float() - expected.float()).norm() / expected.float().norm()).item()
    assert error < tolerance, f"off by {error:.2e} of the reference, more than {tolerance}: nothing is timed"


def chosen() -> dict[str, str]:
    """The tiles that tuning chose, by kernel and shape."""
    from shoal.ops import triton_gemm, triton_latent, triton_weights

    tuners = {"linear": triton_gemm._linear, "gradient": triton_gemm._gradient, "latent": triton_latent._attend}
    tuners["few bits"] = triton_weights._linear
    return {f"{name} {key}": str(best) for name, tuner in tuners.items() for key, best in tuner.cache.items()}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


if __name__ == "__main__":
    main()
