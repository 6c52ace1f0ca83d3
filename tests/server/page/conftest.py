"""A browser that visits the chat page, served by an API that plays parts.

Every page opened here has to keep three promises, checked when it is closed: it asks no other host for anything, its
console stays silent, and no script of a model's ever runs.
"""

import re
import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import Browser, Page, sync_playwright

from tests.conftest import BROWSER
from tests.server.page.scripted import Scripted
from tests.server.page.visiting import PATIENCE

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
NOBODY_ELSE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
WATCH = """
window.broken = [];
const note = (e) => window.broken.push(`${e.violatedDirective} ${e.blockedURI}`);
document.addEventListener("securitypolicyviolation", note);
"""


@pytest.fixture(scope="module")
def api() -> Iterator[Scripted]:
    with Scripted() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=BROWSER, args=[*FLAGS, NOBODY_ELSE])
        yield running
        running.close()


@pytest.fixture
def visit(browser, api):
    """Open the page; `expected` is a pattern of what it may say on the console and ask for."""
    opened = []
    api.gate = threading.Semaphore(0)

    def go(url: str = "", expected: str = "$^", **options) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}} | options)
        context.set_default_timeout(PATIENCE * 1000)
        page = context.new_page()
        asked: list[str] = []
        said: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.add_init_script(WATCH)
        page.goto(url or api.url)
        page.wait_for_selector("#model option[value='deepseek-chat'], #notice:not([hidden])", state="attached")
        opened.append((page, url or api.url, asked, said, expected))
        return page

    yield go
    for page, url, asked, said, expected in opened:
        assert page.evaluate("window.hurt") is None, "a script of the model's ran"
        assert page.evaluate("window.broken") == []
        elsewhere = [a for a in asked if not a.startswith((url, f"blob:{url}")) and not re.search(expected, a)]
        assert not elsewhere, elsewhere
        loud = [line for line in said if not re.search(expected, line)]
        assert not loud, loud
        page.context.close()
