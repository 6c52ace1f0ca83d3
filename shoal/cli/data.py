"""`shoal data prepare|check`: text to shards, once, before any model looks at it."""

import argparse
from pathlib import Path
from time import perf_counter

from shoal.data.config import DataConfig

SOURCE_HELP = (
    "python-stdlib, worked-NAME[:COUNT], a file, a folder, a glob, or hf:NAME; "
    "SOURCE@3 repeats it three times in training; may be given several times"
)
DEFAULT = DataConfig()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="shoal data", description="Turn text into shards.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="prepare|check")
    prepare = verbs.add_parser("prepare", help="tokenise sources, split off held-out documents, write a corpus folder")
    add_source_flags(prepare)
    prepare.add_argument("--tokenizer", help="a tokenizer folder to use instead of training one")
    prepare.add_argument("--out", type=Path, help="the corpus folder; default a place in the cache ($SHOAL_CACHE)")
    check = verbs.add_parser("check", help="read a corpus again: sizes, hashes, duplicates between the splits")
    check.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    return run_check(args.folder) if args.verb == "check" else run_prepare(args)


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", action="extend", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--vocab-size", type=int, default=DEFAULT.vocab_size, help="tokens to learn (%(default)s)")
    parser.add_argument(
        "--val-suffixes",
        default=DEFAULT.val_suffixes,
        metavar="DIGITS",
        help="hold out documents whose SHA-256 ends in one of these hex digits (%(default)s)",
    )


def run_prepare(args: argparse.Namespace) -> int:
    from shoal.data.corpus import prepare
    from shoal.tasks.catalog import GENERATORS

    sources = tuple(args.source or DEFAULT.sources)
    config = DataConfig(sources, args.vocab_size, args.tokenizer, args.val_suffixes)
    begin = perf_counter()
    corpus = prepare(config, GENERATORS, args.out, print)
    print(describe(corpus), f"{corpus.folder}  ({perf_counter() - begin:.1f} s)", sep="\n")
    return 0


def run_check(folder: Path) -> int:
    from shoal.data.corpus import Corpus, check_disjoint

    corpus = Corpus.open(folder)
    corpus.verify()
    check_disjoint(corpus.train, corpus.val)
    print(describe(corpus), "whole: sizes and hashes agree, no document stands in both splits", sep="\n")
    return 0


def describe(corpus) -> str:
    lines = []
    for count in corpus.info["sources"]:
        kinds = {"documents": count["unique"]} | {k: count[k] for k in ("duplicates", "empty", "skipped") if count[k]}
        lines.append(f"{count['source']}: " + ", ".join(f"{n:,} {kind}" for kind, n in kinds.items()))
    for name, split in (("train", corpus.train), ("val", corpus.val)):
        tokens = len(split.tokens)
        ratio = f"{split.n_bytes / tokens:.3f} bytes a token"
        lines.append(f"{name:5}  {split.n_documents:,} documents  {tokens:,} tokens  {split.n_bytes:,} bytes  {ratio}")
    return "\n".join(lines)
