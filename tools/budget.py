"""The line budget: how big each room is, and that nothing outgrew what can be read in one look.

Prints lines a room, C kernels included, then fails where a file passes 500 lines or a function 120, or where a line of
C is wider than 120 (ruff sees to Python's).
"""

import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILE_LIMIT, FUNCTION_LIMIT, WIDTH_LIMIT = 500, 120, 120


def sources() -> list[Path]:
    every = (p for top in ("shoal", "tests", "bench") for p in (ROOT / top).rglob("*"))
    return sorted(p for p in every if p.suffix in (".py", ".c", ".h"))


def functions(path: Path) -> list[tuple[str, int]]:
    """(name, lines) of every function in a file."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    return [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in nodes]


def main() -> int:
    lines, files, too_long = Counter(), Counter(), []
    for path in sources():
        name = path.relative_to(ROOT)
        top, *below = name.parts
        room = f"{top}/{below[0]}" if top == "shoal" and len(below) > 1 else top
        text = path.read_text().splitlines()
        lines[room] += len(text)
        files[room] += 1
        if len(text) > FILE_LIMIT:
            too_long.append(f"{name}: {len(text)} lines, at most {FILE_LIMIT}")
        if path.suffix == ".py":
            long = [(f, n) for f, n in functions(path) if n > FUNCTION_LIMIT]
            too_long += [f"{name}: {f} has {n} lines, at most {FUNCTION_LIMIT}" for f, n in long]
        else:
            wide = [(i, len(line)) for i, line in enumerate(text, start=1) if len(line) > WIDTH_LIMIT]
            too_long += [f"{name}:{i}: {n} characters, at most {WIDTH_LIMIT}" for i, n in wide]
    for room in sorted(lines):
        print(f"{room:<18} {files[room]:>4} files {lines[room]:>6} lines")
    package = sum(n for room, n in lines.items() if room.startswith("shoal"))
    print(f"{'the package':<18} {package:>17} lines")
    for line in too_long:
        print(line)
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())
