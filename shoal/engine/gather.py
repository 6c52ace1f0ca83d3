"""Waiting for a request: a sink that collects its steps into one result."""

from dataclasses import dataclass, replace
from threading import Event

from torch import Tensor

from shoal.engine.request import Finish, Request, Step, Token, Usage


@dataclass(frozen=True)
class Result:
    """All that a request came to."""

    tokens: tuple[Token, ...]
    finish: Finish
    usage: Usage
    error: str | None = None
    routes: Tensor | None = None  # see Request


class Gatherer:
    """A sink that waits: collects all of a request's steps, and passes them on."""

    def __init__(self, request: Request):
        self.request = replace(request, sink=self)
        self._next, self._tokens, self._done = request.sink, [], Event()

    def __call__(self, step: Step) -> None:
        self._tokens += step.tokens
        self._last = step
        try:
            self._next(step)
        finally:
            if step.finish:
                self._done.set()

    def result(self) -> Result:
        self._done.wait()
        last = self._last
        assert last.finish
        return Result(tuple(self._tokens), last.finish, last.usage, last.error, last.routes)


def silent(step: Step) -> None:
    """A sink for those who wait for the result."""
