"""Tokens on disk to flat training batches, as a pure function of one number.

The split is one circular stream. In each epoch it is cut, at a shift drawn from (seed, epoch), into windows of
`context` inputs, so every token is an input once (but for a rest shorter than one window), and the windows are visited
in an order that a small Feistel network computes for any index without storing it. `batch(start)` depends on nothing
but the global sample index `start`: a resumed run, or one on another number of ranks, sees exactly what it would have
seen.

Inside a window each document part is a segment: positions restart at 0, attention stays inside (`lengths`), EOS is
predicted, the next document's BOS never is. A long document simply goes on in other windows.

Fill-in-the-middle (arXiv 2207.14255, prefix-suffix-middle; V3 at rate 0.1) turns a part of L tokens into

    BOS <fim_begin> prefix <fim_hole> suffix <fim_end> middle EOS        of L tokens too: the text gives up its last few

Shapes: T tokens of a batch, samples_per_batch · context.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from shoal.data.corpus import Split
from shoal.data.draws import mix, permuted
from shoal.data.tokenizer import FimIds
from shoal.errors import DataError

UNPREDICTED = -100
FIM_LEAST = 16  # tokens a part needs to be worth rearranging


@dataclass(frozen=True)
class Batch:
    tokens_T: Tensor  # int64
    targets_T: Tensor  # int64, UNPREDICTED where nothing is
    positions_T: Tensor  # int64, from 0 in each segment
    lengths: tuple[int, ...]  # of the segments; sum T
    n_bytes: int  # spelled by the predicted targets
    ids: tuple[int, ...]  # global sample indices

    def to(self, device: torch.device) -> "Batch":
        tokens_T, targets_T, positions_T = (x.to(device) for x in (self.tokens_T, self.targets_T, self.positions_T))
        return replace(self, tokens_T=tokens_T, targets_T=targets_T, positions_T=positions_T)


@dataclass(frozen=True)
class Loader:
    split: Split
    byte_lengths: np.ndarray
    context: int
    samples_per_batch: int
    seed: int
    mask_documents: bool = True
    fim_rate: float = 0.0
    fim_ids: FimIds | None = None

    def __post_init__(self):
        if self.samples_per_epoch < 1:
            got = f"{len(self.split.tokens):,} tokens and a context of {self.context}"
            raise DataError(got, "at least one whole window", "give more text or a shorter context")
        if self.fim_rate > 0 and self.fim_ids is None:
            raise DataError(f"fim_rate {self.fim_rate}", "a tokenizer with fill-in-the-middle tokens", "set fim_rate 0")

    @property
    def samples_per_epoch(self) -> int:
        return len(self.split.tokens) // self.context

    def cut(self, context: int) -> "Loader":
        """The same text in other windows, as many tokens a batch."""
        return replace(self, context=context, samples_per_batch=self.samples_per_batch * self.context // context)

    def batch(self, start: int) -> Batch:
        """Samples start … start + samples_per_batch - 1."""
        ids = range(start, start + self.samples_per_batch)
        samples = [self.sample(i) for i in ids]
        tokens_T, targets_T = (np.concatenate(column) for column in list(zip(*samples))[:2])
        lengths = [n for sample in samples for n in sample[2]]
        return packed(tokens_T, targets_T, lengths, self.byte_lengths, tuple(ids))

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Inputs, targets and segment lengths of one window."""
        begin = self.window(index)
        stream = np.arange(begin, begin + self.context + 1) % len(self.split.tokens)
        tokens = self.split.tokens[stream].astype(np.int64)
        starts = self.starts_in(begin)
        inputs, targets = tokens[:-1], tokens[1:].copy()
        targets[starts[starts > 0] - 1] = UNPREDICTED
        cuts = [0, *starts[(starts > 0) & (starts < self.context)].tolist(), self.context]
        if self.fim_rate > 0:
            inputs, targets = self.fill_in_the_middle(inputs, targets, cuts, index)
        return inputs, targets, np.diff(cuts).tolist() if self.mask_documents else [self.context]

    def window(self, index: int) -> int:
        """Where in the stream sample `index` begins."""
        epoch, i = divmod(index, self.samples_per_epoch)
        shift = mix(self.seed, epoch, 0) % len(self.split.tokens)
        place = permuted(i, self.samples_per_epoch, key=mix(self.seed, epoch, 1))
        return (shift + self.context * place) % len(self.split.tokens)

    def starts_in(self, begin: int) -> np.ndarray:
        """Where documents start in the window, counted from its begin: 0 … context."""
        starts, end, n = self.split.doc_starts, begin + self.context + 1, len(self.split.tokens)
        here = starts[np.searchsorted(starts, begin) : np.searchsorted(starts, min(end, n))]
        wrapped = starts[: np.searchsorted(starts, end - n)] + n if end > n else starts[:0]
        return np.concatenate([here, wrapped]) - begin

    def fill_in_the_middle(self, inputs: np.ndarray, targets: np.ndarray, cuts: list[int], index: int):
        inputs = inputs.copy()
        for part, (a, b) in enumerate(pairwise(cuts)):
            draw = mix(self.seed, index, 2 + part)
            if b - a >= FIM_LEAST and (draw & 0xFFFFFFFF) < self.fim_rate * 2**32:
                assert self.fim_ids is not None
                inputs[a:b] = rearranged(inputs[a:b], self.fim_ids, mix(draw, 0, 0))
                targets[a : b - 1] = inputs[a + 1 : b]
                targets[b - 1] = UNPREDICTED
        return inputs, targets


def rearranged(part: np.ndarray, ids: FimIds, draw: int) -> np.ndarray:
    """The part with its middle last, as long as before."""
    text = part[int(part[0] == ids.bos) : len(part) - int(part[-1] == ids.eos)][: len(part) - len(ids)]
    a, b = sorted((draw % (len(text) + 1), (draw >> 32) % (len(text) + 1)))
    prefix, middle, suffix = text[:a], text[a:b], text[b:]
    pieces = [ids.bos], [ids.begin], prefix, [ids.hole], suffix, [ids.end], middle, [ids.eos]
    return np.concatenate(pieces)


def packed(tokens_T, targets_T, lengths: list[int], byte_lengths: np.ndarray, ids: tuple[int, ...]) -> Batch:
    ends = np.cumsum(lengths)
    positions_T = np.arange(len(tokens_T)) - np.repeat(ends - lengths, lengths)
    n_bytes = int(byte_lengths[targets_T[targets_T >= 0]].sum())
    tokens_T, targets_T, positions_T = (torch.from_numpy(x) for x in (tokens_T, targets_T, positions_T))
    return Batch(tokens_T, targets_T, positions_T, tuple(lengths), n_bytes, ids)


def eval_batches(
    split: Split, byte_lengths: np.ndarray, context: int, tokens_per_batch: int, limit_tokens: int | None = None
) -> Iterator[Batch]:
    """Every token after a document's first, predicted exactly once, documents in order.

    A document is cut into chunks of `context` inputs that share one token (the last target is the next first input).
    Batches all have `tokens_per_batch` tokens, filled up with a segment that predicts nothing, so how many go into one
    never changes the score. `limit_tokens` takes about that many, in chunks spread evenly over the split. `ids` are
    chunk numbers.
    """
    assert tokens_per_batch >= context, (tokens_per_batch, context)
    begins, sizes = chunks(split.doc_starts, context)
    keep = np.arange(len(begins))
    if limit_tokens is not None and limit_tokens < sizes.sum():
        n = max(1, round(len(keep) * limit_tokens / sizes.sum()))
        keep = keep[np.arange(n) * len(keep) // n]
    group, used = [], 0
    for i in keep.tolist():
        if used + sizes[i] > tokens_per_batch:
            yield evaluated(split, byte_lengths, begins[group], sizes[group], tokens_per_batch, tuple(group))
            group, used = [], 0
        group.append(i)
        used += sizes[i]
    if group:
        yield evaluated(split, byte_lengths, begins[group], sizes[group], tokens_per_batch, tuple(group))


def chunks(doc_starts: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each chunk begins and how many inputs it has; a document of L tokens has L - 1 inputs."""
    n_inputs = np.diff(doc_starts) - 1
    n_chunks = -(-n_inputs // context)
    order = np.arange(n_chunks.sum()) - np.repeat(np.cumsum(n_chunks) - n_chunks, n_chunks)
    begins = np.repeat(doc_starts[:-1], n_chunks) + order * context
    sizes = np.minimum(np.repeat(n_inputs, n_chunks) - order * context, context)
    return begins, sizes


def evaluated(split: Split, byte_lengths, begins, sizes, tokens_per_batch: int, ids: tuple[int, ...]) -> Batch:
    rest = tokens_per_batch - int(sizes.sum())
    at = np.concatenate([np.arange(b, b + n) for b, n in zip(begins, sizes)])
    tokens_T = np.pad(split.tokens[at].astype(np.int64), (0, rest))
    targets_T = np.pad(split.tokens[at + 1].astype(np.int64), (0, rest), constant_values=UNPREDICTED)
    return packed(tokens_T, targets_T, sizes.tolist() + [rest] * (rest > 0), byte_lengths, ids)
