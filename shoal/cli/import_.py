"""`shoal import FOLDER OUT`: take in someone else's Hugging Face folder: checked, dequantised, canonical."""

import argparse

from shoal.cli.export import convert


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="shoal import",
        description="Check a Hugging Face folder (DeepSeek V2, V3, R1; GLM-4.5-style; Llama; Qwen2), or a GGUF file "
        "(the same but GLM), and write it anew as a folder.",
    )
    parser.add_argument("model", metavar="FOLDER", help="a Hugging Face model folder, or a GGUF file")
    return convert(parser, argv)
