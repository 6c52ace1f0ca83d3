"""A stranger's JSON schema, bounded before any compiler sees it: size, depth, enums, patterns, and where `$ref` points.

Only references inside the schema are followed, so nothing is ever fetched. A reference may come back to itself through
a property (a tree), not directly (`a → b → a`), which would describe nothing.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from shoal.errors import RequestError

MAX_BYTES = 2**17
MAX_DEPTH = 32
MAX_ENUM = 1000
MAX_PATTERN = 256
MAX_REPEAT = 1000  # the largest number in a pattern's {…}
INSIDE = re.compile(r"#(/|$)")
DRAFTS = ("http://json-schema.org/", "https://json-schema.org/")


def check(schema: Mapping[str, Any], param: str) -> None:
    """Raises RequestError that names `param`."""
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as e:
        raise bad(f"a schema that is no JSON: {str(e)[:200]}", "an object of JSON", param) from None
    if size > MAX_BYTES:
        raise bad(f"a JSON schema of {size:,} bytes", f"at most {MAX_BYTES:,}", param)
    sound: set[str] = set()  # references that lead somewhere: each is followed once
    for node, depth in nodes(schema):
        if depth > MAX_DEPTH:
            raise bad("a deeply nested JSON schema", f"at most {MAX_DEPTH} levels", param)
        check_node(node, schema, param, sound)


def nodes(schema: Any) -> Iterator[tuple[Mapping[str, Any], int]]:
    level, depth = [schema], 1
    while level:
        yield from ((item, depth) for item in level if isinstance(item, Mapping))
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, Mapping) else item)
            if isinstance(child, Mapping | list)
        ]
        depth += 1


def check_node(node: Mapping[str, Any], root: Mapping[str, Any], param: str, sound: set[str]) -> None:
    enum, pattern, ref = node.get("enum"), node.get("pattern"), node.get("$ref")
    if isinstance(enum, list) and len(enum) > MAX_ENUM:
        raise bad(f"an enum of {len(enum):,} values", f"at most {MAX_ENUM:,}", param)
    if isinstance(pattern, str):
        check_pattern(pattern, param)
    if isinstance(ref, str):
        check_ref(ref, root, param, sound)
    for name in ("$dynamicRef", "$recursiveRef"):
        if isinstance(node.get(name), str):
            raise bad(f"a JSON schema with {name}", "$ref alone", param)
    draft = node.get("$schema")
    if isinstance(draft, str) and not draft.startswith(DRAFTS):
        raise bad(f"a JSON schema of the draft {shown(draft)}", "one of json-schema.org's", param)


def check_pattern(pattern: str, param: str) -> None:
    """Bounded here by length and by the product of its counts; its compilation is bounded by the grammar's limits."""
    if len(pattern) > MAX_PATTERN:
        raise bad(f"a pattern of {len(pattern):,} characters", f"at most {MAX_PATTERN}", param)
    product = 1
    for low, high in re.findall(r"\{(\d{1,20})(?:,(\d{0,20}))?\}", pattern):
        product *= max(int(low), int(high or 0), 1)
    if product > MAX_REPEAT:
        raise bad(f"a pattern that repeats up to {product:,} times", f"at most {MAX_REPEAT:,}", param)


def check_ref(ref: str, root: Mapping[str, Any], param: str, sound: set[str]) -> None:
    """Follow a chain to its end, or to where an earlier one went on; together linear in the schema."""
    if not INSIDE.match(ref):
        raise bad(f"the $ref {shown(ref)}", "references inside the schema (#/$defs/…); nothing is fetched", param)
    seen: set[str] = set()
    while ref not in sound:
        if ref in seen:
            raise bad(f"the $ref {shown(ref)} that leads back to itself", "references that come to an end", param)
        seen.add(ref)
        target = resolve(ref, root, param)
        following = target.get("$ref") if isinstance(target, Mapping) else None
        if not isinstance(following, str) or not INSIDE.match(following):
            break
        ref = following
    sound |= seen


def resolve(ref: str, root: Mapping[str, Any], param: str) -> Any:
    target: Any = root
    for name in ref[1:].split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(target, list) and name.isdecimal() and len(name) < 6 and int(name) < len(target):
            target = target[int(name)]
        elif isinstance(target, Mapping) and name in target:
            target = target[name]
        else:
            raise bad(f"the $ref {shown(ref)} to nothing", "one that leads somewhere", param)
    return target


def shown(text: str) -> str:
    """A stranger's word inside our sentence: quoted, escaped, cut."""
    return ascii(text[:64] + "…" if len(text) > 64 else text)


def bad(got: str, expected: str, param: str) -> RequestError:
    return RequestError(
        got, expected, "simplify the schema; docs/chat.md says what is supported", param, "invalid_schema"
    )
