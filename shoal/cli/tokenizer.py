"""`shoal tokenizer train`: learn a byte-level BPE from sources; transformers opens the result."""

import argparse
from pathlib import Path

from shoal.cli.data import DEFAULT, add_source_flags
from shoal.errors import DataError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="shoal tokenizer", description="Train a tokenizer.")
    train = parser.add_subparsers(dest="verb", required=True, metavar="train").add_parser("train", help="learn merges")
    add_source_flags(train)
    train.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json and tokenizer_config.json")
    args = parser.parse_args(argv)

    from shoal.data.config import DataConfig
    from shoal.data.corpus import train_tokenizer
    from shoal.data.sources import resolve
    from shoal.tasks.catalog import GENERATORS

    if (args.out / "tokenizer.json").exists():
        raise DataError(f"{args.out}, which has a tokenizer.json", "another folder", "choose another --out")
    config = DataConfig(tuple(args.source or DEFAULT.sources), args.vocab_size, val_suffixes=args.val_suffixes)
    tokenizer = train_tokenizer([resolve(spec, GENERATORS) for spec in config.sources], config, print)
    tokenizer.save(args.out)
    print(f"{args.out}: {tokenizer.vocab_size:,} tokens")
    return 0
