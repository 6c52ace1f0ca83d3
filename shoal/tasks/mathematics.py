"""Whether a mathematical result is the right one: by math-verify where it is installed, else by exact numbers.

math-verify reads both as LaTeX and compares them as expressions, so 1/2 is 0.5 and x + 1 is 1 + x. Its other reader
hands text to Python's parser and evaluates it; it stays off. It stops itself with alarms, which need the main thread of
a process of their own: a grader's. Without it results are compared as numbers (signs, thousands, decimals, fractions,
percentages of none), and as text without spaces where the expected one is no number; which of the two is in use is
logged once, when a file is opened.
"""

import logging
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.util import find_spec

from shoal.tasks.task import Check

SECONDS = 10.0  # a grader waits: math-verify's first answer imports sympy, and its alarms come before
ALARM = 2  # seconds that reading or comparing may take
LONGEST = 300  # characters of a result

log = logging.getLogger(__name__)


@cache
def verifier() -> type["Verified"] | type["SameNumber"]:
    if find_spec("math_verify"):
        log.info("mathematical results are compared by math-verify")
        return Verified
    log.warning("math-verify is not installed (pip install 'shoal-lm[rl]'): results are compared as exact numbers")
    return SameNumber


def check(expected: str) -> Check:
    return verifier()(expected)


@dataclass(frozen=True)
class Verified:
    """Equal as expressions, by math-verify."""

    expected: str

    def __call__(self, answer: str) -> bool:
        from math_verify import LatexExtractionConfig, parse, verify  # pyright: ignore[reportMissingImports]

        if len(answer) > LONGEST or not one_result(answer):
            return False
        config = [LatexExtractionConfig()]
        read = [parse(formula(text), config, parsing_timeout=ALARM) for text in (self.expected, answer)]
        return bool(verify(*read, timeout_seconds=ALARM))


@dataclass(frozen=True)
class SameNumber:
    """The same number, or the same text where it is none."""

    expected: str

    def __call__(self, answer: str) -> bool:
        if len(answer) > LONGEST or not one_result(answer):
            return False
        expected, found = number(self.expected), number(answer)
        if expected is None:
            return bare(answer) == bare(self.expected)
        return found == expected


def formula(text: str) -> str:
    """LaTeX between dollars; what is boxed counts alone."""
    inner = boxed(text)
    return f"${text.strip(' $.') if inner is None else inner}$"


def one_result(answer: str) -> bool:
    """Nothing beside the result but a name before it: no chain of equations, no alternatives, at most one box."""
    name, _, rest = answer.rpartition("=")
    named = re.fullmatch(r"[\s$]*([A-Za-z](\([a-z]\))?\s*)?", name) and "=" not in rest
    return bool(named) and not re.search(r"\bor\b|\\boxed.*\\boxed|;|\n", answer)


def number(text: str) -> Fraction | None:
    """1,234.5 and $-3$ and \\frac{1}{2} and 2/4 as exact numbers; None for anything else."""
    plain = bare(text)
    if found := re.fullmatch(r"(-?)\\[dt]?frac\{(-?[0-9]{1,30})\}\{([0-9]{1,30})\}", plain):
        plain = f"{found[1]}{found[2]}/{found[3]}"
    if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", plain):
        plain = plain.replace(",", "")
    if not re.fullmatch(r"-?([0-9]+(\.[0-9]+)?|\.[0-9]+|[0-9]+/0*[1-9][0-9]*)", plain):
        return None
    return Fraction(plain)


def bare(text: str) -> str:
    """Without spaces, dollars, a box around it or a full stop after it."""
    inner = boxed(text)
    return re.sub(r"[\s$]|\\[,!;]", "", text if inner is None else inner).removesuffix(".").removeprefix("+")


def boxed(text: str) -> str | None:
    """What the last \\boxed{} holds, braces matched; None where there is none."""
    _, found, rest = text.rpartition("\\boxed{")
    depth = 1
    for i, c in enumerate(rest if found else ""):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return rest[:i]
    return None
