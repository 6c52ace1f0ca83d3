"""Calls in text: found however the text is cut, their arguments untouched, and what is no call stays text."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.data.chat import BARE_DEEPSEEK_CALLS, DEEPSEEK_CALLS, JSON_CALLS, LLAMA_CALLS, CallForm
from shoal.engine.calls import MOST_HEAD_CHARS, CallDelta, Calls, overlap

FORMS = (JSON_CALLS, DEEPSEEK_CALLS, BARE_DEEPSEEK_CALLS)
values = st.recursive(
    st.none() | st.integers() | st.text() | st.sampled_from(["</tool_call>", "<tool_call>", '"}}', "\\"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
arguments = st.dictionaries(st.text(), values, max_size=3).map(lambda v: json.dumps(v, ensure_ascii=False))
scraps = st.sampled_from(
    [
        *'a{}<>\n "\\:,[`',
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", "arguments": {',
        '"x": "}"',
        "}}",
        '"name"',
        "ü🙂",
    ]
)


def read(form: CallForm, text: str, cuts: list[int]) -> tuple[str, list[tuple[str, str]]]:
    """Content, and (name, arguments) of each call, of the text in pieces."""
    parser, content, found = Calls(form, "t"), "", []
    edges = [0, *sorted({c % (len(text) + 1) for c in cuts}), len(text)]
    pieces = [p for a, b in pairwise(edges) for p in parser.feed(text[a:b])]
    for piece in [*pieces, *parser.flush()]:
        if isinstance(piece, CallDelta):
            if piece.name is not None:
                assert piece.id == f"call_t_{len(found)}"
                found.append((piece.name, ""))
            assert piece.index == len(found) - 1
            found[-1] = (found[-1][0], found[-1][1] + piece.arguments)
        else:
            content += piece
    return content, found


def spelled(form: CallForm, name: str, given: str) -> str:
    return form.open + form.head.format(name) + given + form.tail + form.close


@given(st.sampled_from(FORMS), st.lists(arguments, min_size=1, max_size=3), st.lists(st.integers(0, 10**6)))
def test_calls_come_back_as_they_were_written(form, given_, cuts):
    text = "Let me see." + "\n".join(spelled(form, f"f{i}", a) for i, a in enumerate(given_))
    assert read(form, text, cuts) == ("Let me see.", [(f"f{i}", a) for i, a in enumerate(given_)])


@given(st.lists(arguments, min_size=1, max_size=3), st.lists(st.integers(0, 10**6)))
def test_calls_without_tags_come_back_too(given_, cuts):
    text = "\n".join(spelled(LLAMA_CALLS, f"f{i}", a) for i, a in enumerate(given_))
    assert read(LLAMA_CALLS, " " + text, cuts) == ("", [(f"f{i}", a) for i, a in enumerate(given_)])


@given(
    st.sampled_from([JSON_CALLS, LLAMA_CALLS]),
    st.lists(scraps, max_size=40).map("".join),
    st.lists(st.integers(0, 10**6), max_size=10),
)
def test_cuts_change_nothing(form, text, cuts):
    whole = read(form, text, [])
    assert read(form, text, cuts) == whole == read(form, text, list(range(len(text))))


@pytest.mark.parametrize(
    "text, content, calls",
    [
        ('{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        ('\n{ "name" : "f" ,"parameters":{} } \n', "", [("f", "{}")]),
        ('{"name": "f", "parameters": {"a": "}"}} Done.', "Done.", [("f", '{"a": "}"}')]),
        ('{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
        ('Use {"name": "f", "parameters": {}}', 'Use {"name": "f", "parameters": {}}', []),
        ('{"a": 1} {"name": "f", "parameters": {}}', '{"a": 1} {"name": "f", "parameters": {}}', []),
        ('{"name": "f", "param', '{"name": "f", "param', []),
        ("  ", "  ", []),
    ],
)
def test_calls_without_tags_stand_where_an_answer_begins(text, content, calls):
    assert read(LLAMA_CALLS, text, list(range(len(text)))) == (content, calls)


@given(st.lists(scraps, max_size=40).map("".join))
def test_text_without_a_call_is_content(text):
    text = text.replace("<tool_call>", "<tool-call>")
    assert read(JSON_CALLS, text, []) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>hello</tool_call>",
        "<tool_call>",
        "<tool_call",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>'[:20],
        '<tool_call>{"arguments": {}}</tool_call> and so on',
        "<tool_call>" + "[" * MOST_HEAD_CHARS + "</tool_call>",
        "<tool_call>" + "x" * (MOST_HEAD_CHARS + 10),
    ],
)
def test_what_only_looks_like_a_call_stays_text(text):
    assert read(JSON_CALLS, text, []) == (text, [])


def test_arguments_before_the_name_are_read_too():
    text = '<tool_call>\n{"arguments": {"a": [1, "é"]}, "name": "f"}\n</tool_call>'
    assert read(JSON_CALLS, text, []) == ("", [("f", '{"a": [1, "é"]}')])
    assert read(JSON_CALLS, text.replace('{"a": [1, "é"]}', '"text"'), []) == ("", [("f", "text")])


def test_arguments_stream_as_they_come():
    parser = Calls(JSON_CALLS, "t")
    assert list(parser.feed('<tool_call>{"name": "f", "arguments": {"a": "lo')) == [
        CallDelta(0, "", "call_t_0", "f"),
        CallDelta(0, '{"a": "lo'),
    ]
    assert list(parser.feed('ng"}')) == [CallDelta(0, 'ng"}')]
    assert list(parser.feed("}</tool_")) == [] and list(parser.feed("call>x")) == ["x"]


def test_arguments_that_are_no_json_are_only_text():
    hostile = '{__import__("os").system("touch /tmp/x")}'
    text = spelled(JSON_CALLS, "f", hostile)
    assert read(JSON_CALLS, text, []) == ("", [("f", hostile)])


def test_what_follows_the_arguments_without_an_end_is_text_again():
    text = '<tool_call>{"name": "f", "arguments": {}} and more'
    assert read(JSON_CALLS, text, []) == ("and more", [("f", "{}")])


@given(st.text("ab", max_size=8), st.text("ab", min_size=1, max_size=5))
def test_overlap_is_the_longest_end_that_begins_the_mark(text, mark):
    ends = [n for n in range(len(mark)) if n <= len(text) and text.endswith(mark[:n])]
    assert overlap(text, mark) == max(ends)
