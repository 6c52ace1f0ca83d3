"""The process that a model's code runs in: `python -I -S -B cell.py SETTINGS`, started by `sandbox.py`.

The first process enters the namespaces, starts a second and does nothing but wait for it, and kill it when told to end.
The second isolates itself, says what held, and only then reads code. What it is asked and what it replies are lines of
plain values (`plain.py`) on pipes that came as stdin and stdout; the code's own input and output are /dev/null.

    {"run": source, "remote": (names,)}          -> {"done": None} | {"error": text}
    {"call": name, "args": …, "kwargs": …}       -> {"value": value} | {"error": text}

Names in `remote` are functions that live elsewhere: calling one writes the same `call` line and reads its reply. So
tests run in one cell and the code they test in another, and nothing but plain values ever lies in the tests' cell.
"""

import json
import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import isolation  # pyright: ignore[reportMissingImports]
import plain  # pyright: ignore[reportMissingImports]

del sys.path[0]


def main(settings: dict) -> None:
    isolation.die_with_parent(signal.SIGTERM)
    means = settings["means"]
    if means != "bubblewrap" and os.getppid() != settings["parent"]:  # died meanwhile
        return
    if means == "namespaces":
        isolation.enter_namespaces()
    second = 0
    signal.signal(signal.SIGTERM, lambda *_: os.kill(second, signal.SIGKILL) if second else os._exit(1))
    second = os.fork()
    if second:
        os.close(0)
        os.close(1)
        os.waitpid(second, 0)
        return
    isolation.die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    wire = Wire()
    held = isolation.isolate(means, settings["paths"], settings["seconds"], settings["memory"])
    wire.write({"held": held})
    serve(wire)


class Wire:
    """The pipes of stdin and stdout, moved out of the way of whoever prints."""

    def __init__(self):
        self.requests, self.replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
        quiet = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(quiet, fd)

    def read(self):
        line = self.requests.readline()
        if not line:
            os._exit(0)
        return plain.loads(line)

    def write(self, value) -> None:
        line = plain.dumps(value).encode() + b"\n"
        while line:
            line = line[os.write(self.replies, line) :]


def serve(wire: Wire) -> None:
    names: dict = {"__name__": "answer", "__builtins__": __builtins__}
    while True:
        request = wire.read()
        try:
            if "run" in request:
                names.update({name: Remote(name, wire) for name in request["remote"]})
                exec(compile(request["run"], "<answer>", "exec"), names)
                reply = {"done": None}
            else:
                value = names[request["call"]](*request["args"], **request["kwargs"])
                reply = {"value": value}
            wire.write(reply)
        except BaseException as e:  # the code's, whatever it is; the next request is read all the same
            wire.write({"error": f"{type(e).__name__}: {e}"[:200]})


class Remote:
    """A function that lives in another cell. Its arguments and its value are plain."""

    def __init__(self, name: str, wire: Wire):
        self.name, self.wire = name, wire

    def __call__(self, *args, **kwargs):
        try:
            self.wire.write({"call": self.name, "args": args, "kwargs": kwargs})
        except ValueError as e:
            self.wire.write({"ungradable": str(e)})
            os._exit(0)
        reply = self.wire.read()
        if "value" not in reply:
            raise RuntimeError(reply["error"])
        return reply["value"]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
