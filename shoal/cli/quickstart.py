"""`shoal quickstart`: a model that fits this machine and your minutes, trained, sampled and reported."""

import argparse

from shoal.cli import pretrain


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="shoal quickstart", description="A model sized for this machine and your minutes."
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="training time, evaluation included (default 10)")
    parser.add_argument("--out", help="the run directory to make (default: a new one under runs/)")
    args, flags = parser.parse_known_args(argv)
    out = ["--out", args.out] if args.out else []
    return pretrain.main(["quickstart", "--minutes", str(args.minutes), *out, *flags])
