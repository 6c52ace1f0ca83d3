"""What a base reads of solutions: shares, languages, and nothing held out."""

from shoal.tasks.catalog import resolve
from shoal.tasks.solutions import OPENINGS, Habits, solutions
from shoal.tasks.task import draw

TASKS = resolve("chain_sum,sorting")


def test_shares_are_those_asked_for():
    found = list(solutions(TASKS, (1, 2), Habits(worked=0.4, foreign=0.5), 2000))
    shown = [reasoning for _, reasoning, _ in found if reasoning]
    assert abs(len(shown) / 2000 - 0.4) < 0.04
    english = sum(reasoning.startswith(OPENINGS["en"]) for reasoning in shown)
    assert abs(english / len(shown) - 0.5) < 0.06
    assert all(reasoning.split("\n")[0] in OPENINGS.values() and "\n" in reasoning for reasoning in shown)


def test_they_are_training_items_and_the_same_every_time():
    found = list(solutions(TASKS, (1,), Habits(), 50, seed=3))
    assert found == list(solutions(TASKS, (1,), Habits(), 50, seed=3))
    items = [draw(TASKS, 3, i, "train", (1,)) for i in range(50)]
    assert [(p, a) for p, _, a in found] == [(item.prompt, item.answer) for item in items]
