"""Items in, attempts out: what a model makes of problems, with as much thinking as it is allowed.

    prompt <think> │ thinking … </think> │ <answer> answer </answer>
                    think(), cut at a     say(), once for every budget:
                    budget or extended    the thoughts are shared

A budget B ends the thinking after B tokens: the model is then given `</think><answer>` and goes on; with 0 it doesn't
think at all. A thought that ended by itself before is left as it is, marks included, so the form is graded too. With
`at_least` a thought that ends too early goes on after the text `wait` in place of its end (s1, arXiv 2501.19393 §3.2).

Thinking and answer are two requests without a guide, for three reasons. A guide can force and forbid a token but not
replace one that was drawn, as `wait` must. The server's (`engine/output.py`) puts `<answer>` after every `</think>`,
which would grade a form that the model may not know. And the answers of all budgets go on from one long thought: draws
depend on seed and position alone, so the first 64 tokens of 1024 are those that a budget of 64 would have drawn, and a
curve costs little more than its last point. The cache has the prefix of a group and of a thought, where it is long.

An answer is taken from a completion by one rule. Our own chat form: strictly what stands between the marks
(`tasks.task.extract_answer`). Any other template: of what follows the thinking, the inside of the last <answer>, else
of the last \\boxed{}, else the last line; such a model is asked for the first in its prompt (`ASK`).
"""

import hashlib
import re
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.data.chat import Chat, Message, question
from shoal.data.tokenizer import BOS, Tokenizer
from shoal.engine.gather import Result, silent
from shoal.engine.request import Request, Sampling
from shoal.errors import ConfigError, ModelError
from shoal.tasks.grading import Graders
from shoal.tasks.task import Item, Outcome, Task, draw, extract_answer

if TYPE_CHECKING:
    from shoal.engine.engine import LocalEngine

ASK = "\n\nEnd with the answer alone, between <answer> and </answer>."
WAIT = "\nWait,"
DRAWS = 50  # for each problem wanted, before there are said to be too few


@dataclass(frozen=True)
class Attempt:
    """One sample for one item. `tokens` are all of the completion, with marks; `budget` None: it thought freely."""

    item: Item
    completion: str
    thinking_tokens: int
    tokens: int
    answer: str | None
    outcome: Outcome
    seed: int
    budget: int | None


@dataclass(frozen=True)
class Rules:
    """How attempts are made. `max_tokens` are of a whole completion, and never more than the context has room for."""

    samples: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 1024
    at_least: int = 0
    wait: str = WAIT
    seed: int = 0


Attempts = list[list[Attempt]]  # by item, then by sample


def problems(tasks: Sequence[Task], count: int, seed: int, levels: Sequence[int] | None) -> list[Item]:
    """`count` held-out problems, none twice; in the order of tasks and levels. Fewer where there are no more."""
    found: dict[tuple[str, str], Item] = {}
    for index in range(DRAWS * count):
        item = draw(tasks, seed, index, "held_out", levels)
        found.setdefault((item.task, item.content), item)
        if len(found) == count:
            break
    names = [task.name for task in tasks]
    return sorted(found.values(), key=lambda item: (names.index(item.task), item.level))


def evaluate(
    engine: "LocalEngine",
    tokenizer: Tokenizer,
    items: Sequence[Item],
    graders: Graders,
    samples: int = 1,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int = 1024,
    budget: int | None = None,
    seed: int = 0,
) -> Attempts:
    """Every item tried `samples` times, all at once, and graded. Raises ConfigError for a budget that doesn't fit."""
    rules = Rules(samples, temperature, top_p, max_tokens, seed=seed)
    return sweep(engine, tokenizer, items, graders, rules, [budget])[0]


def sweep(
    engine: "LocalEngine",
    tokenizer: Tokenizer,
    items: Sequence[Item],
    graders: Graders,
    rules: Rules,
    budgets: Sequence[int | None],
    ends: Collection[int] = (),
) -> list[Attempts]:
    """`evaluate` for each budget, thinking once. `ends`: tokens that end a turn besides the tokenizer's own."""
    with closing(Form(tokenizer, ends)) as form:
        thoughts = begin(form, items, rules, engine.context)
        check_budgets(form, thoughts, rules, budgets)
        if form.think_end is not None:
            think(engine, form, thoughts, rules, most(budgets))
        said = say(engine, form, thoughts, rules, budgets)
        answers = {key: form.answer(tokenizer.decode(tokens, skip_special=True)) for key, tokens in said.items()}
    graded = graders.grade([(items[thoughts[key[0]].item], answer) for key, answer in answers.items()])
    outcomes = dict(zip(answers, graded, strict=True))
    found = []
    for budget in budgets:
        flat: list[Attempt] = []
        for i, thought in enumerate(thoughts):
            key = (i, *thought.until(budget, form.think_end))
            text, item = tokenizer.decode(said[key], skip_special=True), items[thought.item]
            count = len(said[key])
            flat.append(Attempt(item, text, key[1], count, answers[key], outcomes[key], thought.seed, budget))
        found.append([flat[i : i + rules.samples] for i in range(0, len(flat), rules.samples)])
    return found


def seed_of(seed: int, item: int, sample: int) -> int:
    """Of one sample: a pure function, and no two of them share their draws but by chance."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{item}:{sample}".encode()).digest()[:8], "big") >> 1


class Form:
    """How one model folder is asked and how its answers are read."""

    def __init__(self, tokenizer: Tokenizer, ends: Collection[int] = ()):
        self.tokenizer, self.chat = tokenizer, Chat(tokenizer)
        marks = self.chat.marks
        self.think, self.think_end = marks.think, marks.think_end
        self.ends = marks.ends | frozenset(ends) | ({marks.answer_end} if marks.answer_end is not None else set())
        self.forced = [mark for mark in (marks.think_end, marks.answer) if mark is not None]

    def prompt(self, item: Item) -> list[int]:
        """Leaves off inside the thinking, where the model has marks of it."""
        if self.chat.ours:
            return self.tokenizer.encode_pieces((BOS, *question(item.prompt)))
        tokens = self.chat.prompt((Message("user", item.prompt + ASK),))
        opened = self.think is None or self.chat.marks.thinking_after(tokens)
        return tokens if opened or self.think is None else [*tokens, self.think]

    def answer(self, completion: str) -> str | None:
        found = extract_answer(completion) if self.chat.ours else self._last(completion)
        return None if found is None else found.strip()

    def _last(self, completion: str) -> str | None:
        thinking, end, content = completion.rpartition("</think>")
        if self.think is not None and not end:
            return None  # it never came to an answer
        if marked := re.findall(r"<answer>(.*?)</answer>", content, re.DOTALL):
            return marked[-1]
        if (found := boxed(content)) is not None:
            return found
        lines = [line for line in content.splitlines() if line.strip()]
        return lines[-1] if lines else None

    def close(self) -> None:
        if self.chat.template:
            self.chat.template.child.close()


def boxed(text: str) -> str | None:
    """The inside of the last \\boxed{…}, braces balanced; None where there is none that closes."""
    _, found, rest = text.rpartition("\\boxed{")
    depth = 1
    for i, c in enumerate(rest):
        depth += (c == "{") - (c == "}")
        if found and not depth:
            return rest[:i]
    return None


@dataclass
class Thought:
    """`room` for the whole completion; `end` is the token that ended it, None where it was cut off."""

    item: int
    prompt: list[int]
    seed: int
    room: int
    tokens: list[int]
    end: int | None = None

    def until(self, budget: int | None, think_end: int | None) -> tuple[int, bool]:
        """(tokens of thinking, whether the answer was forced) at a budget."""
        forced = think_end is not None and budget is not None and len(self.tokens) >= budget
        return (budget or 0) if forced else len(self.tokens), forced


def begin(form: Form, items: Sequence[Item], rules: Rules, context: int) -> list[Thought]:
    """All samples of an item side by side. Raises ConfigError where the context has no room for a completion."""
    found = []
    for i, item in enumerate(items):
        prompt = form.prompt(item)
        room = min(rules.max_tokens, context - len(prompt))
        if room < 1:
            got = f"a problem of {len(prompt)} tokens ({item.task}, level {item.level})"
            raise ConfigError(got, f"fewer than the context of {context}", "choose lower levels, or another model")
        found += [Thought(i, prompt, seed_of(rules.seed, i, s), room, []) for s in range(rules.samples)]
    return found


def check_budgets(form: Form, thoughts: Sequence[Thought], rules: Rules, budgets: Sequence[int | None]) -> None:
    """Raises ConfigError for a budget without room for an answer, or for a model that has no marks of thinking."""
    given = [budget for budget in budgets if budget is not None]
    if (given or rules.at_least) and form.think_end is None:
        got = "a budget of thinking for a model whose chat has no <think>"
        raise ConfigError(got, "a model that marks its thinking", "leave the budgets out")
    left = min((thought.room for thought in thoughts), default=0) - len(form.forced) - 1
    if given and not 0 <= min(given) <= max(given) <= left:
        got = f"budgets {', '.join(map(str, given))}"
        raise ConfigError(
            got, f"0 to {left} tokens, so that an answer fits behind", "ask for less, or raise max_tokens"
        )
    if rules.at_least > (left if None in budgets else min(given, default=left)):
        got = f"at least {rules.at_least} tokens of thinking"
        raise ConfigError(got, "no more than the smallest budget", "ask for less, or leave the smaller budgets out")


def most(budgets: Sequence[int | None]) -> int | None:
    """The largest budget; None where one of them is free."""
    given = [budget for budget in budgets if budget is not None]
    return max(given) if len(given) == len(budgets) else None


def think(engine: "LocalEngine", form: Form, thoughts: Sequence[Thought], rules: Rules, budget: int | None) -> None:
    """Think, up to the budget; what ends before `at_least` goes on after `wait`."""
    assert form.think_end is not None
    stops = form.ends | {form.think_end}
    wait = form.tokenizer.encode(rules.wait)
    going = [(t, t.room if budget is None else min(budget, t.room)) for t in thoughts]
    while going := [(t, limit) for t, limit in going if t.end is None and len(t.tokens) < limit]:
        results = engine.generate([request(t, t.tokens, limit, rules, stops) for t, limit in going])
        for (t, limit), result in zip(going, results, strict=True):
            t.tokens += drawn(result)
            if result.finish == "stop":
                t.end = t.tokens.pop()
                if len(t.tokens) < rules.at_least:
                    t.tokens, t.end = (t.tokens + wait)[:limit], None


Key = tuple[int, int, bool]  # thought, tokens of its thinking, whether the answer was forced


def say(
    engine: "LocalEngine", form: Form, thoughts: Sequence[Thought], rules: Rules, budgets: Sequence[int | None]
) -> dict[Key, list[int]]:
    """The whole completions: for each thought as it stands at each budget, the answer behind it."""
    before: dict[Key, list[int]] = {}
    for budget in budgets:
        for i, t in enumerate(thoughts):
            n, forced = t.until(budget, form.think_end)
            end = form.forced if forced else [t.end] if t.end is not None else []
            before[i, n, forced] = t.tokens[:n] + end
    owed = {
        key: tokens
        for key, tokens in before.items()
        if len(tokens) < thoughts[key[0]].room and (key[2] or thoughts[key[0]].end == form.think_end)
    }
    asked = [request(thoughts[i], tokens, thoughts[i].room, rules, form.ends) for (i, _, _), tokens in owed.items()]
    results = engine.generate(asked)
    return before | {k: tokens + drawn(r) for (k, tokens), r in zip(owed.items(), results, strict=True)}


def request(thought: Thought, so_far: list[int], limit: int, rules: Rules, stops: frozenset[int]) -> Request:
    """Go on behind what the thought's completion has so far, which may grow to `limit`."""
    sampling = Sampling(rules.temperature, rules.top_p, seed=thought.seed)
    return Request((*thought.prompt, *so_far), limit - len(so_far), silent, sampling, stops)


def drawn(result: Result) -> list[int]:
    if result.error:
        raise ModelError(result.error, "finite numbers from the model", "check the weights")
    return [token.id for token in result.tokens]
