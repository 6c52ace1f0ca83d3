"""Small Python programs: say what one prints, and write one that does as told.

What a program prints is computed by the function that writes it, next to each line; nothing is executed here. Functions
that a model writes are called in the sandbox, and what they return is compared out here (`programs.py`).
"""

from collections.abc import Callable
from random import Random
from typing import Any

from shoal.tasks.programs import PATIENCE, Returns
from shoal.tasks.task import Made, Task

LEVELS = (1, 2, 3, 4, 5)
CALLS = 6  # that a written function is tried with
Program = tuple[list[str], list[str], int | str]  # lines, trace, what it prints


def predict_output(rng: Random, level: int) -> Made:
    lines, trace, output = (assignments, branch, loop, selection, digits)[level - 1](rng)
    code = "\n".join(lines)
    forms = ("What does this print?", "What is the output of this Python program?", "Predict the output:")
    return Made(f"{rng.choice(forms)}\n{code}", "\n".join(trace), str(output), code)


def assignments(rng: Random) -> Program:
    x, a, b = rng.randint(1, 20), rng.randint(2, 20), rng.randint(2, 9)
    y = x + a
    z = y * b if rng.random() < 0.5 else y - b
    last = f"z = y * {b}" if z == y * b else f"z = y - {b}"
    lines = [f"x = {x}", f"y = x + {a}", last, "print(z)"]
    return lines, [f"y={x}+{a}={y}", f"z={y}{last[6]}{b}={z}"], z


def branch(rng: Random) -> Program:
    x, a, k, b, c = (rng.randint(1, 20) for _ in range(5))
    y, taken = x + a, x + a > k + 10
    z = y - b if taken else y + c
    lines = [f"x = {x} + {a}", f"if x > {k + 10}:", f"    x = x - {b}", "else:", f"    x = x + {c}", "print(x)"]
    step = f"x={y}-{b}={z}" if taken else f"x={y}+{c}={z}"
    return lines, [f"x={x}+{a}={y}", f"{y}>{k + 10} {taken}", step], z


def loop(rng: Random) -> Program:
    start, low, count, factor = rng.randint(0, 20), rng.randint(0, 5), rng.randint(3, 5), rng.randint(1, 5)
    lines = [f"x = {start}", f"for i in range({low}, {low + count}):", f"    x += i * {factor}", "print(x)"]
    trace, x = [], start
    for i in range(low, low + count):
        trace.append(f"i={i} x={x}+{i * factor}={x + i * factor}")
        x += i * factor
    return lines, trace, x


def selection(rng: Random) -> Program:
    numbers, k = [rng.randint(0, 20) for _ in range(rng.randint(4, 6))], rng.randint(4, 12)
    lines = [f"xs = {numbers}", "n = 0", "for x in xs:", f"    if x > {k}:", "        n += x", "print(n)"]
    trace, total = [], 0
    for x in numbers:
        trace.append(f"{x}>{k} n={total}+{x}={total + x}" if x > k else f"{x} no")
        total += x if x > k else 0
    return lines, trace, total


def digits(rng: Random) -> Program:
    n, factor, plus = rng.randint(100, 99_999), rng.randint(1, 4), rng.randint(0, 5)
    lines = ["def f(n):", "    s = 0", "    while n > 0:", f"        s += n % 10 * {factor}", "        n //= 10"]
    lines += [f"    return s + {plus}", f"print(f({n}))"]
    trace, total = [], 0
    while n > 0:
        d = n % 10 * factor
        trace.append(f"n={n} s={total}+{d}={total + d}")
        total, n = total + d, n // 10
    return lines, [*trace, f"{total}+{plus}={total + plus}"], total + plus


Wanted = tuple[
    str, str, str, Callable[..., Any], Callable[[Random], tuple]
]  # words, parameters, body, reference, arguments


def write_function(rng: Random, level: int) -> Made:
    """The reasoning is one example worked out; the tests are others."""
    words, parameters, body, reference, arguments = rng.choice(WANTED[level - 1])(rng)
    draws = Random(words)  # equal problems have equal examples
    tried = []
    while len({repr(value) for _, value in tried[1:]}) < 3:  # no constant may pass
        tried = [(args, reference(*args)) for args in (arguments(draws) for _ in range(CALLS + 1))]
    example, *tests = tried
    asked = rng.choice(("Write a Python function f({}) that returns {}.", "Define f({}) in Python; it returns {}."))
    check = Returns("f", tuple(args for args, _ in tests), tuple(value for _, value in tests))
    reasoning = f"f({', '.join(map(repr, example[0]))}) is {example[1]!r}"
    code = f"def f({parameters}):\n    return {body}"
    return Made(asked.format(parameters, words), reasoning, code, f"f({parameters}): {words}", check)


def one(rng: Random) -> tuple[int]:
    return (rng.randint(-50, 50),)


def two(rng: Random) -> tuple[int, int]:
    return rng.randint(-50, 50), rng.randint(-50, 50)


def count(rng: Random) -> tuple[int]:
    return (rng.randint(0, 60),)


def integers(rng: Random) -> tuple[list[int]]:
    return ([rng.randint(-9, 30) for _ in range(rng.randint(0, 8))],)


def text(rng: Random) -> tuple[str]:
    return ("".join(rng.choice("abcde ") for _ in range(rng.randint(0, 12))),)


def line(rng: Random) -> Wanted:
    a, b = rng.randint(2, 20), rng.randint(1, 20)
    return f"x times {a} plus {b}", "x", f"x * {a} + {b}", lambda x: x * a + b, one


def gap(rng: Random) -> Wanted:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    words = f"{a} times x minus {b} times y"
    return words, "x, y", f"{a} * x - {b} * y", lambda x, y: a * x - b * y, two


def bound(rng: Random) -> Wanted:
    k, m = rng.randint(-20, 20), rng.randint(-20, 20)
    words = f"x if x is greater than {k}, otherwise {m}"
    return words, "x", f"x if x > {k} else {m}", lambda x: x if x > k else m, one


def larger(rng: Random) -> Wanted:
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    words = f"the larger of x plus {a} and y plus {b}"
    return words, "x, y", f"max(x + {a}, y + {b})", lambda x, y: max(x + a, y + b), two


def total_above(rng: Random) -> Wanted:
    k, m = rng.randint(-5, 25), rng.randint(2, 9)
    words = f"{m} times the sum of the numbers in xs that are greater than {k}"
    body = f"{m} * sum(x for x in xs if x > {k})"
    return words, "xs", body, lambda xs: m * sum(x for x in xs if x > k), integers


def scaled(rng: Random) -> Wanted:
    a, b = rng.randint(2, 12), rng.randint(1, 12)
    words = f"the list of the numbers in xs, each times {a} minus {b}"
    return words, "xs", f"[x * {a} - {b} for x in xs]", lambda xs: [x * a - b for x in xs], integers


def letters(rng: Random) -> Wanted:
    c, k = rng.choice("abcde"), rng.randint(2, 30)
    words = f"how often {c!r} occurs in s, plus {k}"
    return words, "s", f"s.count({c!r}) + {k}", lambda s: s.count(c) + k, text


def backwards(rng: Random) -> Wanted:
    c, d, k = *rng.sample("abcde", 2), rng.randint(1, 5)
    words = f"s reversed, with {c!r} replaced by {d!r}, {k} times in a row"
    body = f"s[::-1].replace({c!r}, {d!r}) * {k}"
    return words, "s", body, lambda s: s[::-1].replace(c, d) * k, text


def multiples(rng: Random) -> Wanted:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    words = f"the sum of the whole numbers from 0 to n - 1 that {a} or {b} divides"
    body = f"sum(i for i in range(n) if i % {a} == 0 or i % {b} == 0)"
    return (
        words,
        "n",
        body,
        lambda n: sum(i for i in range(n) if i % a == 0 or i % b == 0),
        count,
    )


def squares(rng: Random) -> Wanted:
    a, k = rng.randint(2, 9), rng.randint(0, 25)
    words = f"the sorted list of the squares plus {k} of the numbers in xs that {a} divides"
    body = f"sorted(x * x + {k} for x in xs if x % {a} == 0)"
    return words, "xs", body, lambda xs: sorted(x * x + k for x in xs if x % a == 0), integers


WANTED = ((line, gap), (bound, larger), (total_above, scaled), (letters, backwards), (multiples, squares))
TASKS = (
    Task("predict_output", LEVELS, predict_output),
    Task("write_function", LEVELS, write_function, seconds=PATIENCE),
)
