"""A step of a model for few tokens as a list of instructions, which native/program.c runs in one call.

What it is for: at one token a stream every weight is read for hardly any arithmetic. The machine's memory is the limit
then, and the cost of calling dozens of operations a layer would be several times that limit. A `Program` is built
once, over the weights where they lie (a trainer may update them in place), and run for every step.

Each method appends an instruction and returns its output, a buffer of `most` rows of which a step uses the first T;
buffers of one name and width are one. An instruction sees what those before it left; one that is `beside` the next may
run at the same time. Results are bf16, rounded where the modules of shoal/model round, and the rows of a step don't
change each other by as much as a bit.

The specification is the model's own forward pass: engine/native.py writes programs, its tests compare.
Shapes: T rows, N outputs, K inputs, E experts, A chosen; H heads, G key-value heads, V value dims, C latent, R rope.
"""

import ctypes
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from ctypes import byref, c_float, c_int64, c_void_p
from enum import IntEnum, IntFlag
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shoal.ops import cpu
from shoal.ops.quant import Form, Quantised

ABSENT = 2  # what a run answers where a busy expert had no place
Weight = Tensor | Quantised
FORMS: list[Form] = ["fp8", "int8", "int4"]  # as in native/step.h, from 1 on
FREE = 2**23  # bytes taken together for buffers


class Kind(IntEnum):
    """As in native/program.c."""

    EMBED, NORM, LINEAR, GATED, KEEP_LATENT, KEEP_HEADS, ATTEND_LATENT, ATTEND_HEADS = range(8)
    LOGITS, ROUTE, EXPERTS_GATED, EXPERTS_DOWN, WEIGH, DRAW = range(8, 14)


class Flag(IntFlag):
    SIGMOID, NORMED, WIDE, ADD, FORETOLD = (1 << i for i in range(5))


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("codes", "scales", "least")),
        *((name, c_int64) for name in ("form", "rows", "columns", "half")),
    ]


MATRIX_BYTES = ctypes.sizeof(_Matrix)


class _Instruction(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("kind", "wait")),
        *((name, c_void_p) for name in ("x", "w", "w2", "bias", "matrices", "y", "kept", "kept2")),
        *((name, c_int64) for name in "xs ys N K H G R V E A stacked groups best_groups flags".split()),
        *((name, c_float) for name in ("eps", "scale")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("T", "P", "singles", "chunks")),
        *((name, c_void_p) for name in "chunk_at token_T position_T slot_T stream_T table_SP cos sin".split()),
        *((name, c_void_p) for name in "expert_M row_M busy_E start_E weight_M".split()),
        *((name, c_int64) for name in ("n_busy", "routed", "absent")),
        *((name, c_void_p) for name in "temperature_S seed_S counted_S left_S stop_at stops drawn_T logprob_T".split()),
    ]


class _Kept(ctypes.Structure):
    _fields_ = [("from_", c_void_p), ("to", c_void_p), ("bytes", c_int64)]


class Routing(NamedTuple):
    """How a router chooses: the numbers of model/config.py's MoEConfig."""

    n_experts: int
    n_chosen: int
    n_groups: int
    best_groups: int
    sigmoid: bool
    normed: bool
    scale: float


class Choice(NamedTuple):
    """What a router chooses by: rows of x, its weight, its bias; and where experts are left, chosen [T, A] int16."""

    x: Tensor
    weight_EK: Tensor
    bias_E: Tensor
    chosen_TA: Tensor | None = None


class Matrices:
    """A mixture's experts by where each lies at the moment: gate and up [F, D], all of one form and block, down [D, F]
    likewise (a row is arranged once, whichever it meets). Between runs they may be placed, moved and cleared; while one
    is busy it must be there."""

    def __init__(self, n_experts: int, dim: int, hidden: int):
        self.dim, self.hidden = dim, hidden
        self.table = (_Matrix * (3 * n_experts))()
        self._held: list[tuple[Weight, ...]] = [()] * n_experts

    def __len__(self) -> int:
        return len(self._held)

    @classmethod
    def stacked(cls, gate_up_E2FD: Tensor, down_EDF: Tensor) -> "Matrices":
        E, D, F = down_EDF.shape
        made = cls(E, D, F)
        for e in range(E):
            made.place(e, gate_up_E2FD[e, :F], gate_up_E2FD[e, F:], down_EDF[e])
        return made

    def place(self, e: int, gate: Weight, up: Weight, down: Weight) -> None:
        """They are read where they lie until others take their place."""
        wide, narrow = (self.hidden, self.dim), (self.dim, self.hidden)
        assert (gate.shape, up.shape, down.shape) == (wide, wide, narrow), (e, gate.shape, up.shape, down.shape)
        self._held[e] = (gate, up, down)
        self.table[3 * e : 3 * e + 3] = [*_alike(gate, up), _matrix(down)]

    def kept(self, e: int) -> bytes:
        """How it is placed, for `put`: as long as its matrices stay where they are."""
        return bytes(memoryview(self.table).cast("B")[3 * e * MATRIX_BYTES : 3 * (e + 1) * MATRIX_BYTES])

    def put(self, e: int, kept: bytes) -> None:
        """`place`, without looking again. Whoever kept it keeps the matrices, too."""
        ctypes.memmove(ctypes.addressof(self.table) + 3 * e * MATRIX_BYTES, kept, 3 * MATRIX_BYTES)

    def clear(self, e: int) -> None:
        self._held[e] = ()
        self.table[3 * e : 3 * e + 3] = [_Matrix()] * 3


def _matrix(weight_NK: Weight) -> _Matrix:
    if isinstance(weight_NK, Tensor):
        assert weight_NK.is_contiguous()
        return _Matrix(codes=weight_NK.data_ptr())
    q = weight_NK
    assert takes(q), (q.form, q.shape, q.block)
    least = None if q.least is None else q.least.data_ptr()
    form, half = 1 + FORMS.index(q.form), int(q.scales.dtype is torch.float16)
    return _Matrix(q.codes.data_ptr(), q.scales.data_ptr(), least, form, *q.block, half)


def linear(x_MK: Tensor, weight_NK: Quantised) -> Tensor:
    """x Wᵀ [M, N] of bf16 rows, by a program of one instruction. Rows fewer than `cpu.PANELS` don't mix."""
    M, p = len(x_MK), Program(len(x_MK))
    y = x_MK.new_empty(M, weight_NK.shape[0])
    if M:
        p.linear(x_MK, weight_NK, y)
        p.run(Rows([0] * M, chunks=[M] if M >= cpu.PANELS else ()))
    return y


def _alike(*weights_NK: Weight) -> list[_Matrix]:
    """Of one form and group: they share what is made of x."""
    made = [_matrix(weight) for weight in weights_NK]
    assert len({(m.form, m.columns) for m in made}) == 1, weights_NK
    return made


def takes(q: Quantised) -> bool:
    """Whether products read this matrix as it is: sizes that are multiples of 16, blocks of whole lines of codes."""
    (N, K), (rows, columns) = q.shape, q.block
    parts = [q.codes, q.scales] + ([] if q.least is None else [q.least])
    fits = all(x.is_contiguous() and x.device.type == "cpu" for x in parts) and N % 16 == K % 16 == 0
    if q.form == "fp8":
        return fits and rows % 16 == columns % 64 == 0 and q.scales.dtype is torch.float32
    narrow = {x.dtype for x in parts[1:]} in ({torch.bfloat16}, {torch.float16})
    return fits and narrow and rows == 1 and columns in (32, 64, 128, K)


class Mixture(NamedTuple):
    """Of a program's mixtures one: the instructions as far as its choice, those before its products (two), and the
    experts that are chosen from."""

    routed: int
    gated: int
    experts: Matrices


class Rows(NamedTuple):
    """What a step's rows are: their tokens, positions, slots in the cache, and whose pages they see.

    `table[stream]` are a stream's pages; every row of a stream sees all up to its own position. Rows attend one by one,
    but for the last ones in `chunks`: runs of so many rows, each of one stream and in order. They do with fewer
    operations, and with numbers that depend on the cut.
    """

    tokens: Sequence[int]
    positions: Sequence[int] = ()
    slots: Sequence[int] = ()
    streams: Sequence[int] = ()
    table: Sequence[Sequence[int]] = ()
    chunks: Sequence[int] = ()


class Draws(NamedTuple):
    """How each stream's tokens are drawn (temperature 0: the likeliest), whether log-probabilities are wanted, how many
    tokens it may have, and the last of them that it wants."""

    temperatures: Sequence[float]
    seeds: Sequence[int]  # 64 bits, unsigned
    counted: Sequence[bool]
    left: Sequence[int]  # none more than the steps
    stops: Sequence[Collection[int]]


class Drawn(NamedTuple):
    """Of each stream the first `taken` of tokens and, where wanted, log-probabilities [S, steps]; and the rows behind
    them [S, steps, …] of the buffers that were to be kept."""

    taken: list[int]
    tokens: Tensor
    logprobs: Tensor
    kept: list[Tensor]


class Program:
    def __init__(self, most: int, angles: tuple[Tensor, Tensor] | None = None):
        """`most` rows a step; `angles`: cos and sin of every position that may come, fp32 [positions, R/2]."""
        self.most = most
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._free = torch.empty(0, dtype=torch.uint8)
        self._code: list[_Instruction] = []
        self._compiled: ctypes.Array[_Instruction] | None = None  # the same in one piece, until one is added
        self._held: list[Any] = [*(angles or ())]  # what instructions point to
        self._step = _Step()
        self._routed = 0  # instructions as far as the last choice of experts
        self.mixtures: list[Mixture] = []
        if angles:
            self._step.cos, self._step.sin = (x.data_ptr() for x in angles)

    def rows(self, name: str, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The buffer of this name and width [most, width]."""
        if (name, width) not in self._buffers:
            n = self.most * width * dtype.itemsize
            if n > len(self._free):
                self._free = cpu.huge(max(n, FREE))
            self._buffers[name, width] = self._free[:n].view(dtype).view(self.most, width)
            self._free = self._free[-(-n // 64) * 64 :]
        return self._buffers[name, width]

    def _to(self, to: str | Tensor, width: int) -> Tensor:
        return self.rows(to, width) if isinstance(to, str) else to

    def __len__(self) -> int:
        """Instructions so far."""
        return len(self._code)

    def embed(self, weight_VD: Tensor, to: str) -> Tensor:
        y = self.rows(to, weight_VD.shape[1])
        return self._add(Kind.EMBED, y=y, w=weight_VD, N=weight_VD.shape[1])

    def norm(self, x: Tensor, weight: Tensor, eps: float, to: str | Tensor, beside: bool = False) -> Tensor:
        return self._add(Kind.NORM, beside, x=x, w=weight, y=self._to(to, len(weight)), K=len(weight), eps=eps)

    def linear(
        self,
        x: Tensor,
        weight_NK: Weight,
        to: str | Tensor,
        bias: Tensor | None = None,
        add: bool = False,
        beside: bool = False,
    ) -> Tensor:
        """x Wᵀ (+ bias), put where `to` says or added to what stands there; fp32 where that is fp32."""
        N, K = weight_NK.shape
        y = self._to(to, N)
        flags = (Flag.WIDE if y.dtype is torch.float32 else 0) | (Flag.ADD if add else 0)
        matrices = self._matrices(weight_NK)
        return self._add(Kind.LINEAR, beside, x=x, matrices=matrices, bias=bias, y=y, N=N, K=K, flags=flags)

    def gated(self, x: Tensor, gate_NK: Weight, up_NK: Weight, to: str, beside: bool = False) -> Tensor:
        """silu(x gateᵀ) · x upᵀ"""
        N, K = gate_NK.shape
        both = self._matrices(gate_NK, up_NK)
        return self._add(Kind.GATED, beside, x=x, matrices=both, y=self.rows(to, N), N=N, K=K, stacked=2)

    def _matrices(self, *weights_NK: Weight) -> ctypes.Array[_Matrix]:
        self._held += weights_NK
        return (_Matrix * len(weights_NK))(*_alike(*weights_NK))

    def keep_latent(self, x: Tensor, norm_C: Tensor, eps: float, latent_PUW: Tensor, beside: bool = False) -> None:
        """Into the cache: the first C of x normed, the R others turned (in neighbouring pairs)."""
        C, W = len(norm_C), latent_PUW.shape[-1]
        self._add(Kind.KEEP_LATENT, beside, x=x, w=norm_C, kept=latent_PUW, K=C, R=W - C, eps=eps)

    def keep_heads(self, k: Tensor, v: Tensor, k_PUGK: Tensor, v_PUGK: Tensor) -> None:
        """Into the cache: k turned (in halves), v as it is."""
        G, K = k_PUGK.shape[2:]
        self._add(Kind.KEEP_HEADS, x=k, w2=v, kept=k_PUGK, kept2=v_PUGK, G=G, K=K)

    def attend_latent(self, q: Tensor, up: Tensor, H: int, N: int, latent_PUW: Tensor, scale: float, to: str) -> Tensor:
        """Absorbed latent attention: q [T, H · (N + R)] as projected, `up` [H · (N + V), C]."""
        C, W, V = up.shape[1], latent_PUW.shape[-1], len(up) // H - N
        sizes: dict[str, Any] = {"H": H, "N": N, "R": W - C, "V": V, "K": C}
        return self._add(Kind.ATTEND_LATENT, x=q, w=up, kept=latent_PUW, y=self.rows(to, H * V), scale=scale, **sizes)

    def attend_heads(self, q: Tensor, k_PUGK: Tensor, v_PUGK: Tensor, scale: float, to: str) -> Tensor:
        """Grouped-query attention: q [T, H · K] as projected."""
        G, K = k_PUGK.shape[2:]
        y = self.rows(to, q.shape[1])
        sizes: dict[str, Any] = {"H": q.shape[1] // K, "G": G, "K": K}
        return self._add(Kind.ATTEND_HEADS, x=q, kept=k_PUGK, kept2=v_PUGK, y=y, scale=scale, **sizes)

    def route(self, choice: Choice, r: Routing, beside: bool = False, foretold: Choice | None = None) -> None:
        """Every row's experts and what they count, for `experts_gated`, `experts_down` and `weigh` behind it. What is
        `foretold` meanwhile, of a later choice, is only told."""
        ahead = self._logits(foretold, "foretold logits", beside=True) if foretold else None
        logits = self._logits(choice, "logits")
        if foretold and ahead is not None:
            self._choose(foretold, ahead, r, Flag.FORETOLD, beside=True)
        self._choose(choice, logits, r, Flag(0), beside)
        self._routed = len(self._code)
        chosen = self.most * r.n_chosen
        lengths = {"expert_M": chosen, "row_M": chosen, "busy_E": r.n_experts, "start_E": r.n_experts + 1}
        for name, length in lengths.items():
            self._room(name, length, torch.int64)
        self._room("weight_M", chosen, torch.float32)

    def _logits(self, c: Choice, to: str, beside: bool = False) -> Tensor:
        E, K = c.weight_EK.shape
        return self._add(Kind.LOGITS, beside, x=c.x, w=c.weight_EK, y=self.rows(to, E, torch.float32), E=E, K=K)

    def _choose(self, c: Choice, logits: Tensor, r: Routing, flags: Flag, beside: bool) -> None:
        flags |= (Flag.SIGMOID if r.sigmoid else 0) | (Flag.NORMED if r.normed else 0)
        sizes: dict[str, Any] = {"E": r.n_experts, "A": r.n_chosen, "groups": r.n_groups, "best_groups": r.best_groups}
        self._add(Kind.ROUTE, beside, x=logits, bias=c.bias_E, y=c.chosen_TA, flags=flags, scale=r.scale, **sizes)

    def _room(self, name: str, length: int, dtype: torch.dtype) -> None:
        """For what routers choose; the next one writes over it."""
        room = self._buffers.get((name, 0))
        if room is None or len(room) < length:
            room = self._buffers[name, 0] = torch.zeros(length, dtype=dtype)
            setattr(self._step, name, room.data_ptr())

    def experts_gated(self, x: Tensor, experts: Matrices, n_chosen: int, to: str) -> Tensor:
        """Of each row's experts, silu(x gateᵀ) · x upᵀ: [most, A · F]."""
        self.mixtures.append(Mixture(self._routed, len(self._code), experts))
        N, K = experts.hidden, experts.dim
        sizes: dict[str, Any] = {"N": N, "K": K, "E": len(experts), "A": n_chosen, "stacked": 2, "ys": N}
        return self._add(Kind.EXPERTS_GATED, x=x, matrices=experts.table, y=self.rows(to, n_chosen * N), **sizes)

    def experts_down(self, x: Tensor, experts: Matrices, n_chosen: int, to: str) -> Tensor:
        N, K = experts.dim, experts.hidden
        sizes: dict[str, Any] = {"N": N, "K": K, "E": len(experts), "A": n_chosen, "xs": K, "ys": N}
        return self._add(Kind.EXPERTS_DOWN, x=x, matrices=experts.table, y=self.rows(to, n_chosen * N), **sizes)

    def weigh(self, x: Tensor, shared: Tensor | None, n_chosen: int, onto: Tensor) -> Tensor:
        """y += Σ weight · x over each row's experts, + shared."""
        N = onto.shape[1]
        return self._add(Kind.WEIGH, x=x, w2=shared, y=onto, N=N, A=n_chosen, xs=N)

    def draw(self, logits: Tensor) -> None:
        """A token a row by fp32 logits: for `run_steps`, at the end of a program."""
        self._add(Kind.DRAW, x=logits, N=logits.shape[1])

    def _add(self, kind: Kind, beside: bool = False, **arguments: Any) -> Tensor:
        c = _Instruction(kind=kind, wait=int(not beside), stacked=1)
        for stride, name in (("xs", "x"), ("ys", "y")):
            if isinstance(arguments.get(name), Tensor):
                arguments.setdefault(stride, arguments[name].stride(0))
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                assert value.stride(-1) == 1 and (name in "xy" or value.is_contiguous()), (kind, name)
                self._held.append(value)
                value = value.data_ptr()
            elif isinstance(value, ctypes.Array):
                self._held.append(value)
                value = ctypes.addressof(value)
            setattr(c, name, value)
        self._code.append(c)
        self._compiled = None
        return arguments["y"] if "y" in arguments else arguments["x"]

    def run(self, rows: Rows, n: int | None = None, first: int = 0, partly: bool = False) -> None:
        """One step, or of its first `n` instructions those from `first` on; those before it left what they left. What
        `rows` lack, none of them may ask for. `partly`: busy experts that have no place are passed over."""
        held, n = self._bring(rows), len(self._code) if n is None else n
        code = byref(self._whole(), first * ctypes.sizeof(_Instruction))
        failed = cpu.run("run_program", code, n - first, byref(self._step))
        self._check(0 if partly and failed == ABSENT else failed)
        del held

    def busy(self) -> list[int]:
        """The experts that the last choice fell on, in order."""
        return self._buffers["busy_E", 0][: self._step.n_busy].tolist()

    @staticmethod
    def _check(failed: int) -> None:
        if failed == 1:
            raise MemoryError("no room for the scores of attention")
        assert not failed, "an expert is busy that has no place"

    def run_steps(self, rows: Rows, draws: Draws, steps: int, keep: Sequence[Tensor] = ()) -> Drawn:
        """So many steps of rows that are streams of their own, each fed the token drawn in the one before: as long as
        the stream goes on, and all logits are finite. `keep`: dense buffers of rows, whose last state isn't enough."""
        T, s = len(rows.tokens), self._step
        lists = {
            "temperature_S": ("f", draws.temperatures),
            "seed_S": ("Q", draws.seeds),
            "counted_S": ("q", draws.counted),
            "left_S": ("q", draws.left),
            "stop_at": ("q", accumulate(map(len, draws.stops), initial=0)),
            "stops": ("q", chain.from_iterable(draws.stops)),
            "drawn_T": ("q", [0] * T),
            "logprob_T": ("d", [0.0] * T),
        }
        held = self._bring(rows) + self._point(lists)
        tokens, logprobs = torch.empty(T, steps, dtype=torch.int64), torch.empty(T, steps, dtype=torch.float64)
        taken, kept = torch.zeros(T, dtype=torch.int64), [x.new_empty(T, steps, *x.shape[1:]) for x in keep]
        pairs = [(x.data_ptr(), to.data_ptr(), x[0].nbytes) for x, to in zip(keep, kept)]
        made = (tokens, logprobs, taken, (_Kept * len(pairs))(*pairs), len(pairs))
        self._check(cpu.run("run_steps", self._whole(), len(self._code), byref(s), steps, *made))
        del held
        return Drawn(taken.tolist(), tokens, logprobs, kept)

    def _whole(self) -> ctypes.Array[_Instruction]:
        if self._compiled is None:
            self._compiled = (_Instruction * len(self._code))(*self._code)
        return self._compiled

    def _bring(self, rows: Rows) -> list[array]:
        """Point the step to these rows; what is returned must live as long as it is looked at."""
        T = len(rows.tokens)
        assert 0 < T <= self.most, (T, self.most)
        s, P = self._step, max(map(len, rows.table), default=0)
        s.T, s.P, s.singles, s.chunks = T, P, T - sum(rows.chunks), len(rows.chunks)
        lists = {
            "chunk_at": accumulate(rows.chunks, initial=s.singles),
            "token_T": rows.tokens,
            "position_T": rows.positions,
            "slot_T": rows.slots,
            "stream_T": rows.streams,
            "table_SP": (page for pages in rows.table for page in (*pages, *[0] * (P - len(pages)))),
        }
        return self._point({name: ("q", numbers) for name, numbers in lists.items()})

    def _point(self, lists: Mapping[str, tuple[str, Iterable]]) -> list[array]:
        held = [array(kind, numbers) for kind, numbers in lists.values()]
        for name, numbers in zip(lists, held, strict=True):
            setattr(self._step, name, numbers.buffer_info()[0])
        return held
