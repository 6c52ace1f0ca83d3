"""`shoal import FOLDER OUT`: take in someone else's Hugging Face folder: checked, dequantised, canonical."""

import argparse

from shoal.cli.export import convert


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="shoal import",
        description="Check a Hugging Face folder (DeepSeek V2, V3, R1; GLM-4.5-style; Llama; Qwen2) and write it anew.",
    )
    parser.add_argument("model", metavar="FOLDER", help="a Hugging Face model folder")
    return convert(parser, argv)
