"""Documents to tokens on disk: tokenise once, then map the file into memory.

    sources → drop exact duplicates → split by hash → BPE on the training part → [BOS] tokens [EOS] each

    corpus.json   tokenizer.json   tokenizer_config.json
    train/tokens.bin (uint16, or uint32 for more than 65,536 tokens)   train/doc_starts.bin (int64)
    val/…

A document is held out by the last hex digit of its SHA-256, so the split never moves when sources are added, and
equal documents can't stand on both sides (checked on what was written all the same). The corpus is built in a folder
beside its place and renamed when whole. `prepare` keeps corpora in a cache under a key of everything they depend on, so
a second start costs a look at file dates.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from shoal.data.config import DataConfig
from shoal.data.sources import Generator, Source, is_corpus, resolve
from shoal.data.tokenizer import RECIPE, Special, Tokenizer
from shoal.errors import DataError, ResourceError
from shoal.runtime import cache_root

FORMAT = 1
FIX = "remove the folder and prepare the corpus again"
FIX_EMPTY = "give sources with more text (about one document in 16 is held out), or more digits in val_suffixes"
TOKENIZER_BYTES = 2**27  # of text are enough to learn merges from, an equal part of each source
ENCODE_CHARS = 2**22  # encoded at once, so that memory stays flat


@dataclass(frozen=True)
class Split:
    """One stream of documents end to end; document i is tokens[doc_starts[i] : doc_starts[i + 1]]."""

    tokens: np.ndarray
    doc_starts: np.ndarray  # int64
    n_bytes: int  # of the text the tokens spell

    @property
    def n_documents(self) -> int:
        return len(self.doc_starts) - 1


@dataclass(frozen=True)
class Corpus:
    """An opened corpus folder: `train` and `val` are memory-mapped."""

    folder: Path
    info: dict
    tokenizer: Tokenizer
    train: Split
    val: Split

    @classmethod
    def open(cls, folder: str | Path) -> "Corpus":
        """Raises DataError when files are missing or their sizes or tokenizer disagree with corpus.json."""
        folder = Path(folder)
        info = read_info(folder)
        tokenizer = Tokenizer.load(folder)
        if tokenizer.sha256 != info["tokenizer_sha256"]:
            raise DataError(f"{folder} with a changed tokenizer.json", "the one it was encoded with", FIX)
        return cls(folder, info, tokenizer, *(open_split(folder / name, info) for name in ("train", "val")))

    def held_out(self, source: str) -> Split:
        """The held-out documents of one source, named as in the settings without @count (or :count)."""
        names = (k["source"] for k in self.info["sources"])
        found = [
            kind["documents"]["val"]
            for name, kind in zip(names, self.info["sources"])
            if source in (name, name.partition(":")[0])
        ]
        if not found or found[0][0] == found[0][1]:
            raise DataError(f"no held-out documents of {source}", "a source of this corpus", FIX_EMPTY)
        starts = self.val.doc_starts[found[0][0] : found[0][1] + 1]
        tokens = self.val.tokens[starts[0] : starts[-1]]
        return Split(tokens, starts - starts[0], int(self.tokenizer.byte_lengths()[tokens].sum()))

    def verify(self) -> None:
        """Read every token again and compare hashes. Raises DataError that names the damaged file."""
        for name in ("train", "val"):
            if sha256_of(self.folder / name / "tokens.bin") != self.info["splits"][name]["sha256"]:
                raise DataError(f"{self.folder / name}/tokens.bin with another hash", "the recorded one", FIX)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises DataError where a model of `vocab_size` has no row for some token."""
        if self.tokenizer.vocab_size > vocab_size:
            n = self.tokenizer.vocab_size
            fix = f"set --model.vocab_size {n}, or take text and tokenizer of fewer tokens"
            raise DataError(f"a model of {vocab_size} tokens and a corpus of {n}", "at least as many", fix)


def prepare(
    config: DataConfig,
    generators: Mapping[str, Generator] | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> Corpus:
    """The corpus that `config` describes, from the cache (or from `out`) when it is there, else built.

    `generators` are the generated sources by name: the tasks room's worked items, passed in from above. `say` hears
    what takes long. Raises DataError, and ResourceError when the disk is full.
    """
    if out is None and len(config.sources) == 1 and is_corpus(config.sources[0]):
        return opened(config)
    sources = [resolve(spec, generators or {}) for spec in config.sources]
    given = Tokenizer.load(config.tokenizer) if config.tokenizer else None
    settings = [config.val_suffixes, given.sha256 if given else (config.vocab_size, *RECIPE)]
    asked = json.dumps([FORMAT, settings, [(s.name, s.stamp, s.repeat) for s in sources]])
    key = hashlib.sha256(asked.encode()).hexdigest()
    folder = Path(out) if out else cache_root() / "corpora" / key[:16]
    with locked(folder.parent):  # a second process waits here, then finds the corpus whole
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            say(f"preparing {', '.join(config.sources)}; the next start finds it in {folder}")
            with whole_folder(folder) as draft:
                tokenizer = given or train_tokenizer(sources, config, say)
                say(f"encoding with {tokenizer.vocab_size:,} tokens")
                build(draft, sources, config, tokenizer, key)
    corpus = Corpus.open(folder)
    if corpus.info["key"] != key:
        raise DataError(f"{folder}, which holds another corpus", "an empty place", "choose another --out or remove it")
    return corpus


def opened(config: DataConfig) -> Corpus:
    """The corpus folder that is the only source: its tokenizer and its split are taken as they are."""
    corpus = Corpus.open(Path(config.sources[0]).expanduser())
    if config.tokenizer and Tokenizer.load(config.tokenizer).sha256 != corpus.tokenizer.sha256:
        got = f"{corpus.folder} with the tokenizer {config.tokenizer}"
        raise DataError(got, "the one it was encoded with", "leave out data.tokenizer, or prepare it again")
    return corpus


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise DataError(f"{folder}: {e.strerror}", "a folder to write in", "choose another, or set SHOAL_CACHE") from e
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A draft folder that takes its name when the block ends well, and vanishes when it doesn't."""
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)  # left by a killed process; the lock says that none is alive
    try:
        draft.mkdir()
        yield draft
        draft.rename(folder)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(f"a full disk while writing {folder}", "room", "free space or set SHOAL_CACHE") from e
        raise DataError(f"{folder}: {e.strerror}", "a place to write", "check its permissions") from e
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def build(draft: Path, sources: list[Source], config: DataConfig, tokenizer: Tokenizer, key: str) -> None:
    held_out = tuple(config.val_suffixes)
    if tokenizer.eos_id is None:
        raise DataError("a tokenizer without an end-of-sentence token", "one to end documents with", "choose another")
    tokenizer.save(draft)
    writers = {name: SplitWriter(draft / name, tokenizer) for name in ("train", "val")}
    reader = Reader(sources)
    ranges = []
    for source in sources:
        marks = {name: w.n_documents for name, w in writers.items()}
        for batch in batches(reader.documents(source)):
            for (digest, pieces), ids in zip(batch, encode(tokenizer, [pieces for _, pieces in batch])):
                writers["val" if digest.endswith(held_out) else "train"].write(ids, text_bytes(pieces))
        writers["train"].repeat(marks["train"], source.repeat - 1)
        ranges.append({name: (marks[name], w.n_documents) for name, w in writers.items()})
    splits = {name: w.close() for name, w in writers.items()}
    kinds = [c.summary() | {"documents": r} for c, r in zip(reader.counts, ranges)]
    info = {"format": FORMAT, "key": key, "tokenizer_sha256": tokenizer.sha256, "sources": kinds, "splits": splits}
    (draft / "corpus.json").write_text(json.dumps(info, indent=2))
    finished = Corpus.open(draft)
    check_disjoint(finished.train, finished.val)


@dataclass
class Count:
    source: str
    unique: int = 0
    duplicates: int = 0
    empty: int = 0
    skipped: list[str] = field(default_factory=list)  # what is not text

    def summary(self) -> dict:
        return asdict(self) | {"skipped": len(self.skipped), "skipped_first": self.skipped[:10]}


class Reader:
    """Reads sources in order, each document once: (SHA-256 hex digest, pieces)."""

    def __init__(self, sources: list[Source]):
        self.counts = [Count(s.name) for s in sources]
        self.pending = iter(self.counts)
        self.seen: set[bytes] = set()

    def documents(self, source: Source) -> Iterator[tuple[str, tuple[str, ...]]]:
        count = next(self.pending)
        for document in source.documents(count.skipped):
            pieces = (document,) if isinstance(document, str) else document
            try:
                content = "".join(pieces).encode()
            except UnicodeEncodeError as e:  # JSON can hold half a character
                count.skipped.append(f"{e.reason} in {e.object[:40]!r}")
                continue
            digest = hashlib.sha256(content)
            if not content:
                count.empty += 1
            elif digest.digest() in self.seen:
                count.duplicates += 1
            else:
                count.unique += 1
                self.seen.add(digest.digest())
                yield digest.hexdigest(), pieces


def train_tokenizer(sources: list[Source], config: DataConfig, say: Callable[[str], None]) -> Tokenizer:
    """Learn from the training documents alone; what is held out stays unseen."""
    say(f"learning {config.vocab_size:,} tokens")

    def texts() -> Iterator[str]:
        reader = Reader(sources)
        for source in sources:
            left = TOKENIZER_BYTES // len(sources)
            for digest, pieces in reader.documents(source):
                if not digest.endswith(tuple(config.val_suffixes)) and left > 0:
                    left -= text_bytes(pieces)
                    yield from (p for p in pieces if not isinstance(p, Special))

    return Tokenizer.train(texts(), config.vocab_size)


def text_bytes(pieces: Iterable[str]) -> int:
    return sum(len(p.encode()) for p in pieces if not isinstance(p, Special))


def batches(documents: Iterable[tuple[str, tuple[str, ...]]]) -> Iterator[list[tuple[str, tuple[str, ...]]]]:
    batch, chars = [], 0
    for document in documents:
        batch.append(document)
        chars += sum(map(len, document[1]))
        if chars >= ENCODE_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def encode(tokenizer: Tokenizer, documents: list[tuple[str, ...]]) -> Iterator[list[int]]:
    """[BOS] tokens [EOS] of each, the text of all of them encoded on all threads."""
    texts = iter(tokenizer.encode_batch([p for pieces in documents for p in pieces if not isinstance(p, Special)]))
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert tokenizer.eos_id is not None
    for pieces in documents:
        parts = [[tokenizer.special_id(p)] if isinstance(p, Special) else next(texts) for p in pieces]
        yield start + [i for part in parts for i in part] + [tokenizer.eos_id]


class SplitWriter:
    def __init__(self, folder: Path, tokenizer: Tokenizer):
        folder.mkdir()
        self.folder = folder
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self.file = (folder / "tokens.bin").open("wb")
        self.starts = array("q", [0])
        self.n_bytes = [0]  # before each document

    @property
    def n_documents(self) -> int:
        return len(self.starts) - 1

    def write(self, ids: list[int] | np.ndarray, n_bytes: int) -> None:
        self.file.write(np.asarray(ids, self.dtype).tobytes())
        self.starts.append(self.starts[-1] + len(ids))
        self.n_bytes.append(self.n_bytes[-1] + n_bytes)

    def repeat(self, first: int, times: int) -> None:
        """Write the documents from `first` on again, `times` times."""
        last = self.n_documents
        self.file.flush()
        stream = np.memmap(self.file.name, self.dtype, "r") if times and last > first else np.zeros(0)
        for i in list(range(first, last)) * times:
            self.write(stream[self.starts[i] : self.starts[i + 1]], self.n_bytes[i + 1] - self.n_bytes[i])

    def close(self) -> dict:
        """Finish the files; what corpus.json says of them. Raises DataError where there are no documents."""
        if not self.n_documents:
            raise DataError(f"no documents for the {self.folder.name} split", "some text", FIX_EMPTY)
        with self.file as file:
            file.flush()
            os.fsync(file.fileno())
        (self.folder / "doc_starts.bin").write_bytes(self.starts.tobytes())
        n_tokens, n_bytes = self.starts[-1], self.n_bytes[-1]
        shape = {"documents": self.n_documents, "tokens": n_tokens, "bytes": n_bytes, "dtype": self.dtype.name}
        return shape | {"sha256": sha256_of(self.folder / "tokens.bin")}


def read_info(folder: Path) -> dict:
    try:
        info = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        assert info["format"] == FORMAT and all(info["splits"][s]["sha256"] for s in ("train", "val"))
        return info
    except FileNotFoundError:
        raise DataError(f"{folder} without corpus.json", "what `shoal data prepare` made", "give its folder") from None
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as e:
        raise DataError(f"{folder}/corpus.json: {e!r}", f"a corpus folder of format {FORMAT}", FIX) from e


def open_split(folder: Path, info: dict) -> Split:
    facts = info["splits"][folder.name]
    try:
        tokens = np.memmap(folder / "tokens.bin", np.dtype(facts["dtype"]), "r")
        starts = np.fromfile(folder / "doc_starts.bin", np.int64)
    except (OSError, ValueError, TypeError) as e:
        raise DataError(f"{folder}: {e}", "tokens.bin and doc_starts.bin", FIX) from e
    whole = len(tokens) == facts["tokens"] and len(starts) == facts["documents"] + 1
    if not whole or starts[0] != 0 or starts[-1] != len(tokens) or (np.diff(starts) <= 0).any():
        raise DataError(f"{folder} of {len(tokens):,} tokens", f"the {facts['tokens']:,} that corpus.json says", FIX)
    return Split(tokens, starts, facts["bytes"])


def check_disjoint(train: Split, val: Split) -> None:
    """Raises DataError where a held-out document stands in the training split, token for token."""
    shared = duplicates(train, val)
    if shared:
        got = f"{len(shared)} held-out documents in the training split, the first is number {shared[0]}"
        raise DataError(got, "none", "drop duplicates before splitting")


def duplicates(train: Split, val: Split) -> list[int]:
    """Which held-out documents stand in `train` too. Works on any two splits of one tokenizer."""
    known = {document_hash(train, i) for i in range(train.n_documents)}
    return [i for i in range(val.n_documents) if document_hash(val, i) in known]


def document_hash(split: Split, i: int) -> bytes:
    tokens = split.tokens[split.doc_starts[i] : split.doc_starts[i + 1]]
    return hashlib.sha256(tokens.astype(np.uint32).tobytes()).digest()


def sha256_of(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
