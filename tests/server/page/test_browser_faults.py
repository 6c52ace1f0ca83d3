"""The chat page in a real browser when things go wrong: hostile output, errors, a server or a storage that is gone."""

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import Error

from tests.server.page.scripted import HOSTILE, Scripted
from tests.server.page.visiting import LAST, ask, begin, settle

pytestmark = pytest.mark.browser


# --- what a model writes is never run


@pytest.mark.parametrize("how", ["hostile answer", f"echo {HOSTILE}", HOSTILE])
def test_42_hostile_output_is_shown_and_never_run(visit, how):
    page = visit()
    ask(page, how)
    page.wait_for_timeout(300)
    assert not page.locator(
        "#thread :is(script, img, iframe, style, form, object, embed, [onerror], [onclick])"
    ).count()
    assert all(a.startswith("http") for a in page.locator("#thread a[href]").evaluate_all("l => l.map((a) => a.href)"))
    if how == "hostile answer":
        shown = page.locator(f"{LAST} .prose").inner_text()
        assert "<script>window.hurt = 1</script>" in shown and "<iframe" in shown and "pixel" in shown
    page.reload()
    page.wait_for_selector(".bubble")


def test_a_script_could_not_run_if_it_got_in(visit):
    """The policy, tried from inside: inline scripts, handlers, eval, HTML without the policy, other hosts."""
    page = visit(expected="Content Security Policy|Trusted|tracker.test|:9/|^data:")
    tried = page.evaluate(
        """async () => {
          const failed = {};
          const attempt = async (name, action) => {
            failed[name] = false;
            try { await action(); } catch { failed[name] = true; }
          };
          const script = document.createElement("script");
          await attempt("script text", () => { script.textContent = "window.hurt = 8"; document.body.append(script); });
          const bad = "<img src=x onerror='window.hurt=9'>";
          await attempt("innerHTML", () => { document.body.insertAdjacentHTML("beforeend", bad); });
          await attempt("a second policy", () => trustedTypes.createPolicy("other", { createHTML: (x) => x }));
          await attempt("the same policy again", () => trustedTypes.createPolicy("shoal", { createHTML: (x) => x }));
          await attempt("fetch", () => fetch("http://tracker.test/"));
          await attempt("local port", () => fetch("http://127.0.0.1:9/"));
          const image = new Image();
          const src = "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>";
          const load = (onload, onerror) => Object.assign(image, { onload, onerror, src });
          await attempt("image", () => new Promise(load));
          return failed;
        }"""
    )
    allowed = [name for name, failed in tried.items() if not failed]
    assert not allowed
    assert page.evaluate("window.broken.splice(0).length") > 0


# --- errors


def test_errors_say_what_happened_and_can_be_tried_again(visit, api):
    page = visit(expected="429|400")
    api.failures = 1
    begin(page, "flaky question")
    box = page.locator(".error")
    box.wait_for()
    assert box.inner_text().startswith("Too many requests for now.\n") and "30 requests a minute" in box.inner_text()
    assert "wait 7 s" in box.inner_text()
    box.locator(".retry").click()
    settle(page)
    assert page.locator(LAST).get_attribute("data-state") == "done" and not page.locator(".versions").count()
    begin(page, "overflow it")
    page.wait_for_selector(f"{LAST} .error")
    assert "expected at most 4,096" in page.locator(f"{LAST} .error").inner_text()


@pytest.mark.parametrize("part, words", [("cut", "broke off"), ("broken", "the engine failed")])
def test_a_stream_that_breaks_keeps_what_came(visit, part, words):
    page = visit(expected="ERR_")
    ask(page, f"{part} now")
    assert words in page.locator(f"{LAST} .error").inner_text()
    assert page.locator(f"{LAST} .prose").inner_text().startswith("Two sorted lists")
    page.click(f"{LAST} .retry")
    page.wait_for_selector(".versions:has-text('2/2')")


def test_a_server_that_is_gone(visit):
    with Scripted() as short:
        page = visit(short.url, expected="ERR_CONNECTION")
        ask(page, "echo first")
    begin(page, "echo second")
    page.wait_for_selector(f"{LAST} .error")
    assert "can't be reached" in page.locator(f"{LAST} .error").inner_text()


def test_a_key_is_asked_for_kept_and_used(visit):
    with Scripted(key="sk-good") as locked:
        page = visit(locked.url, expected="401")
        page.click("#notice button:text-is('Enter a key')")
        page.wait_for_selector("text=A key is needed to see usage.")
        page.fill("dialog input[type=password]", "sk-good")
        page.click("dialog button:text-is('Save')")
        page.wait_for_selector(".usage td:text-is('20,981')")
        assert page.locator(".usage tbody th").all_inner_texts() == ["2026-11-20", "2026-11-21"]
        page.select_option("dialog select", "model")
        page.wait_for_selector(".usage th:text-is('one model')")
        page.keyboard.press("Escape")
        ask(page, "think please")
        assert page.locator(f"{LAST} strong").inner_text() == "linear time"
        page.reload()
        page.wait_for_selector("#model option[value=deepseek-chat]", state="attached")
        page.click(f"{LAST} button[aria-label^='View as curl']")
        code = page.locator("dialog pre").inner_text()
        assert "$SHOAL_API_KEY" in code and "sk-good" not in code


def test_without_storage_the_page_works_and_says_so(browser, api):
    context = browser.new_context()
    page = context.new_page()
    page.add_init_script("indexedDB.open = () => { throw new DOMException('no', 'SecurityError'); }")
    page.goto(api.url)
    page.wait_for_selector("#notice:has-text('keeps nothing')")
    ask(page, "echo works")
    assert page.locator(f"{LAST} .prose").inner_text() == "works"
    context.close()


def test_without_markdown_from_the_server_text_is_shown_as_it_is(visit):
    page = visit(expected="503")
    page.route("**/page/markdown", lambda route: route.fulfill(status=503, body="{}"))
    ask(page, "hostile answer")
    page.wait_for_timeout(300)
    assert "<img src=x onerror=" in page.locator(f"{LAST} .prose").inner_text()
    assert not page.locator("#thread img").count()


def test_an_errors_trace_never_reaches_the_page(visit):
    page = visit(expected="500")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=500, body="Traceback <b>"))
    begin(page, "echo x")
    page.wait_for_selector(f"{LAST} .error")
    assert page.locator(f"{LAST} .error strong").inner_text() == "The server made a mistake."
    assert "Traceback" not in page.locator("#thread").inner_text()


def test_browser_errors_are_noticed(visit, api):
    """The same eyes on a page that breaks its promises."""
    page = visit(expected="loud|tracker.test")
    page.evaluate("console.error('loud')")
    with pytest.raises(Error):
        page.evaluate("fetch('http://tracker.test/')")
    assert page.evaluate("window.broken.splice(0)")[0].startswith("connect-src")
