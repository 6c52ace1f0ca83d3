"""`shoal generate MODEL --prompt "…"`: continue a prompt, printed as it comes; with `--json` one object at the end."""

import argparse
import json
import sys
from collections.abc import Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING

from shoal.cli.budget import add_memory, open_sized
from shoal.cli.opened import DTYPES, MODEL_HELP, Opened
from shoal.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from shoal.data.tokenizer import Tokenizer


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="shoal generate", description="Continue a prompt with a model.")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--prompt", required=True, help='the text to continue; "-" reads it from standard input')
    parser.add_argument("--max-tokens", type=int, default=200, help="default 200")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy; default 0.6")
    parser.add_argument("--top-p", type=float, default=0.95, help="default 0.95")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text; default 0")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default float32, with --memory bfloat16")
    add_memory(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args(argv)
    check(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    args.dtype = args.dtype or ("float32" if args.memory is None else "bfloat16")
    opened, cache = open_sized(args)
    before = prompt_tokens(opened, prompt, args.max_tokens)
    if args.json:
        print(json.dumps(answer(opened, prompt, before, args, cache), ensure_ascii=False))
    else:
        print(prompt, end="", flush=True)
        for text in pieces(opened.tokenizer, continued(opened, before, args, cache)):
            print(text, end="", flush=True)
        print()
    return 0


def check(args: argparse.Namespace) -> None:
    if args.max_tokens is not None and args.max_tokens < 1:
        raise ConfigError(f"--max-tokens {args.max_tokens}", "1 or more", "ask for at least one token")
    if not 0 <= args.temperature <= 100:
        raise ConfigError(f"--temperature {args.temperature}", "0 (greedy) to 100", "0.6 is a good start")
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"--top-p {args.top_p}", "above 0, up to 1", "1 keeps every token")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise ConfigError(f"--seed {args.seed}", "0 to 2^63 - 1", "choose another seed")


def prompt_tokens(opened: Opened, prompt: str, max_tokens: int) -> list[int]:
    """BOS, as every document begins, and the prompt; what does not fit the model's context is refused."""
    t, context = opened.tokenizer, opened.model.config.max_positions
    tokens = ([] if t.bos_id is None else [t.bos_id]) + t.encode(prompt)
    if not tokens:
        raise ConfigError("an empty prompt for a model without a start token", "some text", "give a --prompt")
    if len(tokens) + max_tokens > context:
        raise ConfigError(
            f"a prompt of {len(tokens)} tokens and {max_tokens} more",
            f"at most {context} together, the model's context",
            f"use --max-tokens {context - len(tokens)}" if len(tokens) < context else "shorten the prompt",
        )
    return tokens


def continued(opened: Opened, before: list[int], args: argparse.Namespace, cache: int | None = None) -> Iterator[int]:
    """Token by token, by the engine. Closing the iterator ends the request."""
    from shoal.engine.engine import LocalEngine
    from shoal.engine.request import Request, Sampling, Step

    steps: SimpleQueue[Step] = SimpleQueue()
    stop = frozenset([] if opened.tokenizer.eos_id is None else [opened.tokenizer.eos_id])
    sampling = Sampling(temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    engine = LocalEngine(opened.model, cache, unchanged=opened.unchanged)
    try:
        engine.submit(Request(tuple(before), args.max_tokens, steps.put, sampling, stop))
        finish = None
        while not finish:
            step = steps.get()
            yield from (token.id for token in step.tokens)
            finish = step.finish
            if step.error:
                raise ModelError(f"{opened.folder}: {step.error}", "finite numbers from the model", "check the weights")
    finally:
        engine.close()


def answer(opened: Opened, prompt: str, before: list[int], args: argparse.Namespace, cache: int | None) -> dict:
    tokens = list(continued(opened, before, args, cache))
    return {
        "model": str(opened.folder),
        "prompt": prompt,
        "prompt_tokens": len(before),
        "text": opened.tokenizer.decode(tokens, skip_special=True),
        "tokens": tokens,
        "finish": "stop" if tokens[-1] == opened.tokenizer.eos_id else "length",
        "seed": args.seed,
    }


def pieces(tokenizer: "Tokenizer", tokens: Iterator[int]) -> Iterator[str]:
    """Text as soon as the bytes of its tokens make whole characters."""
    waiting: list[int] = []
    for token in tokens:
        waiting.append(token)
        text = tokenizer.decode(waiting, skip_special=True)
        if not text.endswith("\ufffd"):
            yield text
            waiting = []
    yield tokenizer.decode(waiting, skip_special=True)
