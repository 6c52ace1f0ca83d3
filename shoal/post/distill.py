"""Distillation: a teacher's samples become a student's lessons (R1, section 2.4: fine-tuning alone, no reinforcement).

    prompts ──teacher──▶ answers.jsonl ──select──▶ conversations ──sft──▶ student

Here is what leads to the fine-tuning: the prompts, asking for what is missing, what it cost, and the student to start
from. On-policy distillation, in which the student writes and the teacher judges, is `on_policy.py`.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from shoal.data.tokenizer import Tokenizer
from shoal.errors import ConfigError, ModelError
from shoal.model.config import ModelConfig
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.post.answers import Answer, Answers
from shoal.post.config import DistillConfig
from shoal.post.conversations import items, rows, text, wrong
from shoal.post.selection import Prompt
from shoal.post.teacher import Teacher
from shoal.train.stop import Stop

SAY_EVERY = 100  # answers


@dataclass(frozen=True)
class Cost:
    """In tokens and dollars."""

    answers: int
    tokens_in: int
    tokens_out: int
    usd: float

    def __str__(self) -> str:
        price = f", ${self.usd:,.2f}" if self.usd else ""
        return f"{self.answers:,} answers, {self.tokens_in:,} tokens in, {self.tokens_out:,} out{price}"


def prompts_of(source: str, seed: int, levels: Sequence[int] | None = None) -> list[Prompt]:
    """A JSONL file of `{"prompt": …}` or `{"messages": …}` (its first user's turn), or tasks with a count.

    Each once. Raises DataError, ConfigError.
    """
    if not source:
        raise ConfigError("no prompts", "what to ask", "give --prompts FILE.jsonl or --prompts addition:500")
    if Path(source).is_file() or (source.endswith(".jsonl") and ":" not in source):
        found = [Prompt(prompt_in(row, where)) for where, row in rows(Path(source))]
    else:
        found = [Prompt(item.prompt, item) for item in items(source, seed, levels)]
    unique = list({prompt.text: prompt for prompt in found}.values())
    if not unique:
        raise ConfigError(f"{source} without a prompt", "at least one", "look at the file")
    return unique


def prompt_in(row: dict, where: str) -> str:
    messages = row.get("messages")
    if isinstance(messages, list):
        asked = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
        found = asked[0] if asked else None
    else:
        found = row.get("prompt")
    if not (prompt := text(found, where, "prompt")):
        raise wrong(where, "no prompt", '{"prompt": "…"}')
    return prompt


def collect(
    teacher: Teacher, prompts: Sequence[Prompt], samples: int, answers: Answers, say: Callable[[str], None]
) -> bool:
    """Ask for what is not on file. False where somebody asked to stop before all was there."""
    every = [(prompt.text, sample) for prompt in prompts for sample in range(samples)]
    missing = [one for one in every if answers.get(*one) is None]
    say(f"asking   for {len(missing):,} answers of {len(every):,}; {len(every) - len(missing):,} are on file")
    if not missing:
        return True
    with Stop(say) as stop, closing(teacher.ask(missing)) as asking:
        for number, answer in enumerate(asking, 1):
            answers.add(answer)
            if number % SAY_EVERY == 0:
                say(f"asking   {number:,} of {len(missing):,} came")
            if stop.asked:
                return False
    return True


def cost_of(answers: Sequence[Answer], config: DistillConfig) -> Cost:
    tokens_in, tokens_out = sum(a.prompt_tokens for a in answers), sum(a.completion_tokens for a in answers)
    usd = (tokens_in * config.endpoint.usd_in + tokens_out * config.endpoint.usd_out) / 1e6
    return Cost(len(answers), tokens_in, tokens_out, usd)


def fresh_student(preset: str, vocab_size: int, seed: int, context: int) -> Transformer:
    """A preset's shape with this vocabulary, its weights drawn anew, on the CPU. Raises ConfigError."""
    return Transformer(student_config(preset, vocab_size, context)).init_weights(seed)


def student_config(preset: str, vocab_size: int, context: int) -> ModelConfig:
    config = replace(PRESETS[preset], vocab_size=vocab_size)
    if context > config.max_positions:
        got = f"batch.context {context} for {preset}, a model of {config.max_positions} positions"
        raise ConfigError(got, "no longer samples than it has positions", "lower --batch.context")
    return config


def require_one_vocabulary(teacher: Transformer, of_teacher: Tokenizer, student: Transformer, of_student: Tokenizer):
    """Raises ModelError where a token's number means something else to the two, or one knows more of them."""
    same = of_teacher.full.get_vocab(with_added_tokens=True) == of_student.full.get_vocab(with_added_tokens=True)
    sizes = teacher.config.vocab_size, student.config.vocab_size
    if not same or sizes[0] != sizes[1]:
        got = f"vocabularies of {sizes[0]:,} (teacher) and {sizes[1]:,} (student) tokens that are not the same"
        fix = "take a student of the teacher's family, or leave out --on-policy and learn from samples"
        raise ModelError(got, "one vocabulary: the teacher judges the student's own tokens", fix)
