"""What attempts say about a model: pass@k, majority votes, intervals, and accuracy against tokens of thinking.

An item was tried n times and c attempts are right. What would be k of them?

    pass@k   at least one of k is right            1 - C(n-c, k) / C(n, k)            Chen et al., arXiv 2107.03374 §2.1
    cons@k   the most frequent answer of k is      the mean over all subsets of k     Wang et al., arXiv 2203.11171
             right (self-consistency)

Both are exact means over all subsets of size k of the n attempts, so unbiased for any k up to n; no subset is drawn.
At a tie the answer that came first wins, and since attempts come in no particular order, `cons_at_k` gives
each of the tied ones its equal share. An attempt without an answer counts among the k and has no vote.

Attempts at one item resemble each other: an interval that took them for independent would be too narrow. So it is
Wilson's for one attempt an item, and otherwise a bootstrap over items, never narrower than Wilson's for independent
attempts (few rare successes look too sure to a bootstrap). Where every item has the same rate, resampling shows no
spread, and it is Wilson's with as many trials as items.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb, sqrt

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 2000
MOST_ATTEMPTS = 1000  # at an item: C(1000, 500) is about the largest that a double holds


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k of the n attempts is among the c right ones."""
    assert 0 <= c <= n and 1 <= k <= n, (n, c, k)
    return 1 - comb(n - c, k) / comb(n, k)


def cons_at_k(answers: Sequence[str | None], right: Sequence[bool], ks: Sequence[int]) -> list[float]:
    """For each k, the probability that the majority of k of these attempts is right; one answer has one outcome.

    For each number w of votes that may win: F counts, by size and by how many answers reach w, the subsets in which
    none has more; R those in which besides one right answer is marked that reaches it. One answer of m votes multiplies
    both by Σ_{x<w} C(m,x) z^x + y C(m,w) z^w, where z counts attempts and y the answers at w.
    """
    n, most = len(answers), max(ks)
    assert len(right) == n <= MOST_ATTEMPTS and min(ks) >= 1 and most <= n, (n, ks)
    votes = Counter(answer for answer in answers if answer is not None)
    is_right = dict(zip(answers, right))
    won = np.zeros(most + 1)
    for w in range(1, min(most, max(votes.values(), default=0)) + 1):
        F, R = np.zeros((2, most // w + 1, most + 1))  # [answers that reach w, attempts chosen]
        F[0] = [comb(n - votes.total(), x) for x in range(most + 1)]
        for answer, m in votes.items():
            counts = [comb(m, x) for x in range(min(w, m) + 1)]
            below, at = counts[:w], counts[w] if m >= w else 0
            F_next, R_next = _product(F, below, most), _product(R, below, most)
            if at:
                F_next[1:, w:] += at * F[:-1, : most + 1 - w]
                R_next[1:, w:] += at * R[:-1, : most + 1 - w]
                if is_right[answer]:
                    R_next[1:, w:] += at * F[:-1, : most + 1 - w]
            F, R = F_next, R_next
        won[:] += (R[1:] / np.arange(1, len(R))[:, None]).sum(0)
    return [float(won[k] / comb(n, k)) for k in ks]


def _product(F: np.ndarray, factors: Sequence[int], most: int) -> np.ndarray:
    """F times Σ_x factors[x] z^x, up to the power `most`."""
    found = np.zeros_like(F)
    for x, factor in enumerate(factors[: most + 1]):
        found[:, x:] += factor * F[:, : most + 1 - x]
    return found


def wilson(right: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Interval of a proportion of n independent trials (Wilson 1927); (0, 1) for no trials."""
    if n == 0:
        return 0.0, 1.0
    p, n = right / n, float(n)
    middle, width = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * width) / (1 + z * z / n) for sign in (-1, 1))
    return max(0.0, min(low, p)), min(1.0, max(high, p))


def bootstrap(rates: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The middle 95% of the mean over items drawn anew, with replacement."""
    rates_N = np.asarray(rates, float)
    drawn_RN = np.random.default_rng(seed).integers(len(rates_N), size=(resamples, len(rates_N)))
    low, high = np.percentile(rates_N[drawn_RN].mean(1), [2.5, 97.5])
    return float(low), float(high)


def interval(rates: Sequence[float], attempts: int) -> tuple[float, float]:
    """95% of the mean of the items' rates, each found by so many attempts."""
    n = len(rates)
    if attempts == 1 or len(set(rates)) == 1:
        return wilson(sum(rates), n)
    (low, high), (least, most) = bootstrap(rates), wilson(sum(rates) * attempts, n * attempts)
    return min(low, least), max(high, most)


def powers(most: int) -> list[int]:
    """1, 2, 4, … and `most` itself: the k that are worth a point."""
    return sorted({2**i for i in range(most.bit_length())} | {most}) if most else []


Tried = Sequence[tuple[str | None, str, int]]  # attempts at one item: (answer, outcome, tokens of thinking)


def row(groups: Sequence[Tried]) -> dict:
    """What attempts at some items come to, as plain JSON.

    `failed` attempts, which the grader couldn't judge, are neither right nor wrong: they are left out of everything but
    the tokens, and so is an item without any other. `k` go up to the fewest judged attempts of an item.
    """
    judged = [[(a, o == "right") for a, o, _ in group if o != "failed"] for group in groups]
    judged = [group for group in judged if group]
    rates = [sum(r for _, r in group) / len(group) for group in judged]
    ks = powers(min(map(len, judged), default=0))
    passed = [[pass_at_k(len(g), sum(r for _, r in g), k) for k in ks] for g in judged]
    agreed = [cons_at_k([a for a, _ in g], [r for _, r in g], ks) for g in judged]
    every = [attempt for group in groups for attempt in group]
    return {
        "items": len(groups),
        "attempts": len(every),
        "failed": sum(outcome == "failed" for _, outcome, _ in every),
        "unanswered": sum(answer is None for answer, _, _ in every),
        "accuracy": mean(rates),
        "interval": list(interval(rates, max(map(len, judged)))) if rates else None,
        "k": ks,
        "pass_at_k": [mean(column) for column in zip(*passed)],
        "cons_at_k": [mean(column) for column in zip(*agreed)],
        "thinking_tokens": mean([tokens for _, _, tokens in every]),
    }


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def table(groups: Mapping[tuple[str, int], Sequence[Tried]]) -> list[dict]:
    """A row for all, one for each task that has several levels, and one for each (task, level)."""
    tasks = list(dict.fromkeys(task for task, _ in groups))
    rows = [part(groups, None, None)] if len(groups) > 1 else []
    for task in tasks:
        levels = sorted(level for name, level in groups if name == task)
        if len(levels) > 1 and len(tasks) > 1:
            rows.append(part(groups, task, None))
        rows += [part(groups, task, level) for level in levels]
    return rows


def part(groups: Mapping[tuple[str, int], Sequence[Tried]], task: str | None, level: int | None) -> dict:
    """The row of one task and level; None stands for all."""
    chosen = [of for (name, at), of in groups.items() if task in (None, name) and level in (None, at)]
    return {"task": task, "level": level} | row([group for of in chosen for group in of])
