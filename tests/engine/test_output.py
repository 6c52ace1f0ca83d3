"""The token state machine: what is shown doesn't depend on how it came, and what must not be shown never is."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.data.tokenizer import SHOWN
from shoal.engine.output import Stops
from shoal.engine.request import MOST_STOP_CHARS, Step, Token
from shoal.errors import RequestError
from tests.engine.outputs import (
    ANSWER_END_ID,
    ANSWER_ID,
    BYTES,
    CHAT,
    EOS,
    MARKS,
    SPELLINGS,
    THINK_END_ID,
    THINK_ID,
    TOKENIZER,
    VOCAB,
    calls,
    output,
    run,
    said,
)

PLAIN = replace(MARKS, calls=None)
ids = st.integers(0, VOCAB - 1)
groups = st.lists(st.integers(1, 7), min_size=1, max_size=5)
words = st.lists(st.sampled_from(["a", "b", "ab", "STOP", "é", "漢", "🙂", "\n", " ", "<", "x"]), max_size=30).map(
    "".join
)
stop_strings = st.lists(
    st.text("abSTOP é漢\n", min_size=1, max_size=4) | st.sampled_from(["STOP", "🙂"]), max_size=4, unique=True
)


def told(deltas):
    return said(deltas), said(deltas, "reasoning"), calls(deltas)


@st.composite
def spelled(draw, text: str) -> list[int]:
    """Tokens that spell the text, of any lengths: bytes where the draw says so, the tokenizer's own elsewhere."""
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    found = []
    for a, b in zip([0, *cuts], [*cuts, len(text)]):
        part = text[a:b]
        in_bytes = draw(st.booleans())
        found += [BYTES[bytes([c])] for c in part.encode()] if in_bytes else TOKENIZER.encode(part)
    return found


@given(st.data(), words, stop_strings, groups)
def test_any_spelling_in_any_steps_shows_the_same(data, text, stops, group):
    whole = told(run(output(thinking=False, stops=stops), TOKENIZER.encode(text)))
    again = told(run(output(thinking=False, stops=stops), data.draw(spelled(text)), group=group))
    assert again == whole


@given(words, stop_strings)
def test_text_ends_before_the_first_stop_string_to_be_complete(text, stops):
    expected, finish = text, "length"
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            expected, finish = text[: end - max(map(len, found))], "stop"
            break
    out = output(marks=PLAIN, thinking=False, stops=stops)
    deltas = run(out, TOKENIZER.encode(text))
    assert said(deltas) == expected and not any(s in expected for s in stops)
    assert out.finish(Step((), finish)) == finish and (out.state == "over")


@given(words, stop_strings)
def test_no_part_of_a_stop_string_is_shown_before_it_is_sure(text, stops):
    """Whatever has been shown at any moment is a part of what will have been shown at last."""
    out, shown_so_far = output(marks=PLAIN, thinking=False, stops=stops), [""]
    for t in TOKENIZER.encode(text):
        goes_on = out.accept(t)
        shown_so_far.append(shown_so_far[-1] + said(out.feed(Step((Token(t),)))))
        if not goes_on:
            break
    last = shown_so_far[-1] + said(out.feed(Step((), "length")))
    assert all(last.startswith(s) for s in shown_so_far)


@given(st.lists(ids, max_size=60), groups, st.sampled_from([True, False, None]))
def test_any_tokens_at_all_show_the_same_in_any_steps(tokens, group, thinking):
    followed = output(thinking=thinking)
    kept = []
    for t in tokens:
        forced = followed.forced()
        t = t if forced is None else forced
        kept.append(t)
        if not followed.accept(t):
            break
    one = told(run(output(thinking=thinking), kept))
    assert told(run(output(thinking=thinking), kept, group=group)) == one


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40))
def test_plain_text_is_what_the_tokenizer_decodes(tokens):
    tokens = [t for t in tokens if t not in CHAT.plain.ends]
    assert said(run(output(marks=CHAT.plain), tokens)) == TOKENIZER.decode(tokens, skip_special=True)


@given(st.lists(ids, max_size=80), st.integers(0, 20), st.sampled_from([True, None]))
def test_the_budget_always_ends_thinking(tokens, budget, thinking):
    out = output(thinking=thinking, budget=budget)
    for t in [THINK_ID, *tokens] if thinking is None else tokens:
        forced = out.forced()
        assert out.reasoning_tokens <= budget
        if forced is not None:
            assert forced in (THINK_END_ID, ANSWER_ID)
        if not out.accept(t if forced is None else forced):
            break
    assert out.state != "thinking" or len(tokens) <= budget


def test_reasoning_and_answer_are_parted_by_marks_alone():
    text = TOKENIZER.encode("so </think> is text")
    tokens = [*text, THINK_END_ID, ANSWER_ID, *TOKENIZER.encode("\n4 <answer>"), ANSWER_END_ID]
    out = output(thinking=True)
    deltas = run(out, tokens)
    assert told(deltas) == ("4 <answer>", "so </think> is text", [])
    assert out.reasoning_tokens == len(text) and out.state == "over"


def test_an_answer_opens_after_the_reasoning():
    out = output(thinking=True)
    out.accept(THINK_END_ID)
    assert out.forced() == ANSWER_ID
    out.accept(ANSWER_ID)
    assert out.forced() is None and out.mask() is None


def test_half_a_character_never_crosses_from_the_reasoning_into_the_answer():
    half, rest = BYTES["é".encode()[:1]], BYTES["é".encode()[1:]]
    deltas = run(output(thinking=True), [half, THINK_END_ID, ANSWER_ID, rest, half])
    assert (said(deltas, "reasoning"), said(deltas)) == ("\ufffd", "\ufffd\ufffd")


def test_calls_are_told_and_named_as_the_reason():
    text = 'Let me see.<tool_call>{"name": "add", "arguments": {"a": "é"}}</tool_call>'
    out = output(thinking=False)
    deltas = run(out, [*TOKENIZER.encode(text), EOS])
    assert (said(deltas), calls(deltas)) == ("Let me see.", [("add", '{"a": "é"}')])
    assert out.finish(Step((), "stop")) == "tool_calls" and out.finish(Step((), "length")) == "length"
    deltas = run(output(marks=PLAIN, thinking=False), TOKENIZER.encode(text))
    assert (said(deltas), calls(deltas)) == (text, [])


@given(words, groups)
def test_every_token_of_text_comes_with_the_text_it_made(text, group):
    """For log-probabilities: in order, each once, marks and ends left out."""
    tokens = TOKENIZER.encode(text)
    deltas = run(output(marks=PLAIN, thinking=False, stops=["zz"]), [*tokens, EOS], group=group)
    assert [t.id for d in deltas for t in d.tokens] == tokens


def test_what_was_not_stepped_is_not_shown():
    out = output(thinking=False)
    tokens = TOKENIZER.encode("one two three")
    for t in tokens:
        out.accept(t)
    assert said(out.feed(Step((Token(tokens[0]),)))) == SPELLINGS[tokens[0]].decode()
    assert out.feed(Step((), "cancelled")) == []


@pytest.mark.parametrize("stops", [[""], ["x" * (MOST_STOP_CHARS + 1)], ["x"] * 17, ["x"] * 100_000])
def test_stop_strings_no_client_needs_are_refused(stops):
    with pytest.raises(RequestError) as e:
        Stops(stops)
    assert e.value.param == "stop"


def test_special_tokens_show_nothing_and_readers_marks_do():
    hidden = {i for i, t in TOKENIZER.full.get_added_tokens_decoder().items() if not SPELLINGS[i]}
    assert hidden == {TOKENIZER.id(t.content) for t in TOKENIZER.full.get_added_tokens_decoder().values() if t.special}
    assert [SPELLINGS[TOKENIZER.special_id(s)].decode() for s in SHOWN] == list(SHOWN)
