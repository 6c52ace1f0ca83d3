"""A teacher's answers on file: one JSON line each, written as it comes, asked for once.

An answer's key is the hash of who was asked (`teacher`), how (`settings`), what (`prompt`) and which sample it is. So a
run that was stopped asks only for what is missing, and another temperature, teacher or instruction finds nothing of
the old one's. A last line torn by a kill is cut off when the file is opened; a damaged one elsewhere is a DataError.
"""

import fcntl
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from shoal.errors import DataError, RunError

SHAPE = {"prompt": str, "sample": int, "reasoning": str, "content": str, "finish": str}
COUNTS = ("prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class Answer:
    """`finish`: "stop", "length", or "refused" where the teacher took the request for a bad one."""

    prompt: str
    sample: int
    reasoning: str
    content: str
    finish: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Answers:
    """Those of one teacher, asked in one way. A context manager: one process at a time owns the file. `keep` is told
    of each answer by its key, on file or new, in place of `found`, for whom a part of it is enough in memory."""

    def __init__(
        self, path: Path, teacher: str, settings: Mapping[str, Any], keep: Callable[[str, Answer], None] | None = None
    ):
        self.path, self.teacher, self.settings = path, teacher, dict(settings)
        self.found: dict[str, Answer] = {}
        self.keep = keep or self.found.__setitem__

    def __enter__(self) -> "Answers":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "ab+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise RunError(f"{self.path} is in use", "answers nobody else writes", "wait, or name another") from None
        self.file.seek(0)
        content = self.file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self.file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            self.keep(*self._read(line, number))
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _read(self, line: bytes, number: int) -> tuple[str, Answer]:
        try:
            row = json.loads(line)
            values = {name: row[name] for name in (*SHAPE, *COUNTS)}
            sound = all(isinstance(values[name], kind) for name, kind in SHAPE.items())
            sound &= all(type(values[name]) is int for name in COUNTS)
            key = row["key"]
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise DataError(f"{self.path}, line {number} is damaged", "an answer", "remove the line; it is asked again")
        return key, Answer(**values)

    def key(self, prompt: str, sample: int) -> str:
        identity = json.dumps([self.teacher, self.settings, prompt, sample], sort_keys=True)
        return sha256(identity.encode()).hexdigest()

    def get(self, prompt: str, sample: int) -> Answer | None:
        return self.found.get(self.key(prompt, sample))

    def add(self, answer: Answer) -> None:
        key = self.key(answer.prompt, answer.sample)
        self.keep(key, answer)
        row = {"key": key, "teacher": self.teacher, "settings": self.settings} | asdict(answer)
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def of(self, prompts: Iterable[str], samples: int) -> list[Answer]:
        """All there are to these prompts, in their order."""
        every = (self.get(prompt, sample) for prompt in prompts for sample in range(samples))
        return [answer for answer in every if answer is not None]


def parted(text: str) -> tuple[str, str]:
    """Reasoning and content of a whole completion, marks taken off; what never came to `</think>` is all reasoning
    where it opened with `<think>`, all content where it didn't."""
    head, end, rest = text.partition("</think>")
    if not end:
        head, rest = (head, "") if head.lstrip().startswith("<think>") else ("", head)
    return head.strip().removeprefix("<think>").strip(), rest.strip()
