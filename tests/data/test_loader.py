import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.data.corpus import Split
from shoal.data.loader import FIM_LEAST, UNPREDICTED, Loader, eval_batches
from shoal.data.tokenizer import FimIds
from shoal.errors import DataError

BOS, EOS = 0, 1
FIM = FimIds(bos=BOS, eos=EOS, begin=2, hole=3, end=4)
FIRST = 10  # of the text tokens, each used once in a stream, so that a token names its place


def stream(lengths) -> Split:
    """Documents BOS, unique text tokens, EOS; lengths count the text."""
    documents, at = [], FIRST
    for n in lengths:
        documents.append([BOS, *range(at, at + n), EOS])
        at += n
    starts = np.cumsum([0, *map(len, documents)])
    return Split(np.concatenate(documents).astype(np.uint32), starts, sum(lengths))


def byte_lengths(split: Split) -> np.ndarray:
    lengths = np.arange(split.tokens.max() + 1) % 7 + 1
    lengths[:FIRST] = 0
    return lengths.astype(np.int32)


def loader(split: Split, context=8, samples=1, **changes) -> Loader:
    return Loader(split, byte_lengths(split), context, samples, **{"seed": 3, **changes})


def epoch(the: Loader, number=0):
    n = the.samples_per_epoch
    return [the.batch(i) for i in range(number * n, (number + 1) * n)]


splits = st.lists(st.integers(0, 40), min_size=1, max_size=12).map(stream).filter(lambda s: len(s.tokens) >= 8)
seeds = st.integers(0, 2**31)


@given(splits, seeds, st.integers(0, 3))
def test_every_token_is_an_input_once_an_epoch(split, seed, number):
    tokens = torch.cat([b.tokens_T for b in epoch(loader(split, seed=seed), number)]).numpy()
    counts = np.bincount(tokens, minlength=split.tokens.max() + 1)
    assert counts[FIRST:].max(initial=0) <= 1
    assert len(tokens) == len(split.tokens) // 8 * 8  # only a rest shorter than one window is left out


@given(splits, seeds)
def test_nothing_crosses_a_document(split, seed):
    follows = dict(zip(split.tokens[:-1].tolist(), split.tokens[1:].tolist()))
    for b in epoch(loader(split, seed=seed)):
        assert sum(b.lengths) == len(b.tokens_T) == 8
        for part, aims, places in zip(*(x.split(b.lengths) for x in (b.tokens_T, b.targets_T, b.positions_T))):
            assert places.tolist() == list(range(len(part)))
            assert BOS not in part[1:] and EOS not in part[:-1] and BOS not in aims
            for token, target in zip(part.tolist(), aims.tolist()):
                expected = UNPREDICTED if token == EOS else target if token == BOS else follows[token]
                assert target == expected
            assert (part[1:] == aims[:-1]).all()


@given(splits, seeds)
def test_unmasked_packing_has_one_segment_a_window_and_the_same_targets(split, seed):
    for b, masked in zip(*(epoch(loader(split, seed=seed, mask_documents=m)) for m in (False, True))):
        assert b.lengths == (8,) and b.positions_T.tolist() == list(range(8))
        assert torch.equal(b.targets_T, masked.targets_T) and torch.equal(b.tokens_T, masked.tokens_T)


@given(splits, seeds, st.integers(0, 10**12))
def test_a_batch_depends_on_nothing_but_its_sample_index(split, seed, start):
    whole = loader(split, samples=6, seed=seed, fim_rate=0.5, fim_ids=FIM)
    two = [loader(split, samples=3, seed=seed, fim_rate=0.5, fim_ids=FIM).batch(start + i) for i in (3, 0)]
    whole.batch(start + 17)
    b = whole.batch(start)
    assert b.ids == tuple(range(start, start + 6)) == two[1].ids + two[0].ids
    for name in ("tokens_T", "targets_T", "positions_T"):
        assert torch.equal(getattr(b, name), torch.cat([getattr(two[1], name), getattr(two[0], name)]))
    assert b.lengths == two[1].lengths + two[0].lengths and b.n_bytes == two[0].n_bytes + two[1].n_bytes


def test_epochs_and_seeds_visit_in_other_orders():
    split = stream([500])
    orders = [[the.window(i) for i in range(62)] for the in (loader(split), loader(split, seed=4))]
    orders.append([loader(split).window(62 + i) for i in range(62)])
    assert len({tuple(o) for o in orders}) == 3 and len({o[0] % 8 for o in orders}) > 1


@given(splits)
def test_bytes_are_those_of_the_predicted_targets(split):
    for b in epoch(loader(split)):
        assert b.n_bytes == sum(byte_lengths(split)[t] for t in b.targets_T.tolist() if t != UNPREDICTED)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=8).map(stream), seeds)
def test_a_rearranged_part_reads_as_before(split, seed):
    """prefix + middle + suffix is the text of the part but for its last few tokens; the part keeps its place."""
    context = min(64, len(split.tokens))
    plain, mixed = (loader(split, context, seed=seed, fim_rate=rate, fim_ids=FIM) for rate in (0.0, 1.0))
    for before, after in zip(epoch(plain), epoch(mixed)):
        assert before.lengths == after.lengths
        columns = (before.tokens_T, after.tokens_T, after.targets_T)
        for old, new, target in zip(*(x.split(before.lengths) for x in columns)):
            if len(old) < FIM_LEAST:
                assert torch.equal(old, new)
                continue
            text = [t for t in old.tolist() if t not in (BOS, EOS)]
            ids = new.tolist()
            assert (ids[0], ids[1], ids[-1]) == (FIM.bos, FIM.begin, FIM.eos)
            hole, end = ids.index(FIM.hole), ids.index(FIM.end)
            prefix, suffix, middle = ids[2:hole], ids[hole + 1 : end], ids[end + 1 : -1]
            assert prefix + middle + suffix == text[: len(old) - 5]
            assert target.tolist() == [*ids[1:], UNPREDICTED]


def test_the_share_of_rearranged_parts_is_the_rate():
    split = stream([62] * 400)
    batches = epoch(loader(split, context=64, fim_rate=0.3, fim_ids=FIM))
    parts = [p for b in batches for p in b.tokens_T.split(b.lengths) if len(p) >= FIM_LEAST]
    assert 0.24 < np.mean([FIM.begin in p for p in parts]) < 0.36


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(DataError, match="whole window"):
        loader(stream([3]), context=8)
    with pytest.raises(DataError, match="fill-in-the-middle"):
        loader(stream([30]), fim_rate=0.1)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12).map(stream), st.integers(8, 40))
def test_evaluation_predicts_every_token_once_with_its_own_past(split, tokens_per_batch):
    seen = []
    before = dict(zip(split.tokens[1:].tolist(), split.tokens[:-1].tolist()))
    for b in eval_batches(split, byte_lengths(split), 8, tokens_per_batch):
        assert len(b.tokens_T) == sum(b.lengths) == tokens_per_batch
        for part, aims in zip(b.tokens_T.split(b.lengths), b.targets_T.split(b.lengths)):
            if UNPREDICTED in aims:
                assert (aims == UNPREDICTED).all()  # the filling
                continue
            assert len(part) <= 8 and (part[1:] == aims[:-1]).all()
            assert all(before[t] == p for p, t in zip(part.tolist(), aims.tolist()) if t != EOS)
            seen += aims.tolist()
    assert seen == [t for t in split.tokens.tolist() if t != BOS]  # in order, EOS included


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12).map(stream))
def test_evaluation_counts_all_bytes_whatever_the_batch_size(split):
    lengths = byte_lengths(split)
    chunks = []
    for size in (8, 30, 1000):
        batches = list(eval_batches(split, lengths, 8, size))
        assert sum(b.n_bytes for b in batches) == lengths[split.tokens].sum()
        parts = (t for b in batches for t in b.targets_T.split(b.lengths))
        chunks.append([t.tolist() for t in parts if UNPREDICTED not in t])
    assert chunks[0] == chunks[1] == chunks[2]


def test_a_limit_takes_chunks_spread_over_the_split():
    split = stream([100] * 50)
    ids = [i for b in eval_batches(split, byte_lengths(split), 8, 64, limit_tokens=500) for i in b.ids]
    again = [i for b in eval_batches(split, byte_lengths(split), 8, 640, limit_tokens=500) for i in b.ids]
    assert ids == again == sorted(set(ids))
    assert 55 <= len(ids) <= 75 and max(np.diff(ids)) - min(np.diff(ids)) <= 1 and max(ids) > 600
