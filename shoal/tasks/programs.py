"""Checks of answers that are Python code: they run in the sandbox, and what they should give never goes there.

`Returns` asks the code's function for values and compares them out here. `Passes` has tests that are code themselves
(HumanEval's `check(candidate)`, MBPP's asserts): they run in a second cell that never sees the model's code, where the
function under test is a stand-in that passes plain arguments out and plain values in. So an assert compares values that
were built in the tests' own process, and there is nothing in it that the model's code could have touched: no patched
builtins, no equality of its own, no frame to read the expected value from. Tests whose arguments aren't plain, or that
look at an argument after the call, can't be graded so; the first raise (the grader failed), the second don't pass.
"""

import re
from dataclasses import dataclass
from typing import Any

from shoal.tasks.sandbox import SECONDS, Cell, Ended, Raised

PATIENCE = 3 * SECONDS + 10.0  # of a grader: the deadline of the code, and starting two cells on a busy machine


@dataclass(frozen=True)
class Returns:
    """`entry` must return, for each tuple of arguments, a value that equals the expected one and has its type."""

    entry: str
    calls: tuple[tuple[Any, ...], ...]
    expected: tuple[Any, ...]
    seconds: float = SECONDS

    def __call__(self, answer: str) -> bool:
        with Cell(self.seconds) as cell:
            try:
                cell.run(code_of(answer))
                return all(same(cell.call(self.entry, args), value) for args, value in zip(self.calls, self.expected))
            except (Raised, Ended):
                return False


@dataclass(frozen=True)
class Passes:
    """`tests` must run to their end where `remote` names stand for the answer's functions of those names.

    `candidate` stands for `entry`. `before` is the code that the answer goes on from, or writes anew; what it imports
    and defines is there in both cases.
    """

    tests: str
    remote: tuple[str, ...]
    entry: str = ""
    before: str = ""
    seconds: float = SECONDS

    def __call__(self, answer: str) -> bool:
        code = code_of(answer)
        anew = re.search(rf"^def {re.escape(self.entry)}\b", code, re.MULTILINE)
        code = f"{self.before}\n{code}" if anew else self.before + code
        with Cell(self.seconds) as model, Cell(self.seconds) as tests:
            try:
                model.run(code)
                tests.write({"run": self.tests, "remote": self.remote})
                return self.relay(model, tests)
            except (Raised, Ended):
                return False

    def relay(self, model: Cell, tests: Cell) -> bool:
        """Carry calls and values between the two until the tests end; whether they did without raising."""
        while True:
            said = tests.read()
            if "ungradable" in said:
                raise ValueError(f"a test's arguments can't leave its process: {said['ungradable']}")
            if "call" not in said:
                return "done" in said
            name = self.entry if said["call"] == "candidate" else said["call"]
            try:
                tests.write({"value": model.call(name, said["args"], said["kwargs"])})
            except Raised as e:
                tests.write({"error": str(e)})


def same(found: Any, expected: Any) -> bool:
    """Equal plain values of equal types; True is not 1, and [1] not (1,)."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in expected)
    return found == expected


def code_of(answer: str) -> str:
    """The code of an answer: what a fence of backticks holds where the whole answer is one, else all of it."""
    fenced = re.fullmatch(r"\s*```(?:python|py)?\n(.*?)\n?```\s*", answer, re.DOTALL)
    return fenced[1] if fenced else answer
