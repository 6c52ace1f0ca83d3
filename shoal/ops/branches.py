"""Which rows attend to which, where segments begin alike: answers to one prompt, for example.

Shapes: T rows of a batch, M of all segments, one after the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Branches(NamedTuple):
    """Segments of which some begin alike: what they share lies there once.

    Segment s is the rows rows_M[starts[s] : starts[s + 1]]. Its first shared[s] rows are those that the last segment
    before it which shares nothing begins with; the others are its own, one after the other.
    """

    lengths: tuple[int, ...]
    starts: Tensor
    rows_M: Tensor
    shared: Tensor
    first_T: Tensor  # where in rows_M each row comes first

    @classmethod
    def of(cls, segments: Sequence[Sequence[range]]) -> "Branches":
        """Segments as stretches of rows; each row is in one of them, at least."""
        lengths = [sum(map(len, spans)) for spans in segments]
        rows_M = np.concatenate([np.arange(span.start, span.stop) for spans in segments for span in spans])
        starts = np.cumsum([0, *lengths])
        first_T = np.empty(rows_M.max() + 1, np.int64)
        first_T[rows_M[::-1]] = np.arange(len(rows_M))[::-1]
        again_M = first_T[rows_M] < np.arange(len(rows_M))
        assert all(lengths), "a segment without rows"
        shared = np.add.reduceat(again_M, starts[:-1], dtype=np.int64)
        check_shared(rows_M, starts, shared)
        return cls(tuple(lengths), *map(torch.from_numpy, (starts, rows_M, shared, first_T)))


def check_shared(rows_M: np.ndarray, starts: np.ndarray, shared: np.ndarray) -> None:
    """What the kernel relies on: see Branches."""
    alone = 0  # the last segment that shares nothing
    for s, n in enumerate(shared.tolist()):
        alone = alone if n else s
        its, theirs = rows_M[starts[s] : starts[s + 1]], rows_M[starts[alone] : starts[alone + 1]]
        assert not n or s - 1 == alone or n == shared[s - 1], f"segment {s} shares {n} rows, its neighbour others"
        assert (its[:n] == theirs[:n]).all() and (np.diff(its[n:]) == 1).all(), f"segment {s} is not a branch"
