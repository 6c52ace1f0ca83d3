"""The chat page in a real browser, against an API that plays parts (see scripted.py): what it is for."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("playwright")

from tests.server.fake import END, THINK_END, FakeEngine
from tests.server.page.scripted import ANSWER, THOUGHT
from tests.server.page.visiting import LAST, PATIENCE, ask, begin, path_of, settle, stored, until
from tests.server.running import Running

pytestmark = pytest.mark.browser


# --- an answer, from the first token to the bill


def test_an_answer_with_thinking_code_table_links_and_figures(visit, api):
    page = visit()
    ask(page, "think about merging")
    answer = page.locator(LAST)
    assert re.fullmatch(r"Thought [\d.]+ s · 19 tokens", answer.locator("summary").inner_text())
    assert answer.locator(".thought").inner_text() == THOUGHT
    assert answer.locator("pre").inner_text() == ANSWER.split("```")[1].removeprefix("python\n").rstrip("\n")
    assert answer.locator("td").all_inner_texts() == ["1", "a", "[1]", "2", "b", "[1, 2]"]
    assert answer.locator("a").get_attribute("href") == "https://example.org/notes"
    assert "noopener" in (answer.locator("a").get_attribute("rel") or "")
    figures = answer.locator(".stats").inner_text()
    n = 19 + len(range(0, len(ANSWER), 5))
    assert re.fullmatch(
        rf"[\d.]+ tokens/s · first token after [\d.]+ s · 1,210 in, 1,088 cached · 19 thinking · {n} out · \$0.000312",
        figures,
    )
    assert page.locator("#context").inner_text().strip() == f"{1210 + n:,} / 4,096"
    assert page.locator("#context").get_attribute("aria-valuenow") == str(1210 + n)
    assert api.asked[-1]["messages"] == [{"role": "user", "content": "think about merging"}]


def test_the_real_server_speaks_as_the_page_expects(visit, tmp_path):
    engine = FakeEngine(lambda _: [*b"Hmm.", THINK_END, *b"**Yes**.", END], per_step=20)
    with Running(tmp_path, engine) as server:
        page = visit(f"{server.url}/", expected="401")
        page.click("#notice button:text-is('Enter a key')")
        page.fill("dialog input[type=password]", server.key)
        page.click("dialog button:text-is('Save')")
        page.wait_for_selector("#model option[value='deepseek-chat']", state="attached")
        page.keyboard.press("Escape")
        for cached in ("", ", 64 cached"):
            ask(page, "a question that is long enough to fill a unit of the prefix cache")
            answer = page.locator(LAST)
            thought = re.fullmatch(r"Thought ([\d.]+) s · 4 tokens", answer.locator("summary").inner_text())
            assert thought and float(thought[1]) > 0
            assert answer.locator(".prose strong").inner_text() == "Yes"
            figures = answer.locator(".stats").inner_text()
            assert re.search(rf" in{cached} · 4 thinking · 14 out · \$0\.0", figures), figures
        assert page.locator("#context").inner_text().strip().endswith("/ 4,096")
        rows = server.rows()
        page.click("button:has-text('Keys and usage')")
        page.wait_for_selector(f".usage td:text-is('{sum(row['prompt'] for row in rows)}')")


def test_figures_run_while_it_writes_and_stop_stops_the_server(visit, api):
    page = visit()
    gone = api.gone
    begin(page, "forever please")
    until(page, "document.querySelector('.stats')?.textContent.includes('tokens/s')")
    assert "about" in page.locator(".stats").inner_text()
    assert page.locator("#send").get_attribute("aria-label") == "Stop"
    page.keyboard.press("Escape")
    settle(page)
    kept = page.locator(f"{LAST} .prose").inner_text()
    assert kept.startswith("word word") and page.locator(f"{LAST} .note").inner_text() == "Stopped"
    for _ in range(100):  # until the server has noticed
        page.wait_for_timeout(100 if api.gone == gone else 0)
    page.wait_for_timeout(400)
    assert api.gone == gone + 1
    assert page.locator(f"{LAST} .prose").inner_text() == kept
    assert page.locator("#send").get_attribute("aria-label") == "Send"


def test_the_queue_is_shown(visit, api):
    page = visit()
    begin(page, "queue me")
    until(page, "document.querySelector('.note')?.textContent === '3 before you in the queue'")
    api.gate.release(2)
    until(page, "document.querySelector('.note')?.textContent === '1 before you in the queue'")
    api.gate.release()
    settle(page)
    assert page.locator(f"{LAST} .note").inner_text() == ""


def test_thinking_opens_by_itself_and_is_closed_by_the_reader_only(visit, api):
    page = visit()
    begin(page, "slow one")
    page.wait_for_selector("details.thinking[open]")
    assert re.match(r"Thinking \d+ s · \d+ tokens", page.locator("summary").inner_text())
    page.click("summary")
    api.gate.release()
    page.wait_for_selector(f"{LAST}[data-state=answering]")
    assert page.locator("details.thinking").get_attribute("open") is None, "it opened again"
    page.click("summary")
    api.gate.release()
    settle(page)
    assert page.locator("details.thinking").get_attribute("open") is not None, "it closed itself"
    page.reload()
    page.wait_for_selector("details.thinking[open]")


def test_nothing_flickers_or_jumps_while_it_grows(visit):
    page = visit()
    page.evaluate(
        """() => {
          window.seen = { looks: 0, shrank: 0, height: 0, first: null, replaced: 0 };
          const look = () => {
            const prose = document.querySelector(".prose");
            if (prose) {
              const { height } = prose.getBoundingClientRect();
              window.seen.looks++;
              window.seen.shrank = Math.max(window.seen.shrank, window.seen.height - height);
              window.seen.height = height;
              const code = prose.querySelector(".code");
              if (code && window.seen.first && code !== window.seen.first) window.seen.replaced++;
              window.seen.first = code ?? window.seen.first;
            }
          };
          new MutationObserver(look).observe(document.body, { subtree: true, childList: true, characterData: true });
        }"""
    )
    ask(page, "merge")
    seen = page.evaluate("({ ...window.seen, first: null })")
    assert seen["looks"] > 5 and seen["height"] > 100, "too little was seen of it"
    assert seen["replaced"] == 0, "the code block was built again"
    assert seen["shrank"] < 30, "the text lost more than a line"


def test_the_scroll_follows_until_the_reader_scrolls_up(visit, api):
    page = visit()
    begin(page, "long story")
    until(page, "document.querySelector('#scroll').scrollTop > 600")
    page.wait_for_timeout(300)
    page.mouse.move(700, 400)
    page.mouse.wheel(0, -400)
    page.wait_for_selector("#to-latest", state="visible")
    page.wait_for_timeout(300)
    top, height = page.evaluate("(s => [s.scrollTop, s.scrollHeight])(document.querySelector('#scroll'))")
    api.gate.release()
    settle(page)
    assert page.evaluate("document.querySelector('#scroll').scrollHeight") > height + 200
    assert abs(page.evaluate("document.querySelector('#scroll').scrollTop") - top) < 2
    page.click("#to-latest")
    left = page.evaluate("(s => s.scrollHeight - s.clientHeight - s.scrollTop)(document.querySelector('#scroll'))")
    assert left < 2 and page.locator("#to-latest").is_hidden()


# --- the tree


def test_regenerate_edit_and_branch(visit, api):
    page = visit()
    ask(page, "echo one")
    page.click(f"{LAST} button[aria-label='Answer again']")
    settle(page)
    assert page.locator(f"{LAST} .versions").inner_text() == "2/2"
    ask(page, "echo two")
    assert [m["content"] for m in api.asked[-1]["messages"]] == ["echo one", "one", "echo two"]
    page.focus("#words")
    page.keyboard.press("ArrowUp")
    page.keyboard.type(" changed")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.bubble')[1].innerText === 'echo two changed'")
    settle(page)
    assert page.locator(f"{LAST} .prose").inner_text() == "two changed"
    assert page.locator(".question .versions").inner_text() == "2/2"
    page.click(".question .versions button[aria-label='Previous version']")
    assert path_of(page) == ["echo one", "echo two"]
    page.locator(".answer .versions button[aria-label='Previous version']").first.click()
    assert path_of(page) == ["echo one"]
    page.locator(".answer .versions button[aria-label='Next version']").first.click()
    assert path_of(page) == ["echo one", "echo two"]
    page.reload()
    page.wait_for_selector(".bubble >> nth=1")
    assert path_of(page) == ["echo one", "echo two"]


def test_history_is_kept_exported_and_imported_whole(visit, tmp_path):
    page = visit()
    ask(page, "think first")
    page.click(f"{LAST} button[aria-label='Answer again']")
    settle(page)
    ask(page, "echo <b>second</b>")
    page.click("#doors button:nth-child(2)")
    with page.expect_download() as started:
        page.click("dialog button:text-is('Export all')")
    file = tmp_path / "chats.json"
    started.value.save_as(file)
    (exported,) = json.loads(file.read_text())["chats"]
    assert len(exported["nodes"]) == 6  # root, two questions, two answers to the first, one to the second
    page.click("dialog button:text-is('Delete all')")
    page.click("dialog.ask button:text-is('Delete all')")
    page.wait_for_selector("#hero:not([hidden])")
    assert stored(page) == []
    page.set_input_files("input[type=file]", str(file))
    page.wait_for_selector("#toast:text-is('1 chat imported')")
    (back,) = stored(page)
    assert shape(back) == shape(exported) and back["id"] == exported["id"]
    page.set_input_files("input[type=file]", str(file))
    page.wait_for_selector("#toast:text-is('Nothing new in that file')")
    file.write_text('{"format": "shoal-chats", "version": 1, "chats": [{}]}')
    page.set_input_files("input[type=file]", str(file))
    page.wait_for_selector('#toast:text-is("That file doesn\'t hold chats of this page.")')
    assert len(stored(page)) == 1


def shape(chat: dict, node: str = "root") -> dict:
    kept = {k: v for k, v in chat["nodes"][node].items() if k not in ("id", "parent", "children", "queue")}
    return kept | {"below": [shape(chat, child) for child in chat["nodes"][node]["children"]]}


def test_an_answer_cut_short_by_a_reload_is_kept_as_stopped(visit):
    page = visit(expected="ERR_")
    begin(page, "forever on")
    end = time.monotonic() + PATIENCE
    while not any(node["content"][:9] == "word word" for chat in stored(page) for node in chat["nodes"].values()):
        assert time.monotonic() < end, "it was never written down"
        page.wait_for_timeout(100)
    page.reload()
    page.wait_for_selector(f"{LAST}[data-state=stopped]")
    assert page.locator(f"{LAST} .prose").inner_text().startswith("word word")


# --- asking


def test_parameters_system_prompt_model_and_thinking_are_sent(visit, api):
    page = visit()
    page.select_option("#model", "deepseek-reasoner")
    page.select_option("#thinking", "enabled")
    page.click("#bar-right button")
    page.fill("dialog textarea", "Be brief.")
    page.fill("dialog input[name=temperature]", "0.3")
    page.fill("dialog input[name=top_k]", "9999999999")
    page.fill("dialog input[name=top_p]", "7")
    page.check("dialog input[type=checkbox]")
    page.keyboard.press("Escape")
    ask(page, "echo hi")
    body = api.asked[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["model"], body["temperature"], body["top_p"]) == ("deepseek-reasoner", 0.3, 1)
    assert body["thinking"] == {"type": "enabled"} and "seed" not in body and body["stream"] is True
    page.keyboard.press("Control+k")
    ask(page, "echo again")
    assert api.asked[-1]["messages"][0]["content"] == "Be brief." and api.asked[-1]["temperature"] == 0.3


def test_the_request_as_code_is_the_request(visit, api):
    page = visit()
    ask(page, 'echo it\'s $(so) "quoted"\\')
    page.click(f"{LAST} button[aria-label^='View as curl']")
    command = page.locator("dialog pre").inner_text()
    sent = subprocess.run(
        ["bash", "-c", f"curl() {{ printf '%s' \"${{@: -1}}\"; }}\n{command}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(sent.stdout) == api.asked[-1]
    page.click("dialog button:text-is('Python')")
    compile(page.locator("dialog pre").inner_text(), "shown", "exec")


def test_the_keyboard_is_enough(visit, api):
    page = visit()
    assert page.evaluate("document.activeElement.id") == "words"
    page.keyboard.type("echo a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    page.keyboard.press("Enter")
    page.wait_for_selector(LAST)
    settle(page)
    assert api.asked[-1]["messages"][-1]["content"] == "echo a\nb"
    asked = len(api.asked)
    page.keyboard.type("조합 중")
    composing = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true})"
    page.evaluate(f"document.querySelector('#words').dispatchEvent({composing})")
    page.wait_for_timeout(150)
    assert len(api.asked) == asked, "an input method's Enter sent the message"
    page.keyboard.press("Control+k")
    assert page.locator("#hero").is_visible() and page.evaluate("document.activeElement.id") == "words"
    seen = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
        ring = page.evaluate(
            """() => { const s = getComputedStyle(document.activeElement);
              return document.activeElement.matches('body, #words') || s.outlineStyle !== 'none'; }"""
        )
        assert ring, f"no visible focus on {seen}"
    assert {"new-chat", "model", "thinking", "words"} <= seen


def test_every_control_has_a_name(visit):
    page = visit()
    ask(page, "think of names")
    ask(page, "echo more")
    for opener in ("#bar-right button", "#doors button:nth-child(1)", "#doors button:nth-child(2)", None):
        if opener:
            page.click(opener)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("button, select, textarea, input:not([type=file])")]
              .filter((c) => !(c.ariaLabel || c.innerText.trim() || c.labels?.[0]?.textContent.trim() || c.placeholder))
              .map((c) => c.outerHTML)"""
        )
        assert not nameless, nameless
        page.keyboard.press("Escape")


@pytest.mark.parametrize(
    "locale, tag, button, thought",
    [
        ("en-GB", "en", "New chat", r"Thought .+ · 19 tokens"),
        ("ko-KR", "ko", "새 대화", r".+ 동안 생각함 · 토큰 19개"),
        ("zh-CN", "zh-CN", "新对话", r"思考了 .+ · 19 个词元"),
        ("fr-FR", "en", "New chat", r"Thought .+ · 19 tokens"),
    ],
)
def test_the_browsers_language(visit, locale, tag, button, thought):
    page = visit(locale=locale)
    assert page.evaluate("document.documentElement.lang") == tag
    assert page.locator("#new-chat span").inner_text() == button
    ask(page, "think")
    assert re.fullmatch(thought, page.locator("summary").inner_text())


def test_language_and_appearance_can_be_chosen(visit):
    page = visit(color_scheme="light")
    ask(page, "think first")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.click("#doors button:nth-child(2)")
    page.select_option("dialog select >> nth=1", "dark")
    assert page.evaluate(paper) == "rgb(10, 18, 23)" != light
    page.select_option("dialog select >> nth=0", "ko")
    assert page.locator("#new-chat span").inner_text() == "새 대화"
    assert "동안 생각함" in page.locator("summary").inner_text()
    page.reload()
    page.wait_for_selector("#new-chat span:text-is('새 대화')")
    assert page.evaluate(paper) == "rgb(10, 18, 23)"


def test_a_phone_has_room_for_everything(visit):
    page = visit(viewport={"width": 360, "height": 640}, is_mobile=True, has_touch=True)
    assert page.locator("#hero h1").bounding_box()["y"] > 0
    ask(page, "think hard about merging")
    wide = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((e) => !e.closest("pre, .wide, #sidebar, .hidden, svg")
          && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.className || e.tagName)"""
    )
    assert not wide, wide
    assert page.locator("#sidebar").is_hidden()
    page.click("#bar-left button")
    page.wait_for_selector("#sidebar", state="visible")
    page.click("#new-chat")
    page.wait_for_selector("#sidebar", state="hidden")
    page.click("#bar-right button")
    assert page.locator("dialog").bounding_box()["width"] <= 360


def test_chats_can_be_switched_renamed_and_deleted_while_one_runs(visit):
    page = visit()
    begin(page, "slow one")
    page.wait_for_selector(f"{LAST}[data-state=thinking]")
    page.keyboard.press("Control+k")
    ask(page, "echo other")
    assert page.locator(".chat.running a").all_inner_texts() == ["slow one"]
    page.hover(".chat:has-text('echo other')")
    page.click(".chat:has-text('echo other') button[aria-label^='Rename']")
    page.keyboard.type("<i>new name</i>")
    page.keyboard.press("Enter")
    page.wait_for_selector(".chat a:text-is('<i>new name</i>')")
    page.click(".chat a:text-is('slow one')")
    page.wait_for_selector("details.thinking")
    page.click("#send")
    settle(page)
    page.hover(".chat:has-text('slow one')")
    page.click(".chat:has-text('slow one') button[aria-label^='Delete']")
    page.click("dialog.ask button:text-is('Delete')")
    page.wait_for_selector("#hero:not([hidden])")
    page.wait_for_timeout(100)
    assert [chat["title"] for chat in stored(page)] == ["<i>new name</i>"]


def test_screenshots(visit, tmp_path: Path):
    """Each look of the page can be drawn; set the folder with --basetemp to keep them."""
    looks = {"light": {}, "dark": {"color_scheme": "dark"}, "korean": {"locale": "ko-KR"}}
    looks["phone"] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    for name, options in looks.items():
        page = visit(**options)
        page.screenshot(path=tmp_path / f"{name}-empty.png")
        ask(page, "think about merging")
        assert len(page.screenshot(path=tmp_path / f"{name}.png")) > 20_000
