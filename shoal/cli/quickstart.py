"""`shoal quickstart [--minutes M] [--out DIR] …`: a model that fits this machine and your minutes.

It measures for some seconds (products, bandwidth, real steps), picks model, batch and tokens, and says why. Every flag
of `shoal pretrain` is understood too; a model or a batch given by one is not chosen again.
"""

from shoal.cli import pretrain


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n--minutes is the time of training, scores on the way included (default 10)")
        return 0
    return pretrain.launch(pretrain.parse(["quickstart", *argv]), ["shoal", "quickstart", *argv], size=True)
