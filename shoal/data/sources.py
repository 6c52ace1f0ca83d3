"""Where documents come from. A source is written as one string:

    python-stdlib               the running interpreter's own library source: real code on every machine, offline
    worked-arithmetic:20000     that many generated items with their worked answers, passed in by the caller (`tasks/`:
                                worked-TASK for one task, worked-arithmetic and worked-tasks for several)
    path/to/folder, src/**/*.py, notes.txt, corpus.jsonl, corpus.parquet         files; a folder means every text in it
    path/to/corpus              what `shoal data prepare` wrote, as the only source (`corpus.py` opens it as it is)
    hf:NAME_OR_FOLDER           a Hugging Face dataset's train split, with its `text` column
    SOURCE@3                    any of these, three times in the training split

A document is a text, or a tuple of pieces with `Special` tokens among them. Text is taken byte for byte, line ends too,
so that byte counts are those of the files. Files that are not text are skipped and counted in a folder or a glob, and
refused where they are named.
"""

import glob
import hashlib
import inspect
import json
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shoal.data.chat import worked
from shoal.errors import DataError

Document = str | tuple[str, ...]
Generator = Callable[[int], Iterator[tuple[str, str, str]]]  # count -> (prompt, reasoning, answer)

GENERATED_ITEMS = 20_000
TEXT_FIELDS = ("text", "content")
FORMS = "python-stdlib, worked-NAME[:COUNT], a file, a folder, a glob, or hf:NAME"


@dataclass(frozen=True)
class Source:
    """`stamp` changes when the content may have changed; `documents` appends what it had to skip to its argument."""

    name: str
    stamp: str
    documents: Callable[[list[str]], Iterator[Document]]
    repeat: int = 1


def resolve(spec: str, generators: Mapping[str, Generator]) -> Source:
    """Find what a source string names. Raises DataError when that is nothing."""
    name, _, times = spec.rpartition("@") if re.search(r"@\d+$", spec) else (spec, "", "1")
    if int(times) < 1:
        raise DataError(f"source {spec} repeated {times} times", "at least once", "leave the source out instead")
    kind, _, rest = name.partition(":")
    if kind in generators:
        stamp, documents = from_generator(generators[kind], rest)
    elif name == "python-stdlib":
        stamp, documents = from_files(stdlib_files(), named=False)
        stamp += sys.version
    elif is_corpus(name):
        fix = "prepare one corpus of all the texts, or name the texts here"
        raise DataError(f"{name}, a prepared corpus", "it alone, once, and to train on", fix)
    elif kind == "hf":
        stamp, documents = from_hugging_face(rest)
    else:
        stamp, documents = from_files(*find_files(name))
    return Source(name, hashlib.sha256(stamp.encode()).hexdigest(), documents, int(times))


def is_corpus(name: str) -> bool:
    """Whether a folder holds tokens, and not texts."""
    folder = Path(name).expanduser()
    return (folder / "corpus.json").is_file() and (folder / "train").is_dir()


def from_generator(generate: Generator, count: str):
    if count and not count.isdigit():
        raise DataError(f"{count!r} generated items", "a whole number", "write for instance worked-arithmetic:20000")
    n = int(count or GENERATED_ITEMS)
    made_by = Path(inspect.getfile(generate.func if isinstance(generate, partial) else generate)).parent
    code = "".join(file.read_text(encoding="utf-8") for file in sorted(made_by.glob("*.py")))  # all that shapes an item
    return f"{n} {code}", lambda skipped: (worked(*item) for item in generate(n))


def stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    foreign = {"site-packages", "dist-packages"}
    return [f for f in sorted(root.rglob("*.py")) if not foreign & set(f.relative_to(root).parts)]


def find_files(name: str) -> tuple[list[Path], bool]:
    """The files a path or glob means, sorted, and whether it named one file. Hidden files and folders are left out."""
    path = Path(name).expanduser()
    if path.is_file():
        return [path], True
    if path.is_dir():
        walk = ((Path(top), subs, files) for top, subs, files in os.walk(path))
        found = [top / f for top, subs, files in walk if not hide(subs) for f in files if not f.startswith(".")]
    else:
        found = [Path(f) for f in glob.glob(str(path), recursive=True)]
    found = sorted(f for f in found if f.is_file())
    if not found:
        raise DataError(
            f"source {name!r} with no files", FORMS, "check the path; quote a glob so the shell leaves it alone"
        )
    return found, False


def hide(folders: list[str]) -> None:
    """Drop hidden folders from an os.walk, in place."""
    folders[:] = [f for f in folders if not f.startswith(".")]


def from_files(files: list[Path], named: bool):
    stats = ((f, f.stat()) for f in files)
    stamp = "\n".join(f"{f.absolute()} {s.st_size} {s.st_mtime_ns}" for f, s in stats)
    return stamp, partial(read_files, files, named)


def read_files(files: list[Path], named: bool, skipped: list[str]) -> Iterator[Document]:
    for file in files:
        if file.suffix in (".jsonl", ".ndjson"):
            yield from read_jsonl(file)
        elif file.suffix == ".parquet":
            yield from read_parquet(file)
        elif (text := read_text(file)) is not None:
            yield text
        elif named:
            raise DataError(f"{file}, which is not text", "UTF-8 without NUL bytes", "convert it, or name another file")
        else:
            skipped.append(str(file))


def read_text(file: Path) -> str | None:
    """The file's exact text, or None where it is not UTF-8 or holds NUL bytes."""
    try:
        content = file.read_bytes()
        return None if b"\0" in content else content.decode()
    except UnicodeDecodeError:
        return None
    except OSError as e:
        raise DataError(f"{file}: {e.strerror}", "a readable file", "check its permissions") from e


def read_jsonl(file: Path) -> Iterator[str]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise DataError(f"{file}, line {number}: {e}", "one JSON object a line", "repair the file") from e
                yield text_field(row if isinstance(row, dict) else {}, f"{file}, line {number}")


def text_field(row: dict, where: str) -> str:
    found = next((row[k] for k in TEXT_FIELDS if isinstance(row.get(k), str)), None)
    if found is None:
        raise DataError(f"{where} without text", f"a string under {' or '.join(TEXT_FIELDS)}", "rename the field")
    return found


def read_parquet(file: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        column = next((c for c in TEXT_FIELDS if c in table.schema_arrow.names), None)
        if column is None:
            raise DataError(f"{file} with {table.schema_arrow.names}", f"a column {TEXT_FIELDS}", "rename the column")
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowException, OSError) as e:
        raise DataError(f"{file}: {str(e)[:200]}", "a whole Parquet file", "write it again") from e


def from_hugging_face(name: str):
    """A folder written by `save_to_disk`, or the name of a dataset that `datasets` can load."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise DataError(f"source hf:{name}", "the `datasets` package", "pip install 'shoal-lm[interop]'") from e
    try:
        found = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name, split="train")
    except Exception as e:  # the hub, the network and the file formats each raise their own
        raise DataError(
            f"hf:{name}: {str(e)[:200]}", "a dataset with a train split", "check the name and network"
        ) from e
    rows: Any = found["train"] if isinstance(found, datasets.DatasetDict) else found
    return f"{name} {rows._fingerprint}", lambda skipped: (text_field(row, f"hf:{name}") for row in rows)
