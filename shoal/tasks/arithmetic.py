"""Arithmetic whose reasoning can be checked: a prompt, a worked solution, and a grader that is the reward.

A model can't be rewarded into a skill it never shows (the gradient scales with the pass rate), so the same items serve
twice: their worked solutions are training text, and later their graders score what the model writes by itself. A grader
returns exactly 1.0 or 0.0, computes with integers only, never evaluates model output as code, and bounds its length.

Item `i` of a seed is drawn from a generator keyed by the hash of (seed, i): any item alone, in any order, and two seeds
share nothing but chance. The reasoning depends on the prompt alone, so equal prompts make equal documents, which the
corpus drops and never splits across held-out and training text.

Written the way a small model can follow: one column or partial product a line, every carry named.
"""

import ast
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import combinations
from math import gcd
from random import Random

LEVELS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Item:
    task: str
    level: int
    prompt: str
    reasoning: str
    answer: str
    check: Callable[[str], bool]

    def grade(self, answer: str | None) -> float:
        """1.0 for a right answer, 0.0 for anything else, None included."""
        return float(answer is not None and self.check(answer.strip()))

    def reward(self, completion: str) -> float:
        """Grade what follows `<think>` in a whole completion."""
        return self.grade(extract_answer(completion))


def extract_answer(completion: str) -> str | None:
    """The text between <answer> and </answer> right after the only </think>; None when the form is another."""
    reasoning, end, rest = completion.partition("</think>")
    found = re.fullmatch(r"\s*<answer>([^<>]*)</answer>\s*", rest)
    return found[1] if end and found and "<answer>" not in reasoning else None


def item(seed: int, index: int, tasks: tuple[str, ...] | None = None, levels: tuple[int, ...] = LEVELS) -> Item:
    """Item `index` of the endless list that `seed` names; task and level drawn evenly from those given."""
    key = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    rng = Random(int.from_bytes(key, "big"))
    task, level = rng.choice(tasks or tuple(TASKS)), rng.choice(levels)
    prompt, reasoning, answer, check = TASKS[task](rng, level)
    return Item(task, level, prompt, reasoning, answer, check or partial(same_integer, answer))


def worked(count: int, seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """The first `count` items as (prompt, reasoning, answer): the corpus source `worked-arithmetic`."""
    for index in range(count):
        it = item(seed, index)
        yield it.prompt, it.reasoning, it.answer


GENERATORS = {"worked-arithmetic": worked}


def same_integer(expected: str, answer: str) -> bool:
    return answer == expected


Made = tuple[str, str, str, Callable[[str], bool] | None]  # prompt, reasoning, answer, check (None: the same integer)


def number(rng: Random, digits: int) -> int:
    """Of at most so many digits, every length equally likely."""
    n = rng.randint(1, digits)
    return rng.randint(10 ** (n - 1), 10**n - 1)


def phrase(rng: Random, expression: str) -> str:
    return rng.choice(("What is {}?", "Compute {}.", "{} = ?", "Work out {}.")).format(expression)


def columns(a: int, b: int) -> list[tuple[int, int]]:
    """Digit pairs from the right, the shorter number padded with zeros."""
    width = max(len(str(a)), len(str(b)))
    return [(int(x), int(y)) for x, y in zip(str(a).zfill(width)[::-1], str(b).zfill(width)[::-1])]


def add_columns(a: int, b: int) -> list[str]:
    lines, carry = [], 0
    for x, y in columns(a, b):
        total = x + y + carry
        lines.append(f"{x} + {y} + {carry} = {total}, write {total % 10} carry {total // 10}")
        carry = total // 10
    return [*lines, *([f"write {carry}"] if carry else [])]


def subtract_columns(a: int, b: int) -> list[str]:
    """For a ≥ b."""
    lines, borrow = [], 0
    for x, y in columns(a, b):
        need = int(x < y + borrow)
        top = x + 10 * need
        lines.append(f"{top} - {y} - {borrow} = {top - y - borrow}, borrow {need}")
        borrow = need
    return lines


def spell(n: int) -> str:
    """The digits read from the left, one by one."""
    return " ".join(str(n))


def addition(rng: Random, level: int) -> Made:
    a, b = number(rng, 2 * level), number(rng, 2 * level)
    lines = [f"{spell(a)} + {spell(b)}", *add_columns(a, b), f"read up: {spell(a + b)}"]
    return phrase(rng, f"{a} + {b}"), "\n".join(lines), str(a + b), None


def subtraction(rng: Random, level: int) -> Made:
    a, b = number(rng, 2 * level), number(rng, 2 * level)
    high, low = max(a, b), min(a, b)
    lines = [f"{spell(high)} - {spell(low)}", *subtract_columns(high, low), f"read up: {spell(high - low)}"]
    if a < b:
        lines = [f"{a} is less than {b}, so the result is negative", *lines]
    return phrase(rng, f"{a} - {b}"), "\n".join(lines), str(a - b), None


def multiplication(rng: Random, level: int) -> Made:
    a, b = number(rng, level + 1), number(rng, (level + 1) // 2)
    lines, total = [], 0
    for place, digit in enumerate(reversed(str(b))):
        part = a * int(digit) * 10**place
        lines.append(f"{a} * {digit} = {a * int(digit)}, shifted {place}: {part}")
        lines.append(f"{total} + {part} = {total + part}")
        total += part
    return phrase(rng, f"{a} * {b}"), "\n".join(lines), str(total), None


def division(rng: Random, level: int) -> Made:
    a, b = number(rng, level + 2), number(rng, (level + 1) // 2) + 1
    lines, rest = [], 0
    for digit in str(a):
        have = rest * 10 + int(digit)
        rest = have % b
        lines.append(f"bring down {digit}: {have} / {b} = {have // b}, {have} - {have // b * b} = {rest}")
    lines.append(f"quotient {a // b}, remainder {rest}")
    kind = rng.choice(("quotient", "remainder"))
    prompt = rng.choice(("What is the {} of {} / {}?", "Divide {1} by {2} and give the {0}.")).format(kind, a, b)
    return prompt, "\n".join(lines), str(a // b if kind == "quotient" else rest), None


def common_divisor(rng: Random, level: int) -> Made:
    shared = number(rng, (level + 1) // 2)
    a, b = shared * number(rng, (level + 2) // 2), shared * number(rng, (level + 2) // 2)
    lines, x, y = [], a, b
    while y:
        lines.append(f"{x} mod {y} = {x % y}")
        x, y = y, x % y
    prompt = rng.choice(("What is the greatest common divisor of {} and {}?", "Compute gcd({}, {}).")).format(a, b)
    return prompt, "\n".join([*lines, f"the last divisor is {x}"]), str(gcd(a, b)), None


def power_modulo(rng: Random, level: int) -> Made:
    base, exponent, modulus = rng.randint(2, 9 * level), rng.randint(2, level + 3), rng.randint(3, 10 * level)
    lines, value = [f"{base} mod {modulus} = {base % modulus}"], base % modulus
    for step in range(2, exponent + 1):
        product = value * (base % modulus)
        lines.append(f"power {step}: {value} * {base % modulus} = {product}, mod {modulus} = {product % modulus}")
        value = product % modulus
    return phrase(rng, f"{base}^{exponent} mod {modulus}"), "\n".join(lines), str(value), None


def linear_equation(rng: Random, level: int) -> Made:
    """a x + b = c x + d with a whole solution; c is 0 in the first two levels."""
    x, c = rng.randint(-5 * level, 5 * level), rng.randint(1, 2 * level) if level > 2 else 0
    a, b = c + rng.randint(2, 3 * level), rng.randint(-9 * level, 9 * level)
    d = (a - c) * x + b
    right = f"{c}x {signed(d)}" if c else f"{d}"
    lines = [f"take {c}x from both sides: {a - c}x {signed(b)} = {d}"] if c else []
    lines += [f"{a - c}x = {d} {signed(-b)} = {d - b}", f"x = {d - b} / {a - c} = {x}"]
    return f"Solve for x: {a}x {signed(b)} = {right}", "\n".join(lines), str(x), None


def signed(n: int) -> str:
    return f"- {-n}" if n < 0 else f"+ {n}"


OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b if a >= b else None,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b if b and a % b == 0 else None,
}


def results(a: int, b: int) -> dict[str, int]:
    """What two numbers can make, larger one first, whole and not negative."""
    a, b = max(a, b), min(a, b)
    return {op: v for op, f in OPERATIONS.items() if (v := f(a, b)) is not None}


def countdown(rng: Random, level: int) -> Made:
    """Three numbers, each used once, make a target; solved by trying pairs in order, dead ends included."""
    while True:
        numbers = tuple(rng.randint(1, 5 * level + 4) for _ in range(3))
        first = rng.choice([*results(*numbers[:2]).values()])
        target = rng.choice([*results(first, numbers[2]).values()])
        if 0 < target < 1000:
            break
    lines, answer = search(numbers, target)
    listed = ", ".join(map(str, numbers))
    prompt = f"Use {listed} once each with + - * / to make {target}."
    return prompt, "\n".join(lines), answer, partial(makes_target, numbers, target)


def search(numbers: tuple[int, ...], target: int) -> tuple[list[str], str]:
    """The trace up to the first expression that makes the target, and that expression."""
    lines = []
    for i, j in combinations(range(3), 2):
        a, b = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
        c = numbers[3 - i - j]
        for op, v in results(a, b).items():
            last = results(v, c)
            tried = ", ".join(map(str, last.values()))
            hit = next((o for o, w in last.items() if w == target), None)
            lines.append(f"{a} {op} {b} = {v}, with {c}: {tried}{': found' if hit else ''}")
            if hit:
                inner = f"({a} {op} {b})"
                return lines, f"{inner} {hit} {c}" if v >= c else f"{c} {hit} {inner}"
    raise AssertionError((numbers, target))


def makes_target(numbers: tuple[int, ...], target: int, answer: str) -> bool:
    """An expression over + - * / that uses each number once and equals the target, in exact fractions."""
    if not re.fullmatch(r"[0-9+\-*/() ]{1,60}", answer):
        return False
    try:
        used: list[int] = []
        value = evaluate(ast.parse(answer.strip(), mode="eval").body, used)
        return value == target and sorted(used) == sorted(numbers)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False


def evaluate(node: ast.expr, used: list[int]) -> Fraction:
    """The value of a parsed expression; raises ValueError for anything but whole numbers and the four operations."""
    match node:
        case ast.Constant(value=int(n)):
            used.append(n)
            return Fraction(n)
        case ast.BinOp(left, ast.Add(), right):
            return evaluate(left, used) + evaluate(right, used)
        case ast.BinOp(left, ast.Sub(), right):
            return evaluate(left, used) - evaluate(right, used)
        case ast.BinOp(left, ast.Mult(), right):
            return evaluate(left, used) * evaluate(right, used)
        case ast.BinOp(left, ast.Div(), right):
            return evaluate(left, used) / evaluate(right, used)
    raise ValueError(node)


TASKS: dict[str, Callable[[Random, int], Made]] = {
    "addition": addition,
    "subtraction": subtraction,
    "multiplication": multiplication,
    "division": division,
    "common_divisor": common_divisor,
    "power_modulo": power_modulo,
    "linear_equation": linear_equation,
    "countdown": countdown,
}
