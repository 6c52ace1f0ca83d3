import math
import shutil
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import SandboxError
from shoal.tasks import plain, sandbox
from shoal.tasks.sandbox import Cell, Ended, Raised, level

LOOK = """def look(text):
    import ctypes, os, resource, socket, subprocess, threading
    return eval(text)"""
FLOOD = """import os
for fd in range(3, 20):
    try:
        while True:
            os.write(fd, b"x" * 65536)
    except OSError:
        pass"""

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(10**300), 10**300)
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers()
)
keys = st.text() | st.integers() | st.tuples(st.integers(), st.text())
values = st.recursive(
    leaves,
    lambda v: st.lists(v) | st.tuples(v, v) | st.dictionaries(keys, v) | st.sets(keys) | st.frozensets(keys),
    max_leaves=10,
)


@settings(max_examples=40)
@given(values)
def test_plain_values_cross_as_they_are(value):
    there = plain.loads(plain.dumps(value))
    assert type(there) is type(value)
    assert there == value or "nan" in repr(value)


class Sly(int):
    def __eq__(self, _):
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize("value", [Sly(3), [Sly(3)], {Sly(3): 1}, object(), len, range(3), "a".encode, [[[]] * 2, ...]])
def test_nothing_but_plain_values_leaves(value):
    with pytest.raises(ValueError, match="not plain"):
        plain.dumps(value)


def test_nesting_is_bounded_both_ways():
    deep = []
    for _ in range(60):
        deep = [deep]
    with pytest.raises(ValueError, match="deeper"):
        plain.dumps(deep)
    for line in ("[" * 60 + "]" * 60, "[" * 100_000, '{"dict": [[' * 5000):
        with pytest.raises(ValueError):
            plain.loads(line)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{}",
        '{"a": 1, "b": 2}',
        '{"class": "os"}',
        "1.5",
        "NaN",
        '{"set": [[]]}',
        '{"float": "x"}',
        '{"dict": [1]}',
        "9" * 5000,
    ],
)
def test_lines_that_are_not_ours_are_refused(line):
    with pytest.raises(ValueError):
        plain.loads(line)


def test_numbers_that_are_none_cross():
    assert math.isnan(plain.loads(plain.dumps(math.nan)))
    assert plain.loads(plain.dumps([math.inf, -0.0])) == [math.inf, 0.0]


@pytest.fixture(scope="module")
def looker():
    with Cell(seconds=60) as cell:
        cell.run(LOOK)
        yield cell


@pytest.mark.parametrize(
    "text",
    [
        "os.fork()",
        "subprocess.run(['/bin/true'])",
        "os.execv('/bin/true', ['true'])",
        "socket.socket()",
        "socket.socketpair()",
        "socket.create_connection(('127.0.0.1', 80))",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "open('/proc/1/mem', 'rb')",
        "os.listdir('/')",
        "os.listdir('/root')",
        "os.listdir('/sys')",
        "os.listdir(os.path.expanduser('~'))",
        f"open({str(Path(__file__).parent.parent)!r} + '/conftest.py').read()",
        "os.kill(-1, 9)",
        "os.kill(1, 9)",
        "os.kill(os.getppid(), 9)",
        "os.symlink('/etc/passwd', 'x')",
        "os.link('/dev/null', 'x')",
        "os.mkfifo('x')",
        "os.setsid()",
        "os.chroot('.')",
        "os.memfd_create('x')",
        "os.setuid(0)",
        "os.nice(-1)",
        "os.sched_setaffinity(0, {0})",
        "open('/usr/lib/x', 'w')",
        "resource.prlimit(os.getppid() or 2, resource.RLIMIT_CPU, (1, 1))",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "bytearray(2**30)",
        "os.posix_fallocate(os.open('big', os.O_CREAT | os.O_WRONLY), 0, 2**30)",
    ],
)
def test_a_cell_is_denied(looker, text):
    with pytest.raises(Raised):
        looker.call("look", (text,))


@pytest.mark.parametrize(
    "call",
    ["ptrace(16, 1, 0, 0)", "unshare(0x10000000)", "prctl(1, 0, 0, 0, 0)", "mount(b'none', b'/room', b'tmpfs', 0, 0)"]
    + [
        f"syscall({n}, 0, 0, 0, 0, 0, 0)"
        for n in (298, 310, 311, 321, 323, 425, 250, 135, 175, 272, 308, 434, 438, 59, 62)
    ],
)
def test_doors_of_the_kernel_are_shut(looker, call):
    """Tracing, perf, other processes' memory, bpf, userfaultfd, io_uring, keys, namespaces, pidfd, exec, kill."""
    assert looker.call("look", (f"ctypes.CDLL(None).{call}",)) == -1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("sorted({**os.environ}) in ([], ['LC_CTYPE'])", True),
        ("open('own', 'w').write('abc') and open('own').read()", "abc"),
        ("__import__('hashlib').sha256(b'').hexdigest()[:4]", "e3b0"),
        ("__import__('json').loads('[1]')", [1]),
        ("len(os.urandom(4))", 4),
        ("__import__('itertools').count and __import__('decimal').Decimal(2) ** 3 == 8", True),
        ("threading.Thread(target=len, args=('',)).start()", None),
        ("print('right') or len(input.__name__)", 5),
    ],
)
def test_ordinary_programs_find_what_they_need(looker, text, value):
    assert looker.call("look", (text,)) == value


ENDINGS = ("while True: pass", "import time; time.sleep(100)", "import os; os._exit(0)", "import sys; sys.exit(0)")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_cell_ends_by_its_deadline_whatever_it_does_and_leaves_nothing(ending):
    with Cell(seconds=0.1) as cell:
        family = [psutil.Process(cell.process.pid), *psutil.Process(cell.process.pid).children()]
        assert len(family) == 2
        with pytest.raises((Ended, Raised)):
            cell.run(f"import signal\nfor n in range(1, 9): signal.signal(n, signal.SIG_IGN)\n{ending}")
        with pytest.raises((Ended, Raised)):
            cell.call("f")
    assert not Path(cell.folder).exists()
    assert not any(p.is_running() for p in family)


def test_the_clock_of_a_cell_begins_with_the_first_request(monkeypatch):
    """While the second of two cells starts, the first one's seconds don't pass."""
    now = sandbox.time.monotonic
    with Cell(seconds=5) as cell:
        monkeypatch.setattr(sandbox.time, "monotonic", lambda: now() + 60)
        cell.run("f = lambda: 1")
        assert cell.call("f") == 1
        monkeypatch.setattr(sandbox.time, "monotonic", lambda: now() + 66)
        with pytest.raises(Ended, match="ran out of time"):
            cell.run("while True: pass")


def test_a_reply_without_end_is_cut_off():
    with Cell() as cell, pytest.raises(Ended, match="too much"):
        cell.run(FLOOD)


def test_what_is_no_plain_value_is_an_error_of_the_code(looker):
    with pytest.raises(Raised, match="not plain"):
        looker.call("look", ("object()",))
    with pytest.raises(Raised, match="ZeroDivision"):
        looker.call("look", ("1 / 0",))
    with pytest.raises(Raised, match="KeyError"):
        looker.call("nothing")


def test_the_level_says_what_held():
    assert "seccomp" in level()


@pytest.mark.parametrize("means", ["landlock", *(["bubblewrap"] if shutil.which("bwrap") else [])])
def test_other_means_keep_files_and_processes_out_too(means):
    with Cell(means=means) as cell:
        cell.run(LOOK)
        for text in ("open('/etc/passwd')", "os.fork()", "socket.socket()", "os.kill(1, 0)", "os.listdir('/proc')"):
            with pytest.raises(Raised, match="PermissionError|FileNotFound"):
                cell.call("look", (text,))


def test_too_little_isolation_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / "tasks"
    shutil.copytree(sandbox.CELL.parent, copy)
    source = (copy / "isolation.py").read_text()
    assert "if os.uname().machine not in MACHINES" in source
    (copy / "isolation.py").write_text(source.replace("if os.uname().machine not in MACHINES", "if True"))
    monkeypatch.setattr(sandbox, "CELL", copy / "cell.py")
    with pytest.raises(SandboxError, match="isolation by .*landlock"):
        Cell(means="landlock")
