"""Threads are counted, never guessed; setup changes what it says it changes, in a process of its own."""

import os
import subprocess
import sys

import psutil
import pytest

from shoal import runtime
from shoal.errors import ConfigError


def test_threads_follow_the_environment_and_refuse_rubbish(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert runtime.choose_threads() == (3, "OMP_NUM_THREADS")
    for rubbish in ("0", "-1", "many", "2.5"):
        monkeypatch.setenv("OMP_NUM_THREADS", rubbish)
        with pytest.raises(ConfigError, match=rubbish):
            runtime.choose_threads()


@pytest.mark.parametrize("cores, idle, threads", [(8, 16, 8), (8, 3, 3), (2, 0, 1)])
def test_no_more_threads_than_idle_cores_and_at_least_one(monkeypatch, cores, idle, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runtime, "physical_cores", lambda: cores)
    monkeypatch.setattr(runtime, "idle_cores", lambda: idle)
    assert runtime.choose_threads() == (threads, f"{idle} of {cores} cores idle")


def test_idle_cores_are_those_that_nobody_used(monkeypatch):
    """One core busy, one waiting for the disk, one mostly idle, one whose clock didn't move."""
    busy, waiting, mostly, still = ((20, 0, 0, 0), (0, 0, 0, 20), (4, 0, 16, 0), (0, 0, 0, 0))
    Times = type(psutil.cpu_times(percpu=True)[0])

    def times(*each):
        return [
            Times(**dict.fromkeys(Times._fields, 0.0) | dict(zip(("user", "system", "idle", "iowait"), t)))
            for t in each
        ]

    looks = iter([times(*[(0, 0, 0, 0)] * 4), times(busy, waiting, mostly, still)])
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: next(looks))
    assert runtime.idle_cores(seconds=0) == 3


def test_physical_cores_respect_the_affinity_mask(monkeypatch):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5}, raising=False)
    assert runtime.physical_cores() == 1


CHECK = """
import sys
import torch
from shoal import runtime
chosen = runtime.setup(threads=1, seed=7, device="cpu")
first = torch.rand(3)
assert torch.get_num_threads() == chosen.threads == 1, chosen
assert torch.tensor(1e-40) * 1 == 0 and torch.are_deterministic_algorithms_enabled()
assert not torch.utils.deterministic.fill_uninitialized_memory
assert not {"torch._inductor", "sympy"} & sys.modules.keys(), "a second of every start"
runtime.seed_everything(7)
assert torch.equal(first, torch.rand(3))
print(chosen.description)
"""


def test_setup_does_what_it_says():
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 thread (given)" in done.stdout and "malloc" in done.stdout


def test_zero_threads_are_refused():
    with pytest.raises(ConfigError, match="0 threads"):
        runtime.setup(threads=0)
