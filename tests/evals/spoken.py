"""An engine whose every token is a pure function of what came before and of the seed, and items for it."""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from shoal.data.tokenizer import ANSWER, ANSWER_END, EOS, THINK_END
from shoal.engine.gather import Result
from shoal.engine.request import Request, Token, Usage
from shoal.tasks.task import Item, Outcome
from tests.engine.outputs import TOKENIZER

THINK_END_ID, ANSWER_ID, ANSWER_END_ID, EOS_ID = map(TOKENIZER.special_id, (THINK_END, ANSWER, ANSWER_END, EOS))
WORDS = [THINK_END_ID, ANSWER_ID, ANSWER_END_ID, EOS_ID, *(TOKENIZER.encode("1")), *(TOKENIZER.encode("2"))]


class Speaker:
    """`weights` of WORDS; the other half of the interface is a real engine's."""

    def __init__(self, weights: Sequence[int], context: int = 200):
        self.words = [w for w, n in zip(WORDS, weights) for _ in range(n)]
        self.context, self.fed = context, 0

    def next(self, tokens: Sequence[int], seed: int | None) -> int:
        digest = hashlib.sha256(f"{list(tokens)} {seed}".encode()).digest()
        return self.words[int.from_bytes(digest[:4], "big") % len(self.words)]

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        return [self.run(request) for request in requests]

    def run(self, r: Request) -> Result:
        assert r.max_tokens >= 1 and len(r.tokens) + r.max_tokens <= self.context
        tokens = list(r.tokens)
        while len(tokens) < len(r.tokens) + r.max_tokens:
            tokens.append(self.next(tokens, r.sampling.seed))
            self.fed += 1
            if tokens[-1] in r.stop_tokens:
                break
        found = tokens[len(r.tokens) :]
        return Result(tuple(map(Token, found)), "stop" if found[-1] in r.stop_tokens else "length", Usage())


class InProcess:
    """Graders that trust their checks."""

    def grade(self, pairs: Sequence[tuple[Item, str | None]]) -> list[Outcome]:
        return [self.one(item, answer) for item, answer in pairs]

    def one(self, item: Item, answer: str | None) -> Outcome:
        try:
            return "right" if answer is not None and item.check(answer) else "wrong"
        except ZeroDivisionError:
            return "failed"


def item(prompt: str, answer: str = "1", level: int = 1, check: Any = None) -> Item:
    return Item("digits", level, prompt, "", answer, check or partial(str.__eq__, answer), prompt)


ITEMS = [item("12 + 3 = ?"), item("What is 7 + 8?"), item("x", "2", level=2)]
GRADERS: Any = InProcess()
