"""Engines for the tests of this room."""

import pytest

from shoal.engine.engine import LocalEngine
from shoal.model.transformer import Transformer
from tests.engine.models import model, speculating


@pytest.fixture
def made():
    """Engines, closed when the test ends, with their books checked and nothing left in use."""
    engines: list[LocalEngine] = []

    def make(m: Transformer | None = None, **options) -> LocalEngine:
        make_one = speculating if "depth" in options else LocalEngine
        engines.append(make_one(m or model(), **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
        engine._scheduler.check()
        assert engine.stats().pages_used == 0 and not engine._live
