"""What a folder holds, byte for byte. Torch-free.

`manifest.json` lists the size and SHA-256 of every other file, so a folder can say for itself whether it is whole, and
if not, which file is missing, cut, flipped or extra. `seal` writes it last and leaves everything on the disk (fsync),
ready for an atomic rename. It reads every file once, just written and still in memory, so writers need not know of it.

The manifest ends in its own SHA-256 and must be exactly the bytes that `encode` writes, so a byte flipped in it is not
blamed on another file. This finds accidents. It is no signature.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

NAME = "manifest.json"
VERSION = 1


class Entry(NamedTuple):
    size: int
    sha256: str


def seal(folder: Path, step: int) -> None:
    """Make every file below `folder` durable, then the manifest, then the directories."""
    entries = {name: measured(folder / name, durable=True) for name in files(folder)}
    with open(folder / NAME, "xb") as out:
        out.write(encode(step, entries))
        out.flush()
        os.fsync(out.fileno())
    for directory, _, _ in os.walk(folder, topdown=False):
        sync_directory(directory)


def faults(folder: Path, step: int) -> list[str]:
    """Why `folder` is not the whole checkpoint of `step`, a line a file; an empty list means that it is."""
    path = folder / NAME
    if path.is_symlink() or not path.is_file():
        return [f"{NAME}: {'not a regular file' if path.is_symlink() or path.exists() else 'missing'}"]
    try:
        expected = decode(path.read_bytes(), step)
    except (OSError, ValueError) as error:
        return [f"{NAME}: {error}"]
    found = set(files(folder))
    lines = [f"{name}: not in the manifest" for name in sorted(found - expected.keys())]
    for name, entry in expected.items():
        why = file_fault(folder / name, entry) if name in found else "missing"
        lines += [f"{name}: {why}"] if why else []
    return lines


def file_fault(path: Path, expected: Entry) -> str | None:
    if path.is_symlink() or not path.is_file():
        return "not a regular file"
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{'cut' if size < expected.size else 'grown'}, {size:,} bytes instead of {expected.size:,}"
        if (digest := measured(path).sha256) != expected.sha256:
            return f"flipped, SHA-256 {digest[:12]}… instead of {expected.sha256[:12]}…"
    except OSError as error:
        return f"unreadable, {error.strerror}"
    return None


def files(folder: Path) -> Iterator[str]:
    """Everything below `folder` that is no directory (links included, never followed), but the manifest, in order."""
    paths = (Path(at, name) for at, inner, names in os.walk(folder) for name in inner + names)
    leaves = (path.relative_to(folder).as_posix() for path in paths if path.is_symlink() or not path.is_dir())
    yield from sorted(name for name in leaves if name != NAME)


def encode(step: int, entries: Mapping[str, Entry]) -> bytes:
    body = {"version": VERSION, "step": step, "files": {name: entries[name]._asdict() for name in sorted(entries)}}
    own = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps(body | {"sha256": own}, indent=1).encode() + b"\n"


def decode(raw: bytes, step: int) -> dict[str, Entry]:
    """The entries of a manifest of `step`. ValueError where it is anything but what `encode` writes."""
    try:
        body = json.loads(raw)
        entries = {name: Entry(**entry) for name, entry in body["files"].items()}
        if encode(body["step"], entries) != raw:
            raise ValueError("not as written")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("cut or flipped") from error
    if body["step"] != step:
        raise ValueError(f"belongs to step {body['step']}")
    return entries


def measured(path: Path, durable: bool = False) -> Entry:
    with open(path, "rb") as file:
        if durable:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Entry(file.tell(), digest)


def sync_directory(path: Path | str) -> None:
    """A rename or a new name is on the disk only once its directory is."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
