import json
from collections import Counter

import pytest

from shoal.errors import ConfigError
from shoal.tasks.catalog import resolve
from shoal.tasks.curriculum import Curriculum

TASKS = resolve("chain_sum,countdown")


def drawn(curriculum: Curriculum, count: int = 2000) -> Counter:
    return Counter(curriculum.choose(3, i) for i in range(count))


def test_what_is_half_solved_is_asked_most_and_nothing_is_dropped():
    curriculum = Curriculum(TASKS, (1, 2))
    for _ in range(60):
        curriculum.record("chain_sum", 1, 1.0)
        curriculum.record("countdown", 2, 0.0)
        curriculum.record("countdown", 1, 0.5)
    counts = drawn(curriculum)
    assert set(counts) == {(t.name, level) for t in TASKS for level in (1, 2)}
    for asked in (("countdown", 1), ("chain_sum", 2)):
        for rare in (("chain_sum", 1), ("countdown", 2)):
            assert counts[asked] > 5 * counts[rare]


def test_even_asks_everything_alike():
    curriculum = Curriculum(TASKS, even=True)
    curriculum.record("chain_sum", 1, 1.0)
    counts = drawn(curriculum)
    assert len(counts) == 10 and max(counts.values()) < 1.4 * min(counts.values())


def test_a_curriculum_goes_on_from_its_state_exactly():
    one, other = Curriculum(TASKS), Curriculum(TASKS)
    for i in range(50):
        one.record(*one.choose(1, i), (i % 7) / 6)
    other.load(json.loads(json.dumps(one.state())))
    assert [one.choose(1, i) for i in range(50, 100)] == [other.choose(1, i) for i in range(50, 100)]
    one.record("countdown", 3, 1 / 3)
    other.record("countdown", 3, 1 / 3)
    assert one.state() == other.state()


def test_levels_that_no_task_has_are_refused():
    with pytest.raises(ConfigError, match="levels"):
        Curriculum(TASKS, (9,))
