"""What a bench says of its figures follows from them."""

import pytest

from bench import offload
from shoal.plan.fit import Hardware


@pytest.mark.parametrize(("ratio", "right"), [(0.79, False), (0.81, True), (1.0, True), (1.24, True), (1.3, False)])
def test_a_prediction_may_be_off_by_as_much_either_way(ratio: float, right: bool):
    assert offload.agrees(ratio) is offload.agrees(1 / ratio) is right


def test_a_disk_that_outran_its_measurement_is_told():
    machine = Hardware(2**30, 30e9, disk_rate=1.0e9)
    assert offload.doubted({"disk_bytes_per_s": 0.9e9}, machine) is None
    assert "1.70 GB/s in the run, and plan fit was told 1.00" in str(
        offload.doubted({"disk_bytes_per_s": 1.7e9}, machine)
    )
