"""`shoal score MODEL --text-file F`: how well a model predicts a text, in bits a byte and token by token.

By plain forwards (`model/score.py`), not by the engine, which keeps the logits of a prompt's last token alone.
"""

import argparse
import json
import math
from pathlib import Path

from shoal.cli.opened import DTYPES, MODEL_HELP, Opened, open_model
from shoal.errors import ConfigError, DataError

WINDOW = 4096  # tokens read at once, where the context has room for them


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="shoal score", description="Log-probabilities and bits per byte of a text.")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--text-file", type=Path, required=True, help="UTF-8 text, read as one document")
    parser.add_argument(
        "--window", type=int, metavar="N", help=f"tokens read at once; default: the context, at most {WINDOW}"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; default float32")
    parser.add_argument("--json", action="store_true", help="tokens, logprobs (natural logarithm), bits_per_byte")
    args = parser.parse_args(argv)
    text = read_text(args.text_file)
    opened = open_model(args.model, args.dtype)
    context = opened.model.config.max_positions
    window = min(context, WINDOW) if args.window is None else args.window
    if not 2 <= window <= context:
        raise ConfigError(f"--window {window}", f"2 to {context}, the model's context", "leave it out")
    result = score(opened, text, window)
    if args.json:
        print(json.dumps(result))
    else:
        n = len(result["logprobs"])
        print(f"{result['bits_per_byte']:.4f} bits per byte · {n:,} tokens · {result['bytes']:,} bytes")
    return 0


def read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}", "a readable text file", "check the path") from None
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 at byte {e.start:,}", "text in UTF-8", "convert the file") from None
    if not text:
        raise DataError(f"{path} is empty", "some text", "choose another file")
    return text


def score(opened: Opened, text: str, window: int) -> dict:
    """The text as one document after BOS, where the tokenizer has one. `logprobs` are of the tokens after the first."""
    import torch

    from shoal.model.score import log_probs

    t = opened.tokenizer
    tokens = ([] if t.bos_id is None else [t.bos_id]) + t.encode(text)
    if len(tokens) < 2:
        raise DataError("a text of one token", "two or more: the first one has nothing before it", "give more text")
    found = log_probs(opened.model, torch.tensor(tokens, device=opened.model.embed.weight.device), window).double()
    opened.unchanged()
    n_bytes = int(t.byte_lengths()[tokens[1:]].sum())
    bits = -found.sum().item() / math.log(2)
    return {"tokens": tokens, "logprobs": found.tolist(), "bits_per_byte": bits / max(n_bytes, 1), "bytes": n_bytes}
