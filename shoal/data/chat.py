"""Turns as token pieces: what a question, its reasoning and its answer look like to the model.

    <bos> <User> prompt <Assistant> <think> reasoning </think> <answer> answer </answer> <eos>

BOS and EOS belong to the document, not to the turn, and are added where documents are (`corpus.py`).
"""

from shoal.data.tokenizer import ANSWER, ANSWER_END, ASSISTANT, THINK, THINK_END, USER


def question(prompt: str) -> tuple[str, ...]:
    """What the model is given; it goes on with its reasoning."""
    return USER, prompt, ASSISTANT, THINK


def worked(prompt: str, reasoning: str, answer: str) -> tuple[str, ...]:
    """A question with its worked answer, as training text."""
    return *question(prompt), reasoning, THINK_END, ANSWER, answer, ANSWER_END
