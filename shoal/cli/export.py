"""`shoal export MODEL OUT`: write a model as a Hugging Face folder that transformers, vLLM and SGLang open.

The model is checked as it is read (names, shapes, ranges, scales), FP8 blocks are dequantised, and what is written has
canonical names. The folder appears whole or not at all.
"""

import argparse
import errno
import os
import re
import shutil
from pathlib import Path

from shoal.cli.opened import DTYPES, MODEL_HELP, check_memory, check_vocabulary, model_folder
from shoal.errors import ConfigError, ResourceError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
BESIDE = (  # copied as they are where they exist
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="shoal export", description="Write a model as a Hugging Face folder.")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    return convert(parser, argv)


def convert(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="of all tensors but the router's bias (default: as they are)")
    parser.add_argument("--max-shard-size", default="5GB", help="of one file, such as 500MB; default 5GB")
    args = parser.parse_args(argv)
    shard_bytes = n_bytes(args.max_shard_size)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ConfigError(f"{args.out} exists and is not empty", "a new folder", "choose another OUT")
    part = args.out.parent / f".{args.out.name}.{os.getpid()}"
    try:
        print(write(model_folder(args.model), part, args.dtype, shard_bytes), args.out)
        part.rename(args.out)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{args.out}: {e.strerror}", "room on the disk", "free some space") from None
        raise ConfigError(f"{args.out}: {e.strerror}", "a folder we may write", "choose another OUT") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return 0


def write(source: Path, target: Path, dtype: str | None, shard_bytes: int) -> str:
    """Read `source` and write it to `target`, canonical; says what was written."""
    import torch

    from shoal.model import hf
    from shoal.model.counts import count_parameters
    from shoal.model.hf_files import open_regular, read_json

    raw, config = read_json(source, "config.json"), hf.load_config(source)
    if (source / "tokenizer.json").exists():
        from shoal.data.tokenizer import Tokenizer

        check_vocabulary(Tokenizer.load(source).vocab_size, config.vocab_size)
    stored = raw.get("torch_dtype") or raw.get("dtype")
    matrices = dtype or (stored if stored in DTYPES else "float32")  # holds any other without loss
    check_memory(config, matrices)
    model = hf.load(source, getattr(torch, matrices))
    ids = {"bos_id": raw.get("bos_token_id"), "eos_id": raw.get("eos_token_id")}
    hf.save(model, target, dtype=getattr(torch, dtype) if dtype else None, max_shard_bytes=shard_bytes, **ids)
    for name in BESIDE:
        if (source / name).exists():
            with open_regular(source, name) as file, open(target / name, "wb") as copy:
                shutil.copyfileobj(file, copy)
    counts = count_parameters(model.config)
    return f"{raw['model_type']}, {(counts.total + counts.mtp_total) / 1e6:,.1f}M parameters, {matrices} →"


def n_bytes(size: str) -> int:
    """Bytes of "500MB", "5 GB" or a plain number; units are powers of ten, as file sizes are given."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B|B?)", size.strip().upper())
    count = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if count < 1:
        raise ConfigError(f"--max-shard-size {size}", "a size such as 500MB or 5GB", "give a number and KB, MB or GB")
    return count
