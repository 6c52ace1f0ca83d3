"""What is to be learnt, as conversations: read from JSONL files, or made of tasks' worked solutions.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "reasoning_content": "…", "content": "…"}]}
    {"prompt": "…", "reasoning": "…", "answer": "…"}

One of these a line; the first is OpenAI's form, tool calls and `tools` included. A line that is neither ends the
reading with a DataError that names it: training on what was left by a silent filter is nobody's wish.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.data.chat import Message
from shoal.engine.turns import in_call_order, message_of
from shoal.errors import DataError, RequestError
from shoal.tasks.catalog import resolve
from shoal.tasks.task import Item, draw

TASKS_PREFIX = "tasks:"
DEFAULT_COUNT = 1000  # of problems, where nothing is said
ROLES = ("system", "developer", "user", "assistant", "tool")
FORMS = '{"messages": [{"role": …, "content": …}, …]}, or {"prompt": …, "reasoning": …, "answer": …}'


@dataclass(frozen=True)
class Conversation:
    """`where` says whose fault it is when it can't be rendered."""

    messages: tuple[Message, ...]
    tools: tuple[dict, ...] = ()
    where: str = ""


def worked(prompt: str, reasoning: str, answer: str, where: str = "") -> Conversation:
    return Conversation((Message("user", prompt), Message("assistant", answer, reasoning)), where=where)


def of_data(data: str, seed: int, levels: Sequence[int] | None = None) -> list[Conversation]:
    """A JSONL file, or `tasks:NAMES:COUNT`: worked solutions of so many problems of the training split."""
    if not data:
        fix = "give --data FILE.jsonl, or --data tasks:addition:2000"
        raise DataError("no data", "conversations to learn", fix)
    if not data.startswith(TASKS_PREFIX):
        return list(read(Path(data)))
    found = [
        worked(i.prompt, i.reasoning, i.answer, i.task) for i in items(data, seed, levels) if i.reasoning and i.answer
    ]
    if not found:
        raise DataError(f"{data}, which has no worked solutions", "tasks that show their work", "take other tasks")
    return found


def items(tasks: str, seed: int, levels: Sequence[int] | None = None) -> list[Item]:
    """Problems of the training split, each once: `tasks:countdown,chain_sum:2000`, prefix and count as you like.

    Fewer than asked for where the tasks are so small that the draws repeat themselves.
    """
    names, colon, count = tasks.removeprefix(TASKS_PREFIX).rpartition(":")
    if not (colon and count.isdigit() and int(count)):
        names, count = tasks.removeprefix(TASKS_PREFIX), str(DEFAULT_COUNT)
    found = resolve(names)
    drawn = (draw(found, seed, index, "train", levels) for index in range(int(count)))
    return list({(item.task, item.content): item for item in drawn}.values())


def read(path: Path) -> Iterator[Conversation]:
    """Raises DataError that names the file and the line."""
    count = 0
    for where, row in rows(path):
        count += 1
        yield conversation(row, where)
    if not count:
        raise DataError(f"{path} is empty", f"a line for each conversation: {FORMS}", "look at what wrote it")


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line n", object) of each line of a JSONL file that isn't blank."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", parsed(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: {e}", "a readable UTF-8 file of JSON lines", "check the path") from None


def parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: {e}", f"one JSON object a line: {FORMS}", "correct or remove the line") from None
    if not isinstance(row, dict):
        raise wrong(where, f"a {type(row).__name__}", "a JSON object")
    return row


def conversation(row: dict[str, Any], where: str) -> Conversation:
    if "messages" not in row:
        if not {"prompt", "answer"} <= row.keys():
            raise wrong(where, f"the keys {', '.join(row) or 'none'}", FORMS)
        prompt, reasoning, answer = (text(row.get(k), where, k) for k in ("prompt", "reasoning", "answer"))
        return worked(prompt, reasoning, answer, where)
    raw, tools = row["messages"], row.get("tools") or []
    if not isinstance(raw, list) or not all(isinstance(m, dict) for m in raw):
        raise wrong(where, "messages that are no list of objects", FORMS)
    if not isinstance(tools, list) or None in map(function_of, tools):
        raise wrong(where, "tools that are no list of functions", "tools in OpenAI's form")
    messages = tuple(message(m, f"{where}, messages[{i}]") for i, m in enumerate(raw))
    asked = next((i for i, m in enumerate(messages) if m.role == "user"), len(messages))
    answered = [i for i, m in enumerate(messages) if m.role == "assistant"]
    if not answered or answered[0] < asked:
        got = "no assistant's turn" if not answered else "an assistant's turn before any user's"
        raise wrong(where, got, "a user's turn, then an assistant's to learn")
    try:
        return Conversation(in_call_order(messages), tuple(tools), where)
    except RequestError as e:
        raise wrong(where, e.got, e.expected) from None


def message(raw: dict[str, Any], where: str) -> Message:
    """One that OpenAI's API would take; reasoning stands in `reasoning_content`."""
    if raw.get("role") not in ROLES:
        raise wrong(where, f"the role {raw.get('role')!r}", f"one of {', '.join(ROLES)}")
    for name in ("content", "reasoning_content", "tool_call_id"):
        text(raw.get(name), where, name)
    calls = raw.get("tool_calls") or []
    functions = [function_of(c) for c in calls] if isinstance(calls, list) else [None]
    if not all(f is not None and {"name", "arguments"} <= f.keys() for f in functions):
        raise wrong(where, "tool_calls of another form", "tool_calls in OpenAI's form")
    for call in calls:
        for part in (call.get("id"), call["function"]["name"], call["function"]["arguments"]):
            text(part, where, "tool_calls")
    with_ids = [call | {"id": call.get("id") or ""} for call in calls]
    return message_of({k: v for k, v in raw.items() if k != "prefix"} | {"tool_calls": with_ids})


def function_of(value: Any) -> dict[str, Any] | None:
    """Of a tool or a call."""
    function = value.get("function") if isinstance(value, dict) else None
    return function if isinstance(function, dict) else None


def text(value: Any, where: str, name: str) -> str:
    """A string that can be written as UTF-8; None is an empty one."""
    if value is not None and not isinstance(value, str):
        raise wrong(where, f"{name} that is a {type(value).__name__}", "text")
    try:
        (value or "").encode()
    except UnicodeEncodeError as e:
        raise wrong(where, f"{name}: {e.reason}", "text without lone surrogates") from None
    return value or ""


def wrong(where: str, got: str, expected: str) -> DataError:
    return DataError(f"{where}: {got}", expected, "correct or remove the line")
