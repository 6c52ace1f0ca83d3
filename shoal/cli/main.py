"""`shoal VERB …`. Each verb is one module with `main(argv) -> exit code`, imported when it is asked for.

Nothing here imports torch, numpy or rich, so that help and misspellings are answered at once.
"""

import faulthandler
import os
import sys
from difflib import get_close_matches
from importlib import import_module

from shoal.errors import ShoalError

VERBS = {  # verb: (module of shoal.cli, what it does), in the order of a first day
    "doctor": ("doctor", "hardware, threads, memory, disk; what is missing and how to get it"),
    "quickstart": (
        "quickstart",
        "pretrain, reinforce, distil and compare: what fits this machine and your minutes",
    ),
    "pretrain": ("pretrain", "train a recipe; --resume continues one bit for bit"),
    "sft": ("sft", "fine-tune a model on conversations"),
    "rl": ("rl", "reinforce what graders call right: a base learns to reason"),
    "distill": ("distill", "teach a student what a teacher says"),
    "r1": ("r1", "a base becomes R1 in five stages: cold start, reinforcement, its own best answers, and on"),
    "chat": ("chat", "talk with a model in the terminal"),
    "generate": ("generate", "continue a prompt with a model"),
    "score": ("score", "log-probabilities and bits per byte of a text"),
    "eval": ("eval", "how well a model solves held-out problems, at several budgets of thinking"),
    "samples": ("samples", "what a model answered in training or an evaluation, and what it was worth"),
    "serve": ("serve", "a model behind an OpenAI-shaped API and a chat page"),
    "keys": ("keys", "who may use the API, how fast and how much"),
    "usage": ("usage", "what was used and what it cost, by key, model or day"),
    "plan": ("plan", "will a model run on a machine, how fast, limited by what: before it is fetched"),
    "runs": ("runs", "list, show, compare and report runs"),
    "data": ("data", "turn text into shards"),
    "tokenizer": ("tokenizer", "train a tokenizer"),
    "quantize": ("quantize", "write a model in 8 or 4 bits, and say what that costs"),
    "export": ("export", "write a model as a Hugging Face folder, or as a GGUF file"),
    "import": ("import_", "take in a Hugging Face folder or a GGUF file"),
}
INTERRUPTED = 130  # what a shell reports for Ctrl-C

# OpenMP threads wait for each other some 2,000 times a step. Spinning on (libgomp's default) is fine while every core
# is ours; beside one other busy process a step of 0.7 s took 8 to 12 s. After 2,000 turns a thread now sleeps instead:
# 0.66 s alone, 1.4 s beside that process. libgomp reads this when torch is imported, so it is set before anything else.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def main() -> int:
    faulthandler.enable(2)  # an end by the system (SIGBUS: a mapped file was cut short) says where it was
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("shoal-lm"))
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        close = get_close_matches(verb, VERBS, n=1, cutoff=0.4)
        print(f"shoal: no verb {verb!r}" + (f"; did you mean {close[0]}?" if close else "") + "\n", file=sys.stderr)
        print(usage(), file=sys.stderr)
        return 2
    return run_verb(verb, rest)


def run_verb(verb: str, argv: list[str]) -> int:
    """A verb's exit code; the user's errors without a trace, our own with one."""
    try:
        return import_module(f"shoal.cli.{VERBS[verb][0]}").main(argv)
    except ShoalError as e:
        print(f"shoal {verb}: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print(f"shoal {verb}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left: `shoal runs ls | head`
        sys.stderr.close()
        return 0


def usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {does}" for verb, (_, does) in VERBS.items())
    return f"usage: shoal VERB …      `shoal VERB --help` says more\n\n{verbs}\n\nfirst: shoal quickstart"


if __name__ == "__main__":
    sys.exit(main())
