"""Drafting by the model's own multi-token module: how often it is right, and what that makes of the speed.

    python -m bench.speculation [MODEL] [--quick]        MODEL: a run, or a checkpoint in one; default: runs/latest

Greedy, bf16, on held-out code: prompts are cut from held-out documents of the run's own data. Engines that draft up to
1, 2 or 3 tokens ahead stand beside one that doesn't; each has the model to itself while it is asked. In every round all
of them continue the same fresh prompts, the order turned by one. A speed is all streams' tokens over the time between
the first moment that each stream has a token and the first moment that one has all of its own: the batch is full all
that while. Prompts are in the prefix cache before. `acceptance` is of the drafts that the gate let through.

Engines stop drafting by themselves where it doesn't pay. Rows that "always" draft, at one stream, are of engines that
don't: they show how good the drafts are, and what they would cost.
"""

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bench.record import emit
from bench.shape import THREADS
from bench.sides import Ratio, turned
from bench.table import show
from shoal.cli.opened import Opened, open_model
from shoal.config import from_toml
from shoal.data.corpus import Corpus, prepare
from shoal.engine.engine import LocalEngine
from shoal.engine.request import Request, Sampling, Step
from shoal.engine.speculate import Worth
from shoal.errors import ModelError, ShoalError
from shoal.run import Run
from shoal.tasks.catalog import GENERATORS
from shoal.train.config import PretrainConfig

DEPTHS, BATCHES = (1, 2, 3), (1, 2, 4, 8, 16)
CACHE_BYTES = 2**28
PROMPT, NEW = 129, 192  # two pages and the token that is fed
STREAMS = 4  # asked in a round, at least; smaller batches come one after the other
LEAST_ONE, LEAST_ANY = 1.3, 0.97  # of the better depth at one stream; of any
HOW = "make one with `shoal quickstart --stages base --minutes 10`"


class Always(Worth):
    def __call__(self, streams: int) -> float | None:
        return 0.0  # however unsure the module is


@dataclass(frozen=True)
class Spoken:
    """What batches came to: tokens counted and their seconds; all streams' tokens, drafts, and those that stood."""

    counted: int
    seconds: float
    tokens: list[list[int]]
    drafted: int
    accepted: int

    @property
    def speed(self) -> float:
        return self.counted / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default="latest")
    parser.add_argument("--quick", action="store_true", help="two rounds instead of seven, one batch of each size")
    args = parser.parse_args()
    rounds, streams = (2, 1) if args.quick else (7, STREAMS)
    try:
        opened = open_model(args.model, "bfloat16", THREADS)
        corpus = held_out(opened)
    except ShoalError as e:
        raise SystemExit(f"{e}\n{HOW}") from None
    engines = {depth: LocalEngine(opened.model, CACHE_BYTES, speculate=depth) for depth in (0, *DEPTHS)}
    always = {-depth: always_drafting(opened, depth) for depth in DEPTHS}
    draws = random.Random(0)
    rows = [(depth, 1) for depth in always] + [(depth, batch) for batch in BATCHES for depth in engines]
    found: dict[tuple[int, int], list[Spoken]] = {row: [] for row in rows}
    for i in range(1 + rounds):  # the first warms up
        for batch in BATCHES:
            batches = [[prompt(corpus, draws) for _ in range(batch)] for _ in range(max(1, streams // batch))]
            asked = engines | always if batch == 1 else engines
            for depth in turned(tuple(asked), i):
                spoken = together([speak(asked[depth], prompts) for prompts in batches])
                if i:
                    found[depth, batch].append(spoken)
        print(f"  {f'round {i}' if i else 'warm-up'}", flush=True)
    for engine in (*engines.values(), *always.values()):
        engine.close()
    report(found, opened, rounds)


def always_drafting(opened: Opened, depth: int) -> LocalEngine:
    engine = LocalEngine(opened.model, CACHE_BYTES, speculate=depth)
    assert engine._speculator
    engine._speculator.worth = Always()
    return engine


def held_out(opened: Opened) -> Corpus:
    """The text that the model was not trained on. Raises ModelError where its run isn't there, or is another's."""
    folder = opened.folder.resolve()
    if not opened.model.config.n_mtp:
        raise ModelError(f"{folder} without a multi-token module", "a model that was trained with one", HOW)
    if folder.parent.name != "checkpoints":
        raise ModelError(f"{folder} outside a run", "a run or one of its checkpoints, whose text is known", HOW)
    run = Run.open(folder.parent.parent)
    config = from_toml(PretrainConfig, (run.path / "config.toml").read_text("utf-8"))
    corpus = prepare(config.data, GENERATORS)
    if corpus.tokenizer.sha256 != opened.tokenizer.sha256:
        raise ModelError("a corpus of another tokenizer", "the text as it was when the model was trained", HOW)
    return corpus


def prompt(corpus: Corpus, draws: random.Random) -> tuple[int, ...]:
    """A cut from the middle of a held-out document."""
    starts = corpus.val.doc_starts
    while True:
        i = draws.randrange(corpus.val.n_documents)
        room = int(starts[i + 1] - starts[i]) - PROMPT - NEW
        if room > 0:
            at = int(starts[i]) + draws.randrange(room)
            return tuple(map(int, corpus.val.tokens[at : at + PROMPT]))


def speak(engine: LocalEngine, prompts: Sequence[tuple[int, ...]]) -> Spoken:
    greedy, marks, begun = Sampling(temperature=0), {}, set()

    def sink_of(stream: int):
        def sink(step: Step) -> None:
            """On the engine's thread: `stats` knows all that the step gave, to whomever."""
            begun.add(stream)
            if len(begun) == len(prompts) and "start" not in marks:
                marks["start"] = time.perf_counter(), engine.stats().tokens_out
            elif step.finish and "end" not in marks:
                marks["end"] = time.perf_counter(), engine.stats().tokens_out

        return sink

    engine.generate([Request(tokens, 1, lambda step: None, greedy) for tokens in prompts])
    results = engine.generate([Request(tokens, NEW, sink_of(i), greedy) for i, tokens in enumerate(prompts)])
    assert all(r.finish == "length" and r.usage.cached == PROMPT - 1 for r in results), results[0].usage
    (began, before), (ended, after) = marks["start"], marks["end"]
    tokens = [[token.id for token in r.tokens] for r in results]
    drafted, accepted = (sum(getattr(r.usage, name) for r in results) for name in ("drafted", "accepted"))
    return Spoken(after - before, ended - began, tokens, drafted, accepted)


def together(parts: Sequence[Spoken]) -> Spoken:
    """Of batches that came one after the other."""
    counted, drafted, accepted = (sum(getattr(p, name) for p in parts) for name in ("counted", "drafted", "accepted"))
    return Spoken(counted, sum(p.seconds for p in parts), [t for p in parts for t in p.tokens], drafted, accepted)


def report(found: dict[tuple[int, int], list[Spoken]], opened: Opened, rounds: int) -> None:
    plain = {batch: [s.speed for s in found[0, batch]] for batch in BATCHES}
    rows = [row for row in found if row[0]]
    ratios = {row: Ratio.of([s.speed for s in found[row]], plain[row[1]]) for row in rows}
    best = max(DEPTHS, key=lambda depth: ratios[depth, 1].median)
    limits = {row: limit(row, best) for row in rows}
    names = {row: name(*row) for row in rows}
    accepted = {row: share(found[row]) for row in rows}
    same = {row: alike(found[row], found[0, row[1]]) for row in rows}
    speeds = {row: median(s.speed for s in found[row]) for row in rows}
    show(
        ["speed-up", "median", "least", "most", "limit", "acceptance", "drafts a token", "same", "tokens/s", "plain"],
        [
            [n, ratios[r].median, *ratios[r].spread, limits[r], *accepted[r], same[r], speeds[r], median(plain[r[1]])]
            for r, n in names.items()
        ],
    )
    emit(
        "speculation",
        rows=list(names.values()),
        ratio=[r.median for r in ratios.values()],
        ours=list(speeds.values()),
        peer=[median(plain[batch]) for _, batch in rows],
        spread=[r.spread for r in ratios.values()],
        limit=list(limits.values()),
        unit="tokens/s",
        acceptance=[share for share, _ in accepted.values()],
        drafts_a_token=[n for _, n in accepted.values()],
        same_streams=list(same.values()),
        model=opened.folder.resolve().parent.parent.name,
        step=opened.folder.name,
        rounds=rounds,
        new_tokens=NEW,
        threads=THREADS,
    )


def name(depth: int, batch: int) -> str:
    """Engines that always draft go by a negative depth."""
    words = f"depth {abs(depth)}, {batch} stream{'s' if batch > 1 else ''}"
    return words if depth > 0 else f"{words}, always"


def limit(row: tuple[int, int], best: int) -> float | None:
    depth, _ = row
    return None if depth < 0 else LEAST_ONE if row == (best, 1) else LEAST_ANY


def share(rounds: Sequence[Spoken]) -> tuple[float | None, float]:
    """Of the drafts that were fed, how many stood; and how many were fed for each token that came."""
    whole = together(rounds)
    return whole.accepted / whole.drafted if whole.drafted else None, whole.drafted / sum(map(len, whole.tokens))


def alike(ours: Sequence[Spoken], plain: Sequence[Spoken]) -> float:
    """The share of streams whose tokens are the same as without drafts."""
    pairs = list(zip(together(ours).tokens, together(plain).tokens, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


if __name__ == "__main__":
    main()
