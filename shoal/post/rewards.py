"""What an answer is worth: rules, each between 0 and 1, weighed by the recipe. No learnt judge for reasoning (R1-Zero).

    accuracy    1 for the right answer                              (the task's grader; R1, section 2.2)
    format      1 for `reasoning</think><answer>answer</answer>` and nothing else
    language    the share of the reasoning's words that are in the prompt's language, of right answers only (R1's
                language consistency reward: a fluent wrong answer earns nothing by it)
    preference  how good it is to read, by rules or by a judge      (`judge.py`; R1's last stage; the loop adds it)

A word's language is told by its script, which is enough to see English, Korean and Chinese mixed; a reasoning without
words (only digits and signs) is consistent.
"""

import re
from collections import Counter
from dataclasses import dataclass

from shoal.errors import ConfigError
from shoal.tasks.task import Outcome, extract_answer

SCRIPTS = {
    "ko": r"[\uac00-\ud7a3\u1100-\u11ff\u3130-\u318f]+",
    "ja": r"[\u3040-\u30ff]+",
    "zh": r"[\u4e00-\u9fff]",  # one character, about a word
    "ru": r"[\u0400-\u04ff]+",
    "en": r"[A-Za-z]{2,}",  # any Latin; single letters are variables
}
WORDS = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in SCRIPTS.items()))


@dataclass(frozen=True)
class RewardConfig:
    accuracy: float = 1.0
    format: float = 0.0
    language: float = 0.0
    preference: float = 0.0

    def __post_init__(self):
        for name in ("accuracy", "format", "language", "preference"):
            if not 0 <= getattr(self, name) < float("inf"):
                got = f"rewards.{name} = {getattr(self, name)}"
                raise ConfigError(got, "a number from 0", f"set --rewards.{name} to such a number")


def reward(config: RewardConfig, prompt: str, completion: str, outcome: Outcome) -> float:
    right = float(outcome == "right")
    value = config.accuracy * right
    if config.format:
        value += config.format * well_formed(completion)
    if config.language:
        value += config.language * right * language_share(thinking(completion), language_of(prompt))
    return value


def well_formed(completion: str) -> float:
    return float(extract_answer(completion) is not None)


def thinking(completion: str) -> str:
    return completion.partition("</think>")[0]


def languages(text: str) -> Counter[str]:
    """How many words of each language."""
    return Counter(str(match.lastgroup) for match in WORDS.finditer(text))


def language_of(prompt: str) -> str:
    """Of most of its words; English where it has none."""
    found = languages(prompt)
    return found.most_common(1)[0][0] if found else "en"


def language_share(text: str, language: str) -> float:
    """The share of words in `language`; 1 without words."""
    found = languages(text)
    return found[language] / total if (total := found.total()) else 1.0


def consistent(prompt: str, completion: str) -> bool:
    """Whether the thinking is wholly in the prompt's language."""
    return language_share(thinking(completion), language_of(prompt)) == 1.0
