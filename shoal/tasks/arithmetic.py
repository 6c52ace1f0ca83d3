"""Arithmetic with worked solutions, written the way a small model can follow: one column, one partial product or one
step a line, every carry named.

The reasoning depends on the problem alone, so equal prompts make equal documents, which the corpus drops and never
splits across held-out and training text. Checks compute with integers and exact fractions; none evaluates the answer.
"""

import ast
import re
from fractions import Fraction
from functools import partial
from itertools import combinations
from math import gcd
from random import Random

from shoal.tasks.task import Made, Task

LEVELS = (1, 2, 3, 4, 5)


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
    return Made(phrase(rng, f"{a} + {b}"), "\n".join(lines), str(a + b), f"{a}+{b}")


def subtraction(rng: Random, level: int) -> Made:
    a, b = number(rng, 2 * level), number(rng, 2 * level)
    high, low = max(a, b), min(a, b)
    lines = [f"{spell(high)} - {spell(low)}", *subtract_columns(high, low), f"read up: {spell(high - low)}"]
    if a < b:
        lines = [f"{a} is less than {b}, so the result is negative", *lines]
    return Made(phrase(rng, f"{a} - {b}"), "\n".join(lines), str(a - b), f"{a}-{b}")


def multiplication(rng: Random, level: int) -> Made:
    a, b = number(rng, level + 1), number(rng, (level + 1) // 2)
    lines, total = [], 0
    for place, digit in enumerate(reversed(str(b))):
        part = a * int(digit) * 10**place
        lines.append(f"{a} * {digit} = {a * int(digit)}, shifted {place}: {part}")
        lines.append(f"{total} + {part} = {total + part}")
        total += part
    return Made(phrase(rng, f"{a} * {b}"), "\n".join(lines), str(total), f"{a}*{b}")


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
    return Made(prompt, "\n".join(lines), str(a // b if kind == "quotient" else rest), f"{kind} {a}/{b}")


def common_divisor(rng: Random, level: int) -> Made:
    shared = number(rng, (level + 1) // 2)
    a, b = shared * number(rng, (level + 2) // 2), shared * number(rng, (level + 2) // 2)
    lines, x, y = [], a, b
    while y:
        lines.append(f"{x} mod {y} = {x % y}")
        x, y = y, x % y
    prompt = rng.choice(("What is the greatest common divisor of {} and {}?", "Compute gcd({}, {}).")).format(a, b)
    return Made(prompt, "\n".join([*lines, f"the last divisor is {x}"]), str(gcd(a, b)), f"{a},{b}")


def power_modulo(rng: Random, level: int) -> Made:
    base, exponent, modulus = rng.randint(2, 9 * level), rng.randint(2, level + 3), rng.randint(3, 10 * level)
    lines, value = [f"{base} mod {modulus} = {base % modulus}"], base % modulus
    for step in range(2, exponent + 1):
        product = value * (base % modulus)
        lines.append(f"power {step}: {value} * {base % modulus} = {product}, mod {modulus} = {product % modulus}")
        value = product % modulus
    problem = f"{base}^{exponent} mod {modulus}"
    return Made(phrase(rng, problem), "\n".join(lines), str(value), problem)


def linear_equation(rng: Random, level: int) -> Made:
    """a x + b = c x + d with a whole solution; c is 0 in the first two levels."""
    x, c = rng.randint(-5 * level, 5 * level), rng.randint(1, 2 * level) if level > 2 else 0
    a, b = c + rng.randint(2, 3 * level), rng.randint(-9 * level, 9 * level)
    d = (a - c) * x + b
    right = f"{c}x {signed(d)}" if c else f"{d}"
    lines = [f"take {c}x from both sides: {a - c}x {signed(b)} = {d}"] if c else []
    lines += [f"{a - c}x = {d} {signed(-b)} = {d - b}", f"x = {d - b} / {a - c} = {x}"]
    equation = f"{a}x {signed(b)} = {right}"
    return Made(f"Solve for x: {equation}", "\n".join(lines), str(x), equation)


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
    return Made(prompt, "\n".join(lines), answer, f"{listed} -> {target}", partial(makes_target, numbers, target))


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


TASKS = tuple(
    Task(make.__name__, LEVELS, make)
    for make in (
        addition,
        subtraction,
        multiplication,
        division,
        common_divisor,
        power_modulo,
        linear_equation,
        countdown,
    )
)
