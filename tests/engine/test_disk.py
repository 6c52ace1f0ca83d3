"""The floor below memory: the same tokens with it and without, and whatever happens to its files, nobody notices."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Event

import pytest
import torch

from shoal.engine import disk as module
from shoal.engine.disk import Disk, maker
from shoal.engine.engine import LocalEngine
from shoal.engine.pages import UNIT
from shoal.engine.request import Sampling
from shoal.engine.runner import Runner
from shoal.errors import ResourceError
from shoal.model.config import ModelConfig
from shoal.model.transformer import Transformer
from tests.engine.models import GREEDY, GROUPED, LATENT, expected, idle, ids, model, pages, prompt, request, speculating

START = prompt(200)  # three whole units


@pytest.fixture
def made(tmp_path):
    """Engines over one folder, one after the other; a new one closes the last."""
    engines: list[LocalEngine] = []

    def make(m: Transformer | None = None, most: int = 2**26, maker: str = "m", **options) -> LocalEngine:
        close()
        make_one = speculating if "depth" in options else LocalEngine
        engines.append(make_one(m or model(), disk=Disk(tmp_path / "pages", most, maker), **options))
        settled(engines[-1])
        return engines[-1]

    def close() -> None:
        for engine in engines:
            engine.close()
            engine._scheduler.check()
        engines.clear()

    yield make
    close()


def kept(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "pages").iterdir() if path.name != "lock"]


def settled(engine: LocalEngine) -> None:
    """Wait until all that was asked of the writer is done."""
    disk, done = engine._disk, Event()
    assert disk is not None
    disk._jobs.put(done.set)
    while not disk.off and not done.wait(0.01):
        pass


def asked(engine: LocalEngine, *requests):
    """Their results, once what they left is on the disk."""
    results = engine.generate(list(requests))
    settled(engine)
    return results


@pytest.mark.parametrize("config", [LATENT, GROUPED], ids=["latent", "grouped"])
@pytest.mark.parametrize("options", [{}, {"depth": 2}, {"max_batch_tokens": 50}])
def test_after_a_restart_pages_are_read_and_tokens_are_the_same(made, config: ModelConfig, options: dict):
    m = model(config)
    if "depth" in options and not config.n_mtp:
        pytest.skip("no module to draft with")
    first = asked(made(m, **options), request(START, 9))[0]
    engine = made(m, **options)
    again, longer = asked(engine, request(START, 9), request(START + prompt(30, 1), 9))
    assert [r.usage.cached for r in (first, again, longer)] == [0, 192, 192]
    assert ids(first) == ids(again) == expected(m, START, 9)
    assert ids(longer) == expected(m, START + prompt(30, 1), 9)
    stats = engine.stats()
    assert (stats.disk_hits, stats.tokens_cached) == (3, 384) and stats.disk_pages >= 3


def test_to_the_last_bit_where_that_is_promised(made):
    m = Transformer(LATENT).init_weights(0).set_dtype(torch.bfloat16)
    wanted = [
        request(START[:80], 5, replace(GREEDY, logprobs=3)),
        request(START[:66], 9, Sampling(0.8, top_p=0.9, seed=5, logprobs=1)),
    ]
    plain = LocalEngine(m, deterministic=True)
    right = [plain.generate([r])[0].tokens for r in wanted]
    plain.close()
    for _ in range(2):
        results = asked(made(m, deterministic=True), *wanted)
        assert [r.tokens for r in results] == right
    assert [r.usage.cached for r in results] == [64, 64]
    assert asked(made(m), wanted[0])[0].usage.cached == 0, "a page of another mode may differ in its last bits"


def test_pages_that_fell_out_of_memory_come_back(made):
    engine = made(memory_bytes=pages(LocalEngine(model()), 4))
    prompts = [prompt(150, i) for i in range(4)]
    for _ in range(2):
        results = [asked(engine, request(p, 5))[0] for p in prompts]
        assert [ids(r) for r in results] == [expected(model(), p, 5) for p in prompts]
    assert [r.usage.cached for r in results] == [128] * 4 and engine.stats().disk_hits >= 6


@pytest.mark.slow
def test_a_full_memory_delays_and_changes_nothing(made):
    engine = made(memory_bytes=pages(LocalEngine(model()), 5), depth=2)
    prompts = [prompt(50, i) for i in range(4)]
    results = asked(engine, *(request(p, 85) for p in prompts))
    assert [ids(r) for r in results] == [expected(model(), p, 85) for p in prompts]
    assert engine._scheduler.preemptions > 0
    assert all(r.usage.cached == 0 for r in results), "what it computed itself wasn't found"


def test_decoding_goes_on_while_others_load(made, monkeypatch):
    asked(made(), request(START, 1))
    engine, order, began = made(), [], Event()
    monkeypatch.setattr("shoal.engine.loader.LOAD_BYTES", 1)  # a page at a time
    read = Disk.read
    monkeypatch.setattr(Disk, "read", lambda *a: order.append("page") or read(*a))

    def sink(step) -> None:
        order.append("token")
        began.set()

    engine.submit(request(prompt(9), 100, sink=sink))
    assert began.wait(10)
    result = asked(engine, request(START, 5))[0]
    assert result.usage.cached == 192 and ids(result) == expected(model(), START, 5)
    places = [i for i, what in enumerate(order) if what == "page"]
    assert len(places) == 3 and all("token" in order[a:b] for a, b in pairwise(places))


def test_a_read_that_hangs_holds_nobody_up_and_is_given_up(made, monkeypatch, caplog):
    asked(made(), request(START, 1))
    engine, hangs, go_on, told = made(), Event(), Event(), []
    read = Disk.read
    monkeypatch.setattr(Disk, "read", lambda *a: (hangs.set(), go_on.wait(20), read(*a))[2])
    engine.submit(request(START, 5, sink=told.append))
    assert hangs.wait(10)
    assert ids(engine.generate([request(prompt(9), 20)])[0]) == expected(model(), prompt(9), 20)
    assert not told
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr("shoal.engine.loader.READ_SECONDS", 0.0)
        idle(engine)
    assert [t.id for step in told for t in step.tokens] == expected(model(), START, 5)
    assert told[-1].usage.cached == 0 and caplog.text.count("used no more") == 1
    go_on.set()


def test_a_read_that_fails_is_given_up_and_ends_no_request(made, tmp_path, monkeypatch, caplog):
    asked(made(), request(START, 1))
    engine = made()

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(Disk, "read", fails)
    with caplog.at_level(logging.WARNING):
        result = asked(engine, request(START, 5))[0]
    assert result.usage.cached == 0 and ids(result) == expected(model(), START, 5)
    assert len(kept(tmp_path)) == 3 and [r.levelname for r in caplog.records] == ["WARNING"]
    assert "MemoryError" in caplog.text


def test_a_floor_that_is_given_up_is_given_no_more_to_do(tmp_path):
    disk, hangs, go_on = Disk(tmp_path / "pages", 10**6, "m"), Event(), Event()

    def hang() -> None:
        hangs.set()
        go_on.wait(20)

    disk.write(b"k", torch.zeros(8, dtype=torch.uint8))
    disk._jobs.put(hang)
    assert hangs.wait(10) and disk.has(b"k")
    disk.give_up("it hangs")
    assert not any(disk.wants(b"k", 8) for _ in range(3)) and disk._jobs.empty()
    go_on.set()
    disk.close()


def test_what_is_read_while_weights_change_is_not_taken_in(made, monkeypatch):
    m = Transformer(LATENT).init_weights(0)
    asked(made(m), request(START, 1))
    engine, hangs, go_on, told = made(m), Event(), Event(), []
    read = Disk.read
    monkeypatch.setattr(Disk, "read", lambda *a: (read(*a), hangs.set(), go_on.wait(20))[0])
    engine.submit(request(START, 5, sink=told.append))
    assert hangs.wait(10)
    m.load_state_dict(model(LATENT, seed=1).state_dict())
    engine.forget()
    idle(engine)
    go_on.set()
    settled(engine)
    assert [t.id for step in told for t in step.tokens] == expected(model(LATENT, seed=1), START, 5)
    assert told[-1].usage.cached == 0 == engine.stats().disk_hits


def test_many_answers_to_one_prompt_read_it_once(made):
    asked(made(), request(START, 1))
    engine = made()
    results = asked(engine, *(request(START, 5) for _ in range(4)))
    assert [r.usage.cached for r in results] == [192] * 4 and engine.stats().disk_hits == 3


def test_tenants_stay_apart(made):
    asked(made(), request(START, 3, salt="a"))
    mine, theirs, nobodys = asked(made(), *(request(START, 3, salt=salt) for salt in ("a", "b", "")))
    assert [r.usage.cached for r in (mine, theirs, nobodys)] == [192, 0, 0]


def test_other_weights_code_or_layers_find_nothing(made):
    asked(made(), request(START, 3))
    for changed in (
        {"maker": "other"},
        {"depth": 1},
        {"m": Transformer(LATENT).init_weights(0).set_dtype(torch.bfloat16)},
    ):
        assert asked(made(**changed), request(START, 3))[0].usage.cached == 0
    assert asked(made(), request(START, 3))[0].usage.cached == 192


def test_changed_weights_find_nothing(made, tmp_path):
    m = Transformer(LATENT).init_weights(0)
    engine = made(m)
    asked(engine, request(START, 3))
    m.load_state_dict(model(LATENT, seed=1).state_dict())
    engine.forget()
    result = asked(engine, request(START, 9))[0]
    assert result.usage.cached == 0 and ids(result) == expected(model(LATENT, seed=1), START, 9)
    assert asked(engine, request(START, 9))[0].usage.cached == 192
    assert asked(made(m), request(START, 3))[0].usage.cached == 0, "pages of either weights are gone"


def test_a_models_name_is_that_of_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10)
    names = [maker(tmp_path), maker(tmp_path)]
    os.utime(tmp_path / "model.safetensors", (1, 1))
    names.append(maker(tmp_path))
    (tmp_path / "config.json").write_text("{ }")
    names.append(maker(tmp_path))
    (tmp_path / "manifest.json").write_text("{}")
    names.append(maker(tmp_path))
    assert names[0] == names[1] and len(set(names)) == 4


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flipped_in_the_digest(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


def gone(path: Path) -> None:
    path.unlink()


def unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


def anothers(path: Path) -> None:
    """A whole page, under another's name."""
    whole = path.parent.parent / "whole"
    if not whole.exists():
        shutil.copytree(path.parent, whole)
    other = next(p for p in whole.iterdir() if p.name not in (path.name, "lock"))
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("when", ["running", "stopped"])
@pytest.mark.parametrize("hurt", [cut, emptied, grown, flipped, flipped_in_the_digest, gone, unreadable, anothers])
def test_damage_is_found_and_the_page_computed_anew(made, tmp_path, caplog, hurt, when: str):
    engine = made()
    asked(engine, request(START, 1))
    paths = kept(tmp_path)
    assert len(paths) == 3
    if when == "running":
        engine._scheduler.pages.forget()
        for path in paths:
            hurt(path)
    else:
        engine.close()
        for path in paths:
            hurt(path)
        engine = made()
    for path in paths:
        if path.is_dir():  # a folder of that name would stand in the way of the next write, too
            path.rmdir()
    with caplog.at_level(logging.CRITICAL):
        result = asked(engine, request(START, 9))[0]
    assert result.usage.cached == 0 and ids(result) == expected(model(), START, 9)
    healed = [asked(made(), request(START, 9))[0] for _ in paths]  # each finds out about one more
    assert healed[-1].usage.cached == 192 and {tuple(ids(r)) for r in healed} == {tuple(ids(result))}


def test_half_of_the_chain_is_used_as_far_as_it_goes(made, tmp_path):
    engine = made()
    asked(engine, request(START[:70], 1))
    first = kept(tmp_path)
    asked(engine, request(START, 1))
    second = min(set(kept(tmp_path)) - set(first), key=lambda p: p.stat().st_mtime_ns)
    second.unlink()
    result = asked(made(), request(START, 9))[0]
    assert result.usage.cached == 64 and ids(result) == expected(model(), START, 9)


def test_a_full_disk_ends_it_with_one_line_and_no_request(made, monkeypatch, caplog):
    engine, write = made(), []

    class Full:
        def __init__(self, *_, **__):
            write.append(1)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "open", Full, raising=False)
    with caplog.at_level(logging.WARNING):
        results = asked(engine, *(request(prompt(150, i), 5) for i in range(3)))
        results += asked(engine, request(prompt(150, 0), 5))
    assert [ids(r) for r in results] == [expected(model(), prompt(150, i), 5) for i in (0, 1, 2, 0)]
    assert len(write) == 1 and len(caplog.records) == 1 and "No space left" in caplog.text


@pytest.mark.slow
def test_a_write_that_comes_short_leaves_nothing(tmp_path, caplog):
    """A limit on the size of files, as a nearly full disk would have it: the kernel writes a part."""
    code = f"""
import resource, signal, sys, time, torch, logging
from pathlib import Path
from shoal.engine.disk import Disk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
d = Disk(Path({str(tmp_path / "pages")!r}), 10**6, "m")
d.write(b"k", torch.zeros(5000, dtype=torch.uint8))
d.close()
sys.exit(d.off and not d.has(b"k"))
"""
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "used no more" in done.stderr
    assert kept(tmp_path) == []


def test_the_bound_holds_and_the_longest_unused_goes_first(made, tmp_path):
    engine = made()
    page = UNIT * engine.bytes_per_token + 32
    engine = made(most=5 * page)
    for i in (0, 1, 0, 2):  # two pages each; the third time the first is used again, in memory
        asked(engine, request(prompt(150, i), 1))
        assert sum(path.stat().st_size for path in kept(tmp_path)) <= 5 * page
        time.sleep(0.01)
    assert engine.stats().disk_pages == len(kept(tmp_path)) == 5
    engine = made(most=5 * page)
    assert asked(engine, request(prompt(150, 0), 1))[0].usage.cached == 128
    engine = made(most=2 * page)  # the order outlasts a restart
    assert len(kept(tmp_path)) == 2
    assert asked(engine, request(prompt(150, 0), 1))[0].usage.cached == 128


def test_a_folder_has_one_owner_and_must_be_writable(made, tmp_path):
    made()
    with pytest.raises(ResourceError, match="another server"):
        Disk(tmp_path / "pages", 10**6, "m")
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cache folder"):
        Disk(tmp_path / "file" / "pages", 10**6, "m")
    with pytest.raises(ResourceError, match="room for a page"):
        made(most=100)


def test_what_is_not_ours_is_left_alone(made, tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    os.mkfifo(folder / ("0" * 32))
    (folder / ("a" * 32 + ".new")).write_text("half of a page")
    engine = made(most=UNIT * LocalEngine(model()).bytes_per_token + 32)
    asked(engine, request(START, 1))
    assert (folder / "notes.txt").read_text() == "mine" and (folder / ("0" * 32)).exists()
    assert not (folder / ("a" * 32 + ".new")).exists()


def test_a_failed_request_leaves_no_page(made, tmp_path, monkeypatch, caplog):
    """Its numbers may be poisoned, long before the draw that shows it."""
    engine, run, calls = made(max_batch_tokens=64), Runner.run, []

    def fails_late(self, work):
        calls.append(work)
        if len(calls) == 4:
            raise RuntimeError
        return run(self, work)

    monkeypatch.setattr(Runner, "run", fails_late)
    with caplog.at_level(logging.CRITICAL):
        assert asked(engine, request(START, 5))[0].finish == "error"
    assert kept(tmp_path) == [] and engine.stats().disk_pages == 0


def test_a_writer_that_is_too_slow_is_not_waited_for(made, monkeypatch):
    engine, go_on = made(), Event()
    monkeypatch.setattr(module, "MOST_WAITING", 2 * UNIT * engine.bytes_per_token)
    engine._disk._jobs.put(lambda: go_on.wait(20))  # type: ignore[union-attr]
    assert ids(engine.generate([request(START, 9)])[0]) == expected(model(), START, 9)
    go_on.set()
    settled(engine)
    assert engine.stats().disk_pages == 2
    asked(engine, request(START, 9))
    assert engine.stats().disk_pages == 3, "offered again"


KILLED = """
import sys
from pathlib import Path
from shoal.engine.disk import Disk
from shoal.engine.engine import LocalEngine
from tests.engine.models import model, prompt, request
engine = LocalEngine(model(), disk=Disk(Path(sys.argv[1]), 2**26, "m"))
print("up", flush=True)
for i in range(10_000):
    engine.generate([request(prompt(200, i), 1)])
"""


@pytest.mark.slow
def test_after_a_kill_whole_pages_are_found_and_halves_are_not(made, tmp_path):
    for i in range(3):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "pages")], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        while len(kept(tmp_path)) < 20 * (i + 1):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    engine = made()
    results = asked(engine, *(request(prompt(200, i), 5) for i in range(4)))
    assert [ids(r) for r in results] == [expected(model(), prompt(200, i), 5) for i in range(4)]
    assert [r.usage.cached for r in results] == [192] * 4
    assert not [path for path in kept(tmp_path) if path.suffix]
