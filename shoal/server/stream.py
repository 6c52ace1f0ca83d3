"""An answer on its way: server-sent events, or one JSON object, while watching that somebody still reads.

    : queued 3                    each second while it waits for its turn (comments, which every SSE client skips)
    : keep-alive                  while nothing comes
    data: {chunk}                 as it comes; what came together is sent together
    data: {last chunk with usage}
    data: [DONE]

A client that goes is noticed by its closing connection, at once; one that stays and reads nothing by a full buffer or
`stall_seconds`. Either way the engine is told, and what was generated is billed.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoal.server.answer import DONE, Answer, Written
from shoal.server.generation import Event, Generation
from shoal.server.limits import Limits
from shoal.server.problem import Problem

SSE = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
JSON = [(b"content-type", b"application/json")]

Keep = Callable[[bytes | None], None]  # told the whole body once it was sent, or None if it never was


class Answering(Response):
    """An ASGI response. `usage_chunk`: usage in a chunk of its own (stream_options), else on the last one."""

    def __init__(
        self,
        generation: Generation,
        answer: Answer,
        limits: Limits,
        streamed: bool,
        usage_chunk: bool,
        keep: Keep | None,
    ):
        self.generation, self.answer, self.limits = generation, answer, limits
        self.streamed, self.usage_chunk, self.keep = streamed, usage_chunk, keep
        self.sent: list[bytes] = []
        self.last_sent = 0.0  # by the loop's clock
        self.sending = False
        self.status_code, self.background = 200, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.loop = asyncio.get_running_loop()
        self.last_sent = self.loop.time()
        self.work = work = asyncio.ensure_future(self.stream(send) if self.streamed else self.whole(send))
        leaving = asyncio.ensure_future(gone(receive))
        self.ticker = self.loop.call_later(self.tick_seconds, self.tick)
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.generation.cancel("gone")
                work.cancel()
            await work
        except (asyncio.CancelledError, OSError):
            self.generation.cancel("gone")
        finally:
            self.kept(None)  # where nothing was: whatever went wrong, the request may be tried again
            self.ticker.cancel()
            leaving.cancel()
            self.generation.cancel("gone")  # a no-op when it has ended

    @property
    def tick_seconds(self) -> float:
        limits = self.limits
        return min(limits.queue_seconds, limits.keep_alive_seconds, limits.stall_seconds) / 2

    def tick(self) -> None:
        """One clock for keep-alives and stalls: a timer for each token would cost more than the token."""
        quiet = self.loop.time() - self.last_sent
        if self.sending:
            if quiet > self.limits.stall_seconds:
                self.stalled()
        elif quiet > (self.limits.queue_seconds if self.position() else self.limits.keep_alive_seconds):
            self.generation.ready.set()  # with nothing to say: the writer says that
        self.ticker = self.loop.call_later(self.tick_seconds, self.tick)

    def stalled(self) -> None:
        self.generation.cancel("stalled")
        self.work.cancel()

    async def stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": SSE})
        unopened = {choice.index for choice in self.generation.choices}
        ended = 0
        while ended < len(self.generation.choices):
            events = await self.next_events(send)
            if self.generation.why == "stalled":
                raise asyncio.CancelledError
            body = []
            for event in events:
                if event.index in unopened:
                    unopened.discard(event.index)
                    body.append(self.answer.opening(event.index))
                body += [self.answer.piece(event.index, delta) for delta in event.deltas if delta.text or delta.name]
                if event.finish is not None:
                    ended += 1
                    if self.generation.problem is None:
                        body.append(self.ending(event, last=ended == len(self.generation.choices)))
            if body:
                await self.give(send, b"".join(body), more=True)
            if self.generation.problem is not None:  # after what was written down before it
                await self.break_off(send, self.generation.problem)
                return
        await self.give(send, DONE, more=False)
        self.kept(b"".join(self.sent))

    def ending(self, event: Event, last: bool) -> bytes:
        spent = self.generation.spent() if last else None
        ending = self.answer.ending(event.index, event.finish or "", None if self.usage_chunk else spent)
        return ending + self.answer.usage(spent) if spent and self.usage_chunk else ending

    async def next_events(self, send: Send) -> list[Event]:
        """What has come, at once if something has; comments until then."""
        while True:
            await self.generation.ready.wait()
            events = self.generation.drained()
            if events or self.generation.why is not None:
                return events
            place = self.position()
            comment = f": queued {place}\n\n" if place else ": keep-alive\n\n"
            await self.give(send, comment.encode(), more=True, kept=False)

    def position(self) -> int:
        request = self.generation.choices[0].request
        return 0 if request is None or self.generation.first is not None else self.generation.engine.position(request)

    async def give(self, send: Send, body: bytes, more: bool, kept: bool = True) -> None:
        """A send that waits for its reader waits until `tick` has had enough."""
        self.last_sent, self.sending = self.loop.time(), True
        await send({"type": "http.response.body", "body": body, "more_body": more})
        self.sending = False
        if kept and self.keep is not None:
            self.sent.append(body)

    def kept(self, body: bytes | None) -> None:
        keep, self.keep = self.keep, None
        if keep is not None:
            keep(body)

    async def break_off(self, send: Send, problem: Problem) -> None:
        """An error in the middle of a stream is an event, which OpenAI's clients raise."""
        self.kept(None)
        error = problem.body(self.generation.id)
        await self.give(send, b"data: " + error + b"\n\n", more=False)

    async def whole(self, send: Send) -> None:
        """A whole answer waits for its end; blank lines keep its connection alive, as DeepSeek's API sends them."""
        written = [Written() for _ in self.generation.choices]
        head: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": JSON}
        begun = False
        while not await self.gathered(written):
            if not begun:
                await send(head)
                begun = True
            await self.give(send, b"\n", more=True, kept=False)
        problem = self.generation.problem
        if problem is not None:
            self.kept(None)
            body = problem.body(self.generation.id)
            head = head | {"status": problem.status, "headers": problem.headers(self.generation.id)}
        else:
            finishes = [choice.finish or "stop" for choice in self.generation.choices]
            shape = partial(self.answer.whole, list(zip(written, finishes)), self.generation.spent())
            long = any(w.hidden or w.prompt for w in written)  # a million numbers take a second to write down
            body = await asyncio.to_thread(shape) if long else shape()
        if not begun:
            await send(head)
        await self.give(send, body, more=False)
        if problem is None:
            self.kept(b"".join(self.sent))

    async def gathered(self, written: list[Written]) -> bool:
        """Take in what comes until the end, or until it is time to keep the connection alive. Whether it is the end."""
        while True:
            await self.generation.ready.wait()
            events = self.generation.drained()
            for event in events:
                for delta in event.deltas:
                    written[event.index].add(delta)
                written[event.index].hidden += event.hidden
                written[event.index].prompt += event.prompt
                written[event.index].end += event.end
            if self.generation.problem is not None or all(c.finish for c in self.generation.choices):
                return True
            if self.loop.time() - self.last_sent > self.limits.keep_alive_seconds:
                return False


async def gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def streamed_again(body: bytes, streamed: bool) -> Response:
    """A kept answer, for a repeated idempotency key."""
    response = Response(body, 200)
    response.raw_headers += [*(SSE if streamed else JSON), (b"x-idempotent-replay", b"true")]
    return response
