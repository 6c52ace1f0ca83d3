"""The machine under a run: device, threads, memory allocator, seeds. `setup` chooses once and says what it chose.

Two settings decide whether a small CPU machine trains at its speed or at a fraction of it:

- Threads. With more threads than idle cores, OpenMP barriers wait for threads that aren't scheduled, and small kernels
  become hundreds of times slower. So we count the cores that are idle now and take no more than that.
- Memory. glibc returns every block above 32 MiB to the kernel when it is freed and gets fresh, unmapped pages for the
  next one. Keeping the blocks made a clone of a 64 MiB tensor 7 times faster (1.9 → 13.4 GB/s, one thread, glibc 2.36).

Denormals are flushed to zero: Adam's second moments decay into them, where each operation costs a hundred cycles.
Importing this module doesn't import torch.
"""

import ctypes
import fcntl
import mmap
import os
import platform
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import psutil

from shoal.errors import ConfigError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class Runtime:
    device: Literal["cpu", "cuda"]
    threads: int
    seed: int
    description: str  # one line: what was chosen and why


def setup(threads: int | None = None, seed: int = 0, device: Literal["cpu", "cuda"] | None = None) -> Runtime:
    """Set this process up for training or serving: call it before the first tensor is made.

    `threads` None takes OMP_NUM_THREADS where it is set, else the idle cores. A run that is resumed must pass the
    number it had: sums over threads are rounded in another order. Deterministic operations are asked of torch.
    """
    why = "given"
    if threads is None:
        threads, why = choose_threads()
    if threads < 1:
        raise ConfigError(f"{threads} threads", "at least 1", "leave threads out to take the idle cores")
    memory = keep_freed_memory()

    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # before the pool starts: threads inherit it
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda", "a GPU that this torch can use", "see `shoal doctor`, or choose cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a fixed workspace
    torch.set_deterministic_debug_mode("error")  # as use_deterministic_algorithms, which imports inductor: a second
    # Filling new tensors only guards against reading unset memory, and costs bandwidth.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    seed_everything(seed)
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_model()
    return Runtime(
        device,
        threads,
        seed,
        f"{device} {name} · {threads} {'thread' if threads == 1 else 'threads'} ({why}) · {memory}",
    )


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch. Our own code draws from explicit generators; this is for libraries'."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def choose_threads() -> tuple[int, str]:
    """(number of threads, why)."""
    if given := os.environ.get("OMP_NUM_THREADS", ""):
        if not given.isdigit() or given == "0":
            raise ConfigError(f"OMP_NUM_THREADS={given}", "a number from 1 up", "correct or unset it")
        return int(given), "OMP_NUM_THREADS"
    cores, idle = physical_cores(), idle_cores()
    return max(1, min(cores, idle)), f"{idle} of {cores} cores idle"


def physical_cores() -> int:
    """Cores this process may use: no hyper-threads, no more than its affinity mask and its cgroup allow."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, min(cores, _cgroup_cores() or cores))


def _cgroup_cores() -> int | None:
    """The CPU quota of a container (cgroup v2) in whole cores; None where there is no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup v2, or the quota is "max"
        return None


def idle_cores(seconds: float = 0.2) -> int:
    """Logical cores nobody used while we looked, rounded; waiting for the disk counts as idle."""
    before = psutil.cpu_times(percpu=True)
    time.sleep(seconds)
    idle = 0.0
    for a, b in zip(before, psutil.cpu_times(percpu=True), strict=True):
        spent = sum(b) - sum(a)
        waited = b.idle - a.idle + getattr(b, "iowait", 0.0) - getattr(a, "iowait", 0.0)
        idle += waited / spent if spent > 0 else 1.0
    return round(idle)


def keep_freed_memory() -> str:
    """Tell glibc to keep freed blocks up to 1 GiB instead of handing them back to the kernel. Says what came of it."""
    if platform.libc_ver()[0] != "glibc":
        return "this system's own malloc"
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_MAX, 0)  # before 2.35, 32 MiB was the most
    kept = kept and libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    return "malloc keeps freed memory" if kept else "malloc could not be tuned"


def give_back_memory() -> None:
    """What malloc keeps of freed blocks, to the system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """Of this process, the page cache (mapped files) aside."""
    status = Path("/proc/self/status")
    if not status.exists():
        return psutil.Process().memory_info().rss
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def free_bytes() -> int:
    """Of memory, the page cache counted as free: the machine's, or less where this process's group is limited."""
    free = psutil.virtual_memory().available
    for line in Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").exists() else ():
        _, controllers, path = line.split(":", 2)
        for root, limit in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
            file = Path("/sys/fs/cgroup") / root / path.lstrip("/") / limit
            if controllers in ("", "memory") and file.exists() and (text := file.read_text().strip()) != "max":
                free = min(free, max(0, int(text) - resident_bytes()))
    return free


def cache_root() -> Path:
    """Where corpora and built kernels are kept between runs: $SHOAL_CACHE, or ~/.cache/shoal."""
    return Path(os.environ.get("SHOAL_CACHE") or Path.home() / ".cache" / "shoal")


@cache
def cpu_model() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets as the kernel names them (avx512_bf16, amx_bf16, …); empty where it doesn't say."""
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


# What the machine can do, measured. Other processes slow it down, so the best of many short tries counts.


def gemm_flops(dtype: str, device: str = "cpu", seconds: float = 1.0) -> float:
    """The best FLOP/s of one square product in "bfloat16" or "float32": the denominator of MFU."""
    import torch

    best = 0.0
    for n in (1024, 2048) if device == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
        best = max(best, 2 * n**3 / _shortest(lambda a=a, b=b: a @ b.T, device, seconds / 2))
    return best


def read_bytes_per_s(device: str = "cpu", seconds: float = 0.5) -> float:
    """The best rate of reading 256 MiB, more than any cache holds."""
    import torch

    x = torch.ones(2**26, device=device)
    return x.nbytes / _shortest(x.sum, device, seconds)


def disk_bytes_per_s(path: Path, seconds: float = 1.0, streams: int = 4) -> float:
    """The rate of reading a file in pieces of 4 MiB, as experts are read: at random, and past the page cache where the
    file system allows it (O_DIRECT). A smaller file is read as a whole."""
    piece, size = 4 << 20, path.stat().st_size
    pieces = max(1, size // piece)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    pass_cache_by(fd)
    end = time.perf_counter() + seconds

    def read(seed: int) -> int:
        buffer, draw, n = mmap.mmap(-1, piece), random.Random(seed), 0
        while time.perf_counter() < end:
            n += os.preadv(fd, [buffer], draw.randrange(pieces) * piece)
        return n

    try:
        with ThreadPoolExecutor(streams) as pool:
            began = time.perf_counter()
            n = sum(pool.map(read, range(streams)))
            return n / (time.perf_counter() - began)
    finally:
        os.close(fd)


def pass_cache_by(fd: int) -> bool:
    """Let reads of an open file pass the page cache by; False where system or file system can't."""
    if direct := getattr(os, "O_DIRECT", 0):
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | direct)
            return True
    return False


def _shortest(call: Callable[[], object], device: str, seconds: float) -> float:
    """Seconds of the fastest call, over `seconds` of calls after one that warms up."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    wait()
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        call()
        wait()
        best = min(best, time.perf_counter() - start)
    return best
