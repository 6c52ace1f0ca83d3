"""The house rules that a reader relies on, checked on the source: who may import whom, and where torch stays out.

Imports go only to a lower rank, never between rooms of one rank; inside a room they are free. So whoever reads a room
knows what lies under it without looking. The rules are DESIGN's; an import inside a function counts like any other.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RANKS = [
    ["errors"],
    ["config"],
    ["runtime"],
    ["run"],
    ["ops"],
    ["model"],
    ["precision", "data", "tasks"],
    ["parallel"],
    ["train", "engine", "plan"],
    ["evals", "report", "server"],
    ["post"],
    ["recipes"],
    ["cli"],
]
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
SOURCES = sorted((ROOT / "shoal").rglob("*.py"))
# plan is arithmetic on descriptions of models and machines: it reads configs and schedules, nothing that computes.
PLAN_MAY_IMPORT = ("shoal.plan", "shoal.errors", "shoal.model.counts", "shoal.parallel.schedule")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room(module: str) -> str:
    return module.split(".")[1]


@cache
def imports(path: Path) -> list[str]:
    """Modules a file imports; `from a import b` as a.b where that is a module of ours or torch's, else as a."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import; write the whole name"
            found += [whole(node.module, alias.name) for alias in node.names]
    return found


def whole(module: str, name: str) -> str:
    path = ROOT.joinpath(*module.split("."), name)
    return f"{module}.{name}" if path.with_suffix(".py").exists() or path.is_dir() or module == "torch" else module


def ours(path: Path) -> list[str]:
    return [name for name in imports(path) if name.startswith("shoal.")]


def test_every_room_has_a_rank():
    rooms = {room(module_name(path)) for path in SOURCES if path.parent.name != "shoal" or path.name != "__init__.py"}
    assert rooms <= RANK.keys(), f"give {rooms - RANK.keys()} a rank"


def test_imports_go_down_the_ranks():
    wrong = [
        f"{module_name(path)} imports {name}"
        for path in SOURCES
        if path != ROOT / "shoal" / "__init__.py"
        for name in ours(path)
        if room(name) != room(module_name(path)) and RANK[room(name)] >= RANK[room(module_name(path))]
    ]
    assert not wrong, "\n".join(wrong)


def test_init_files_are_empty():
    full = [module_name(path) for path in SOURCES if path.name == "__init__.py" and path.read_text().strip()]
    assert not full, full


def test_plan_sees_descriptions_only():
    wrong = [
        f"{module_name(path)} imports {name}"
        for path in SOURCES
        if room(module_name(path)) == "plan"
        for name in ours(path)
        if not name.startswith(PLAN_MAY_IMPORT) and not name.endswith(".config")
    ]
    assert not wrong, "\n".join(wrong)


def test_collectives_live_in_parallel_and_runtime():
    elsewhere = [path for path in SOURCES if room(module_name(path)) not in ("parallel", "runtime")]
    wrong = [module_name(path) for path in elsewhere if mentions_collectives(path)]
    assert not wrong, wrong


def mentions_collectives(path: Path) -> bool:
    """`torch.distributed` imported in any form, or written out."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    written = any(ast.unparse(n) == "torch.distributed" for n in nodes if isinstance(n, ast.Attribute))
    return written or any(name.startswith("torch.distributed") for name in imports(path))


def torch_free() -> list[str]:
    """plan, every config and recipe, the rank-0 files, and the command line until a verb needs torch."""
    parts = [p for p in SOURCES if p.name == "config.py" or p.parent.name in ("plan", "recipes")]
    parts = [p for p in parts if not p.name.startswith("_")]  # recipes/_job.py runs what recipes describe
    parts += [ROOT / "shoal" / name for name in ("errors.py", "runtime.py", "run.py", "cli/main.py", "cli/runs.py")]
    return sorted({module_name(path) for path in parts if path.name != "__init__.py"})


@pytest.mark.parametrize("module", torch_free())
def test_torch_free_parts_import_no_torch(module):
    check = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
