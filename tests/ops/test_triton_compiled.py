"""The kernels compile for GPUs that aren't here, to the instructions they are written for."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="no Triton here: pip install -e '.[gpu]'"),
]
SHARED = {90: 227 << 10, 89: 99 << 10, 86: 99 << 10}  # bytes a program may have


def compiled(chip: int, tmp_path) -> dict[str, list[dict]]:
    """By kernel, of the tile sizes that fit the chip."""
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.compiled", str(chip)]
    ran = subprocess.run(command, capture_output=True, text=True, env=clean | {"TRITON_CACHE_DIR": str(tmp_path)})
    assert ran.returncode == 0, ran.stderr
    made: dict[str, list[dict]] = {}
    for line in map(json.loads, ran.stdout.splitlines()):
        made.setdefault(line["kernel"], []).extend([line] if line["shared"] <= SHARED[chip] else [])
    return made


def test_on_hopper_products_are_wgmma_fed_by_the_copy_engine(tmp_path):
    made = compiled(90, tmp_path)
    for kernel in ("linear", "grouped", "gradient"):
        for size in made[kernel]:
            assert not size["spilled"] and size["copy_engine"], size
            assert all("wgmma" in product and "f32.e4m3.e4m3" in product for product in size["products"]), size
    for size in made["latent attention"]:
        assert not size["spilled"] and all("wgmma" in product for product in size["products"]), size
    assert len(made) == 22
    for kernel, sizes in made.items():
        assert any(not size["spilled"] for size in sizes), (kernel, sizes)


@pytest.mark.parametrize("chip, least", [(89, 22), (86, 7)])
def test_on_gaming_gpus_every_kernel_has_tiles_that_fit(chip, least, tmp_path):
    made = compiled(chip, tmp_path)
    assert len(made) == least
    for kernel, sizes in made.items():
        assert any(not size["spilled"] for size in sizes), (kernel, sizes)
        if kernel in ("linear", "grouped", "gradient"):
            assert all("e4m3.e4m3.f32" in product for size in sizes for product in size["products"]), sizes
