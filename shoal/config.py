"""Configs are nested frozen dataclasses, filled in layers: defaults < recipe < file.toml < flags. Torch-free.

    config, origins = load(recipe(), read("mine.toml"), flags=["--optim.lr", "3e-4"], origin="recipe quickstart")

A key is the dotted path of a leaf (`model.attention.kv_lora_rank`); tuples are leaves. Every leaf has an origin, so a
run can say where each value came from. Layers are merged first and the dataclasses built once, so a `__post_init__`
that checks two fields against each other sees only the final pair.

TOML has no null and no unions, so None is written "none", and where a field may hold one of several dataclasses the
table names its class: `kind = "MLAConfig"`. A table that names another class than the one that stands there starts
afresh; nothing is carried over from the old one. Left out on purpose: interpolation, includes, environment variables.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from shoal.errors import ConfigError

T = TypeVar("T")


def load(
    default: T, *layers: tuple[str, Mapping[str, Any]], flags: Sequence[str] = (), origin: str = "default"
) -> tuple[T, dict[str, str]]:
    """The config after all layers, and the origin of every leaf.

    A layer is (origin, nested or dotted mapping). Leaves of `default` that differ from their dataclass's own default
    carry `origin`, the name of whatever made it. Raises ConfigError for unknown keys and values of the wrong type.
    """
    tree = _Node.of(default)
    origins = {key: "default" if is_default else origin for key, _, is_default in _leaves(default)}
    for name, mapping in layers:
        _merge(tree, _nested(mapping), "", _Layer(name, origins))
    if flags:
        _merge(tree, _nested(_parse_flags(tree, flags)), "", _Layer("flag", origins))
    config = tree.build()
    return config, {key: origins.get(key, "default") for key in flatten(config)}


def read(path: Path | str) -> tuple[str, dict[str, Any]]:
    """A TOML file as a layer for `load`."""
    try:
        return f"file {path}", tomllib.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no config file at {path}", "a TOML file", "check the path given to -c") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ConfigError(f"{path} cannot be read: {e}", "a TOML file", "correct it; strings need quotes") from None


def flatten(config: Any) -> dict[str, Any]:
    """Dotted key → value of every leaf; None and tuples are leaves."""
    return {key: value for key, value, _ in _leaves(config)}


def to_toml(config: Any, origins: Mapping[str, str] | None = None) -> str:
    """The whole config, defaults included. With `origins`, every line that isn't a default says where it came from."""
    return "\n".join(_toml_lines(config, "", origins or {})) + "\n"


def from_toml(cls: type[T], text: str) -> T:
    """The inverse of `to_toml`, exactly. Keys that are missing take the dataclass's default."""
    return from_table(cls, tomllib.loads(text))


def from_table(cls: type[T], table: Mapping[str, Any]) -> T:
    """The same of one table of a parsed file, so that a part of a config can be read without the class of the whole."""
    tree = _Node(cls, {})
    _merge(tree, table, "", _Layer("config.toml", {}))
    return tree.build()


# The tree that layers are merged into


@dataclass
class _Node:
    """A dataclass not yet built. `values` holds final leaves and nodes; absent fields take their default."""

    cls: type
    values: dict[str, Any]
    path: str = ""

    @classmethod
    def of(cls, config: Any, path: str = "") -> "_Node":
        nested = {f.name: getattr(config, f.name) for f in fields(config)}
        return cls(
            type(config),
            {k: _Node.of(v, _join(path, k)) if is_dataclass(v) else v for k, v in nested.items()},
            path,
        )

    def build(self) -> Any:
        values = {k: v.build() if isinstance(v, _Node) else v for k, v in self.values.items()}
        required = {f.name for f in fields(self.cls) if f.default is MISSING and f.default_factory is MISSING}
        if missing := sorted(required - values.keys()):
            keys = ", ".join(_join(self.path, k) for k in missing)
            raise ConfigError(f"{keys} not set", f"every required field of {self.cls.__name__}", "set the keys named")
        return self.cls(**values)


@dataclass(frozen=True)
class _Layer:
    name: str
    origins: dict[str, str]

    def wrong(self, key: str, value: Any, expected: str, fix: str) -> ConfigError:
        says = f"--{key} {value}" if self.name == "flag" else f"{self.name}: {key} = {value!r}"
        return ConfigError(says, expected, fix)


def _merge(node: _Node, mapping: Mapping[str, Any], path: str, layer: _Layer) -> None:
    types = _types(node.cls)
    for name, value in mapping.items():
        key = _join(path, name)
        if name not in types:
            raise _unknown(node, key, layer)
        if classes := _dataclasses(types[name]):
            node.values[name] = _merge_child(node.values.get(name), value, key, types[name], classes, layer)
        else:
            node.values[name] = _coerce(value, types[name], key, layer)
        if not isinstance(node.values[name], _Node):
            layer.origins[key] = layer.name


def _merge_child(child: Any, value: Any, key: str, kind: Any, classes: dict[str, type], layer: _Layer) -> Any:
    """Merge a table into the dataclass that stands at `key`, or start another one where the table names it."""
    if value in ("none", None) and NoneType in get_args(kind):
        return None
    if is_dataclass(value):  # whole, from Python
        child = _Node(type(value), {}, key)
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if not isinstance(value, Mapping):
        choice = "a table" + (', or "none"' if NoneType in get_args(kind) else "")
        raise layer.wrong(key, value, choice, f"set its keys one by one: {_keys(next(iter(classes.values())), key)}")
    value, name = dict(value), next(iter(classes))
    if len(classes) > 1:
        name = value.pop("kind", child.cls.__name__ if child is not None else None)
    if name not in classes:
        raise layer.wrong(f"{key}.kind", name, f"one of {', '.join(classes)}", _nearest(str(name), classes))
    if child is None or child.cls.__name__ != name:
        child = _Node(classes[name], {}, key)
        for old in [k for k in layer.origins if k.startswith(f"{key}.")]:
            del layer.origins[old]
    _merge(child, value, key, layer)
    return child


def _unknown(node: _Node, key: str, layer: _Layer) -> ConfigError:
    """Nearest by the same name elsewhere below, else by spelling among the siblings."""
    path, _, name = key.rpartition(".")
    known = _types(node.cls)
    deeper = [k for k in _all_keys(node, path) if k.rpartition(".")[2] == name]
    fix = f"did you mean {deeper[0]}?" if deeper else _nearest(name, known, prefix=path)
    expected = f"a key of {path or node.cls.__name__}: {', '.join(known)}"
    return ConfigError(f"{layer.name}: unknown key {key}", expected, fix)


def _all_keys(node: _Node, path: str) -> Iterator[str]:
    for name in _types(node.cls):
        child = node.values.get(name)
        yield from _all_keys(child, _join(path, name)) if isinstance(child, _Node) else [_join(path, name)]


def _nearest(name: str, known: Mapping[str, Any], prefix: str = "") -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {_join(prefix, close[0])}?" if close else "use one of these names"


# Values


def _coerce(value: Any, kind: Any, key: str, layer: _Layer) -> Any:
    """`value` as TOML or Python wrote it, checked against the annotation; whole numbers may stand for floats."""
    options = _options(kind)
    if NoneType in options and value in ("none", None):
        return None
    for option in options:
        found = _fit(value, option, key, layer)
        if found is not _MISFIT:
            return found
    expected = " or ".join('"none"' if o is NoneType else _type_text(o) for o in options)
    names = {str(choice): None for o in options if get_origin(o) is Literal for choice in get_args(o)}
    raise layer.wrong(key, value, expected, _nearest(str(value), names) if names else "give a value of that type")


_MISFIT = object()


def _fit(value: Any, kind: Any, key: str, layer: _Layer) -> Any:
    if get_origin(kind) is Literal:
        return value if any(type(value) is type(c) and value == c for c in get_args(kind)) else _MISFIT
    if get_origin(kind) is tuple:
        return _fit_tuple(value, get_args(kind), key, layer)
    if kind is float:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _MISFIT
    if kind is Path:
        return Path(value) if isinstance(value, str | Path) else _MISFIT
    assert kind in (int, bool, str, NoneType), f"{key}: configs hold no {kind}"
    return value if type(value) is kind else _MISFIT


def _fit_tuple(value: Any, kinds: tuple[Any, ...], key: str, layer: _Layer) -> Any:
    if not isinstance(value, list | tuple):
        return _MISFIT
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        return _MISFIT
    return tuple(_coerce(v, k, f"{key}.{i}", layer) for i, (v, k) in enumerate(zip(value, kinds, strict=True)))


def _type_text(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list of " + ", ".join("…" if k is Ellipsis else _type_text(k) for k in get_args(kind))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


# Flags


def _parse_flags(tree: _Node, flags: Sequence[str]) -> dict[str, Any]:
    """`--a.b value`, `--a.b=value`, and `--a.b` alone for true."""
    found: dict[str, Any] = {}
    words = list(flags)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"{word!r} among the flags", "--dotted.key value", "put -- before each key")
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            text = words.pop(0) if words and not words[0].startswith("--") else "true"
        found[key] = _parse_value(text, _type_at(tree, key))
    return found


def _type_at(tree: _Node, key: str) -> Any:
    """The annotation at a dotted key; str where there is none, which `_merge` then reports."""
    kinds: list[Any] = [tree.cls]
    for name in key.split("."):
        candidates = [c for kind in kinds for c in _dataclasses(kind).values()]
        kinds = [_types(c)[name] for c in candidates if name in _types(c)]
    return kinds[0] if kinds else str


def _parse_value(text: str, kind: Any) -> Any:
    """A flag's text as the TOML value that its annotation asks for; text that doesn't parse stays text."""
    options = _options(kind)
    if any(o is str or o is Path for o in options) or (NoneType in options and text == "none"):
        return text
    if any(get_origin(o) is tuple for o in options) and not text.startswith("["):
        item = get_args(next(o for o in options if get_origin(o) is tuple))[0]
        return [_parse_value(part, item) for part in text.split(",") if part]
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


# Dataclasses and TOML


@cache
def _types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _dataclasses(kind: Any) -> dict[str, type]:
    return {o.__name__: o for o in _options(kind) if isinstance(o, type) and is_dataclass(o)}


def _keys(cls: type, path: str) -> str:
    return ", ".join(_join(path, name) for name in _types(cls))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _nested(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys become tables."""
    nested: dict[str, Any] = {}
    for key, value in mapping.items():
        *path, name = key.split(".")
        table = nested
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{key} and {part} are both set", "one of them", "leave one out")
        value = _nested(value) if isinstance(value, Mapping) else value
        table[name] = table[name] | value if isinstance(value, dict) and isinstance(table.get(name), dict) else value
    return nested


def _leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any, bool]]:
    """(key, value, is it the dataclass's own default) of every leaf."""
    for f in fields(config):
        value, key = getattr(config, f.name), _join(path, f.name)
        if is_dataclass(value):
            yield from _leaves(value, key)
        else:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            yield key, value, default is not MISSING and value == default


def _toml_lines(config: Any, path: str, origins: Mapping[str, str]) -> Iterator[str]:
    """Leaves before tables, as TOML demands."""
    types = _types(type(config))
    tables = [f.name for f in fields(config) if is_dataclass(getattr(config, f.name))]
    for f in fields(config):
        if f.name not in tables:
            value, origin = getattr(config, f.name), origins.get(_join(path, f.name), "default")
            assert value != "none" or NoneType not in get_args(types[f.name]), f"{f.name}: 'none' would read as None"
            yield f"{f.name} = {_toml_value(value)}" + (f"  # {origin}" if origin != "default" else "")
    for name in tables:
        yield f"\n[{_join(path, name)}]"
        if len(_dataclasses(types[name])) > 1:
            yield f"kind = {_toml_value(type(getattr(config, name)).__name__)}"
        yield from _toml_lines(getattr(config, name), _join(path, name), origins)


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
