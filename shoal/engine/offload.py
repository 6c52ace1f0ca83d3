"""Models whose experts are more than the memory: those that are used most stay, others come from the disk when chosen.

Everything that meets every token is in memory, the always-on part. Of the routed experts, as many are in slots as the
budget has room for; a token waits for those it has chosen and that aren't there. What makes that wait short:

- Whole experts are read, by several threads, past the page cache (experts.py).
- Those that are there are multiplied with while the others are read, and each that comes as soon as it has come.
- The next layer's experts are foretold by its own router from today's hidden state (the residual stream changes little
  from layer to layer) and read ahead, unless the foretelling is mostly wrong; so the disk works on while we compute.
- The slot that is given up is that of the expert chosen least, lately: every choice counts one, and counts half as
  much HALF_LIFE steps later. An expert in use, on its way, or foretold for the layer to come is never given up.

Which experts lie where changes no number: the same matrices are multiplied with, wherever they were.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.engine.experts import Expert, Job, Matrix, Placed, Store
from shoal.model.hf_files import Entry, TensorFolder
from shoal.model.moe import MoE
from shoal.model.transformer import Transformer
from shoal.ops import dispatch as ops
from shoal.ops.quant import Quantised
from shoal.runtime import resident_bytes

HALF_LIFE = 64  # steps
LOOK = 16  # steps from one look at the process's memory to the next
WORTH = 0.5  # share of foretold experts that must be chosen, for the reading of them to be worth the disk's time
MEMORY = 0.02  # what the last foretelling counts in that share

Batch = list[tuple[int, Placed]]  # experts by their number in the layer; gate, up, down


@dataclass(frozen=True)
class OffloadStats:
    """Since the start. `chosen` counts an expert once a layer and step, however many rows have chosen it."""

    chosen: int = 0
    found: int = 0  # of those, in memory when they were chosen
    foretold: int = 0  # of those, there or on their way because they had been foretold
    read_ahead: int = 0  # experts whose reading was begun before they were chosen
    bytes_read: int = 0
    seconds_reading: float = 0.0  # in which at least one read was going on
    guessed: int = 0  # experts foretold, read or not
    right: int = 0  # of them chosen


class Slots:
    """Which expert is in which slot, and whose turn it is to leave."""

    def __init__(self, n_slots: int, n_experts: int):
        self.slot_of = np.full(n_experts, -1)
        self._owner = np.full(n_slots, -1)
        self._held = np.zeros(n_slots, dtype=bool)
        self._score = np.zeros(n_experts)
        self._weight = 1.0

    @property
    def free(self) -> int:
        """Slots that could be given up now."""
        return len(self._held) - int(self._held.sum())

    def count(self, experts: Sequence[int]) -> None:
        """They were chosen."""
        self._score[experts] += self._weight

    def age(self) -> None:
        """A step has passed."""
        self._weight *= 2 ** (1 / HALF_LIFE)
        if self._weight > 1e9:
            self._score /= self._weight
            self._weight = 1.0

    def take(self, expert: int) -> int | None:
        """A slot for it (-1: for nobody), held; None where all are."""
        worth = np.where(self._owner < 0, -1.0, self._score[self._owner])
        slot = int(np.where(self._held, np.inf, worth).argmin())
        if self._held[slot]:
            return None
        if self._owner[slot] >= 0:
            self.slot_of[self._owner[slot]] = -1
        self._owner[slot], self._held[slot] = expert, True
        if expert >= 0:
            self.slot_of[expert] = slot
        return slot

    def retire(self) -> int | None:
        """A slot that is never taken again; None where all are held."""
        return self.take(-1)

    def empty(self, expert: int) -> None:
        """What should have come into its slot did not."""
        slot = self.slot_of[expert]
        self._owner[slot], self._held[slot], self.slot_of[expert] = -1, False, -1

    def hold(self, experts: Iterable[int], held: bool = True) -> None:
        for x in experts:
            self._held[self.slot_of[x]] = held


class Offload:
    """The experts of all mixtures of a model, numbered layer by layer: mixture · E + expert. For one thread."""

    def __init__(self, store: Store, n_slots: int, n_experts: int, least: int = 1, ceiling: int | None = None):
        """`n_experts` of a layer. `ceiling`: bytes that the process may have; where it has more, all slots but the
        `least` may be given up."""
        self.store, self.E, self.n_slots = store, n_experts, n_slots
        self.least = least
        self._slots = Slots(n_slots, len(store.experts))
        self._ceiling, self._steps = ceiling, 0
        self._jobs: dict[int, Job] = {}  # experts on their way, their slots held
        self._foretold: set[int] = set()  # of the mixture to come; those that are there are held
        self._ahead: set[int] = set()  # of these, the ones that are read because of it
        self._trust = 1.0
        self._counts = dict.fromkeys(("chosen", "found", "foretold", "read_ahead", "guessed", "right"), 0)

    def stats(self) -> OffloadStats:
        s = self.store
        return OffloadStats(**self._counts, bytes_read=s.bytes_read, seconds_reading=s.seconds_reading)

    @contextmanager
    def chosen(self, mixture: int, busy: Sequence[int]) -> Iterator[Iterator[Batch]]:
        """All `busy` experts of a mixture, each once, in batches: those that are in memory, then others as they come.
        Reading begins at once; a batch stays where it is until the next one is asked for. Raises StorageError."""
        wanted = [mixture * self.E + e for e in busy]
        self._harvest()
        if mixture == 0:
            self._slots.age()
            self._stay_below()
        self._judge(set(wanted))
        here = [x for x in wanted if self._ready(x)]
        missing = [x for x in wanted if not self._ready(x)]
        self._slots.count(wanted)
        self._slots.hold(here)
        self._counts["chosen"] += len(wanted)
        self._counts["foretold"] += len(self._ahead.intersection(wanted))
        self._counts["found"] += len(set(here) - self._ahead)
        self._ahead = set()
        self._fetch(missing)
        try:
            yield self._batches(here, missing)
        finally:
            self._slots.hold((x for x in wanted if self._ready(x)), False)

    def foretell(self, mixture: int, experts: Iterable[int]) -> None:
        """These will probably be chosen next: keep those that are here, and read the others when nobody waits."""
        self._foretold = {mixture * self.E + e for e in experts}
        self._slots.hold(x for x in self._foretold if self._ready(x))
        for x in self._foretold if self._trust >= WORTH else ():
            if self._slots.slot_of[x] < 0 and self._slots.free > self.n_slots // 2:
                self._read(x, urgent=False)
                self._ahead.add(x)
                self._counts["read_ahead"] += 1

    def _stay_below(self) -> None:
        """Budgets are made beforehand; if something else has grown, experts make room. Enough for a token stay."""
        self._steps += 1
        if self._ceiling is None or self._steps % LOOK != 1:
            return
        over = resident_bytes() - self._ceiling
        while over > 0 and self.n_slots > self.least and (slot := self._slots.retire()) is not None:
            self.store.release(slot)
            self.n_slots -= 1
            over -= self.store.slot_bytes

    def _ready(self, x: int) -> bool:
        return bool(self._slots.slot_of[x] >= 0) and x not in self._jobs

    def _batches(self, batch: list[int], left: list[int]) -> Iterator[Batch]:
        while batch or left:
            if batch:
                yield [(x % self.E, self.store.matrices(x, int(self._slots.slot_of[x]))) for x in batch]
                self._slots.hold(batch, False)
            self._fetch(left)
            batch = self._arrived(left) if left else []
            left = [x for x in left if x not in batch]

    def _fetch(self, missing: Sequence[int]) -> None:
        """Read those for which there are slots."""
        for x in missing:
            if x not in self._jobs:
                self._read(x, urgent=True)
            elif not self._jobs[x].urgent:
                self.store.read(self._jobs[x], urgent=True)

    def _read(self, x: int, urgent: bool) -> None:
        slot = self._slots.take(x)
        if slot is not None:
            self._jobs[x] = Job(x, slot)
            self.store.read(self._jobs[x], urgent)

    def _arrived(self, left: Sequence[int]) -> list[int]:
        """Wait for one at least; their slots stay held."""
        if not any(x in self._jobs for x in left):  # all slots are held for what was foretold
            self._let_go()
            self._fetch(left)
        self.store.wait([self._jobs[x] for x in left if x in self._jobs])
        arrived = [x for x in left if x in self._jobs and self._jobs[x].ended]
        for x in arrived:
            if error := self._jobs.pop(x).error:
                self._slots.empty(x)
                raise error
        return arrived

    def _harvest(self) -> None:
        """What came, or failed, while nobody looked."""
        for x in [x for x, job in self._jobs.items() if job.ended]:
            if self._jobs.pop(x).error:
                self._slots.empty(x)
            else:
                self._slots.hold([x], x in self._foretold)

    def _judge(self, wanted: set[int]) -> None:
        """How right the last foretelling was; what was wrong is kept no longer, and not read where it still waits."""
        guessed, right = self._foretold, self._foretold & wanted
        if guessed and wanted and min(guessed) // self.E == min(wanted) // self.E:
            self._trust += MEMORY * (len(right) / len(guessed) - self._trust)
            self._counts["guessed"] += len(guessed)
            self._counts["right"] += len(right)
        self._foretold = set()
        for x in guessed - wanted:
            if self._ready(x):
                self._slots.hold([x], False)
            elif x in self._jobs and self.store.cancel(self._jobs[x]):
                del self._jobs[x]
                self._slots.empty(x)

    def _let_go(self) -> None:
        """Of all that is held for later."""
        self._judge(set())
        while self._jobs:
            self.store.wait(list(self._jobs.values()))
            self._harvest()


def counted(model: Transformer) -> dict[str, Any]:
    """What an engine's `Stats` say of experts that come and go; nothing where none do."""
    last = model.layers[-1].get_submodule("ffn")
    if not isinstance(last, MoE) or not isinstance(last.experts, OffloadedExperts):
        return {}
    return {f"experts_{name}": n for name, n in asdict(last.experts.offload.stats()).items()}


class OffloadedExperts(nn.Module):
    """`Experts` whose weights come and go. Computed by the CPU, where the weights are, wherever the rows come from."""

    def __init__(self, offload: Offload, mixture: int):
        super().__init__()
        self.offload, self.mixture, self.down = offload, mixture, range(offload.E)

    @property
    def located(self) -> Sequence[Expert]:
        """Its own, in the files."""
        first = self.mixture * self.offload.E
        return self.offload.store.experts[first : first + self.offload.E]

    def like(self) -> Placed:
        """The first one's form and sizes; of its numbers nothing is known."""
        return self.offload.store.like(self.mixture * self.offload.E)

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        ends, rows_MD = counts_E.cumsum(0).tolist(), x_MD.cpu()
        y_MD, counts = torch.empty_like(rows_MD), counts_E.tolist()
        with self.offload.chosen(self.mixture, [e for e, n in enumerate(counts) if n]) as batches:
            for batch in batches:
                for e, (gate, up, down) in batch:
                    mine = slice(ends[e] - counts[e], ends[e])
                    y_MD[mine] = product(ops.swiglu(product(rows_MD[mine], gate), product(rows_MD[mine], up)), down)
        return y_MD.to(x_MD.device)


def product(x: Tensor, weight: Matrix) -> Tensor:
    return ops.quantised_linear(x, weight) if isinstance(weight, Quantised) else F.linear(x, weight.to(x.dtype))


class StoredRows(nn.Module):
    """`Embedding` whose rows are read from the file they lie in, each when it is asked for."""

    def __init__(self, files: TensorFolder, entry: Entry, dtype: torch.dtype, device: torch.device | str = "cpu"):
        super().__init__()
        self.file, self.entry = files.open(entry.file), entry
        self.weight = torch.empty(0, entry.shape[1], dtype=dtype, device=device)  # says what rows are like

    def forward(self, tokens_T: Tensor) -> Tensor:
        e = self.entry
        rows_TD = torch.empty(len(tokens_T), e.shape[1], dtype=e.dtype)
        for row_D, token in zip(rows_TD, tokens_T.tolist(), strict=True):
            self.file.read_into(row_D.view(torch.uint8).numpy().data, e.start + token * row_D.nbytes)
        return rows_TD.to(self.weight.device, self.weight.dtype)
