"""A few seconds of the soak (`python -m bench.soak` takes minutes): what clients do to a server goes when they go."""

import pytest

from bench.soak import soak


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_server_is_what_it_was_when_its_clients_are_gone():
    seen = soak(6.0, clients=16, rounds=4)
    assert not seen.failures, (seen.statuses, seen.broken[:3])
    assert seen.statuses[200] > 20 and seen.statuses[400] > 2 and len(seen.did) == 8
    assert seen.pages == [0] * 4
    assert seen.descriptors[-1] <= seen.descriptors[0] + 2
    assert seen.memory[-1] - seen.memory[-2] < 64 * 2**20
