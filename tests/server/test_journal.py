"""The journal: what it holds at any point it may be cut at is exactly what was written before, and no more."""

import fcntl
import json
import os
import random
from collections.abc import Callable

import pytest

from shoal.server import journal
from shoal.server.auth import Keys
from shoal.server.clerk import recover
from shoal.server.journal import Counts, Journal
from shoal.server.ledger import Ledger

ROW = {"at": 1, "key": "k", "tenant": "t", "model": "m", "route": "/x", "hit": 1, "miss": 2, "out": 3}


def row(name: str) -> dict:
    return ROW | {"id": name}


def played(book: Journal, seed: int, n: int = 120) -> None:
    """Requests that come, grow and end in some order."""
    draw, live = random.Random(seed), []
    for i in range(n):
        if draw.random() < 0.3 or not live:
            live.append([f"req-{seed}-{i}", 0])
            book.begin(row(live[-1][0]))
        elif draw.random() < 0.2:
            book.end([live.pop(draw.randrange(len(live)))[0]])
        else:
            one = draw.choice(live)
            one[1] += draw.randint(1, 3)
            book.note(one[0], Counts(7, 3, one[1]))
        if draw.random() < 0.5:
            book.flush()
    book.flush()


def believed(text: str) -> dict[str, Counts]:
    """The same, computed another way: line by line with a dict."""
    found: dict[str, Counts] = {}
    for line in text.split("\n")[:-1]:
        words = line.split(" ")
        if words[0] == "B":
            found[json.loads(line[2:])["id"]] = Counts()
        elif words[0] == "T" and words[1] in found:
            found[words[1]] = Counts(*map(int, words[2:]))
        elif words[0] == "E":
            found.pop(words[1], None)
    return found


def test_17_cut_at_any_of_a_thousand_points_it_reads_what_stood_before(tmp_path):
    book = Journal(tmp_path)
    played(book, 0)
    text = book.path.read_text()
    points = range(0, len(text), max(1, len(text) // 1200))
    assert len(points) > 1000
    for point in points:
        left = {one.row["id"]: one.counts for one in journal.read(text[:point])}
        assert left == believed(text[:point])


def test_what_is_noted_is_in_the_file_after_each_flush_and_not_before(tmp_path):
    book = Journal(tmp_path)
    book.begin(row("a"))
    book.note("a", Counts(5, 0, 1))
    assert book.path.read_text() == ""
    book.flush()
    assert journal.read(book.path.read_text()) == [(row("a"), Counts(5, 0, 1))]


def test_recovery_settles_each_open_request_once(tmp_path):
    ledger, folder = Ledger(f"sqlite:///{tmp_path}/l.db"), tmp_path / "j"
    book = Journal(folder)
    played(book, 1)
    expected = believed(book.path.read_text())
    assert recover(ledger, folder) == 0, "a living server's journal is its own"
    os.close(book.file)  # as its death would
    copy = book.path.read_text()
    assert recover(ledger, folder) == len(expected) > 5
    assert list(folder.iterdir()) == []
    (folder / "again.journal").write_text(copy)
    assert recover(ledger, folder) == 0
    used = ledger.usage("model")[0]
    assert used["requests"] == len(expected)
    assert used["completion"] == sum(c.completion for c in expected.values())
    assert used["cost"] == sum(1 * c.cached + 2 * (c.prompt - c.cached) + 3 * c.completion for c in expected.values())


def test_compaction_keeps_what_is_open(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "COMPACT_BYTES", 2000)
    book = Journal(tmp_path)
    plain = Journal(tmp_path / "plain")
    played(book, 2, 600)
    monkeypatch.setattr(journal, "COMPACT_BYTES", 2**30)
    played(plain, 2, 600)
    assert book.path.stat().st_size < plain.path.stat().st_size / 2
    small, large = (believed(b.path.read_text()) for b in (book, plain))
    assert small == large and {name: counts for name, (_, counts) in book.open.items()} == large
    assert [p.suffix for p in tmp_path.iterdir() if p.is_file()] == [".journal"]


def test_a_full_disk_is_an_error_and_leaves_no_half_line(tmp_path):
    book = Journal(tmp_path)
    book.begin(row("a"))
    book.flush()
    file, full = os.dup(book.file), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, book.file)
    book.note("a", Counts(1, 0, 1))
    with pytest.raises(OSError):
        book.flush()
    os.dup2(file, book.file)
    book.note("a", Counts(1, 0, 2))
    book.flush()
    assert journal.read(book.path.read_text()) == [(row("a"), Counts(1, 0, 2))]


def test_a_journal_with_nothing_open_goes_with_its_server(tmp_path):
    book = Journal(tmp_path)
    book.begin(row("a"))
    book.end(["a"])
    book.flush()
    book.close()
    assert list(tmp_path.iterdir()) == []
    assert Keys(required=False).rows == {}


def before_the_next_lock(monkeypatch, act: Callable[[], object]) -> None:
    flock = fcntl.flock

    def late(file, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        act()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)


def test_what_a_living_server_replaces_or_closes_while_another_looks_is_its_own(tmp_path, monkeypatch):
    ledger, folder = Ledger(f"sqlite:///{tmp_path}/l.db"), tmp_path / "j"
    book = Journal(folder)
    book.begin(row("a"))
    book.flush()
    (folder / "settled.journal").symlink_to("nowhere")  # as one that goes after a look at the folder
    before_the_next_lock(monkeypatch, book.compact)
    assert recover(ledger, folder) == 0
    assert journal.read(book.path.read_text()) == [(row("a"), Counts())]
    book.end(["a"])
    book.flush()
    before_the_next_lock(monkeypatch, book.close)
    assert recover(ledger, folder) == 0 and not book.path.exists()
    ledger.close()


def test_no_server_that_starts_takes_anothers_journal_before_it_is_locked(tmp_path, monkeypatch):
    ledger, folder = Ledger(f"sqlite:///{tmp_path}/l.db"), tmp_path / "j"
    before_the_next_lock(monkeypatch, lambda: recover(ledger, folder))
    assert Journal(folder).path.exists()
    ledger.close()
