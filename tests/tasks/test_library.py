"""Questions without anything to reckon: the form of their answers is checked, and their own answers have it."""

import pickle

import pytest

from shoal.tasks import library
from shoal.tasks.catalog import TASKS, resolve
from shoal.tasks.task import draw


@pytest.fixture(autouse=True)
def few(monkeypatch):
    library.documented.cache_clear()
    monkeypatch.setattr(library, "MODULES", ("bisect", "heapq", "shlex", "textwrap", "no_such_module"))
    yield
    library.documented.cache_clear()


def test_items_answer_themselves_and_are_in_no_worked_corpus():
    (task,) = resolve("library")
    items = [draw((task,), 0, index, "train") for index in range(20)]
    assert all(item.check(item.answer) and item.content in item.prompt for item in items)
    assert len({item.content for item in items}) > 5 and "library" not in TASKS
    assert pickle.loads(pickle.dumps(items[0])).check(items[0].answer)


@pytest.mark.parametrize(
    "answer, right",
    [
        ("Wrap a paragraph, as os.path would.", True),
        ("wrap a paragraph of text.", False),
        ("Wrap a paragraph of text", False),
        ("Wrap it. Then fill it.", False),
        ("Wrap it.", False),
        ("Wrap the text and wrap the text and.", False),
        ("Wrap 문단을 of text.", False),
        ("", False),
    ],
)
def test_one_whole_sentence_is_asked_for(answer, right):
    assert library.is_sentence(answer) is right
