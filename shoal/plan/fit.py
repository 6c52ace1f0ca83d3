"""Will a model run here, how fast, and limited by what: before a byte of it is fetched. Torch-free.

Weights are of three kinds. The *near* part meets every token: attention, dense and shared feed-forwards, routers, norms
and head. The embedding is looked up, a row a token. Routed *experts* are most of a mixture's bytes and each token meets
few of them, so they may lie further away: in memory as far as it goes, the others on the disk.

    seconds a token = near / rate of the memory it lies in  +  Σ_layers E[max(chosen experts / RAM, missed ones / disk)]
    missed ones: binomial, (1 − hit rate) each       hit rate = experts in memory / experts, if chosen equally often

Experts that are in memory are multiplied with while a layer's others are read, hence the maximum; a layer waits for the
one before and can't read before it has chosen, hence the sums. What a layer costs between its parts isn't known. Beside
a GPU the near part and the cache lie in its memory and the experts' products are computed where the experts lie, by the
CPU: what crosses the bus is a row of activations a layer. Rates are sustained ones; real routers prefer some experts,
and then more are found than the uniform rate says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import comb, floor
from typing import Literal

from shoal.errors import ResourceError
from shoal.model.config import MLAConfig, ModelConfig, MoEConfig
from shoal.model.counts import count_parameters
from shoal.plan.memory import cache_bytes_per_token, numbers

Form = Literal["bf16", "fp8", "int8", "int4"]
Memory = Literal["GPU memory", "RAM"]
FORMS: tuple[Form, ...] = ("bf16", "fp8", "int8", "int4")
GROUP = 128  # numbers of a row that share a 16-bit scale, in int8 and int4, where nothing else is said

PROCESS_BYTES = 320 << 20  # interpreter, torch and server, before any model: 256 MiB, and what they grow by
GPU_PROCESS_BYTES = 600 << 20  # a CUDA context and its libraries
MARGIN = 0.02  # of a budget stays empty: what malloc keeps, a thread's stack, a long request
ROWS = 512  # in a call of the engine
LOGITS_BYTES = 2**25  # of its rows that are drawn from
TILE = 64  # tokens of attention
THREADS = 8  # whose rooms are counted where nothing is known of them


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's parts."""

    near: int
    embedding: int
    expert: int  # one, its three matrices with their scales
    n_experts: int  # routed ones, of all layers
    chosen: int  # by a token, of all layers
    modules: int = 0  # the multi-token ones, which are read where all of the model is in memory

    @property
    def experts(self) -> int:
        return self.expert * self.n_experts

    @property
    def total(self) -> int:
        """Without multi-token modules."""
        return self.near + self.embedding + self.experts


def scaled(form: Form, group: int = GROUP) -> float:
    """Bytes of a number with its share of a scale."""
    return {"bf16": 2, "fp8": 1 + 4 / 128**2, "int8": 1 + 2 / group, "int4": 0.5 + 2 / group}[form]


def weights(config: ModelConfig, form: Form, group: int = GROUP) -> Weights:
    """In this form: embedding, keys' and values' up-projection in bf16, norms and routers in fp32; the head in 8 bits
    where the others have 8 or 4 that are integers (with 4: a scale a row), else in bf16; one that is the embedding too
    counts as near."""
    c, counts = config, count_parameters(config)
    mixtures = sum(c.is_moe(i) for i in range(c.n_layers))
    in_expert = 3 * c.dim * c.moe.moe_dim if c.moe else 0
    n_experts = mixtures * (c.moe.n_routed_experts if c.moe else 0)
    vectors = numbers(replace(c, n_mtp=0)).vectors
    up = c.n_layers * up_parameters(c)
    body = counts.total - counts.embedding - counts.head - vectors - up - n_experts * in_expert
    embedding = 2 * counts.embedding
    eight = scaled("int8", group if form == "int8" else c.dim)
    head = embedding if c.tie_embeddings else counts.head * (eight if form in ("int8", "int4") else 2)
    number = scaled(form, group)
    return Weights(
        near=floor(4 * vectors + 2 * up + number * body + head),
        embedding=0 if c.tie_embeddings else embedding,
        expert=floor(number * in_expert),
        n_experts=n_experts,
        chosen=mixtures * (c.moe.n_activated if c.moe else 0),
        modules=floor(number * counts.mtp_total),
    )


def up_parameters(config: ModelConfig) -> int:
    """Of a layer's up-projection of latents, which decoding folds into queries and outputs: 0 without latents."""
    a = config.attention
    return a.kv_lora_rank * a.n_heads * (a.qk_nope_head_dim + a.v_head_dim) if isinstance(a, MLAConfig) else 0


def buffer_bytes(config: ModelConfig, context: int, few_bits: bool, threads: int = THREADS) -> int:
    """What the engine's calls work in: rows of activations, logits, and each thread's room."""
    a_thread = attention_room(config, context) + (arranged_room(config) if few_bits else 0)
    return rows_bytes(config) + LOGITS_BYTES + threads * a_thread


def rows_bytes(config: ModelConfig) -> int:
    """A call's rows of activations. A multi-token module that drafts has as many of its own."""
    a, m, d = config.attention, config.moe, config.dim
    if isinstance(a, MLAConfig):
        q, o = a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim), a.n_heads * a.v_head_dim
        width = q + o + 2 * (a.q_lora_rank or 0) + a.kv_lora_rank + a.qk_rope_head_dim
    else:
        width = 2 * a.head_dim * (a.n_heads + a.n_kv_heads)
    width += 4 * d + config.hidden_dim
    if m:
        width += m.n_activated * (m.moe_dim + d) + m.n_shared_experts * m.moe_dim + d + 2 * m.n_routed_experts
        width += d + 2 * m.n_routed_experts + m.n_activated  # of the choice that is foretold
    return ROWS * width * 2


def attention_room(config: ModelConfig, context: int) -> int:
    """A thread's for panels of weights, and for a chunk's attention with all keys and values of a head: `room_for` in
    ops/native/program.c."""
    a, panel = config.attention, panel_room(max(*inputs(config), config.moe.moe_dim if config.moe else 0))
    if isinstance(a, MLAConfig):
        K, V, C = a.qk_nope_head_dim + a.qk_rope_head_dim, a.v_head_dim, a.kv_lora_rank
    else:
        K, V, C = a.head_dim, a.head_dim, a.head_dim
    tokens = -(-context // TILE) * TILE
    packed = 2 * (tokens * (K + V) + TILE * max(K, V)) + 4 * TILE * V
    return max(panel, 2 * (ROWS * K + tokens * (K + V)) + packed + panel_room(C))


def panel_room(K: int) -> int:
    """Of 64 outputs' packed weights, 16 more on their way there, and scales."""
    return 2 * K * (64 + 16) + 4 * 64 * (-(-K // 32) + 1)


def arranged_room(config: ModelConfig) -> int:
    """A thread's for rows as codes meet them, by dots and by panels: `room_for_arranged`."""
    m, widest = config.moe, arranged_bytes(max(inputs(config)))
    return 2 * ROWS * max(widest, m.n_activated * arranged_bytes(m.moe_dim) if m else 0)


def arranged_bytes(K: int) -> int:
    """A row's numbers in 16 bits, and their sums by group."""
    return 64 + 256 * -(-K // 128) + 64 * -(-K // 512)


def inputs(config: ModelConfig) -> list[int]:
    """Widths of the rows, one a token, that meet matrices."""
    a, m = config.attention, config.moe
    of_heads = [a.n_heads * a.v_head_dim, a.q_lora_rank or 0] if isinstance(a, MLAConfig) else [a.n_heads * a.head_dim]
    dense, shared = 0 if config.is_moe(0) else config.hidden_dim, m.n_shared_experts * m.moe_dim if m else 0
    return [config.dim, dense, shared, *of_heads]


@dataclass(frozen=True)
class Hardware:
    """Bytes that may be used and bytes/s that are sustained. Without a GPU its numbers are 0."""

    ram_bytes: int
    ram_rate: float
    disk_rate: float = 0.0  # 0: no disk to read experts from
    gpu_bytes: int = 0
    gpu_rate: float = 0.0
    bus_rate: float = 0.0


@dataclass(frozen=True)
class Division:
    """What a budget of bytes is divided into. `slots` are experts that stay in memory."""

    process: int
    near: int
    cache: int
    buffers: int
    slots: int
    expert: int
    n_experts: int

    @property
    def total(self) -> int:
        return self.process + self.near + self.cache + self.buffers + self.slots * self.expert

    @property
    def hit_rate(self) -> float:
        """If all experts are chosen equally often."""
        return min(1.0, self.slots / self.n_experts) if self.n_experts else 1.0

    def parts(self) -> dict[str, int]:
        named = {"process": self.process, "always-on weights": self.near, "cache": self.cache, "buffers": self.buffers}
        if self.n_experts:
            named[f"{self.slots:,} of {self.n_experts:,} experts"] = self.slots * self.expert
        return {name: n for name, n in named.items() if n}


def divide(
    budget: int, *, process: int, near: int, cache: int, buffers: int, expert: int, n_experts: int, least: int
) -> Division:
    """As many experts as fit beside the rest. Raises ResourceError, with the smallest budget that works, where not
    even `least` of them do."""
    fixed = process + near + cache + buffers
    room = floor(budget * (1 - MARGIN)) - fixed
    slots = min(n_experts, room // expert) if n_experts else 0
    least = min(least, n_experts)
    if room < 0 or slots < least:
        smallest = smallest_budget(fixed + least * expert)
        parts = {"the process": process, "always-on weights": near, "the cache": cache, "buffers": buffers}
        parts |= {f"{least} experts": least * expert}
        raise ResourceError(
            f"{mib(budget)} for " + ", ".join(f"{name} {mib(n)}" for name, n in parts.items() if n),
            f"at least {mib(smallest)}",
            f"--memory {mib(smallest)}, or a smaller --cache, or weights in fewer bits",
        )
    return Division(process, near, cache, buffers, slots, expert, n_experts)


def smallest_budget(parts: int) -> int:
    """In whole MiB, the margin included."""
    return -(-floor(parts / (1 - MARGIN) + 1) // 2**20) * 2**20


def mib(n: int) -> str:
    return f"{-(-n // 2**20)}MiB"


def least_experts(moe: MoEConfig | None) -> int:
    """In memory: those that a layer has chosen for a token."""
    return moe.n_activated if moe else 0


@dataclass(frozen=True)
class Fit:
    """One model in one form on one machine."""

    form: str
    weights: Weights
    runs: bool
    why_not: str
    smallest: int  # bytes of RAM with which it runs, experts on the disk where there is one
    places: Mapping[str, Mapping[str, int]]  # bytes of each part, by the place it lies in
    hit_rate: float  # chosen experts that are found in memory
    bytes_per_token: Mapping[str, float] = field(default_factory=dict)  # by link
    seconds: Mapping[str, float] = field(default_factory=dict)  # a token's, by link
    tokens_per_s: float = 0.0

    @property
    def limit(self) -> str:
        """The link that a token waits for most."""
        return max(self.seconds, key=self.seconds.__getitem__) if self.seconds else ""

    def bounds(self) -> dict[str, float]:
        """Tokens/s that each link allows by itself."""
        return {link: 1 / s for link, s in self.seconds.items() if s}


def fit(config: ModelConfig, form: Form, machine: Hardware, context: int, hit_rate: float | None = None) -> Fit:
    """One stream at `context` tokens, in groups of GROUP, by THREADS threads. `hit_rate` None is the uniform one."""
    buffers = buffer_bytes(config, context, form != "bf16")
    return placed(config, form, weights(config, form), buffers, machine, context, hit_rate)


def placed(
    config: ModelConfig, form: str, w: Weights, buffers: int, machine: Hardware, context: int, hit_rate: float | None
) -> Fit:
    """The same of weights that are known."""
    cache = context * cache_bytes_per_token(config)
    room = machine.gpu_bytes * (1 - MARGIN) - (GPU_PROCESS_BYTES + cache + buffers)
    on_gpu = w.n_experts > 0 and room >= w.near
    if room >= w.total + w.modules:
        smallest = smallest_budget(PROCESS_BYTES)
        if machine.ram_bytes < smallest:
            why_not = f"{mib(machine.ram_bytes)} for the process {mib(PROCESS_BYTES)}"
            return Fit(form, w, False, why_not, smallest, {}, 0.0)
        gpu = {"process": GPU_PROCESS_BYTES, "weights": w.total + w.modules, "cache": cache, "buffers": buffers}
        places = {"GPU": gpu, "RAM": {"process": PROCESS_BYTES}}
        found = Fit(form, w, True, "", smallest, places, 1.0)
        return timed(found, config, machine, near="GPU memory", far="GPU memory", cache=cache)
    beside = 0 if on_gpu else w.near
    host = {"near": beside, "cache": 0 if on_gpu else cache, "process": PROCESS_BYTES}
    host |= {"buffers": 0 if on_gpu else buffers, "expert": w.expert, "n_experts": w.n_experts}
    far = bool(machine.disk_rate) and w.n_experts > 0
    fixed = sum(host[k] for k in ("near", "cache", "process", "buffers"))
    looked_up = 0 if on_gpu else w.embedding + w.modules
    drafter = rows_bytes(config) if w.modules and not on_gpu else 0
    whole = smallest_budget(fixed + w.experts + looked_up + drafter)
    least = least_experts(config.moe) if far else w.n_experts
    smallest = smallest_budget(fixed + least * w.expert) if far else whole
    in_ram = whole <= machine.ram_bytes
    if in_ram or not far:
        host["near"] += looked_up
        host["buffers"] += drafter
    try:
        division = divide(machine.ram_bytes, **host, least=least)
    except ResourceError as e:
        return Fit(form, w, False, e.got, smallest, {}, 0.0)
    places = {"RAM": division.parts()}
    if on_gpu:
        parts = {"process": GPU_PROCESS_BYTES, "always-on weights": w.near}
        places = {"GPU": parts | {"cache": cache, "buffers": buffers}} | places
    if on_gpu or (far and not in_ram):
        rest = w.n_experts - division.slots
        on_disk = {f"{rest:,} experts": rest * w.expert, "embedding": w.embedding}
        places["disk"] = {name: n for name, n in on_disk.items() if n}
    rate = 1.0 if division.slots == w.n_experts else division.hit_rate if hit_rate is None else hit_rate
    found = Fit(form, w, True, "", smallest, places, rate)
    return timed(found, config, machine, near="GPU memory" if on_gpu else "RAM", far="RAM", cache=cache)


def timed(f: Fit, config: ModelConfig, machine: Hardware, near: Memory, far: Memory, cache: int) -> Fit:
    """With bytes and seconds a token on each link: near weights and cache are read from `near`, the cache to its end
    once; experts from `far`, as far as the disk hasn't them."""
    w = f.weights
    chosen = w.chosen * w.expert
    moved = {"GPU memory": 0.0, "bus": 0.0, "RAM": 0.0, "disk": (1 - f.hit_rate) * chosen}
    moved[near] += w.near + cache
    moved[far] += chosen
    if near != far:
        moved["bus"] = 4 * config.dim * w.chosen / max(1, least_experts(config.moe))
    rates = {"GPU memory": machine.gpu_rate, "bus": machine.bus_rate, "RAM": machine.ram_rate}
    rates["disk"] = machine.disk_rate
    seconds = {link: n / rates[link] for link, n in moved.items() if n}
    token = sum(seconds.values()) - chosen / rates[far] - seconds.get("disk", 0)
    if chosen:
        A = least_experts(config.moe)
        read = w.expert / machine.disk_rate if f.hit_rate < 1 else 0.0
        token += w.chosen / A * layer_seconds(A, f.hit_rate, w.expert / rates[far], read)
    moved = {link: n for link, n in moved.items() if n}
    return replace(f, bytes_per_token=moved, seconds=seconds, tokens_per_s=1 / token)


def layer_seconds(chosen: int, hit_rate: float, computed: float, read: float) -> float:
    """Expected seconds of a layer's experts, each `computed` or `read` in so many: what is missing is read while the
    others are computed, but not before the layer has chosen, so one layer's luck is no help to another."""
    missing = (comb(chosen, k) * (1 - hit_rate) ** k * hit_rate ** (chosen - k) for k in range(chosen + 1))
    return sum(share * max(chosen * computed, k * read) for k, share in enumerate(missing))
