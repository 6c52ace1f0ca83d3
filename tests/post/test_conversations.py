"""Files of conversations: what is read, and how what can't be is named."""

import json
from pathlib import Path

import pytest

from shoal.errors import ConfigError, DataError
from shoal.post.conversations import items, of_data, read

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_both_forms_are_read(tmp_path):
    call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    talk = [
        {"role": "user", "content": "what time?"},
        {"role": "assistant", "content": None, "reasoning_content": "ask", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
        {"role": "assistant", "content": "Noon."},
    ]
    row = {"prompt": "1 + 1", "reasoning": "two ones", "answer": "2", "teacher": "somebody"}
    first, second, third = read(written(tmp_path / "a.jsonl", GOOD, "", {"messages": talk}, row))
    assert [m.role for m in second.messages] == ["user", "assistant", "tool", "assistant"]
    assert second.messages[1].reasoning == "ask" and second.messages[1].calls[0].name == "now"
    assert (third.messages[1].reasoning, third.messages[1].content) == ("two ones", "2")
    assert first.where.endswith("a.jsonl, line 1") and second.where.endswith("line 3")


@pytest.mark.parametrize(
    "line, what",
    [
        ('{"messages": [', "Expecting value"),
        ("[1]", "a list"),
        ({"text": "a"}, "the keys text"),
        ({"messages": "hi"}, "no list of objects"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant's turn"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "before any user's"),
        ({"messages": [{"role": "judge", "content": "hi"}]}, "the role 'judge'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content that is a int"),
        ('{"prompt": "\\ud800", "answer": "a"}', "surrogates"),
        ({"messages": [*GOOD["messages"], {"role": "tool", "content": "x", "tool_call_id": "a"}]}, "result of a call"),
        ({"messages": [GOOD["messages"][0], {"role": "assistant", "tool_calls": [{}]}]}, "tool_calls of another form"),
        (GOOD | {"tools": [3]}, "tools that are no list"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, what):
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2") as e:
        list(read(written(tmp_path / "bad.jsonl", GOOD, line)))
    assert what in e.value.got


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        of_data(str(written(tmp_path / "empty.jsonl", "", "")), 0)
    with pytest.raises(DataError, match="No such file"):
        of_data(str(tmp_path / "none.jsonl"), 0)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(DataError, match="latin"):
        of_data(str(tmp_path / "latin.jsonl"), 0)
    with pytest.raises(DataError, match="no data"):
        of_data("", 0)


def test_worked_solutions_of_the_training_split():
    talks = of_data("tasks:addition,countdown:40", 0)
    assert 30 < len(talks) <= 40 and all(t.messages[1].reasoning and t.messages[1].content for t in talks)
    found = items("addition,countdown:40", 0)
    assert {i.task for i in found} == {"addition", "countdown"} and {i.split for i in found} == {"train"}
    assert len({(i.task, i.content) for i in found}) == len(found)
    assert {i.level for i in items("addition:40", 0, [2, 3])} == {2, 3}
    with pytest.raises(ConfigError, match="did you mean addition"):
        of_data("tasks:adition:3", 0)
