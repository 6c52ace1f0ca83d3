"""The first signal is a wish, the second an order. Real signals to a real process."""

import signal
import subprocess
import sys

import pytest

LOOP = """
from shoal.train.stop import Stop
import sys
with Stop(say=lambda text: print(text, flush=True)) as stop:
    print("ready", flush=True)
    while not stop.asked:
        pass
    while sys.argv[1] == "stuck":
        pass
print(f"saved after {stop.asked}", flush=True)
"""


def started(how: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", LOOP, how], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_the_loop_finish(number):
    process = started("well")
    process.send_signal(number)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert said.splitlines()[-1] == f"saved after {number.name}" and "Once more to quit at once" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_kills(number):
    process = started("stuck")
    process.send_signal(signal.SIGINT)
    assert process.stdout and "Once more" in process.stdout.readline()
    process.send_signal(number)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == -number and said == ""


def test_handlers_are_put_back():
    from shoal.train.stop import Stop

    before = signal.getsignal(signal.SIGINT)
    with Stop(say=print):
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
