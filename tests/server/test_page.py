"""The page's files are themselves and nothing else is; Markdown comes back clean whatever goes in."""

import html.parser
import re

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from shoal.server import page


@pytest.fixture(scope="module")
def browser():
    app = FastAPI()
    app.include_router(page.router())
    return TestClient(app)


class Found(html.parser.HTMLParser):
    """Tags with attributes, and the text between them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_every_file_is_served_with_its_type_and_the_policy(browser):
    for path in page.FOLDER.iterdir():
        answer = browser.get("/" if path.name == "index.html" else f"/page/{path.name}")
        assert answer.status_code == 200 and answer.content == path.read_bytes()
        assert answer.headers["content-type"] == page.TYPES[path.suffix]
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_policy_has_no_hole():
    assert "unsafe" not in page.POLICY and "*" not in page.POLICY and "data:" not in page.POLICY


def test_a_browser_asks_again_and_is_told_that_nothing_changed(browser):
    first = browser.get("/page/main.js")
    again = browser.get("/page/main.js", headers={"If-None-Match": f'W/"other", {first.headers["etag"]}'})
    assert first.headers["cache-control"] == "no-cache"
    assert (again.status_code, again.content) == (304, b"")
    assert browser.get("/page/main.js", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("path", ["../page.py", "%2e%2e/page.py", "..%2fpage.py", "main.js%00", "", "nothing.js"])
def test_no_path_leads_elsewhere(browser, path):
    assert browser.get(f"/page/{path}").status_code == 404


def test_every_module_that_is_imported_is_there():
    for path in page.FOLDER.glob("*.js"):
        for name in re.findall(r'from "\./([\w.]+)"', path.read_text()):
            assert (page.FOLDER / name).exists(), f"{path.name} imports {name}"


def test_nothing_is_asked_of_another_host():
    for path in page.FOLDER.iterdir():
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", path.read_text())) - {"http://www.w3.org/2000/svg"}
        assert not addresses, f"{path.name}: {addresses}"


def test_no_word_is_missing_in_any_language():
    text = (page.FOLDER / "words.js").read_text()
    blocks = re.findall(r"const (\w+) = \{(.*?)\n\};", text, re.S)
    keys = {name: set(re.findall(r"(?:^|[,{]\s)\s*(\w+): [\"']", block)) for name, block in blocks}
    values = {name: dict(re.findall(r'(\w+): "((?:[^"\\]|\\.)*)"', block)) for name, block in blocks}
    assert keys.keys() == {"en", "ko", "zh"} and len(keys["en"]) > 100
    for name in ("ko", "zh"):
        assert keys[name] == keys["en"], keys[name] ^ keys["en"]
        for key, english in values["en"].items():
            assert set(re.findall(r"\{\w+\}", values[name][key])) <= set(re.findall(r"\{\w+\}", english)), key


def test_markdown_in_order_and_as_html(browser):
    answer = browser.post("/page/markdown", json={"texts": ["# a", "*b*", ""]})
    assert answer.json() == {"html": ["<h1>a</h1>\n", "<p><em>b</em></p>\n", ""]}
    assert answer.headers["cache-control"] == "no-store"


def test_code_keeps_its_language_its_spaces_and_its_signs():
    assert page.render("```py\nif a < b:\n    x & y\n```") == (
        '<pre><code class="language-py">if a &lt; b:\n    x &amp; y\n</code></pre>\n'
    )
    assert 'class="language-c++"' in page.render("```c++\nx\n```")
    assert "class" not in page.render('```"><script>\nx\n```')


def test_a_table_keeps_its_columns():
    rendered = page.render("|a|b|c|\n|:-|-:|:-:|\n|1|2|3|")
    assert re.findall(r'<td align="(\w+)">', rendered) == ["left", "right", "center"] and "style" not in rendered


def test_links_leave_no_trace_and_go_to_the_web_only():
    (_, (tag, attributes)) = Found(page.render("[x](https://a.test/?q=1&r=2)")).tags
    assert attributes == {"href": "https://a.test/?q=1&r=2", "target": "_blank", "rel": "noopener noreferrer nofollow"}
    for address in (
        "javascript:alert(1)",
        "data:text/html,x",
        "/keys",
        "//a.test",
        "file:///etc",
        "vbscript:x",
        "blob:x",
    ):
        found = Found(page.render(f"[x](<{address}>)"))
        assert all("href" not in attributes for _, attributes in found.tags), address


def test_a_picture_becomes_its_link():
    found = Found(page.render("![a cat](http://a.test/cat.png)"))
    assert [tag for tag, _ in found.tags] == ["p", "a"] and found.text.strip() == "a cat"


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<iframe srcdoc='<script>1</script>'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "<style>*{display:none}</style>",
    "<form action=http://a.test><input></form>",
    "<math><mtext></p><script>alert(1)</script>",
    "<!-- --!><script>alert(1)</script>",
    "`<script>`",
    '[x](https://a.test "onmouseover=alert(1) <b>")',
    '[x](https://a.test/"onmouseover="alert(1))',
    '![" onerror="alert(1)](x)',
    "<https://a.test/<script>>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
]
SAFE = page.TAGS


def assert_clean(rendered: str) -> None:
    for tag, attributes in Found(rendered).tags:
        assert tag in SAFE, rendered
        assert attributes.keys() <= {"href", "title", "target", "rel", "start", "align", "class"}, rendered
        assert re.match(r"https?:|mailto:", attributes.get("href") or "https:"), rendered


@pytest.mark.parametrize("text", HOSTILE)
def test_42_what_is_hostile_is_shown_and_never_run(text):
    rendered = page.render(text)
    assert_clean(rendered)
    if text.startswith("<") and not text.startswith("<https"):
        assert Found(rendered).text.strip() == text  # to the letter, as text


@given(
    st.lists(st.sampled_from([*HOSTILE, "\n", "\n\n", "- ", "> ", "```", "| a |\n|-|\n| ", "    ", "**", "]("])).map(
        "".join
    )
)
def test_no_mixture_gets_through(text):
    assert_clean(page.render(text))


@given(st.text())
def test_any_text_comes_back_clean(text):
    assert_clean(page.render(text))


@pytest.mark.parametrize(
    "body, status",
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'{"texts": "a"}', 400),
        (b'{"texts": [1]}', 400),
        (b'{"texts": [], "more": 1}', 400),
        (b'{"texts": ["\\ud800"]}', 400),
        (b'{"texts": ["\xff"]}', 400),
        (b"[" * 100_000, 400),
        (b'{"texts": [' + b'"",' * 3000 + b'""]}', 400),
        (b" " * (page.MAX_BYTES + 1), 413),
    ],
)
def test_bad_bodies_are_refused_in_the_shape_of_the_api(browser, body, status):
    answer = browser.post("/page/markdown", content=body)
    assert answer.status_code == status and answer.json()["error"]["message"]
    assert browser.post("/page/markdown", json={"texts": ["good"]}).status_code == 200
