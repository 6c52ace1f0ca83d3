"""The page in a real browser: it says nothing on the console and asks nobody for anything."""

import json
import re
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shoal.report import chain, page
from tests.report.chained import write_chain
from tests.report.synthetic import write_reinforced, write_run
from tests.report.test_page import HOSTILE, put

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.browser
FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run --enable-logging=stderr"


@pytest.fixture
def serve(tmp_path):
    """Serve a folder to a browser that finds no host but *.test: (addresses asked for, console, DOM)."""

    def visit(folder: Path, name: str) -> tuple[list[str], list[str], str]:
        asked: list[str] = []

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, format, *args):
                asked.append(self.headers["Host"] + self.path)

        with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            world = f"--host-resolver-rules=MAP *.test 127.0.0.1:{server.server_port},MAP * ~NOTFOUND"
            profile = f"--user-data-dir={tmp_path}/profile"
            command = [str(CHROMIUM), *FLAGS.split(), world, profile, "--dump-dom", f"http://here.test/{name}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            server.shutdown()
        return asked, re.findall(r"CONSOLE.*", done.stderr), done.stdout

    return visit


def test_a_page_is_silent_and_fetches_nothing(tmp_path, serve):
    run = write_run(tmp_path / "run", steps=150)
    put(run / "samples/3.json", {"prompt": HOSTILE, "text": HOSTILE})
    page.write(run)
    asked, console, dom = serve(run, "report.html")
    assert asked == ["here.test/report.html"]
    assert console == []
    assert "36% less than xz -9e" in dom and "<script" not in dom and "&lt;script&gt;alert(1)" in dom


def test_the_page_of_a_chain_is_silent_too(tmp_path, serve):
    chain.write(write_chain(tmp_path / "run"))
    asked, console, dom = serve(tmp_path / "run", "report.html")
    assert asked == ["here.test/report.html"] and console == []
    assert "R1-Zero: reinforcement alone" in dom and "<script" not in dom


def test_a_page_of_reinforcement_is_silent_too(tmp_path, serve):
    run = write_reinforced(tmp_path / "run")
    line = {"step": 200, "index": 9, "sample": 0, "prompt": HOSTILE, "text": HOSTILE, "outcome": HOSTILE}
    with (run / "samples/rollouts.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    page.write(run)
    asked, console, dom = serve(run, "report.html")
    assert asked == ["here.test/report.html"] and console == []
    assert "Engine against trainer" in dom and "<script" not in dom


def test_what_would_break_the_promise_is_noticed(tmp_path, serve):
    """The same eyes on a page that breaks it: a picture from elsewhere, one from here, and a script that complains."""
    html = "<img src=http://x.test/a.png><img src=/b.png><script>console.error('loud')</script>"
    (tmp_path / "bad.html").write_text(html)
    asked, console, _ = serve(tmp_path, "bad.html")
    assert {"x.test/a.png", "here.test/b.png"} < set(asked)
    assert any("loud" in line for line in console)


def test_the_policy_stops_a_script_that_got_in(tmp_path, serve):
    run = write_run(tmp_path / "run", steps=50)
    html = page.write(run).read_text().replace("</main>", "<script>console.error('loud')</script></main>")
    (run / "report.html").write_text(html)
    _, console, _ = serve(run, "report.html")
    assert console and not any('"loud"' in line for line in console)
    assert any("Content Security Policy" in line for line in console)
