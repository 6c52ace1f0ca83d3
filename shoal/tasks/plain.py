"""Plain values as lines of JSON, to cross between processes that don't trust each other. Imported inside the sandbox,
so it needs nothing but json.

Only the very types below pass, no subclass of them: what is read on the other side is built there from scratch, so no
value can bring an equality, a hash or a class of its own. Tags keep apart what JSON doesn't: tuples, sets, dictionaries
with any keys, floats that are no numbers.
"""

import json

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes longer than all else here
    from typing import Any

MAX_DEPTH = 50


def dumps(value: object) -> str:
    """One line. Raises ValueError for anything that is not plain, or deeper than MAX_DEPTH."""
    return json.dumps(encode(value, MAX_DEPTH))


def loads(line: str | bytes) -> "Any":
    """Raises ValueError for anything that `dumps` doesn't write."""
    try:
        return decode(json.loads(line), MAX_DEPTH)
    except (TypeError, RecursionError, OverflowError) as e:
        raise ValueError(f"not plain: {type(e).__name__}") from None


def encode(value: "Any", depth: int) -> "Any":
    kind = type(value)
    if depth < 0:
        raise ValueError(f"deeper than {MAX_DEPTH}")
    if kind in (type(None), bool, int, str):
        return value
    if kind is float:
        return {"float": repr(value)}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is complex:
        return {"complex": [repr(value.real), repr(value.imag)]}
    if kind is list:
        return [encode(v, depth - 1) for v in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encode(v, depth - 1) for v in value]}
    if kind is dict:
        return {"dict": [[encode(k, depth - 1), encode(v, depth - 1)] for k, v in value.items()]}
    raise ValueError(f"a {kind.__name__} is not plain")


def decode(found: "Any", depth: int) -> "Any":
    if depth < 0:
        raise ValueError(f"deeper than {MAX_DEPTH}")
    if isinstance(found, list):
        return [decode(v, depth - 1) for v in found]
    if not isinstance(found, dict):
        if isinstance(found, float):
            raise ValueError("a float without its tag")
        return found
    [(tag, held)] = found.items()
    match tag:
        case "float":
            return float(held)
        case "bytes":
            return bytes.fromhex(held)
        case "complex":
            real, imaginary = held
            return complex(float(real), float(imaginary))
        case "tuple":
            return tuple(decode(v, depth - 1) for v in held)
        case "set":
            return {decode(v, depth - 1) for v in held}
        case "frozenset":
            return frozenset(decode(v, depth - 1) for v in held)
        case "dict":
            return {decode(k, depth - 1): decode(v, depth - 1) for k, v in held}
    raise ValueError(f"unknown tag {tag!r}")
