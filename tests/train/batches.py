"""Small random batches for tests of the training room."""

from collections.abc import Sequence

import torch

from shoal.data.loader import Batch


def batch_of(lengths: Sequence[int], vocab: int = 512, seed: int = 0) -> Batch:
    """Segments of random tokens; the last token of each predicts nothing."""
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    tokens = torch.randint(vocab, (T,), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    targets = tokens.roll(-1)
    targets[torch.tensor(lengths).cumsum(0) - 1] = -100
    return Batch(tokens, targets, positions, tuple(lengths), n_bytes=2 * T, ids=tuple(range(len(lengths))))
