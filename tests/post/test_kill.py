"""SIGKILL at any moment of a rollout, an update or a save: the run goes on as if nothing had happened."""

import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from shoal.run import Run
from tests.post.test_rl import newest, samples

KILLS = 12


def started(path, *more: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "tests.post.killed", str(path), *more]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "begun\n"
    return process


@pytest.mark.slow
@pytest.mark.multiprocess
def test_no_kill_mixes_versions_or_counts_a_group_twice(tmp_path):
    alone = started(tmp_path / "whole")
    began = time.monotonic()
    assert alone.wait() == 0
    seconds, rng = time.monotonic() - began, random.Random(0)
    process, kills = started(tmp_path / "killed"), 0
    while kills < KILLS:
        try:
            process.wait(timeout=rng.uniform(0.05, 0.5 * seconds))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process, kills = started(tmp_path / "killed", "resume"), kills + 1
    assert process.wait() == 0 and kills
    whole, killed = Run.open(tmp_path / "whole"), Run.open(tmp_path / "killed")
    ours, theirs = newest(whole), newest(killed)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert samples(whole) == samples(killed)
    assert whole.series("rl/reward") == killed.series("rl/reward")
