"""An engine whose model takes no time, and a server on it: what is left to measure is everything around a model.

    python -m bench.scripted SECONDS      serves; so long between two steps

The far end of `bench.overhead`. Says its port and key as a line of JSON, answers each line on stdin with the seconds of
processor time that the process has used, and ends when stdin does.
"""

import json
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from shoal.data.config import DataConfig
from shoal.data.corpus import prepare
from shoal.data.tokenizer import Tokenizer
from shoal.engine.request import Request, Stats, Step, Token, Usage

VOCAB = 8192
PHRASE = "the quick brown fox jumps over the lazy dog and "
NAME = "scripted"


@dataclass(eq=False)
class Running:
    request: Request
    given: int = 0


class ScriptedEngine:
    """Implements `Engine`: every request gets `script` over and over, a token a step; guides are asked as ever."""

    context = 4096

    def __init__(self, script: list[int], pause: float = 0.0):
        self.script, self.pause = script, pause
        self.running: list[Running] = []
        self.cancelled: set[Request] = set()
        self.closing = False
        self.wake = threading.Condition()
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> None:
        with self.wake:
            self.running.append(Running(request))
            self.wake.notify()

    def cancel(self, request: Request) -> None:
        with self.wake:
            if any(run.request is request for run in self.running):
                self.cancelled.add(request)

    def position(self, request: Request) -> int:
        return 0

    def stats(self) -> Stats:
        return Stats(len(self.running), 0, 1, 0, 0, 0, 0, 0, 0, 0)

    def close(self) -> None:
        with self.wake:
            self.closing = True
            self.wake.notify()
        self.thread.join()

    def loop(self) -> None:
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.running or self.closing)
                if self.closing:
                    return
                runs = list(self.running)
            if self.pause:
                time.sleep(self.pause)
            for run in runs:
                step = self.step(run)
                if step.finish:
                    with self.wake:
                        self.running.remove(run)
                        self.cancelled.discard(run.request)
                run.request.sink(step)

    def step(self, run: Running) -> Step:
        request = run.request
        if request in self.cancelled:
            return Step((), "cancelled", Usage(len(request.tokens), 0, run.given))
        token = self.script[run.given % len(self.script)]
        run.given += 1
        ends = request.guide is not None and not request.guide.accept(token)
        finish = "stop" if ends else "length" if run.given == request.max_tokens else None
        return Step((Token(token),), finish, Usage(len(request.tokens), 0, run.given))


def tokenizer() -> Tokenizer:
    return prepare(DataConfig(vocab_size=VOCAB)).tokenizer


def main(pause: float) -> None:
    from shoal.engine.turns import Turns
    from shoal.server.auth import Keys
    from shoal.server.http import Server, build
    from shoal.server.ledger import Ledger
    from shoal.server.limits import Limits
    from shoal.server.service import Service

    words = tokenizer()
    engine = ScriptedEngine(words.encode(PHRASE), pause)
    with tempfile.TemporaryDirectory(dir="build/bench") as folder:
        ledger = Ledger(f"sqlite:///{folder}/ledger.db")
        _, key = ledger.new_key("bench")
        turns, keys = Turns(words, VOCAB), Keys(required=True)
        patient = Limits(idle_seconds=600)  # the connection stays open while the other side is asked
        service = Service(engine, turns, NAME, ledger, Path(folder) / "journals", keys, patient)
        server = Server(service, build(service), "127.0.0.1", 0)
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        print(json.dumps({"port": server.address[1], "key": key}), flush=True)
        for _ in sys.stdin:
            print(time.process_time(), flush=True)
        server.should_exit = True
        thread.join()
        engine.close()
        ledger.close()


if __name__ == "__main__":
    main(float(sys.argv[1]))
