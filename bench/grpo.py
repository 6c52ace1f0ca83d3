"""A step of reinforcement learning that every side is given: 16 prompts of 8 answers each, all of them `tokens` long.

Nothing ends an answer early, so all sides draw and learn from as many tokens. The reward is the share of an answer's
characters that are letters: it costs nothing, and answers of random weights differ in it, so all of them teach.
"""

from random import Random

PROMPTS, GROUP = 16, 8
ANSWERS = PROMPTS * GROUP
LEARNING_RATE, BETAS = 1e-5, (0.9, 0.95)


def prompt(index: int) -> str:
    """A problem as the tasks have them, some ten tokens."""
    rng = Random(index)
    return f"{rng.randrange(10, 100)} + {rng.randrange(10, 100)} = ?"


def reward(text: str) -> float:
    return sum(map(str.isalpha, text)) / max(1, len(text))
