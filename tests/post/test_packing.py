"""What is predicted, and that a batch is nothing but its samples side by side."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from shoal.data.chat import Chat, Message, render
from shoal.data.loader import Batch
from shoal.data.tokenizer import ANSWER, ANSWER_END, EOS, THINK_END, Tokenizer
from shoal.errors import DataError
from shoal.model.attend import Packed
from shoal.post.conversations import Conversation, worked
from shoal.post.packing import Packer, samples_of
from shoal.train.loss import further, losses
from tests.post.talks import ROWS, model, talks, tokenizer

LONGEST, T = 64, 128


def packer(epoch_of: int = len(ROWS), T: int = T, seed: int = 0) -> Packer:
    samples = samples_of(talks()[:epoch_of], tokenizer(), LONGEST)
    return Packer(samples, tokenizer().byte_lengths(), T, seed)


def said(batch: Batch) -> list[str]:
    """The predicted text of each segment that has any."""
    parts = batch.targets_T.split(batch.lengths)
    return [tokenizer().decode(part[part >= 0].tolist()) for part in parts if (part >= 0).any()]


def test_just_what_the_assistant_says_is_predicted():
    batch = packer().batch(0)
    expected = {f"{reasoning}</think><answer>{answer}</answer>{EOS}" for _, reasoning, answer in ROWS}
    assert len(said(batch)) == len(batch.ids) > 1 and set(said(batch)) <= expected
    ends = torch.tensor(batch.lengths).cumsum(0) - 1
    inside = torch.ones(len(batch.tokens_T), dtype=torch.bool)
    inside[ends] = False
    predicted = (batch.targets_T >= 0) & inside
    assert torch.equal(batch.targets_T[predicted], batch.tokens_T.roll(-1)[predicted])


def test_without_reasoning_the_marks_that_skip_it_are_given():
    samples = samples_of([worked("2 + 2 = ?", "", "4")], tokenizer(), LONGEST)
    given = samples.tokens_N[: samples.given_S[0]].tolist()
    assert tokenizer().decode(given).endswith("<think></think><answer>")
    assert tokenizer().decode(samples.tokens_N[samples.given_S[0] :].tolist()) == f"4</answer>{EOS}"


def test_given_and_said_are_the_whole_conversation():
    talk = (Message("system", "Be brief."), Message("user", "1 + 1 = ?"), Message("assistant", "2", "one, one"))
    for messages in (talk, (*talk[:2], replace(talk[2], reasoning=""))):
        given, say = Chat(tokenizer()).taught(messages)
        assert given + say == tokenizer().encode_pieces(render(messages, ending="whole"))


def test_each_turn_is_learnt_as_it_was_thought():
    talk = Conversation(
        (
            Message("user", "1 + 1 = ?"),
            Message("assistant", "2", "first thought"),
            Message("user", "and 2 + 2?"),
            Message("assistant", "4", "second thought"),
        )
    )
    samples = samples_of([talk], tokenizer(), 200)
    texts = [
        tokenizer().decode(samples.tokens_N[a:b].tolist()) for a, b in zip(samples.starts[:-1], samples.starts[1:])
    ]
    assert len(samples) == 2 and "first thought" in texts[0] and "first thought" not in texts[1]
    turns = [
        (f"{word} thought", THINK_END, ANSWER, n, ANSWER_END, EOS) for word, n in (("first", "2"), ("second", "4"))
    ]
    assert samples.n_said == sum(len(tokenizer().encode_pieces(turn)) for turn in turns)


def test_epochs_teach_every_sample_once_in_another_order():
    p = packer()
    seen, start, batches = [], 0, 0
    while start < 3 * len(ROWS):
        batch = p.batch(start)
        assert sum(batch.lengths) == T == len(batch.tokens_T) and batch.ids[0] == start
        seen += [p.place(i) for i in batch.ids]
        start, batches = start + len(batch.ids), batches + 1
    epochs = np.array(seen).reshape(3, -1)
    assert all(sorted(epoch) == list(range(len(ROWS))) for epoch in epochs)
    assert (epochs[0] != epochs[1]).any() and batches == p.batches(3) and p.batches(0.01) == 1
    assert torch.equal(p.batch(5).tokens_T, packer().batch(5).tokens_T)


def test_few_samples_are_one_epoch_a_batch_and_the_room_left_predicts_nothing():
    batch = packer(epoch_of=2).batch(0)
    assert batch.ids == (0, 1) and len(said(batch)) == 2 and len(batch.lengths) > 2


def test_packed_samples_cost_what_they_cost_one_by_one():
    m, batch = model(), packer().batch(0)
    n = int((batch.targets_T >= 0).sum())
    whole = losses(m, batch, Packed(batch.lengths), n, 0.3, 0.0, LONGEST)
    main = mtp = 0.0
    parts = (batch.tokens_T.split(batch.lengths), batch.targets_T.split(batch.lengths))
    for tokens_T, targets_T in zip(*parts):
        alone = Batch(tokens_T, targets_T, torch.arange(len(tokens_T)), (len(tokens_T),), 0, (0,))
        part = losses(m, alone, Packed(alone.lengths), n, 0.3, 0.0, LONGEST)
        assert part.mtp is not None
        main, mtp = main + part.main.item(), mtp + part.mtp.item()
    assert whole.mtp is not None
    assert whole.main.item() == pytest.approx(main, rel=1e-5) and whole.mtp.item() == pytest.approx(mtp, rel=1e-5)


def test_modules_predict_nothing_that_was_given():
    """A target two ahead is one of the assistant's tokens, of the same sample."""
    batch = packer().batch(0)
    ahead_T = further(batch.targets_T, batch.positions_T, 1)
    at = (ahead_T >= 0).nonzero()[:, 0]
    assert len(at) and torch.equal(ahead_T[at], batch.targets_T[at + 1])
    assert torch.equal(batch.positions_T[at + 1], batch.positions_T[at] + 1)


def test_what_is_too_long_is_counted():
    samples = samples_of([*talks(), worked("x" * 300, "y", "z")], tokenizer(), LONGEST)
    assert samples.too_long == 1 and "1 too long" in str(samples) and len(samples) == len(ROWS)
    with pytest.raises(DataError, match="no sample of at most 3 tokens"):
        samples_of(talks(), tokenizer(), 3)


def test_a_tokenizer_without_chat_marks_is_refused():
    plain = Tokenizer(tokenizer().text.replace("<think>", "<thought>"))
    with pytest.raises(DataError, match="without chat marks"):
        samples_of(talks(), plain, LONGEST)
