"""Puzzles that take a search or a look at every part: countdown, sorting, counting letters, small logic."""

import ast
import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, pairwise
from random import Random

from shoal.tasks.task import Made, Task

LEVELS = (1, 2, 3, 4, 5)

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
    return Made(prompt, "\n".join(lines), answer, f"{listed} -> {target}", Makes(numbers, target))


def search(numbers: tuple[int, ...], target: int) -> tuple[list[str], str]:
    """The trace up to the first expression that makes the target, and that expression. A line is a pair's result, and
    after the third number what the two of them make.
    """
    lines = []
    for i, j in combinations(range(3), 2):
        a, b = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
        c = numbers[3 - i - j]
        for op, v in results(a, b).items():
            last = results(v, c)
            hit = next((o for o, w in last.items() if w == target), None)
            lines.append(f"{a}{op}{b}={v} {c}: {' '.join(map(str, last.values()))}{' yes' if hit else ''}")
            if hit:
                inner = f"({a}{op}{b})"
                return lines, f"{inner}{hit}{c}" if v >= c else f"{c}{hit}{inner}"
    raise AssertionError((numbers, target))


@dataclass(frozen=True)
class Makes:
    """An expression over + - * / that uses each number once and equals the target, in exact fractions.

    Parsed, never evaluated. The alphabet has no power and no more than 60 characters, so neither the parser's stack
    nor a number can grow; every constant is looked at before any arithmetic.
    """

    numbers: tuple[int, ...]
    target: int

    def __call__(self, answer: str) -> bool:
        if not re.fullmatch(r"[0-9+\-*/() ]{1,60}", answer) or "**" in answer or "//" in answer:
            return False
        try:
            tree = ast.parse(answer.strip(), mode="eval").body
            used = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, int)]
            return sorted(used) == sorted(self.numbers) and evaluate(tree) == self.target
        except (SyntaxError, ValueError, ZeroDivisionError):
            return False


def evaluate(node: ast.expr) -> Fraction:
    """The value of a parsed expression; raises ValueError for anything but whole numbers and the four operations."""
    match node:
        case ast.Constant(value=int(n)):
            return Fraction(n)
        case ast.BinOp(left, ast.Add(), right):
            return evaluate(left) + evaluate(right)
        case ast.BinOp(left, ast.Sub(), right):
            return evaluate(left) - evaluate(right)
        case ast.BinOp(left, ast.Mult(), right):
            return evaluate(left) * evaluate(right)
        case ast.BinOp(left, ast.Div(), right):
            return evaluate(left) / evaluate(right)
    raise ValueError(node)


def sorting(rng: Random, level: int) -> Made:
    """Selection: each line takes the next number and keeps the rest in order."""
    numbers = [rng.randint(0, 99 if level < 4 else 999) for _ in range(level + 2)]
    upwards = rng.random() < 0.5
    order = ("from least to greatest", "in ascending order", "from greatest to least", "in descending order")
    lines, rest = [], list(numbers)
    while len(rest) > 1:
        taken = min(rest) if upwards else max(rest)
        rest.remove(taken)
        lines.append(f"{taken} left {' '.join(map(str, rest))}")
    listed = ", ".join(map(str, numbers))
    answer = ", ".join(map(str, sorted(numbers, reverse=not upwards)))
    content = f"{'up' if upwards else 'down'} {listed}"
    return Made(
        f"Sort {listed} {rng.choice(order[:2] if upwards else order[2:])}.",
        "\n".join(lines),
        answer,
        content,
        Listed(answer),
    )


@dataclass(frozen=True)
class Listed:
    """The same numbers in the same order, with commas or spaces between them."""

    expected: str

    def __call__(self, answer: str) -> bool:
        return re.fullmatch(r"[0-9]+(?:(?:, *| +)[0-9]+)*", answer) is not None and (
            re.split(r"[, ]+", answer) == self.expected.split(", ")
        )


WORDS = (
    "apple arrow banana beetle berry bottle bridge butter button cabbage candle carpet carrot castle cherry chicken "
    "circle coffee cotton dinner dollar dragon eagle engine feather finger flower forest garden ginger grammar green "
    "guitar hammer happy helicopter hello honey hotel island jacket jungle kettle kitchen ladder lemon letter little "
    "locomotive magnet mammal mirror mississippi monkey moon mountain nation needle noodle ocean onion orange paper "
    "parrot pepper piano pillow planet pocket potato puzzle rabbit raccoon river rocket saddle school sheep silver "
    "sister spoon strawberry street summer sunset teacher tiger tomato tree tunnel turtle umbrella valley village "
    "violin wagon water weather willow window winter yellow zebra"
).split()


def letter_count(rng: Random, level: int) -> Made:
    """The words are spelled one a line, and the letter is counted where it stands: s t r1 a w b e r2 r3 y."""
    words = rng.sample([w for w in WORDS if level > 1 or len(w) < 7], max(1, level - 1))
    text = " ".join(words)
    letter = rng.choice(text.replace(" ", "") if rng.random() < 0.9 else "abcdefghijklmnopqrstuvwxyz")
    lines, count = [], 0
    for word in words:
        spelled = []
        for c in word:
            count += c == letter
            spelled.append(f"{c}{count}" if c == letter else c)
        lines.append(" ".join(spelled))
    forms = ("How many {} are in {}?", "Count the letter {} in {}.", "How often does {} occur in {}?")
    return Made(rng.choice(forms).format(letter, text), "\n".join(lines), str(count), f"{letter} in {text}")


def truth(rng: Random, level: int) -> Made:
    """True and False with and, or, not; each line is one operation, the innermost first."""
    lines: list[str] = []
    expression, value = proposition(rng, level + 2, lines)
    forms = ("What is {}?", "Evaluate {}.", "{} is?")
    return Made(rng.choice(forms).format(expression), "\n".join(lines), str(value), expression)


def proposition(rng: Random, leaves: int, lines: list[str]) -> tuple[str, bool]:
    """A random expression of so many leaves and its value; appends a line for each operation."""
    if leaves == 1:
        value = rng.random() < 0.5
        text = str(value)
    else:
        left = rng.randint(1, leaves - 1)
        (a, x), (b, y) = proposition(rng, left, lines), proposition(rng, leaves - left, lines)
        op = rng.choice(("and", "or"))
        value = x and y if op == "and" else x or y
        text = f"({a} {op} {b})"
        lines.append(f"{x} {op} {y}={value}")
    if rng.random() < 0.3:
        lines.append(f"not {value}={not value}")
        return f"not {text}", not value
    return text, value


NAMES = "Ada Ben Cal Dan Eva Fay Gus Hal Ida Jon Kim Leo Mia Ned Ola Pam Quin Ray Sue Tom Uma Vic Wes Zoe".split()
ENDS = {"taller": ("tallest", "shortest"), "older": ("oldest", "youngest"), "faster": ("fastest", "slowest")}
OPPOSITE = {"taller": "shorter", "older": "younger", "faster": "slower"}


def comparison_chain(rng: Random, level: int) -> Made:
    """Who is the tallest? Every neighbouring pair of an order is told, shuffled; solved by joining the pairs."""
    people = rng.sample(NAMES, level + 2)  # in order
    pairs = [*pairwise(people)]
    rng.shuffle(pairs)
    word = rng.choice(tuple(ENDS))
    told = [
        f"{a} is {word} than {b}." if rng.random() < 0.5 else f"{b} is {OPPOSITE[word]} than {a}." for a, b in pairs
    ]
    first = rng.random() < 0.5
    prompt = f"{' '.join(told)} Who is the {ENDS[word][not first]}?"
    lines = [f"{a}>{b}" for a, b in pairs] + [">".join(people)]
    content = f"{'first' if first else 'last'} {'>'.join(people)} {' '.join(a for a, _ in pairs)}"
    return Made(prompt, "\n".join(lines), people[0 if first else -1], content)


TASKS = tuple(Task(make.__name__, LEVELS, make) for make in (countdown, sorting, letter_count, truth, comparison_chain))
