"""The estimators against brute force: every subset, every order."""

from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from itertools import combinations, permutations
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.evals import scaling

ANSWERS = st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=6)


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    hits = [any(i < c for i in chosen) for chosen in combinations(range(n), k)]
    assert scaling.pass_at_k(n, c, k) == pytest.approx(sum(hits) / len(hits), abs=1e-15)


@given(st.integers(1, 400), st.data())
def test_pass_at_k_stays_a_probability_and_grows_with_k(n, data):
    c = data.draw(st.integers(0, n))
    found = [scaling.pass_at_k(n, c, k) for k in scaling.powers(n)]
    assert found == sorted(found) and found[0] == pytest.approx(c / n) and found[-1] == (c > 0)


def majority(answers: Iterable[str | None]) -> str | None:
    """The most frequent answer, the first to have come among equals; None where nobody answered."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__) if votes else None


@settings(max_examples=60)
@given(ANSWERS, st.sets(st.sampled_from("abcd")))
def test_cons_at_k_is_the_mean_over_all_subsets_in_all_orders(answers, right):
    for k in range(1, len(answers) + 1):
        wins = [majority(answers[i] for i in order) in right for order in permutations(range(len(answers)), k)]
        found = scaling.cons_at_k(answers, [a in right for a in answers], [k])
        assert found[0] == pytest.approx(float(Fraction(sum(wins), len(wins))), abs=1e-12)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=64), st.sets(st.sampled_from("abcdefgh")))
def test_right_and_wrong_majorities_add_up(answers, right):
    ks = scaling.powers(len(answers))
    ours = scaling.cons_at_k(answers, [a in right for a in answers], ks)
    others = scaling.cons_at_k(answers, [a not in right for a in answers], ks)
    assert [a + b for a, b in zip(ours, others)] == pytest.approx([1.0] * len(ks))


def test_a_vote_of_many_is_exact_too():
    answers = ["a"] * 40 + ["b"] * 24
    p = sum(comb(40, x) * comb(24, 9 - x) for x in range(5, 10)) / comb(64, 9)
    assert scaling.cons_at_k(answers, [a == "a" for a in answers], [9]) == [pytest.approx(p)]


@given(st.lists(st.sampled_from(["a", "b", None]), max_size=9))
def test_the_majority_goes_to_the_first_among_equals(answers):
    votes = [a for a in answers if a is not None]
    best = max(map(votes.count, votes), default=0)
    assert majority(answers) == next((a for a in votes if votes.count(a) == best), None)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_proportion_and_its_ends_solve_the_score_equation(n, data):
    right = data.draw(st.integers(0, n))
    p, (low, high) = right / n, scaling.wilson(right, n)
    assert 0 <= low <= p <= high <= 1
    for end in (low, high):
        if 0 < end < 1 and end != p:
            assert abs(p - end) == pytest.approx(scaling.Z95 * (end * (1 - end) / n) ** 0.5, rel=1e-6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_the_bootstrap_stays_among_the_rates_and_repeats_itself(rates):
    low, high = scaling.bootstrap(rates, resamples=200)
    assert min(rates) - 1e-12 <= low <= high <= max(rates) + 1e-12
    assert scaling.bootstrap(rates, resamples=200) == (low, high)


def test_attempts_at_one_item_are_not_taken_for_independent():
    """Items that are always or never right: sixteen attempts at each say no more than one does."""
    low, high = scaling.interval([0.0, 1.0] * 20, 16)
    one_low, one_high = scaling.wilson(20, 40)
    assert high - low == pytest.approx(one_high - one_low, rel=0.15)
    assert scaling.interval([0.0] * 40, 16) == scaling.wilson(0, 40)
    assert scaling.interval([1 / 16] + [0.0] * 39, 16)[1] == scaling.wilson(1, 640)[1]


def tried(text: str) -> list[tuple[str | None, str, int]]:
    """+ right, - wrong, . no answer, ? the grader failed."""
    kinds = {"+": ("1", "right"), "-": ("2", "wrong"), ".": (None, "wrong"), "?": ("3", "failed")}
    return [(*kinds[c], 10) for c in text]


def test_failures_of_the_grader_are_counted_apart():
    with_failures, without = scaling.row([tried("+-?+-"), tried("??")]), scaling.row([tried("+-+-")])
    assert (with_failures["failed"], with_failures["items"], with_failures["attempts"]) == (3, 2, 7)
    for name in ("accuracy", "interval", "k", "pass_at_k", "cons_at_k"):
        assert with_failures[name] == without[name]
    lost = scaling.row([tried("?")])
    assert lost["accuracy"] is None and lost["interval"] is None and lost["k"] == []


def test_k_goes_as_far_as_every_item_allows():
    found = scaling.row([tried("+-+-.."), tried("+?????"), tried("-----+")])
    assert found["k"] == [1]
    found = scaling.row([tried("+-+-.."), tried("-----+")])
    assert found["k"] == [1, 2, 4, 6] and found["unanswered"] == 2
    assert found["pass_at_k"][0] == found["accuracy"] == pytest.approx(0.25)
    assert found["cons_at_k"][-1] == pytest.approx(0.25)  # a tie, and a lost vote


def test_a_table_has_the_whole_the_tasks_and_their_levels():
    groups = {("x", 1): [tried("++")], ("x", 2): [tried("--"), tried("+-")], ("y", 1): [tried("-+")]}
    rows = [(r["task"], r["level"], r["items"]) for r in scaling.table(groups)]
    assert rows == [(None, None, 4), ("x", None, 3), ("x", 1, 1), ("x", 2, 2), ("y", 1, 1)]
    assert [(r["task"], r["level"]) for r in scaling.table({("x", 3): [tried("+")]})] == [("x", 3)]
    one_task = scaling.table({("x", 1): [tried("+")], ("x", 2): [tried("-")]})
    assert [(r["task"], r["level"]) for r in one_task] == [(None, None), ("x", 1), ("x", 2)]
