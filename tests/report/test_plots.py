"""The geometry of charts: what is drawn stands where its numbers say."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.report import plots, words
from shoal.report.plots import Chart, Line, Mark

FINITE = st.floats(-1e29, 1e29)


@given(FINITE, FINITE, st.integers(2, 9))
def test_ticks_are_few_round_inside_and_evenly_spaced(a, b, about):
    low, high = min(a, b), max(a, b)
    ticks = plots.nice(low, high, about)
    assert 1 <= len(ticks) <= 3 * about
    slack = 1e-8 * (high - low) + 1e-9 * max(abs(low), abs(high))
    assert all(low - slack <= t <= high + slack for t in ticks) or len(ticks) == 1
    gaps = [y - x for x, y in pairwise(ticks)]
    assert not gaps or max(gaps) - min(gaps) <= slack + 1e-6 * max(gaps)


@given(st.lists(FINITE, min_size=1, max_size=300), st.floats(0, 0.5))
def test_smoothing_stays_within_the_values_and_keeps_both_ends(ys, share):
    points = list(enumerate(ys))
    smooth = plots.smoothed(points, share)
    room = 1e-6 * max(map(abs, ys), default=0) + 1e-12
    assert [x for x, _ in smooth] == list(range(len(ys)))
    assert all(min(ys) - room <= y <= max(ys) + room for _, y in smooth)
    assert smooth[0][1] == pytest.approx(ys[0], abs=room) and smooth[-1][1] == pytest.approx(ys[-1], abs=room)


def test_smoothing_does_not_bend_a_straight_line():
    line = [(float(x), 3.0 - 0.5 * x) for x in range(200)]
    assert all(y == pytest.approx(v) for (_, y), (_, v) in zip(plots.smoothed(line, 0.2), line))


@given(st.integers(1, 5000))
def test_thinning_keeps_the_ends_and_the_order(n):
    kept = plots.thinned([(float(i), 0.0) for i in range(n)])
    assert len(kept) == min(n, plots.MAX_POINTS)
    assert kept[0][0] == 0 and kept[-1][0] == n - 1 and all(a < b for a, b in pairwise(kept))


def test_points_and_marks_stand_at_their_values():
    chart = Chart("t", "", [Line("l", [(0.0, 1.0), (10.0, 3.0)], "a")], "min", marks=[Mark("m", 2.0)], y_range=(0, 4))
    assert (chart.x(0), chart.x(10), chart.x(5)) == (0, 100, 50)
    assert chart.y(chart.y_high) == 0 and chart.y(chart.y_low) == 100
    assert chart.y(2.0) == pytest.approx((chart.y(1.0) + chart.y(3.0)) / 2)
    assert chart.path([(0.0, 1.0)]) == f"0.0,{10 * chart.y(1.0):.1f}"


def test_the_pointer_finds_a_value_everywhere_and_once():
    chart = Chart("t", "", [Line("l", [(float(x), x * x) for x in range(500)], "a")], "min")
    zones = chart.zones
    assert zones[0].left == 0 and sum(z.width for z in zones) == pytest.approx(100)
    assert all(a.left + a.width == pytest.approx(b.left) for a, b in pairwise(zones))
    assert all(0 <= z.inside <= 100 for z in zones)


def test_interpolation_between_and_beyond():
    points = [(1.0, 10.0), (3.0, 30.0)]
    assert [plots.interpolated(points, x) for x in (0, 1, 2, 3, 9)] == [10, 10, 20, 30, 30]


def test_cells_are_full_at_twice_and_at_half_a_fair_share():
    cells = {share: plots.heat_cell(share) for share in (0.0, 0.5, 1.0, 2.0, 7.0)}
    assert {s: c["strength"] for s, c in cells.items()} == {0.0: 1, 0.5: 1, 1.0: 0, 2.0: 1, 7.0: 1}
    assert cells[0.5]["side"] == "under" and cells[2.0]["side"] == "over"


@pytest.mark.parametrize(
    "text, expected",
    [
        (words.count(4_213_000), "4.21M"),
        (words.count(37e9), "37.0B"),
        (words.count(671e9), "671B"),
        (words.count(12), "12"),
        (words.short(1_200_000), "1.2M"),
        (words.short(10_000), "10K"),
        (words.short(100_000), "100K"),
        (words.short(0), "0"),
        (words.duration(59), "59 s"),
        (words.duration(600), "10.0 min"),
        (words.money(0.0162), "1.6 ¢"),
        (words.money(5.328e6), "$5,328,000.00"),
        (words.exponent(3.21e14), "3.21 × 10¹⁴"),
        (words.change(100, 98.5), "−1.5%"),
        (words.change(None, 1), ""),
        (words.block("a ``` b"), "````\na ``` b\n````"),
    ],
)
def test_numbers_read_well(text, expected):
    assert text == expected
