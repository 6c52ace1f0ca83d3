"""Conversations to flat training batches, as a pure function of one number.

Every assistant's turn is a sample: what the engine would give the model before it (`Chat.taught`), then what the model
should say. So a reasoning turn in the middle of a talk is learnt as it would have been thought, though later turns
leave it out; the price is that a talk of k turns is read k times. Only what the model says is predicted.

    sample     given … given said … said EOS         targets    — … — said … said EOS

The endless list of samples is epoch after epoch, each in an order that a small Feistel network computes (as in
`data/loader.py`). `batch(start)` takes samples from index `start` on, whole, as many as fit into T tokens, and never
across the end of an epoch. What room is left holds the samples that come next, the last one cut off, and predicts
nothing: experts so see tokens of the kind they are for, which a run of padding would not be.

Shapes: T tokens of a batch, N of all samples, S samples.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np

from shoal.data.chat import Chat
from shoal.data.draws import mix, permuted
from shoal.data.loader import UNPREDICTED, Batch, packed
from shoal.data.tokenizer import Tokenizer
from shoal.errors import DataError, RequestError
from shoal.post.conversations import Conversation


@dataclass(frozen=True)
class Samples:
    """Tokens end to end; sample i is tokens_N[starts[i] : starts[i + 1]], of which the first given_S[i] are given."""

    tokens_N: np.ndarray  # int32
    starts: np.ndarray  # int64 [S + 1]
    given_S: np.ndarray  # int64
    too_long: int = 0  # left out

    def __len__(self) -> int:
        return len(self.given_S)

    @property
    def n_said(self) -> int:
        return len(self.tokens_N) - int(self.given_S.sum())

    @cached_property
    def sha256(self) -> str:
        """Of everything that training sees."""
        return sha256(b"".join(a.tobytes() for a in (self.tokens_N, self.starts, self.given_S))).hexdigest()

    def __str__(self) -> str:
        long = f"; {self.too_long:,} too long and left out" if self.too_long else ""
        return f"{len(self):,} samples, {len(self.tokens_N):,} tokens, {self.n_said:,} of them to be said{long}"


def samples_of(conversations: Sequence[Conversation], tokenizer: Tokenizer, longest: int) -> Samples:
    """A sample of each assistant's turn that has at most `longest` inputs. Raises DataError."""
    if not tokenizer.chat_template:
        fix = "start from a model with a chat template, or from one that Shoal trained"
        raise DataError("a tokenizer without chat marks", "a form in which turns can be written", fix)
    with closing(Chat(tokenizer)) as chat:
        pairs = [pair for talk in conversations for pair in turns(chat, talk)]
    kept = [(given, said) for given, said in pairs if len(given) + len(said) - 1 <= longest]
    if not kept:
        got = f"no sample of at most {longest:,} tokens among {len(pairs):,}"
        raise DataError(got, "at least one", "raise batch.context, up to the model's positions")
    tokens_N = np.fromiter((t for given, said in kept for t in (*given, *said)), np.int32)
    lengths = [len(given) + len(said) for given, said in kept]
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    return Samples(tokens_N, starts, np.array([len(given) for given, _ in kept]), len(pairs) - len(kept))


def turns(chat: Chat, talk: Conversation) -> list[tuple[list[int], list[int]]]:
    ends = [i for i, m in enumerate(talk.messages, 1) if m.role == "assistant"]
    try:
        return [chat.taught(talk.messages[:end], talk.tools) for end in ends]
    except RequestError as e:
        raise DataError(f"{talk.where}: {e.got}", e.expected, e.fix) from None


@dataclass(frozen=True)
class Packer:
    samples: Samples
    byte_lengths: np.ndarray
    T: int
    seed: int

    def batch(self, start: int) -> Batch:
        """`ids` are the indices, from `start` on, of the samples it teaches."""
        n, tokens, targets, lengths, ids = len(self.samples), [], [], [], []
        room, index = self.T, start
        while room:
            inputs, predicted = self.sample(index)
            whole = index == start + len(ids) and len(inputs) <= room and index // n == start // n
            ids += [index] * whole
            tokens.append(inputs[:room])
            targets.append(predicted if whole else np.full(len(tokens[-1]), UNPREDICTED))
            lengths.append(len(tokens[-1]))
            room, index = room - lengths[-1], index + 1
        return packed(np.concatenate(tokens), np.concatenate(targets), lengths, self.byte_lengths, tuple(ids))

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of one sample, int64."""
        s, i = self.samples, self.place(index)
        tokens = s.tokens_N[s.starts[i] : s.starts[i + 1]].astype(np.int64)
        targets = tokens[1:].copy()
        targets[: s.given_S[i] - 1] = UNPREDICTED
        return tokens[:-1], targets

    def place(self, index: int) -> int:
        epoch, i = divmod(index, len(self.samples))
        return permuted(i, len(self.samples), mix(self.seed, epoch, 0))

    def batches(self, epochs: float) -> int:
        """How many it takes to teach so many epochs."""
        n, count, index = len(self.samples), 0, 0
        lengths = np.diff(self.samples.starts) - 1
        while index < epochs * n:
            end, room = (index // n + 1) * n, self.T
            while index < end and (length := lengths[self.place(index)]) <= room:
                index, room = index + 1, room - length
            count += 1
        return count
