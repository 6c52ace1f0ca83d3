"""How long `shoal serve` takes until it is ready, beyond the import of torch, which nobody can serve without.

    python -m bench.start [--quick]

A model folder of the 107.5M shape in bf16 (built once, in build/bench) is served as a user would, on a ledger of its
own. In every round, one after the other: a fresh Python that imports torch and says so, and a server, from the start of
its process until GET /ready answers 200. What counts is the difference. The files are in the system's cache: the first
round only warms up.
"""

import argparse
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench.record import emit
from bench.shape import SHAPE
from bench.table import show

LIMIT = 3.0
SCRATCH = Path("build/bench")
MODEL = SCRATCH / "served-107M"
PATIENCE_SECONDS = 60
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # as a user has it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds instead of nine")
    rounds = 2 if parser.parse_args().quick else 9
    if not MODEL.exists():
        subprocess.run([sys.executable, "-c", "from bench.start import write; write()"], check=True)
    pairs = [(importing(), serving()) for _ in range(1 + rounds)][1:]
    beyond = [served - imported for imported, served in pairs]
    columns = {"import torch": [i for i, _ in pairs], "shoal serve, ready": [s for _, s in pairs], "beyond": beyond}
    show(["seconds", "median", "least", "most"], [[n, median(s), min(s), max(s)] for n, s in columns.items()])
    emit(
        "start",
        ratio=median(beyond) / LIMIT,  # of the limit: at most 1
        ours=median(columns["shoal serve, ready"]),
        peer=median(columns["import torch"]),
        spread=[min(beyond), max(beyond)],
        limit=LIMIT,
        beyond=median(beyond),
        unit="seconds",
        rounds=rounds,
    )


def write() -> None:
    """The model with a tokenizer, as `shoal export` writes it."""
    import torch

    from shoal.data.config import DataConfig
    from shoal.data.corpus import prepare
    from shoal.model import hf
    from shoal.model.transformer import Transformer

    tokenizer = prepare(DataConfig(vocab_size=SHAPE.vocab_size)).tokenizer
    draft = MODEL.with_name(f".{MODEL.name}")
    model = Transformer(SHAPE).init_weights(0)
    hf.save(model, draft, dtype=torch.bfloat16, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    tokenizer.save(draft)
    draft.rename(MODEL)


def importing() -> float:
    began = time.perf_counter()
    words = [sys.executable, "-c", "import torch; print(1, flush=True)"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout and process.stdout.readline()
        return time.perf_counter() - began


def serving() -> float:
    port = free_port()
    folder = Path(tempfile.mkdtemp(dir=SCRATCH))
    words = ["serve", str(MODEL), "--port", str(port), "--db", f"sqlite:///{folder}/ledger.db"]
    began = time.perf_counter()
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "shoal.cli.main", *words]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
    try:
        while not ready(port):
            if process.poll() is not None or time.perf_counter() - began > PATIENCE_SECONDS:
                raise SystemExit(f"the server was never ready:\n{(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.005)
        return time.perf_counter() - began
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        shutil.rmtree(folder)


def ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except ConnectionError:
        return False
    finally:
        connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
