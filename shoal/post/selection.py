"""Which of a teacher's answers a student should learn: right, whole, readable, each once (rejection sampling).

Every answer gets one verdict, the first of VERDICTS that fits, so the counts add up to what was asked and nothing
disappears unseen. An answer is right when the task's own check says so; prompts without a task are not graded.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.evals.harness import boxed
from shoal.post.answers import Answer
from shoal.post.config import KeepConfig
from shoal.post.conversations import Conversation, worked
from shoal.post.rewards import language_of, language_share
from shoal.tasks.grading import Graders
from shoal.tasks.task import Item

VERDICTS = {
    "refused": "the teacher refused the prompt",
    "cut off": "no end within max_tokens, or nothing said",
    "wrong": "the check says so, or there is no answer to check",
    "failed": "the check itself failed",
    "repeats": "a line comes again and again",
    "language": "in another language",
    "long": "more characters than wanted",
    "duplicate": "said before",
    "surplus": "more than wanted for its prompt",
    "kept": "to be learnt",
}


@dataclass(frozen=True)
class Prompt:
    """`item` grades the answers, where there is one."""

    text: str
    item: Item | None = None


@dataclass(frozen=True)
class Selection:
    conversations: list[Conversation]
    counts: Counter[str]  # by verdict

    def __str__(self) -> str:
        return ", ".join(f"{self.counts[verdict]:,} {verdict}" for verdict in VERDICTS if self.counts[verdict])


def select(prompts: Sequence[Prompt], answers: Sequence[Answer], graders: Graders, config: KeepConfig) -> Selection:
    """In the order of the answers."""
    items = {prompt.text: prompt.item for prompt in prompts}
    said = [lesson(answer, items[answer.prompt] is not None) for answer in answers]
    graded = [(i, item) for i, answer in enumerate(answers) if (item := items[answer.prompt]) is not None]
    outcomes = dict(zip((i for i, _ in graded), graders.grade([(item, said[i][1]) for i, item in graded])))
    taken, seen, counts, kept = Counter(), set(), Counter(), []
    for i, (answer, (reasoning, content)) in enumerate(zip(answers, said, strict=True)):
        verdict = fault(answer, reasoning, content, outcomes.get(i), config)
        lesson_key = (answer.prompt, reasoning, content)
        if verdict is None and lesson_key in seen:
            verdict = "duplicate"
        if verdict is None and taken[answer.prompt] == config.per_prompt:
            verdict = "surplus"
        counts[verdict or "kept"] += 1
        if verdict is None and content is not None:
            taken[answer.prompt] += 1
            seen.add(lesson_key)
            kept.append(worked(answer.prompt, reasoning, content, f"sample {answer.sample} of {answer.prompt[:60]!r}"))
    return Selection(kept, counts)


def fault(answer: Answer, reasoning: str, content: str | None, outcome: str | None, config: KeepConfig) -> str | None:
    """The first verdict against one answer, as it stands alone."""
    text = f"{reasoning}\n{content or ''}"
    if answer.finish == "refused":
        return "refused"
    if answer.finish != "stop" or not answer.content:
        return "cut off"
    if outcome in ("wrong", "failed"):
        return outcome
    if most_repeated(text) > config.repeats:
        return "repeats"
    language = language_of(answer.prompt) if config.language == "prompt" else config.language
    if language != "any" and language_share(text, language) < config.language_share:
        return "language"
    return "long" if len(text) > config.characters else None


def lesson(answer: Answer, graded: bool) -> tuple[str, str | None]:
    """(reasoning, what to say) as a student should learn it; None where a graded answer has none to check.

    A graded one says nothing but the answer, so that it can be graded again; prose before it counts as reasoning where
    the teacher showed none.
    """
    if not graded:
        return answer.reasoning, answer.content
    prose, found = final_answer(answer.content)
    return answer.reasoning or prose, found


def final_answer(content: str) -> tuple[str, str | None]:
    """(what stands before it, the answer): the inside of the last <answer>, else of the last \\boxed, else all."""
    if content.rstrip().endswith("</answer>"):
        prose, opened, inside = content.rstrip().removesuffix("</answer>").rpartition("<answer>")
        if opened:
            return prose.strip(), inside.strip()
    prose, opened, _ = content.rpartition("\\boxed{")
    return (prose.strip(), boxed(content)) if opened else ("", content.strip() or None)


def most_repeated(text: str) -> int:
    """How often the commonest line comes."""
    lines = Counter(line.strip() for line in text.splitlines() if line.strip())
    return max(lines.values(), default=0)
