"""What a checkpoint costs the loop that asks for it: seconds lost, as a share of the wall time between two of them.

    python -m bench.save [--quick]

The `mini` model trains at its real batch size. In every round a save is asked for between quiet steps, and steps go on
until it is on the disk. Lost are the stall (until `Saver.save` returns) and the drag: how much longer the steps beside
the writing thread took than as many quiet ones. The peer, in the same rounds, is what training scripts usually do:
`torch.save` of model and optimizer, synced, while the loop stands still.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from bench.record import emit
from bench.shape import THREADS
from bench.table import show
from shoal.data.loader import Batch
from shoal.model import hf
from shoal.model.presets import PRESETS
from shoal.train.checkpoint import Saver
from shoal.train.config import PretrainConfig
from shoal.train.step import TrainState, train_step

CONFIG = PretrainConfig(PRESETS["mini"], steps=1000)
INTERVAL_SECONDS = 60 * CONFIG.checkpoint.minutes
QUIET_STEPS = 3  # before a save, and as many after
LIMIT = 0.01
SCRATCH = Path("build/bench")  # on the disk that runs are written to; /tmp may be memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds instead of ten")
    rounds = 3 if parser.parse_args().quick else 10
    torch.set_num_threads(THREADS)
    state = TrainState(CONFIG, "cpu")
    for _ in range(2):
        train_step(state, [batch()])
    SCRATCH.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=SCRATCH))
    try:
        saver = Saver(folder / "ours", lambda weights, to: hf.save_state(CONFIG.model, weights, to), keep=2)
        found = [one_round(state, saver, folder / "peer.pt") for _ in range(rounds)]
        saver.close()
    finally:
        shutil.rmtree(folder)
    report(found, state)


def one_round(state: TrainState, saver: Saver, peer: Path) -> dict[str, float]:
    quiet = [timed(lambda: train_step(state, [batch()])) for _ in range(QUIET_STEPS)]
    stall = timed(
        lambda: saver.save(state.counters.step, state.model.state_dict(), state.tensors(), state.saved_counters())
    )
    beside = []
    began = time.perf_counter()
    while saver.thread and saver.thread.is_alive():
        beside.append(timed(lambda: train_step(state, [batch()])))
    written = time.perf_counter() - began
    quiet += [timed(lambda: train_step(state, [batch()])) for _ in range(QUIET_STEPS)]
    drag = sum(beside) - median(quiet) * len(beside)
    plain = timed(lambda: save_plainly(state, peer))
    return {"step": median(quiet), "stall": stall, "drag": drag, "written": written, "torch.save": plain}


def batch() -> Batch:
    """One step's tokens. Saving doesn't care what they say."""
    shape = CONFIG.batch
    tokens_T = torch.randint(CONFIG.model.vocab_size, (shape.tokens,))
    positions_T = torch.arange(shape.context).repeat(shape.samples)
    lengths, ids = (shape.context,) * shape.samples, tuple(range(shape.samples))
    return Batch(tokens_T, tokens_T.roll(-1), positions_T, lengths, n_bytes=shape.tokens, ids=ids)


def save_plainly(state: TrainState, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save({"model": state.model.state_dict(), "optimizer": state.tensors()}, file)
        file.flush()
        os.fsync(file.fileno())


def timed(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def report(found: list[dict[str, float]], state: TrainState) -> None:
    columns = list(found[0])
    show(["seconds", *columns], [[f"round {i}", *(f[c] for c in columns)] for i, f in enumerate(found)])
    rows = {"stall": [f["stall"] for f in found], "stall and drag": [f["stall"] + f["drag"] for f in found]}
    plain = [f["torch.save"] for f in found]
    saved = sum(t.nbytes for t in (*state.model.state_dict().values(), *state.tensors().values()))
    print()
    show(
        [f"{saved / 2**20:.0f} MiB every {INTERVAL_SECONDS:.0f} s", "seconds lost", "most", "share of the time"],
        [[name, median(s), max(s), share(s)] for name, s in [*rows.items(), ("torch.save, synced", plain)]],
    )
    emit(
        "save",
        rows=list(rows),
        ratio=[median(s) / INTERVAL_SECONDS for s in rows.values()],  # of the wall time: at most the limit
        ours=[median(s) for s in rows.values()],
        peer=[median(plain)] * len(rows),
        spread=[(max(s) - min(s)) / median(s) for s in rows.values()],
        limit=[LIMIT] * len(rows),
        interval_seconds=INTERVAL_SECONDS,
        saved_bytes=saved,
        threads=THREADS,
    )


def share(seconds: list[float]) -> str:
    return f"{100 * median(seconds) / INTERVAL_SECONDS:.3f}%"


if __name__ == "__main__":
    main()
