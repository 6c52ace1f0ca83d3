"""What a bench says of its figures follows from them."""

import pytest

from bench import offload


@pytest.mark.parametrize(("ratio", "right"), [(0.79, False), (0.81, True), (1.0, True), (1.24, True), (1.3, False)])
def test_a_prediction_may_be_off_by_as_much_either_way(ratio: float, right: bool):
    assert offload.agrees(ratio) is offload.agrees(1 / ratio) is right
