"""An API that plays parts: what it answers depends on the first word of the last message. For tests of the chat page.

It keeps every request body, so that a test can see what the page asked for.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from shoal.server import page

THOUGHT = "First 17 × 20 is 340. Then 17 × 4 is 68. Together that is 408, and 408 / 17 gives 24 again."
ANSWER = """Two sorted lists merge in **linear time**: look at both heads, take the smaller.

```python
def merge(a: list[int], b: list[int]) -> list[int]:
    merged, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        if a[i] <= b[j]:
            merged.append(a[i]); i += 1
        else:
            merged.append(b[j]); j += 1
    return merged + a[i:] + b[j:]
```

| step | taken from | result |
|-----:|:-----------|:-------|
| 1 | `a` | `[1]` |
| 2 | `b` | `[1, 2]` |

1. Each step takes *one* element.
2. So there are `len(a) + len(b)` of them, see [the notes][n].

[n]: https://example.org/notes
"""
HOSTILE = """<script>window.hurt = 1</script><img src=x onerror="window.hurt = 2">

[click](javascript:window.hurt=3) ![pixel](http://tracker.test/p.png)
<a href="http://x.test" onclick="window.hurt=4">a</a>

<svg onload="window.hurt=5"></svg> <iframe src="http://x.test"></iframe> <style>body { display: none }</style>

```html"><script>window.hurt=6</script>
<script>window.hurt = 7</script>
```
"""
KOREAN = """정렬된 두 리스트는 **앞에서부터** 비교하며 합칩니다. 작은 쪽을 먼저 꺼내면 됩니다.

- 시간은 두 길이의 합에 비례합니다.
- 새 리스트 하나가 필요합니다.
"""
USAGE = [
    {"group": "2026-11-20", "requests": 12, "prompt": 8123, "cached": 6016, "completion": 4210, "cost_usd": 0.00213},
    {"group": "2026-11-21", "requests": 31, "prompt": 20981, "cached": 17920, "completion": 9120, "cost_usd": 0.00471},
]


class Scripted:
    """The server on a free port, in a thread of its own: `with Scripted() as api: api.url`."""

    def __init__(self, key: str | None = None, pause: float = 0.004):
        self.key, self.pause = key, pause
        self.asked: list[dict[str, Any]] = []
        self.gone = 0  # streams whose reader went away
        self.failures = 0  # how often "flaky" still fails
        self.gate = threading.Semaphore(0)  # what waits, waits until it is released
        app = FastAPI()
        app.middleware("http")(self.guard)
        app.include_router(page.router())
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/chat/completions", self.complete, methods=["POST"])
        app.add_api_route("/usage", self.usage, methods=["GET"])
        config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> "Scripted":
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        return self

    def __exit__(self, *_) -> None:
        self.server.should_exit = True
        self.thread.join(5)

    async def guard(self, request: Request, answer: Any) -> Response:
        """As the real gate: Markdown is rendered for those with a key."""
        return (request.url.path == "/page/markdown" and self.refused(request)) or await answer(request)

    def refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return problem(401, "no API key; send it as Authorization: Bearer sk-…", "no_api_key")

    async def models(self, request: Request) -> Response:
        names = ("shoal-107m", "deepseek-chat", "deepseek-reasoner")
        data = [{"id": name, "object": "model", "owned_by": "shoal", "context_length": 4096} for name in names]
        return self.refused(request) or JSONResponse({"object": "list", "data": data})

    async def usage(self, request: Request, by: str) -> Response:
        rows = USAGE if by == "day" else [USAGE[0] | {"group": f"one {by}"}]
        return self.refused(request) or JSONResponse({"object": "list", "data": rows})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        part, _, rest = body["messages"][-1]["content"].partition(" ")
        if refused := self.refused(request):
            return refused
        if part == "busy" or (part == "flaky" and self.failures > 0):
            self.failures -= 1
            return problem(429, "30 requests a minute are allowed", "rate_limit_exceeded", {"Retry-After": "7"})
        if part == "overflow":
            return problem(400, "5,000 tokens of prompt; expected at most 4,096", "context_length_exceeded")
        return StreamingResponse(self.counted(self.play(part, rest, body["model"])), media_type="text/event-stream")

    async def counted(self, stream: AsyncIterator[str]) -> AsyncIterator[str]:
        done = False
        try:
            async for event in stream:
                yield event
            done = True
        finally:
            self.gone += not done

    async def released(self) -> None:
        while not self.gate.acquire(blocking=False):
            await asyncio.sleep(0.01)

    async def play(self, part: str, rest: str, model: str) -> AsyncIterator[str]:
        if part == "queue":
            for place in (3, 2, 1):
                yield f": queued {place}\n\n"
                await self.released()
        thought = THOUGHT if part in ("think", "slow") else ""
        texts = {"hostile": HOSTILE, "echo": rest, "한국어로": KOREAN, "forever": "word " * 4000, "long": ANSWER * 8}
        answer = texts.get(part, ANSWER)
        for name, text in (("reasoning_content", thought), ("content", answer)):
            for i, piece in enumerate(pieces(text)):
                yield event(model, {name: piece})
                await asyncio.sleep(self.pause)
                if part in ("slow", "long") and i == (10 if part == "slow" else 500):
                    await self.released()
                if part == "cut" and i == 30:
                    return
                if part == "broken" and i == 30:
                    error = {"message": "the engine failed", "code": "engine_failed"}
                    yield f"data: {json.dumps({'error': error})}\n\n"
                    return
        n_thought, n_answer = (len(list(pieces(text))) for text in (thought, answer))
        yield event(model, {}, finish="length" if part == "short" else "stop", usage=spent(n_thought, n_answer))
        yield "data: [DONE]\n\n"


def problem(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)


def pieces(text: str, size: int = 5) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def event(model: str, delta: dict[str, Any], finish: str | None = None, usage: dict[str, Any] | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {"object": "chat.completion.chunk", "model": model, "choices": [choice]}
    chunk |= {"usage": usage} if usage else {}
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def spent(thought: int, answer: int) -> dict[str, Any]:
    return {
        "prompt_tokens": 1210,
        "completion_tokens": thought + answer,
        "prompt_cache_hit_tokens": 1088,
        "prompt_cache_miss_tokens": 122,
        "completion_tokens_details": {"reasoning_tokens": thought},
        "cost_usd": 0.000312,
    }


if __name__ == "__main__":  # to look at the page by hand
    with Scripted(pause=0.02) as api:
        print(api.url)
        threading.Event().wait()
