"""safetensors files and the JSON beside them, read as if someone hostile had written them.

A file is 8 bytes of header length, a JSON header (name → dtype, shape, byte range) and the bytes, end to end.
Everything about a folder is checked from its headers before a byte of memory is taken for weights: a wrong length,
ranges that overlap or leave gaps, a shape that disagrees with its bytes, a name twice, a shard outside the folder, a
pipe where a file should be. Then tensors are read one at a time, or used where they lie, in the mapped file. Pickles
(`.bin`, `.pt`) can run code and are never opened.

A file is the one whose header was checked as long as device, inode, size and time of last change are the same; every
read looks, before and after, and `unchanged` looks for those who use mapped tensors. A file that is replaced does them
no harm: the old one stays mapped. One that is cut short or written into does, and between two looks the system answers
the use of bytes that are gone by ending the process (SIGBUS).

Writing goes one tensor at a time too, and every file is synced to disk before the call returns.
"""

import json
import math
import mmap
import os
import stat
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.errors import ModelError, StorageError
from shoal.runtime import pass_cache_by

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 25_000_000  # the format allows 100 MB; all of V3's names in one file would need 12
JSON_LIMIT = HEADER_LIMIT
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
AGAIN = "fetch or export the folder again"

Identity = tuple[int, int, int, int]


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: a file of the folder, and its bytes from `start` to `end` in that file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Opened(NamedTuple):
    """A file of the folder; what is read of it is believed as long as it is the one whose header was checked."""

    path: Path
    file: BufferedReader
    identity: Identity
    direct: bool  # reads pass the page cache by

    def check(self) -> None:
        if identity(self.file) != self.identity:
            raise changed(self.path)

    def read_into(self, to: memoryview, start: int, least: int | None = None) -> int:
        """Fill `to`, or at least so much of it, from this byte of the file on: bytes read. Raises StorageError."""
        done, least = 0, len(to) if least is None else least
        try:
            self.check()
            while done < least:
                n = os.preadv(self.file.fileno(), [to[done:]], start + done)
                if n <= 0:
                    got = f"{self.path} ended {least - done:,} bytes too early"
                    raise StorageError(got, "the bytes its header promises", AGAIN)
                done += n
            self.check()
        except OSError as e:
            fix = "look at the disk and its log, then try again"
            raise StorageError(f"reading {self.path}: {e.strerror}", "a disk that answers", fix) from e
        return done


class Mapped(NamedTuple):
    """A file of the folder in memory, as long as anything refers to it; `open` keeps it reachable for `unchanged`."""

    open: Opened
    bytes: mmap.mmap


class TensorFolder:
    """All tensors of a model folder by name, checked; `read` brings one into memory, `mapped` leaves it where it is."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self._identities: dict[str, Identity] = {}
        self._maps: dict[str, Mapped] = {}
        weight_map = read_index(folder)
        files = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
        for file in files:
            entries, self._identities[file] = read_header(folder, file)
            for name, entry in entries.items():
                if name in self.entries:
                    raise ModelError(f"{name} stands in two files of {folder}", "every tensor once", AGAIN)
                self.entries[name] = entry
        if weight_map is not None:
            self.agrees_with(weight_map)

    def agrees_with(self, weight_map: dict[str, str]) -> None:
        for name in weight_map.keys() | self.entries.keys():
            listed, found = weight_map.get(name), self.entries.get(name)
            if found is None or listed != found.file:
                where = found.file if found else "in no file"
                raise ModelError(f"{INDEX} puts {name} in {listed}, it is {where}", "an index that agrees", AGAIN)

    def read(self, name: str) -> Tensor:
        e = self.entries[name]
        buffer = bytearray(e.end - e.start)
        self.read_into(name, memoryview(buffer))
        if not buffer:
            return torch.empty(e.shape, dtype=e.dtype)
        return torch.frombuffer(buffer, dtype=e.dtype).view(e.shape)

    def read_into(self, name: str, to: memoryview) -> None:
        """All bytes of a tensor. Raises StorageError."""
        opened = self.open(self.entries[name].file)
        with opened.file:
            opened.read_into(to, self.entries[name].start)

    def mapped(self, name: str, raw: bool = False) -> Tensor:
        """The tensor where it lies in its file, or its `raw` bytes (uint8, by rows); never to be written to.

        A copy where its dtype needs another address.
        """
        e = self.entries[name]
        if e.start == e.end:
            return self.read(name)
        if e.file not in self._maps:
            opened = self.open(e.file)
            self._maps[e.file] = Mapped(opened, mmap.mmap(opened.file.fileno(), 0, access=mmap.ACCESS_READ))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self._maps[e.file].bytes, dtype=torch.uint8, count=e.end - e.start, offset=e.start)
        if raw:
            return flat.view(*e.shape[:-1], -1)
        return (flat.clone() if flat.data_ptr() % e.dtype.itemsize else flat).view(e.dtype).view(e.shape)

    def unchanged(self) -> None:
        """Raises StorageError where a mapped file is no longer what it was when its header was checked."""
        for opened, _ in self._maps.values():
            opened.check()

    def open(self, file: str, direct: bool = False) -> Opened:
        """The file whose header was checked; `direct`: past the page cache, where that can be. Raises ModelError and
        StorageError."""
        f = open_regular(self.folder, file)
        opened = Opened(self.folder / file, f, self._identities[file], direct and pass_cache_by(f.fileno()))
        try:
            opened.check()
        except StorageError:
            f.close()
            raise
        return opened


def identity(f: BufferedReader) -> Identity:
    """Device, inode, size and time of last change: what tells a file from one that was written since."""
    s = os.fstat(f.fileno())
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns


def changed(path: Path) -> StorageError:
    return StorageError(f"{path} was changed while it was in use", "a file that stays as it is", "open the model again")


def read_index(folder: Path) -> dict[str, str] | None:
    """The index's map of tensors to files, each a plain name inside the folder; None where one file holds all."""
    indexed, single = os.path.lexists(folder / INDEX), os.path.lexists(folder / SINGLE)
    if indexed and single:
        raise ModelError(f"{folder} has both {SINGLE} and {INDEX}", "one of them", "remove the one that is stale")
    if not indexed:
        if not single:
            raise no_weights(folder)
        return None
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"no weight_map in {folder / INDEX}", "a map of tensor names to files", AGAIN)
    for file in {f if isinstance(f, str) else repr(f) for f in weight_map.values()}:
        if not file.endswith(".safetensors") or "/" in file or "\\" in file or "\0" in file or file.startswith("."):
            raise ModelError(
                f"{INDEX} names {file[:100]!r}", "*.safetensors files in the same folder", "don't trust this folder"
            )
    return weight_map


def no_weights(folder: Path) -> ModelError:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        return ModelError(
            f"{folder} holds {pickles[0]}, a pickle, which can run code when it is opened",
            "safetensors files",
            "convert it where you trust it: transformers' save_pretrained writes safetensors",
        )
    return ModelError(f"no {SINGLE} and no {INDEX} in {folder}", "a model folder with safetensors", "check the path")


def open_regular(folder: Path, name: str) -> BufferedReader:
    """Open a file of the folder for reading: no pipe, no device, no link that leads out of the folder.

    Links into the blob store of a Hugging Face cache are the one exception: `snapshots/HASH/x` → `blobs/y`.
    """
    path = folder / name
    home, target = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if target.parent != home and target.parent != blobs:
        raise ModelError(f"{path} is a link to {target}", "a file inside the folder", "copy the file into the folder")
    try:
        fd = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise ModelError(f"cannot open {path}: {e.strerror}", "a readable file", AGAIN) from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ModelError(f"{path} is not a regular file", "a regular file", AGAIN)
    return os.fdopen(fd, "rb")


def read_json(folder: Path, name: str) -> dict:
    """A JSON object without doubled keys or NaN. Bounded in size, so a bad file costs a moment and no memory."""
    with open_regular(folder, name) as f:
        size = os.fstat(f.fileno()).st_size
        if size > JSON_LIMIT:
            raise ModelError(f"{folder / name} has {size:,} bytes", f"at most {JSON_LIMIT:,}", AGAIN)
        return parse_json(f.read(), f"{folder / name}")


def parse_json(data: bytes, where: str) -> dict:
    def once(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return found

    def refuse(constant: str):
        raise ValueError(f"{constant} is not a number JSON knows")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{where}: {str(e)[:200]}", "valid JSON in UTF-8", AGAIN) from None
    if not isinstance(value, dict):
        raise ModelError(f"{where} holds a {type(value).__name__}", "a JSON object", AGAIN)
    return value


def read_header(folder: Path, file: str) -> tuple[dict[str, Entry], Identity]:
    """Every tensor of one safetensors file. The ranges must tile the data exactly, as the format demands."""
    where = f"{folder / file}"
    with open_regular(folder, file) as f:
        which = identity(f)
        size = which[2]
        length = int.from_bytes(f.read(8), "little") if size >= 8 else size
        if length > HEADER_LIMIT or 8 + length > size:
            raise ModelError(
                f"{where} says its header has {length:,} bytes; the file has {size:,}",
                f"a header of at most {HEADER_LIMIT:,} bytes inside the file",
                AGAIN,
            )
        header = parse_json(f.read(length), f"the header of {where}")
    header.pop("__metadata__", None)
    entries = {name: read_entry(file, name, value, 8 + length) for name, value in header.items()}
    at = 8 + length
    for name, e in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if e.start != at:
            raise ModelError(f"{where}: {name} starts at byte {e.start:,}, not {at:,}", "ranges without gaps", AGAIN)
        at = e.end
    if at != size:
        raise ModelError(f"{where} has {size:,} bytes, its tensors end at {at:,}", "neither more nor less", AGAIN)
    return entries, which


def read_entry(file: str, name: str, value, data_start: int) -> Entry:
    def bad(why: str) -> ModelError:
        return ModelError(f"{file}: {name[:200]} {why}", "a dtype, a shape and the byte range they make", AGAIN)

    def counts(x, at_most: int) -> bool:
        return isinstance(x, list) and len(x) <= at_most and all(type(n) is int and 0 <= n < 2**63 for n in x)

    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad("has other fields than the format")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise bad(f"has dtype {str(value['dtype'])[:40]}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not counts(shape, 8) or not counts(offsets, 2) or len(offsets) != 2:
        raise bad(f"has shape {str(shape)[:80]} at {str(offsets)[:80]}")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise bad(f"has shape {shape} in {offsets[1] - offsets[0]:,} bytes of {value['dtype']}")
    return Entry(file, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


@dataclass(frozen=True)
class Planned:
    """A tensor to be written; `make` brings it into memory when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(folder: Path, tensors: Iterable[Planned], max_shard_bytes: int) -> None:
    """One `model.safetensors`, or numbered shards and their index where one would exceed `max_shard_bytes`."""
    shards = into_shards(tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard)
        weight_map |= {t.name: file for t in shard}
    if len(shards) > 1:
        total = sum(t.nbytes for shard in shards for t in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def into_shards(tensors: Iterable[Planned], max_shard_bytes: int) -> list[list[Planned]]:
    shards, size = [[]], 0
    for t in tensors:
        if shards[-1] and size + t.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += t.nbytes
    return shards


def write_safetensors(path: Path, tensors: list[Planned]) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in tensors:
        header[t.name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts on a multiple of 8
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            value = t.make()
            assert (value.dtype, tuple(value.shape)) == (t.dtype, t.shape), (t.name, value.dtype, value.shape)
            f.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        sync(f)


def write_json(path: Path, value: dict) -> None:
    with open(path, "w", encoding="utf-8") as f:
        f.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        sync(f)


def sync(f) -> None:
    f.flush()
    os.fsync(f.fileno())
