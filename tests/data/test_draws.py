"""Draws stay what they are: the order of training data and seeded answers hang on them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data.draws import mix, permuted, uniform

MIXED = [0x238275BC38FCBE91, 0x6C60AD0E78723D3C, 0xED7F782FE539F642]
UNIFORM = [0.6524484863740305, 0.166398802469093, 0.20128373135334598]


def test_the_numbers_are_those_of_every_release():
    assert [mix(0, 0, 0), mix(7, 2**40, 3), mix(-1, 5, 2**70)] == MIXED
    assert [uniform(0, 0, 0), uniform(2**64 - 1, 4097, 3), uniform(-5, 12, 1)] == UNIFORM


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(max_examples=20)
def test_the_order_is_a_permutation(n, key):
    assert sorted(permuted(i, n, key) for i in range(n)) == list(range(n))
