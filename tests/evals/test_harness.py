"""Budgets hold, seeds repeat, and two requests come to what one would have."""

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data.chat import question
from shoal.data.tokenizer import BOS, Tokenizer
from shoal.engine.engine import LocalEngine
from shoal.engine.gather import silent
from shoal.engine.request import Request, Sampling
from shoal.errors import ConfigError
from shoal.evals import harness
from shoal.evals.harness import Form, Rules, boxed, evaluate, seed_of, sweep
from shoal.model.presets import PRESETS
from shoal.tasks.grading import Graders
from shoal.tasks.task import extract_answer
from tests.engine import models
from tests.engine.outputs import TOKENIZER, VOCAB, output
from tests.evals.spoken import ANSWER_ID, EOS_ID, GRADERS, ITEMS, THINK_END_ID, Speaker, item

WEIGHTS = st.tuples(*[st.integers(0, 3)] * 4, st.just(2), st.just(2))
RULES = Rules(samples=3, max_tokens=60)
CONFIG = replace(PRESETS["tiny"], vocab_size=VOCAB, init_std=0.2)


def tried(engine: Any, budgets, rules: Rules = RULES, items=ITEMS):
    return sweep(engine, TOKENIZER, items, GRADERS, rules, budgets)


def flat(attempts):
    return [a for group in attempts for a in group]


@settings(max_examples=40)
@given(WEIGHTS, st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(0, 9))
def test_no_budget_is_exceeded_and_nought_is_no_thinking(weights, budgets, seed):
    for budget, attempts in zip(budgets, tried(Speaker(weights), budgets, Rules(3, max_tokens=60, seed=seed))):
        for a in flat(attempts):
            thinking, _, _ = a.completion.partition("</think>")
            assert a.thinking_tokens <= budget and a.tokens <= 60 and a.budget == budget
            assert budget or not thinking
            assert (a.answer is None) == (extract_answer(a.completion) is None)


@settings(max_examples=40)
@given(WEIGHTS, st.integers(0, 40), st.integers(0, 9))
def test_a_budget_among_others_gives_what_it_gives_alone(weights, budget, seed):
    rules = Rules(3, max_tokens=60, seed=seed)
    alone = tried(Speaker(weights), [budget], rules)[0]
    assert tried(Speaker(weights), [None, 50, budget, 0], rules)[2] == alone


@settings(max_examples=40)
@given(WEIGHTS, st.integers(0, 9))
def test_free_thinking_is_one_plain_request(weights, seed):
    speaker = Speaker(weights)
    for i, group in enumerate(tried(speaker, [None], Rules(2, max_tokens=40, seed=seed))[0]):
        for s, a in enumerate(group):
            prompt = tuple(TOKENIZER.encode_pieces((BOS, *question(ITEMS[i].prompt))))
            sampling = Sampling(seed=seed_of(seed, i, s))
            whole = speaker.run(Request(prompt, 40, silent, sampling, Form(TOKENIZER).ends))
            assert a.tokens == len(whole.tokens)
            assert a.completion == TOKENIZER.decode([t.id for t in whole.tokens], skip_special=True)


@settings(max_examples=40)
@given(WEIGHTS, st.integers(1, 30))
def test_thoughts_are_extended_to_the_least(weights, least):
    found = flat(tried(Speaker(weights), [40], Rules(3, max_tokens=60, at_least=least))[0])
    assert all(least <= a.thinking_tokens <= 40 for a in found)
    short = [a for a in flat(tried(Speaker(weights), [40], Rules(3, max_tokens=60))[0]) if a.thinking_tokens < least]
    assert not short or any(harness.WAIT in a.completion for a in found)


def test_a_curve_costs_its_longest_thoughts_and_the_answers():
    speaker, budgets = Speaker((0, 0, 1, 0, 20, 20)), [10, 20, 30, 40, 0]
    curve = [flat(attempts) for attempts in tried(speaker, budgets)]
    alone = [sum(a.thinking_tokens for a in point) for point in curve]
    answers = sum(a.tokens - a.thinking_tokens - 2 for point in curve for a in point)
    assert sum(alone) > max(alone) > 0 and speaker.fed <= 41 * len(curve[0]) + answers


def test_failures_of_a_check_are_neither_right_nor_wrong():
    broken = item("1", check=lambda answer: 1 // 0)
    attempts = flat(tried(Speaker((0, 0, 9, 0, 2, 2)), [0], Rules(20), [broken])[0])
    assert {a.outcome for a in attempts} == {"failed"}


@pytest.mark.parametrize("budgets, rules", [([48], Rules()), ([-1], Rules()), ([10], Rules(at_least=11))])
def test_budgets_that_leave_no_room_are_refused(budgets, rules):
    with pytest.raises(ConfigError):
        tried(Speaker((1, 1, 1, 1, 1, 1)), budgets, replace(rules, max_tokens=50))


def test_a_problem_longer_than_the_context_is_refused():
    with pytest.raises(ConfigError, match="a problem of"):
        tried(Speaker((1,) * 6, context=10), [None])


def test_seeds_are_of_item_and_sample_alone():
    seeds = {seed_of(seed, i, s) for seed in range(3) for i in range(20) for s in range(20)}
    assert len(seeds) == 1200 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    "text, inside",
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_box_counts(text, inside):
    assert boxed(text) == inside


FOREIGN = "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}<｜Assistant｜>"


@pytest.fixture(scope="module")
def foreign():
    with closing(Form(Tokenizer(TOKENIZER.text, chat_template=FOREIGN))) as form:
        yield form


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("so 1</think>It is\n<answer> 2 </answer> I think", "2"),
        (r"\boxed{1}</think>Thus \boxed{3}", "3"),
        ("</think>well\n the 4th \n\n", "the 4th"),
        ("it is 5", None),
        ("</think>\n", None),
    ],
)
def test_answers_of_other_chat_forms(foreign, completion, answer):
    assert foreign.answer(completion) == answer


def test_other_chat_forms_are_asked_by_their_template_and_begin_to_think(foreign):
    text = TOKENIZER.decode(foreign.prompt(ITEMS[0]))
    assert text.endswith(f"<｜User｜>{ITEMS[0].prompt}{harness.ASK}<｜Assistant｜><think>")
    assert foreign.forced == [THINK_END_ID] and foreign.ends >= {EOS_ID}


def test_budgets_hold_for_other_chat_forms_and_need_marks_of_thinking():
    other = Tokenizer(TOKENIZER.text, chat_template=FOREIGN)
    thinker: Any = Speaker((1, 0, 0, 1, 2, 2))
    found = sweep(thinker, other, ITEMS, GRADERS, RULES, [0, 5])
    for budget, attempts in zip((0, 5), found):
        assert all(a.thinking_tokens <= budget for a in flat(attempts))
        assert {a.outcome for a in flat(attempts)} <= {"right", "wrong"}
    assert any(a.outcome == "right" for a in flat(found[0]))
    bare = Tokenizer(TOKENIZER.text.replace("think>", "thunk>"), chat_template=FOREIGN)
    speaker: Any = Speaker((0, 0, 0, 3, 1, 1))
    plain = flat(sweep(speaker, bare, ITEMS, GRADERS, Rules(30), [None])[0])
    assert not any(a.thinking_tokens for a in plain) and "right" in {a.outcome for a in plain}
    with pytest.raises(ConfigError, match="no <think>"):
        sweep(speaker, bare, ITEMS, GRADERS, RULES, [4])


@pytest.fixture(scope="module")
def engine():
    with closing(LocalEngine(models.model(CONFIG))) as engine:
        yield engine


def test_a_real_engine_gives_the_same_attempts_for_the_same_seed(engine):
    with Graders() as graders:
        one, again, other = (
            evaluate(engine, TOKENIZER, ITEMS, graders, 4, 1.0, 1.0, 24, budget=8, seed=seed) for seed in (1, 1, 2)
        )
    assert one == again != other
    assert [len(group) for group in one] == [4, 4, 4] and all(a.thinking_tokens <= 8 for a in flat(one))
    assert len({a.completion for a in one[0]}) == 4


def test_a_cut_thought_goes_on_as_under_the_guide_of_the_server(engine):
    """One request with the server's guide, against ours in two."""
    rules = Rules(2, 1.0, 1.0, 24)
    for i, group in enumerate(sweep(engine, TOKENIZER, ITEMS, GRADERS, rules, [12, 5])[1]):
        for s, a in enumerate(group):
            prompt = tuple(TOKENIZER.encode_pieces((BOS, *question(ITEMS[i].prompt))))
            guide = output(thinking=True, budget=5)
            sampling = Sampling(1.0, 1.0, seed=seed_of(0, i, s))
            asked = Request(prompt, 24, silent, sampling, Form(TOKENIZER).ends, guide)
            tokens = models.ids(engine.generate([asked])[0])
            assert tokens[5:7] == [THINK_END_ID, ANSWER_ID] and a.thinking_tokens == 5
            assert a.completion == TOKENIZER.decode(tokens, skip_special=True)
