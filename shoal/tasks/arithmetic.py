"""Arithmetic with worked solutions, written the way a small model can follow: one column, one partial product or one
step a line, as short as it can be said, for every token costs time.

The reasoning depends on the problem alone, so equal prompts make equal documents, which the corpus drops and never
splits across held-out and training text.
"""

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
        lines.append(f"{x}+{y}+{carry}={total}" if carry else f"{x}+{y}={total}")
        carry = total // 10
    return lines


def subtract_columns(a: int, b: int) -> list[str]:
    """For a ≥ b. A ten that a column borrows stands in front of its digit, and is taken from the next."""
    lines, borrow = [], 0
    for x, y in columns(a, b):
        need = int(x < y + borrow)
        top = x + 10 * need
        lines.append(f"{top}-{y}-{borrow}={top - y - borrow}" if borrow else f"{top}-{y}={top - y}")
        borrow = need
    return lines


def spell(n: int) -> str:
    """The digits read from the left, one by one."""
    return " ".join(str(n))


def addition(rng: Random, level: int) -> Made:
    a, b = number(rng, 2 * level), number(rng, 2 * level)
    lines = [f"{spell(a)} + {spell(b)}", *add_columns(a, b), spell(a + b)]
    return Made(phrase(rng, f"{a} + {b}"), "\n".join(lines), str(a + b), f"{a}+{b}")


def subtraction(rng: Random, level: int) -> Made:
    a, b = number(rng, 2 * level), number(rng, 2 * level)
    high, low = max(a, b), min(a, b)
    lines = [f"{spell(high)} - {spell(low)}", *subtract_columns(high, low), spell(high - low)]
    if a < b:
        lines = [f"{a}<{b}: negative", *lines]
    return Made(phrase(rng, f"{a} - {b}"), "\n".join(lines), str(a - b), f"{a}-{b}")


def multiplication(rng: Random, level: int) -> Made:
    a, b = number(rng, level + 1), number(rng, (level + 1) // 2)
    lines, total = [], 0
    for place, digit in enumerate(reversed(str(b))):
        part = a * int(digit) * 10**place
        lines.append(f"{a}*{int(digit) * 10**place}={part}")
        if place:
            lines.append(f"{total}+{part}={total + part}")
        total += part
    return Made(phrase(rng, f"{a} * {b}"), "\n".join(lines), str(total), f"{a}*{b}")


def division(rng: Random, level: int) -> Made:
    """Digit by digit: what is left of the digits so far, divided, and the rest of it."""
    a, b = number(rng, level + 2), number(rng, (level + 1) // 2) + 1
    lines, rest = [], 0
    for digit in str(a):
        have = rest * 10 + int(digit)
        rest = have % b
        lines.append(f"{have}/{b}={have // b} rest {rest}")
    lines.append(f"{a}/{b}={a // b} rest {rest}")
    kind = rng.choice(("quotient", "remainder"))
    prompt = rng.choice(("What is the {} of {} / {}?", "Divide {1} by {2} and give the {0}.")).format(kind, a, b)
    return Made(prompt, "\n".join(lines), str(a // b if kind == "quotient" else rest), f"{kind} {a}/{b}")


def common_divisor(rng: Random, level: int) -> Made:
    """Euclid's algorithm; the last divisor is the answer."""
    shared = number(rng, (level + 1) // 2)
    a, b = shared * number(rng, (level + 2) // 2), shared * number(rng, (level + 2) // 2)
    lines, x, y = [], a, b
    while y:
        lines.append(f"{x}%{y}={x % y}")
        x, y = y, x % y
    prompt = rng.choice(("What is the greatest common divisor of {} and {}?", "Compute gcd({}, {}).")).format(a, b)
    return Made(prompt, "\n".join(lines), str(gcd(a, b)), f"{a},{b}")


def power_modulo(rng: Random, level: int) -> Made:
    base, exponent, modulus = rng.randint(2, 9 * level), rng.randint(2, level + 3), rng.randint(3, 10 * level)
    lines, value = [f"{base}%{modulus}={base % modulus}"], base % modulus
    for _ in range(2, exponent + 1):
        product = value * (base % modulus)
        lines.append(f"{value}*{base % modulus}={product} {product}%{modulus}={product % modulus}")
        value = product % modulus
    problem = f"{base}^{exponent} mod {modulus}"
    return Made(phrase(rng, problem), "\n".join(lines), str(value), problem)


def linear_equation(rng: Random, level: int) -> Made:
    """a x + b = c x + d with a whole solution; c is 0 in the first two levels."""
    x, c = rng.randint(-5 * level, 5 * level), rng.randint(1, 2 * level) if level > 2 else 0
    a, b = c + rng.randint(2, 3 * level), rng.randint(-9 * level, 9 * level)
    d = (a - c) * x + b
    right = f"{c}x {signed(d)}" if c else f"{d}"
    lines = [f"{a}x-{c}x={a - c}x"] if c else []
    lines += [f"{a - c}x={d}{-b:+}={d - b}", f"x={d - b}/{a - c}={x}"]
    equation = f"{a}x {signed(b)} = {right}"
    return Made(f"Solve for x: {equation}", "\n".join(lines), str(x), equation)


def signed(n: int) -> str:
    return f"- {-n}" if n < 0 else f"+ {n}"


CHAIN_TERMS = (3, 4, 5, 6, 6)  # by level
CHAIN_LARGEST = (9, 20, 50, 99, 999)
CHAIN_BOUND = (99, 99, 99, 999, 9999)


def chain_sum(rng: Random, level: int) -> Made:
    """Sums and differences from left to right; the running total stays between 0 and CHAIN_BOUND."""
    largest, bound = CHAIN_LARGEST[level - 1], CHAIN_BOUND[level - 1]
    total = rng.randint(1, largest)
    terms, lines = [str(total)], []
    for _ in range(CHAIN_TERMS[level - 1] - 1):
        term = rng.randint(1, largest)
        fits = [op for op, after in (("+", total + term), ("-", total - term)) if 0 <= after <= bound]
        op = rng.choice(fits)
        after = total + term if op == "+" else total - term
        lines.append(f"{total}{op}{term}={after}")
        terms += [op, str(term)]
        total = after
    return Made(phrase(rng, " ".join(terms)), "\n".join(lines), str(total), "".join(terms))


FACTORS = ((3, 9), (4, 9), (3, 20), (4, 20), (3, 99))  # by level: how many, the largest


def chain_product(rng: Random, level: int) -> Made:
    count, largest = FACTORS[level - 1]
    factors = [rng.randint(2, largest) for _ in range(count)]
    lines, total = [], factors[0]
    for factor in factors[1:]:
        lines.append(f"{total}*{factor}={total * factor}")
        total *= factor
    terms = [str(f) for f in factors]
    return Made(phrase(rng, " * ".join(terms)), "\n".join(lines), str(total), "*".join(terms))


def sum_of_products(rng: Random, level: int) -> Made:
    """Products first, then their sum; one more product every second level."""
    pairs = [(rng.randint(2, 4 * level + 5), rng.randint(2, 9)) for _ in range(2 + level // 2)]
    lines, total = [f"{a}*{b}={a * b}" for a, b in pairs], pairs[0][0] * pairs[0][1]
    for a, b in pairs[1:]:
        lines.append(f"{total}+{a * b}={total + a * b}")
        total += a * b
    problem = " + ".join(f"{a} * {b}" for a, b in pairs)
    return Made(phrase(rng, problem), "\n".join(lines), str(total), problem)


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
        chain_sum,
        chain_product,
        sum_of_products,
    )
)
