"""What all tests share: one thread (shapes are tiny), repeatable property tests, skips where parts are missing."""

import os
import shutil
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported anywhere

import pytest
from hypothesis import settings

settings.register_profile("shoal", deadline=None, derandomize=True)
settings.load_profile("shoal")

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """`runtime.setup` changes the whole process; the next test starts from torch's defaults."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)
        torch.use_deterministic_algorithms(False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here")
    if item.get_closest_marker("browser") and not BROWSER:
        pytest.skip("no chromium here: apt install chromium")
