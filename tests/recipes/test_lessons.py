"""What R1's fine-tuning learns."""

from collections import Counter

from shoal.post.conversations import worked
from shoal.post.rewards import language_of, language_share
from shoal.post.selection import Selection
from shoal.recipes import _lessons, quickstart, r1
from shoal.recipes._r1 import seeded
from shoal.recipes._stages import clear
from shoal.tasks.catalog import resolve
from shoal.tasks.task import Item, extract_answer

TASKS = resolve("chain_sum,countdown")


def test_cold_starts_are_right_and_end_in_words_of_the_prompts_language():
    talks = _lessons.cold_start(TASKS, (1,), 30, seed=0)
    items = {item.prompt: item for item in _lessons.problems(TASKS, (1,), 30, seed=0)}
    assert len(talks) == len(items)
    for talk in talks:
        asked, said = talk.messages
        assert items[asked.content].split == "train" and items[asked.content].check(said.content)
        assert said.reasoning.endswith(f"So the answer is {said.content}.")
        assert language_share(said.reasoning, language_of(asked.content)) == 1.0
        assert extract_answer(f"{said.reasoning}</think><answer>{said.content}</answer>") == said.content


def test_a_korean_prompt_is_answered_in_korean():
    item = Item("sum", 1, "더하기 문제", "1+1=2", "2", str.isdigit, "1+1")
    assert language_share(_lessons.readable(item), "ko") == 1.0 and "2이다" in _lessons.readable(item)


def test_lessons_come_back_as_they_were_written(tmp_path):
    talks = _lessons.cold_start(TASKS, (1,), 5, seed=1)
    again = _lessons.lessons(_lessons.write(tmp_path / "lessons.jsonl", talks))
    assert [talk.messages for talk in again] == [talk.messages for talk in talks]


def test_no_two_stages_draw_the_same_and_the_last_is_asked_everything():
    c = seeded(r1.recipe())
    seeds = {c.cold_start.seed, c.reasoning.seed, c.samples.seed, c.tuning.seed, c.r1.seed}
    assert len(seeds) == 5 and c.r1.tasks == f"{c.tasks},library" and c.reasoning.tasks == c.tasks
    assert c.r1.rewards.preference > 0 == c.reasoning.rewards.preference


def test_the_table_of_shares_is_whole():
    assert abs(sum(r1.SHARES.values()) - 1) < 1e-9
    assert set(r1.SHARES) < set(quickstart.SHARES) and 0.9 <= sum(quickstart.SHARES.values()) <= 1


def test_answers_that_nobody_could_follow_are_not_learnt():
    prompt, good = "How many r are in merry?", "m e r r y\nSo the answer is 2."
    thoughts = [good, "x y\nSo the answer is 7.", "2", f"Look.\n{good}", f"Now.\n{good}"]
    talks = [worked(prompt, thought, "2") for thought in thoughts]
    kept = clear(Selection(talks, Counter(kept=5, wrong=3)), per_prompt=2)
    assert [talk.messages[1].reasoning for talk in kept.conversations] == [good, f"Look.\n{good}"]
    assert kept.counts == {"kept": 2, "unclear": 2, "surplus": 1, "wrong": 3}
