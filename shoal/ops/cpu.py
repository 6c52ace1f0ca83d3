"""Fast twins for x86-64 CPUs with AVX512 (BF16, VNNI, VBMI): C kernels, built once by the machine's `cc` and called.

Why C and not torch.compile: a plain C file builds in seconds instead of 25–90, has no cold start inside a ten-minute
budget, and attention, which no compiler fuses on a CPU, is in it. Activations come here in bf16 only; fp32 ones take
the reference. AdamW's masters are fp32 in any case.
`status()` says what was found; where anything is missing (another processor, no compiler) the reference runs instead,
and the run's log says so.

The kernels use torch's own OpenMP pool: the library is linked against the libgomp that torch has loaded.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from shoal.errors import ConfigError
from shoal.ops.reference import AdamW, Places
from shoal.runtime import cache_root, cpu_flags

SOURCES = Path(__file__).with_name("native")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fPIC", "-fopenmp")
HUGE, MADV_HUGEPAGE, MADV_COLLAPSE = 2**21, 14, 25
PANELS = 24  # rows for which packing a panel pays: native/products.h, too
STRETCH = 2**15  # numbers that are summed by themselves
NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni", "avx512vbmi"}


def wanted() -> str:
    """native or reference, by SHOAL_KERNELS: on a GPU too."""
    asked = os.environ.get("SHOAL_KERNELS") or "native"
    if asked not in ("native", "reference"):
        raise ConfigError(
            f"SHOAL_KERNELS={asked}", "native (where the machine can) or reference", "correct or unset it"
        )
    return asked


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    if wanted() == "reference":
        return None, "reference (SHOAL_KERNELS=reference)"
    lacking = NEEDED - cpu_flags()
    if lacking:
        return None, f"reference (this processor lacks {', '.join(sorted(lacking))})"
    try:
        return ctypes.CDLL(str(_build())), "native AVX512-BF16 kernels"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"reference (the native kernels did not build: {_why(error)})"


def _why(error: Exception) -> str:
    """One line: no compiler, what the compiler said first, or what the system says."""
    if isinstance(error, FileNotFoundError) and error.filename == "cc":
        return "there is no C compiler `cc`; install gcc or clang"
    if isinstance(error, subprocess.CalledProcessError):
        said = error.stderr.strip().splitlines() or [f"it ended with {error.returncode}"]
        return f"`cc` says {next((line for line in said if 'error' in line), said[0])[:300]}"
    return str(error)


def _build() -> Path:
    """Compile into the cache folder under a name that hashes sources, flags, processor and torch; atomic."""
    sources = sorted(SOURCES.glob("*.[ch]"))
    cpu = " ".join(sorted(cpu_flags()))
    key = hashlib.sha256(b"".join(p.read_bytes() for p in sources) + f"{FLAGS}{cpu}{torch.__version__}".encode())
    target = cache_root() / "native" / f"{platform.machine()}-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = []
        for source in (p for p in sources if p.suffix == ".c"):
            objects.append(f"{folder}/{source.stem}.o")
            _run("cc", *FLAGS, "-c", str(source), "-o", objects[-1])
        _run("cc", "-shared", *objects, _openmp(), "-lm", "-o", f"{folder}/shoal.so")
        os.replace(f"{folder}/shoal.so", target)
    return target


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def _openmp() -> str:
    """The libgomp that torch uses, so that both share one pool of threads."""
    home = Path(torch.__file__).parent
    found = [*home.glob("lib/libgomp*.so*"), *home.parent.glob("torch.libs/libgomp*.so*")]
    return str(found[0]) if found else "-lgomp"


def status() -> str:
    """Which kernels run on this CPU, and why if not the native ones."""
    return _library()[1]


def takes(x: Tensor, *dims: int) -> bool:
    """Whether the native kernels accept this tensor: bf16 on a CPU, these dimensions multiples of 16."""
    fits = x.dtype is torch.bfloat16 and x.device.type == "cpu" and all(d % 16 == 0 for d in dims)
    return fits and _library()[0] is not None


def makes_products() -> bool:
    """Whether bf16 products are ours here. Where there is AMX, torch uses it."""
    return "amx_bf16" not in cpu_flags() and _library()[0] is not None


def takes_product(x: Tensor, other: Tensor, *dims: int) -> bool:
    """Whether `GroupedLinear` accepts these rows and a matrix, a stack of them, or a gradient, of these widths."""
    return len(x) >= PANELS and makes_products() and takes(x, *dims) and takes(other)


def call(name: str, *args) -> int:
    """What comes back means something for attention, products and programs only."""
    lib = _library()[0]
    assert lib is not None
    return getattr(lib, name)(*map(_value, args))


def _value(x):
    """Tensors go as pointers, ints as int64, floats as float; what ctypes made as it is."""
    if isinstance(x, Tensor):
        return ctypes.c_void_p(x.data_ptr())
    convert = {int: ctypes.c_int64, float: ctypes.c_float, type(None): ctypes.c_void_p}.get(type(x))
    return convert(x) if convert else x


class GroupedLinear(torch.autograd.Function):
    """Rows starts[e] to starts[e + 1] of x [M, K] times weight e of [E, N, K], transposed: [M, N]. One call for all."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, starts)
        return _times(x, weight, starts, as_stored=False)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, starts = ctx.saved_tensors
        dx = _times(dy, weight, starts, as_stored=True) if ctx.needs_input_grad[0] else None
        return dx, weight_gradient(dy, x, starts) if ctx.needs_input_grad[1] else None, None


def _times(x: Tensor, weight: Tensor, starts: Tensor, as_stored: bool) -> Tensor:
    """x [M, K] times matrices [E, N, K] transposed, or [E, K, N] as stored."""
    if weight.mT.is_contiguous():
        weight, as_stored = weight.mT, not as_stored
    x, weight = _rows(x), weight.contiguous()
    E, (N, K) = len(weight), weight.shape[:0:-1] if as_stored else weight.shape[1:]
    assert x.shape[1] == K and len(starts) == E + 1 and starts[-1] == len(x), (x.shape, weight.shape, starts)
    y = x.new_empty(len(x), N)
    if call("grouped_rows", x, x.stride(0), weight, int(as_stored), starts, E, K, N, y):
        raise MemoryError("no room for a product's panels")
    return y


def weight_gradient(dy: Tensor, x: Tensor, starts: Tensor) -> Tensor:
    """dyᵀ x of each row block, [E, N, K]: zero where it has no rows."""
    dy, x = _rows(dy), _rows(x)
    E, N, K = len(starts) - 1, dy.shape[1], x.shape[1]
    assert len(dy) == len(x) == starts[-1], (dy.shape, x.shape, starts)
    dweight = x.new_empty(E, N, K)
    if call("grouped_matrices", dy, dy.stride(0), x, x.stride(0), starts, E, N, K, dweight):
        raise MemoryError("no room for a product's panels")
    return dweight


def _rows(x: Tensor) -> Tensor:
    """Rows that are dense themselves, any distance apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


class RMSNorm(torch.autograd.Function):
    """x [T, D] may be a column slice of a wider tensor: its row stride is passed on."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = _rows(x)
        T, D = x.shape
        y, rstd = x.new_empty(T, D), torch.empty(T, dtype=torch.float32)
        call("rms_norm_forward", x, x.stride(0), weight, y, rstd, T, D, float(eps))
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, rstd = ctx.saved_tensors
        (T, D), blocks = x.shape, 2 * torch.get_num_threads()
        dx, parts = x.new_empty(T, D), torch.empty(blocks, D, dtype=torch.float32)
        call("rms_norm_backward", x, x.stride(0), weight, rstd, dy.contiguous(), dx, parts, blocks, T, D)
        return dx, parts.sum(0), None


class SwiGLU(torch.autograd.Function):
    """gate and up [T, F]: two tensors, or the halves of one, whose gradients are halves of one again; else copied."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        T, F = gate.shape
        if gate.stride() != up.stride() or gate.stride() not in ((F, 1), (2 * F, 1)):
            gate, up = gate.contiguous(), up.contiguous()
        y = gate.new_empty(T, F)
        call("swiglu_forward", gate, up, gate.stride(0), y, T, F)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        gate, up = ctx.saved_tensors
        T, F = gate.shape
        both = gate.new_empty(T, 2 * F) if gate.stride(0) == 2 * F else gate.new_empty(2, T, F)
        dgate, dup = both.chunk(2, -1) if both.dim() == 2 else both
        call("swiglu_backward", gate, up, gate.stride(0), dy.contiguous(), dgate, dup, T, F)
        return dgate, dup


class RotatePairs(torch.autograd.Function):
    """x [T, R] or [T, H, R], rows and heads any distance apart; cosines and sines fp32 [T, R/2]."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        return _turned(dy, cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x = _rows(x)
    (T, *heads, R), y = x.shape, x.new_empty(x.shape)
    call("rotate_pairs", x, x.stride(0), x.stride(1) if heads else 0, cos, sin, sign, y, T, *(heads or [1]), R)
    return y


def top_k(x_TE: Tensor, k: int) -> Tensor:
    """The indices of each row's k largest, the largest first: int64 [T, k]."""
    index_TK = torch.empty(len(x_TE), k, dtype=torch.int64)
    call("top_k", x_TE, *x_TE.shape, k, index_TK)
    return index_TK


def sort_by_expert(experts_TK: Tensor, n_experts: int) -> Places:
    """See reference.sort_by_expert."""
    token_M, place_TK = torch.empty(experts_TK.numel(), dtype=torch.int64), torch.empty_like(experts_TK)
    counts_E = torch.empty(n_experts, dtype=torch.int64)
    made = (token_M, place_TK, counts_E)
    foreign = call("sort_by_expert", experts_TK, len(token_M), experts_TK.shape[1], n_experts, *made)
    assert not foreign, f"an expert beyond the {n_experts} there are"
    return Places(*made)


def takes_dense(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels for numbers of this type read `x` as it lies."""
    return x.dtype is dtype and x.device.type == "cpu" and x.is_contiguous() and _library()[0] is not None


class GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, token_M: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, token_M)

    @staticmethod
    def backward(ctx, dy_MD: Tensor):
        (place_TK,) = ctx.saved_tensors
        (T, K), D = place_TK.shape, dy_MD.shape[1]
        dx = dy_MD.new_empty(T, D)
        call("sum_rows", dy_MD.contiguous(), place_TK, None, dx, T, K, D)
        return dx, None, None


class WeighRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_MD: Tensor, weights_TK: Tensor, place_TK: Tensor) -> Tensor:
        (T, K), D = place_TK.shape, y_MD.shape[1]
        y_MD, weights_TK = y_MD.contiguous(), weights_TK.contiguous()
        y_TD = y_MD.new_empty(T, D)
        call("sum_rows", y_MD, place_TK, weights_TK, y_TD, T, K, D)
        ctx.save_for_backward(y_MD, weights_TK, place_TK)
        return y_TD

    @staticmethod
    def backward(ctx, dy_TD: Tensor):
        y_MD, weights_TK, place_TK = ctx.saved_tensors
        (T, K), D = place_TK.shape, y_MD.shape[1]
        dy_MD, dw_TK = torch.empty_like(y_MD), torch.empty_like(weights_TK)
        call("weigh_rows_backward", y_MD, place_TK, weights_TK, dy_TD.contiguous(), dy_MD, dw_TK, T, K, D)
        return dy_MD, dw_TK, None


class Attention(torch.autograd.Function):
    """Causal attention inside each segment: q [T, H, K], k [T, G, K], v [T, G, V] → [T, H, V]. Scores are fp32.

    Segments are those of `rows`, from starts[s] to starts[s + 1]; the first shared[s] of them an earlier one has, too.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, rows: Tensor, shared: Tensor, scale: float):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (T, H, K), (G, V) = q.shape, v.shape[1:]
        o, lse = q.new_empty(T, H, V), torch.empty(T, H, dtype=torch.float32)
        where = (starts, len(shared), rows, shared)
        if call("attention_forward", q, k, v, o, lse, *where, H, G, K, V, float(scale)):
            raise MemoryError("no room for attention's tiles")
        ctx.save_for_backward(q, k, v, o, lse, starts, rows, shared)
        ctx.scale = float(scale)
        return o

    @staticmethod
    def backward(ctx, d_o: Tensor):
        q, k, v, o, lse, starts, rows, shared = ctx.saved_tensors
        (_, H, K), (G, V) = q.shape, v.shape[1:]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        where = (starts, len(shared), rows, shared)
        if call("attention_backward", q, k, v, o, lse, d_o.contiguous(), dq, dk, dv, *where, H, G, K, V, ctx.scale):
            raise MemoryError("no room for attention's tiles")
        return dq, dk, dv, None, None, None, None


def run(name: str, code, n: int, step, *more: Tensor | ctypes.Array | int) -> int:
    """`run_program` or `run_steps` of native/program.c, on torch's threads: see program.py."""
    return call(name, code, n, step, torch.get_num_threads(), *more)


def takes_draws(logits_RV: Tensor) -> bool:
    """Whether `draw` accepts these: dense fp32 on a CPU, a vocabulary that is a multiple of 16."""
    return takes_dense(logits_RV, torch.float32) and logits_RV.shape[1] % 16 == 0


def draw(
    logits_RV: Tensor, temperatures: Sequence[float], seeds: Sequence[int], positions: Sequence[int]
) -> tuple[list[int], list[float]]:
    """A token a row (temperature 0: the likeliest; -1 where logits aren't finite) and its log-probability by the raw
    distribution: native/draws.c, what a program draws by too. `positions` are those of the tokens drawn."""
    (R, V), made = logits_RV.shape, (torch.float32, torch.uint64, torch.int64)
    how = [torch.tensor(x, dtype=dtype) for x, dtype in zip((temperatures, seeds, positions), made, strict=True)]
    tokens_R, logprobs_R = torch.empty(R, dtype=torch.int64), torch.empty(R, dtype=torch.float64)
    call("draw_rows", logits_RV, R, V, *how, tokens_R, logprobs_R)
    return tokens_R.tolist(), logprobs_R.tolist()


def huge(n: int) -> Tensor:
    """Room for `n` bytes, uninitialised, on huge pages where the system has some.

    On small ones, scattered over memory, buffers crowd each other out of the second-level cache in some runs and not in
    others: prompts were read 12% slower in a third of them (LOG.md).
    """
    room = torch.empty(n + HUGE, dtype=torch.uint8)
    room = room[-room.data_ptr() % HUGE :][:n]
    _advise(room, MADV_HUGEPAGE)
    return room


def prefer_huge(x: Tensor) -> None:
    """Let pages of `x` that aren't in memory yet be huge ones."""
    _advise(x, MADV_HUGEPAGE)


def collapse(x: Tensor) -> None:
    """Move what stands in memory onto huge pages where the system can: reading it needs fewer translations."""
    _advise(x, MADV_HUGEPAGE)
    _advise(x, MADV_COLLAPSE)


def _advise(x: Tensor, advice: int) -> None:
    start, end = -(-x.data_ptr() // HUGE) * HUGE, (x.data_ptr() + x.nbytes) // HUGE * HUGE
    if start < end and sys.platform == "linux":  # a refusal changes nothing but the speed
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def cross_entropy_(logits_TV: Tensor, targets_T: Tensor, scale: float) -> Tensor:
    """See dispatch.cross_entropy_. The kernel writes where a target points, so each must be in the vocabulary."""
    T, V = logits_TV.shape
    assert targets_T.shape == (T,) and targets_T.dtype == torch.int64, (T, targets_T.shape, targets_T.dtype)
    largest = int(targets_T.max()) if T else -1
    assert largest < V, f"target {largest} in a vocabulary of {V}"
    nll_T = torch.empty(T, dtype=torch.float32)
    call("cross_entropy", logits_TV, targets_T.contiguous(), float(scale), nll_T, T, V)
    return nll_T


def norm(x: Tensor) -> Tensor:
    """See reference.norm."""
    sums = torch.empty(-(-x.numel() // STRETCH), dtype=torch.float32)
    call("sum_squares", x, x.numel(), STRETCH, sums)
    return sums.sum().sqrt()


def adamw_(p: Tensor, m: Tensor, v: Tensor, grad: Tensor, weight: Tensor | None, c: AdamW) -> None:
    """See reference.adamw_."""
    call("adamw", p, m, v, grad, int(grad.dtype is torch.bfloat16), weight, p.numel(), *map(float, c))


def takes_update(p: Tensor, grad: Tensor, weight: Tensor | None) -> bool:
    """Whether `adamw_` accepts these: dense, on a CPU, the gradient bf16 or fp32, the weight bf16."""
    dense = all(x is None or x.is_contiguous() for x in (p, grad, weight))
    dtypes = grad.dtype in (torch.bfloat16, torch.float32) and (weight is None or weight.dtype is torch.bfloat16)
    return dense and dtypes and p.device.type == "cpu" and _library()[0] is not None
