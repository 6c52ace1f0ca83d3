"""GGUF files, llama.cpp's format, read as if someone hostile had written them. The container alone: no model yet.

    "GGUF" · version · number of tensors · number of settings
    settings   name, type, value                             a value is a number, a string, or an array of either
    tensors    name, dimensions (fastest first), type, offset of its bytes
    bytes      each tensor at a multiple of `general.alignment`, one after the other

A model may be split into NAME-00001-of-0000N.gguf and so on; the first file has the settings, each its own tensors.
Files are mapped, never read whole. Counts and lengths are held against the bytes that are there before anything is
made of them, tensors have to tile the rest of the file, and all that is wrong is a ModelError.

The specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Left out: version 1, big-endian files,
arrays of arrays.
"""

import math
import mmap
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

import numpy as np
import torch
from torch import Tensor

from shoal.errors import ModelError
from shoal.model.hf_files import open_regular

MAGIC, VERSIONS = b"GGUF", (2, 3)
HEADER_LIMIT = 2**26  # bytes before the first tensor's; V3's vocabulary takes 6 MB of them
MOST_STRINGS = 2**20  # in all arrays together: a vocabulary and its merges
MOST_ENTRIES = 2**16  # of settings, and of tensors
MOST_DIMENSIONS, MOST_NAME = 4, 256
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
AGAIN = "fetch or convert the file again"

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BOOL, STRING, ARRAY, FLOAT32 = 7, 8, 9, 6
STRUCTS = {kind: Struct(f"<{letter}") for kind, letter in SCALARS.items()}
LENGTH, COUNT = Struct("<Q"), Struct("<I")

Value = bool | int | float | str | list[str] | np.ndarray


@dataclass(frozen=True)
class Kind:
    """A type of numbers: `block` of them in `nbytes` bytes."""

    name: str
    block: int
    nbytes: int


KINDS = {
    0: Kind("f32", 1, 4),
    1: Kind("f16", 1, 2),
    2: Kind("q4_0", 32, 18),
    3: Kind("q4_1", 32, 20),
    6: Kind("q5_0", 32, 22),
    7: Kind("q5_1", 32, 24),
    8: Kind("q8_0", 32, 34),
    12: Kind("q4_K", 256, 144),
    13: Kind("q5_K", 256, 176),
    14: Kind("q6_K", 256, 210),
    30: Kind("bf16", 1, 2),
}
UNREAD = {
    **{9: "q8_1", 10: "q2_K", 11: "q3_K", 15: "q8_K", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s"},
    **{20: "iq4_nl", 21: "iq3_s", 22: "iq2_s", 23: "iq4_xs", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64"},
    **{29: "iq1_m", 34: "tq1_0", 35: "tq2_0", 39: "mxfp4", 40: "nvfp4"},
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: the number of its file, and from which byte on. `shape` is slowest dimension first."""

    kind: Kind
    shape: tuple[int, ...]
    file: int
    start: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.kind.block * self.kind.nbytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


class GGUFFile:
    """All settings and tensors of a file, or of its parts where it is the first of several. Raises ModelError."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.metadata: dict[str, Value] = {}
        self.entries: dict[str, Entry] = {}
        self.maps: list[Tensor] = []
        for i, part in enumerate(parts(self.path)):
            data = mapped(self.path.parent, part)
            metadata, entries = read_header(data, self.path.parent / part, i)
            self.metadata = self.metadata or metadata
            if doubled := self.entries.keys() & entries.keys():
                raise bad(f"{part} holds {min(doubled)[:80]} a second time", "every tensor once")
            self.entries |= entries
            self.maps.append(as_tensor(data))
        self.whole()

    def whole(self) -> None:
        count = self.metadata.get("split.count", 0)
        if count not in (0, len(self.maps)):
            got = f"{self.path} is one of {count} files, {len(self.maps)} are named"
            raise bad(got, "the first file of a split model, NAME-00001-of-0000N.gguf, with the others beside it")
        tensors = self.metadata.get("split.tensors.count", len(self.entries))
        if tensors != len(self.entries):
            raise bad(f"{self.path} has {len(self.entries)} tensors", f"{tensors}, as its settings say")

    def unchanged(self) -> None:
        """As `TensorFolder.unchanged`; of a file nothing is used any more once it is loaded."""

    def rows(self, name: str, first: int, n: int) -> Tensor:
        """Rows of a tensor (all dimensions but the last, flattened) as they lie in the file: uint8 [n, bytes]."""
        e = self.entries[name]
        assert first >= 0 and first + n <= math.prod(e.shape[:-1]), (name, first, n)
        start = e.start + first * e.row_bytes
        return self.maps[e.file][start : start + n * e.row_bytes].view(n, e.row_bytes)


def parts(path: Path) -> list[str]:
    """The names of all files of the model whose first one this is."""
    split = SPLIT.fullmatch(path.name)
    if split is None:
        return [path.name]
    name, number, count = split[1], int(split[2]), int(split[3])
    if number != 1 or not count:
        raise bad(f"{path} is part {number} of {count}", f"the first part, {name}-00001-of-{split[3]}.gguf")
    return [f"{name}-{i:05d}-of-{split[3]}.gguf" for i in range(1, count + 1)]


def mapped(folder: Path, name: str) -> mmap.mmap:
    with open_regular(folder, name) as f:
        try:
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise bad(f"{folder / name} is empty", "a GGUF file") from None


def as_tensor(data: mmap.mmap) -> Tensor:
    """uint8 [bytes], over the mapped file: reading only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors
        return torch.frombuffer(data, dtype=torch.uint8)


def bad(got: str, expected: str) -> ModelError:
    return ModelError(got, expected, AGAIN)


class Cursor:
    """Reads the header from its start, never past `end`."""

    def __init__(self, data: mmap.mmap, where: Path):
        self.data, self.where, self.at = data, where, 0
        self.end = min(len(data), HEADER_LIMIT)
        self.strings_left = MOST_STRINGS

    def room_for(self, n: int, what: str) -> None:
        if n > self.end - self.at:
            got = f"{self.where}: {what} of {n:,} bytes at byte {self.at:,}, where {self.end - self.at:,} are left"
            raise bad(got, f"a header inside the file, of at most {HEADER_LIMIT:,} bytes")

    def number(self, form: Struct):
        self.room_for(form.size, "a number")
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def count(self, what: str, most: int) -> int:
        n = self.number(LENGTH)
        if n > most:
            raise bad(f"{self.where} says it has {n:,} {what}", f"at most {most:,}")
        return n

    def string(self) -> str:
        n = self.number(LENGTH)
        self.room_for(n, "a string")
        self.at += n
        return self.text(self.at - n, self.at)

    def text(self, start: int, end: int) -> str:
        try:
            return self.data[start:end].decode()
        except UnicodeDecodeError:
            raise bad(f"{self.where}: the string at byte {start:,} is not UTF-8", "text in UTF-8") from None

    def name(self) -> str:
        found = self.string()
        if not 0 < len(found) <= MOST_NAME:
            raise bad(f"{self.where}: a name of {len(found):,} characters", f"1 to {MOST_NAME}")
        return found

    def value(self, kind: int) -> Value:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(self.number(COUNT), self.number(LENGTH))
        if kind not in STRUCTS:
            raise bad(f"{self.where}: a value of type {kind}", "one of the format's types, 0 to 12")
        self.truths(kind, 1)
        found = self.number(STRUCTS[kind])
        return float(str(np.float32(found))) if kind == FLOAT32 else found  # 1e-06, not 9.999999974752427e-07

    def array(self, kind: int, n: int) -> list[str] | np.ndarray:
        if kind == STRING:
            return self.strings(n)
        if kind not in STRUCTS:
            raise bad(f"{self.where}: an array of type {kind}", "numbers or strings")
        form = np.dtype(f"<{SCALARS[kind]}")
        self.room_for(n * form.itemsize, f"an array of {n:,}")
        self.truths(kind, n)
        found = np.frombuffer(self.data, form, n, self.at)
        self.at += n * form.itemsize
        return found

    def truths(self, kind: int, n: int) -> None:
        if kind == BOOL and self.data[self.at : self.at + n].strip(b"\0\1"):
            raise bad(f"{self.where}: a truth that is neither 0 nor 1", "true or false")

    def strings(self, n: int) -> list[str]:
        self.room_for(n * LENGTH.size, f"an array of {n:,} strings")
        self.strings_left -= n
        if self.strings_left < 0:
            raise bad(f"{self.where} has over {MOST_STRINGS:,} strings in its arrays", f"at most {MOST_STRINGS:,}")
        return [self.string() for _ in range(n)]


def read_header(data: mmap.mmap, where: Path, file: int) -> tuple[dict[str, Value], dict[str, Entry]]:
    c = Cursor(data, where)
    if data[:4] != MAGIC:
        raise bad(f"{where} begins with {data[:4]!r}", f"{MAGIC!r}: a GGUF file")
    c.at = len(MAGIC)
    if (version := c.number(COUNT)) not in VERSIONS:
        raise bad(f"{where} is GGUF of version {version:,}", "a little-endian file of version 2 or 3")
    n_tensors, n_settings = c.count("tensors", MOST_ENTRIES), c.count("settings", MOST_ENTRIES)
    metadata: dict[str, Value] = {}
    for _ in range(n_settings):
        name = c.name()
        if name in metadata:
            raise bad(f"{where}: the setting {name} stands twice", "every setting once")
        metadata[name] = c.value(c.number(COUNT))
    found: dict[str, tuple[Kind, tuple[int, ...], int]] = {}
    for _ in range(n_tensors):
        name, info = read_info(c)
        if name in found:
            raise bad(f"{where}: the tensor {name} stands twice", "every tensor once")
        found[name] = info
    return metadata, placed(found, metadata.get("general.alignment", 32), c, file)


def read_info(c: Cursor) -> tuple[str, tuple[Kind, tuple[int, ...], int]]:
    """A tensor's name; its type, shape and offset from the first tensor's byte."""
    name, n = c.name(), c.number(COUNT)
    if not 0 < n <= MOST_DIMENSIONS:
        raise bad(f"{c.where}: {name} has {n:,} dimensions", f"1 to {MOST_DIMENSIONS}")
    shape = tuple(c.number(LENGTH) for _ in range(n))[::-1]
    number, offset = c.number(COUNT), c.number(LENGTH)
    kind = KINDS.get(number)
    if kind is None:
        got = f"{c.where}: {name} is of type {UNREAD.get(number, number)}"
        expected = f"one of {', '.join(k.name for k in KINDS.values())}"
        raise ModelError(got, expected, "take another quantisation of this model, such as Q8_0 or Q4_K_M")
    if not all(shape) or shape[-1] % kind.block:
        raise bad(f"{c.where}: {name} has shape {list(shape)}", f"rows of whole blocks of {kind.block} {kind.name}")
    return name, (kind, shape, offset)


def placed(found: dict[str, tuple[Kind, tuple[int, ...], int]], alignment: Value, c: Cursor, file: int) -> dict:
    """Entries that lie one after the other, each at the next multiple of the alignment, the last inside the file."""
    if type(alignment) is not int or alignment not in [2**i for i in range(3, 21)]:
        raise bad(f"{c.where}: alignment {str(alignment)[:40]}", "a power of two from 8 to 1,048,576")
    begin = at = -(-c.at // alignment) * alignment
    entries: dict[str, Entry] = {}
    for name, (kind, shape, offset) in sorted(found.items(), key=lambda item: item[1][2]):
        e = entries[name] = Entry(kind, shape, file, begin + offset)
        if e.start != at:
            raise bad(f"{c.where}: {name} starts at byte {e.start:,}, not {at:,}", "tensors end to end")
        if at + e.nbytes > len(c.data):
            raise bad(f"{c.where} has {len(c.data):,} bytes, {name} ends at {at + e.nbytes:,}", "the whole file")
        at += -(-e.nbytes // alignment) * alignment
    return entries
