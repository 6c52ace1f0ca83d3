"""What few bits cost a trained model: bytes, bits per byte, KL and problems solved, for every form.

    python -m bench.weight_quality [MODEL] [--quick]      MODEL: a run, a checkpoint or a folder; default: runs/latest

Each form is written by `shoal quantize`, calibrated int4 with the training part of the standard library, and held
against the bf16 model on its held-out part (`precision/quality.py`), in windows of 512 tokens; problems are held-out
ones of the quickstart, by `shoal eval` of the folder that was written. `ratio` is bits per byte over the bf16 model's;
`spread` are the smallest and the largest ratio of four parts of the text. `limit` is what a ratio may be.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench import reasoning
from bench.record import emit
from bench.table import show
from shoal.cli import quantize
from shoal.cli.export import write_in_few_bits
from shoal.cli.opened import model_folder
from shoal.ops.quant import Form
from shoal.precision import convert, quality
from shoal.precision.quality import Quality

NEAREST, CALIBRATED = "to the nearest", "calibrated"
PARTS = 4
LIMITS: dict[Form, float] = {"fp8": 1.001, "int8": 1.001, "int4": 1.01}


@dataclass(frozen=True)
class Row:
    form: Form
    group: int | None
    how: str = NEAREST

    @property
    def name(self) -> str:
        return f"{self.form}{f' in groups of {self.group}' if self.group else ''}, {self.how}"

    @property
    def limit(self) -> float | None:
        return LIMITS[self.form] if self.form != "int4" or self.how == CALIBRATED else None


@dataclass(frozen=True)
class Cost:
    whole: Quality
    parts: list[float]
    sizes: convert.Sizes
    solved: list[float]  # accuracy, and its interval

    @property
    def ratio(self) -> float:
        return 1 + self.whole.loss


ROWS = [Row("fp8", None), Row("int8", None), Row("int8", 128)]
ROWS += [Row("int4", group, how) for group in (32, 64, 128) for how in (NEAREST, CALIBRATED)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="latest")
    parser.add_argument("--quick", action="store_true", help="an eighth of the text: shows that it works")
    args = parser.parse_args()
    model, tokens, items = model_folder(args.model), *((8192, 16) if args.quick else (65536, 256))
    source = convert.Source(model)
    corpus = quantize.stdlib(model)
    text = quantize.windows(model, corpus.val.tokens, tokens, "the held-out text")
    spelled = torch.from_numpy(corpus.tokenizer.byte_lengths())[text[:, 1:]].sum(-1)
    before = reasoning.solved(model, items, samples=4)
    found = {}
    for row in ROWS:
        with TemporaryDirectory() as folder:
            made = Path(folder) / "model"
            make = (
                quantize.calibration(model, quantize.LIBRARY, 16384, row.group, corpus)
                if row.how == CALIBRATED
                else None
            )
            print(write_in_few_bits(model, made, row.form, row.group, 2**32, make), row.how, flush=True)
            each = [
                quality.compare(made, model, part, int(n.sum()))
                for part, n in zip(
                    text.split(-(-len(text) // PARTS)), spelled.split(-(-len(text) // PARTS)), strict=True
                )
            ]
            after = reasoning.solved(made, items, samples=4)
            sizes = convert.sizes(source, row.form, row.group)
            found[row] = Cost(together(each), [1 + q.loss for q in each], sizes, [after.accuracy, *after.interval])
    report(found, [before.accuracy, *before.interval], args.quick)


def together(parts: list[Quality]) -> Quality:
    """Of all of a text, given its parts."""
    tokens, text_bytes = sum(q.tokens for q in parts), sum(q.text_bytes for q in parts)

    def mean(name: str, weight: str) -> float:
        return sum(getattr(q, name) * getattr(q, weight) for q in parts) / sum(getattr(q, weight) for q in parts)

    bits = [mean(name, "text_bytes") for name in ("bits_per_byte", "reference_bits_per_byte")]
    return Quality(tokens, text_bytes, *bits, *(mean(name, "tokens") for name in ("kl", "agreement")))


def report(found: dict[Row, Cost], before: list[float], quick: bool) -> None:
    reference = next(iter(found.values())).whole
    table = [
        [
            row.name, c.sizes.matrices / c.sizes.matrices_fp32, c.sizes.whole / c.sizes.whole_fp32,
            f"{c.whole.loss:+.3%}", c.whole.kl, f"{c.whole.agreement:.1%}", f"{c.solved[0]:.1%}",
        ]
        for row, c in found.items()
    ]  # fmt: skip
    header = ["", "layers, of fp32", "all, of fp32", "bits per byte", "KL, bits a token", "same token", "solved"]
    show(header, [["bf16", 0.5, 0.5, reference.reference_bits_per_byte, 0.0, "", f"{before[0]:.1%}"], *table])
    emit(
        "weight_quality",
        rows=[row.name for row in found],
        ratio=[c.ratio for c in found.values()],
        ours=[c.whole.bits_per_byte for c in found.values()],
        peer=[c.whole.reference_bits_per_byte for c in found.values()],
        spread=[[min(c.parts), max(c.parts)] for c in found.values()],
        limit=[row.limit for row in found],
        unit="held-out bits per byte",
        kl_bits=[c.whole.kl for c in found.values()],
        agreement=[c.whole.agreement for c in found.values()],
        solved=[c.solved for c in found.values()],
        solved_in_bf16=before,
        sizes=[c.sizes._asdict() for c in found.values()],
        tokens=reference.tokens,
        quick=quick,
    )


if __name__ == "__main__":
    main()
