"""Problems from files of JSON lines, in the forms that benchmarks are published in.

    math:FILE      {"question", "answer": "… #### 42"} as GSM8K; {"problem", "solution" with \\boxed{}, "level"} as
                   MATH; {"problem" or "question", "answer"}
    choice:FILE    {"question", "choices", "answer": index or letter} as MMLU; {"question", "choices":
                   {"text", "label"}, "answerKey"} as ARC
    code:FILE      {"prompt", "test", "entry_point"} as HumanEval; {"text" or "prompt", "code", "test_list"} as MBPP

A task of a file has its problems in `items`, in their order, and draws among those of a level. One in eight is held out
as everywhere; to report a benchmark's own score, take all of `items`. Raises DataError that names file and line.
"""

import ast
import builtins
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from shoal.errors import DataError
from shoal.tasks import mathematics
from shoal.tasks.programs import PATIENCE, Passes
from shoal.tasks.task import Made, Task

Row = dict[str, Any]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Bad(Exception):
    """What a row lacks: got, expected. `task` adds where."""


def task(kind: str, path: str) -> Task:
    """All problems of a file as one task, named by kind and file name. Raises DataError."""
    file = Path(path).expanduser()
    by_level: dict[int, list[Made]] = {}
    order: list[tuple[int, Made]] = []
    for number, row in rows(file):
        try:
            level, made = READERS[kind](row)
        except Bad as e:
            got, expected = e.args
            raise DataError(f"{file}, line {number}: {got}", expected, "repair that line, or name another file") from e
        by_level.setdefault(level, []).append(made)
        order.append((level, made))
    if not order:
        raise DataError(f"{file} without problems", "one JSON object a line", "name a file that has some")
    seconds = {"math": mathematics.SECONDS, "choice": 0.0, "code": PATIENCE}[kind]
    whole = Task(f"{kind}:{file.stem}", tuple(sorted(by_level)), partial(choose, by_level), seconds=seconds)
    return replace(whole, items=tuple(whole.item(level, made) for level, made in order))


def choose(by_level: dict[int, list[Made]], rng: Random, level: int) -> Made:
    return rng.choice(by_level[level])


def rows(file: Path) -> Iterator[tuple[int, Row]]:
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, parsed(file, number, line)
    except OSError as e:
        raise DataError(f"{file}: {e.strerror}", "a readable file of JSON lines", "check the path") from e


def parsed(file: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        got = f"{file}, line {number}: {str(e)[:200]}"
        raise DataError(got, "one JSON object a line", "repair the file") from e
    if not isinstance(row, dict):
        raise DataError(f"{file}, line {number}: a {type(row).__name__}", "one JSON object a line", "repair the file")
    return row


def text(row: Row, *names: str) -> str:
    """The first of these fields that is a text. Raises Bad."""
    found = next((row[name] for name in names if isinstance(row.get(name), str) and row[name].strip()), None)
    if found is None:
        raise Bad(f"no {' or '.join(names)}", f"a text under {' or '.join(names)}")
    return found


def problem(row: Row) -> tuple[int, Made]:
    """Mathematics: the worked solution is the reasoning, where there is one."""
    prompt = text(row, "problem", "question")
    if "solution" in row and "answer" not in row:
        reasoning = text(row, "solution")
        answer = mathematics.boxed(reasoning)
        if answer is None:
            raise Bad("a solution without a result", r"\boxed{the result} in the solution")
    else:
        answer = str(row["answer"]) if isinstance(row.get("answer"), int | float) else text(row, "answer")
        reasoning, mark, result = answer.rpartition("####")
        answer = (result if mark else answer).strip()
    if not answer:
        raise Bad("an empty answer", "the result")
    found = re.search(r"\d+", str(row.get("level", "")))
    return int(found[0]) if found else 1, Made(prompt, reasoning.strip(), answer, prompt, mathematics.check(answer))


def choice(row: Row) -> tuple[int, Made]:
    """The answer is a letter: our own, A and on, whatever labels the file has."""
    labels: Any = list(LETTERS)
    question, given = text(row, "question"), row.get("choices")
    if isinstance(given, dict):
        given, labels = given.get("text"), given.get("label")
    if not isinstance(given, list) or not isinstance(labels, list) or not 2 <= len(given) <= len(LETTERS):
        raise Bad(f"choices {str(given)[:50]}", f"2 to {len(LETTERS)} texts under choices")
    right = row.get("answer", row.get("answerKey"))
    at = right if type(right) is int else labels.index(right) if right in labels else -1
    if not 0 <= at < len(given):
        raise Bad(f"answer {right!r}", "the index or the label of one of the choices")
    lines = [f"{letter}. {words}" for letter, words in zip(LETTERS, given)]
    content = "\n".join([question, *map(str, given)])
    prompt = "\n".join([question, *lines, "Answer with a letter."])
    return 1, Made(prompt, "", LETTERS[at], content, Letter(LETTERS[at]))


def function(row: Row) -> tuple[int, Made]:
    """HumanEval and MBPP. The tests are not shown, but for MBPP's first, which says what the function is called."""
    if "entry_point" in row:
        before, entry = text(row, "prompt"), text(row, "entry_point")
        tests = f"{before}\n{text(row, 'test')}\ncheck(candidate)\n"
        body = row.get("canonical_solution")
        answer = before + body if isinstance(body, str) else ""
        prompt = f"Complete this function. Answer with all of its code.\n{before}"
        return 1, Made(prompt, "", answer, before, Passes(compiled(tests), ("candidate",), entry, before))
    words, tests = text(row, "text", "prompt"), row.get("test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
        raise Bad(f"test_list {str(tests)[:50]}", "a list of assert statements under test_list")
    imports = row.get("test_imports") or []
    setup = [row.get("test_setup_code") or "", *(imports if isinstance(imports, list) else [])]
    whole = compiled("\n".join([*map(str, setup), *tests]))
    remote = called(whole)
    if not remote:
        raise Bad("tests that call nothing", "assert statements that call a function")
    shown = f"\nFor example: {tests[0]}" if len(tests) > 1 else f"\nIt is called {' and '.join(remote)}."
    answer = row["code"] if isinstance(row.get("code"), str) else ""
    return 1, Made(words.strip() + shown, "", answer, words.strip(), Passes(whole, remote))


def compiled(tests: str) -> str:
    """The same tests, which are Python as far as its parser can tell. Raises Bad."""
    try:
        ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise Bad(f"tests that are no Python: {e}", "tests that parse") from e
    return tests


def called(tests: str) -> tuple[str, ...]:
    """Names of functions that the tests call and neither define, import nor take from Python."""
    nodes = list(ast.walk(ast.parse(tests)))
    own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {(a.asname or a.name) for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names = [n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    return tuple(dict.fromkeys(name for name in names if name not in own and not hasattr(builtins, name)))


@dataclass(frozen=True)
class Letter:
    """B, (B), B) or B., in either case."""

    expected: str

    def __call__(self, answer: str) -> bool:
        found = re.fullmatch(r"\(?([A-Za-z0-9])[).]{0,2}", answer)
        return found is not None and found[1].upper() == self.expected.upper()


READERS: dict[str, Callable[[Row], tuple[int, Made]]] = {"math": problem, "choice": choice, "code": function}
