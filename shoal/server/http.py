"""The app: routes, under /v1, /beta and neither, over one `Service`; and the server that runs it and drains on SIGTERM.

    wire (connections) → Gate (head, key, body) → a route here → Service.admit → Answering

Routes take the body from the gate, so nothing parses JSON but `strict`. OpenAPI comes from the types in `protocol`.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic.json_schema import models_json_schema
from python_multipart.exceptions import MultipartParseError
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import ASGIApp

from shoal.errors import RequestError
from shoal.server import page
from shoal.server.answer import Answer, Vectors
from shoal.server.auth import Key
from shoal.server.batch import Batches
from shoal.server.gate import Gate
from shoal.server.ledger import NANO, now_ms, reason
from shoal.server.metrics import Metrics
from shoal.server.problem import Problem
from shoal.server.protocol import (
    Ask,
    BatchRequest,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    read,
    read_chat,
    read_completion,
    read_embedding,
)
from shoal.server.replay import Replays
from shoal.server.service import Service
from shoal.server.stream import Answering, streamed_again
from shoal.server.wire import wire

BODIES = {
    "chat": ChatRequest,
    "completion": CompletionRequest,
    "embeddings": EmbeddingRequest,
    "create_batch": BatchRequest,
}
UPLOAD = {
    "type": "object",
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": ["batch"]}},
    "required": ["file", "purpose"],
    "additionalProperties": False,
}
USAGE_BY = ("key", "model", "day")

log = logging.getLogger("shoal.server")


def build(service: Service, hosts: frozenset[str] = frozenset()) -> ASGIApp:
    """The whole ASGI app. `hosts`: names besides loopback's that it may be called by where keys are off."""
    api = Api(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        await api.batches.start()
        yield
        await api.batches.stop()
        await service.stop()

    app = FastAPI(title="Shoal", docs_url=None, redoc_url=None, lifespan=lifespan, redirect_slashes=False)
    app.openapi = lambda: described(app)
    routes = api.routes()
    app.include_router(routes, prefix="/v1")
    for prefix in ("", "/beta"):  # DeepSeek's own: the second for its FIM and prefix completion
        app.include_router(routes, prefix=prefix, include_in_schema=False)
    app.include_router(page.router())
    for path, route in (("/health", api.health), ("/ready", api.ready), ("/metrics", api.metrics_text)):
        app.add_api_route(path, route, methods=["GET"])
    for kind in (Problem, RequestError, HTTPException, SQLAlchemyError, Exception):
        app.add_exception_handler(kind, told)
    return Gate(app, service.keys, service.limits, api.metrics, hosts)


class Api:
    """The routes. Each takes the bare request; `request.state` has what the gate found out."""

    def __init__(self, service: Service):
        self.service = service
        self.metrics = Metrics(lambda: service.seen)
        self.replays = Replays(service.limits.replay_bytes, service.limits.replay_seconds)
        self.batches = Batches(service)
        self.created = now_ms() // 1000
        service.observers.append(self.metrics.observe)

    def routes(self) -> APIRouter:
        router = APIRouter()
        for method, path, route in (
            ("POST", "/chat/completions", self.chat),
            ("POST", "/completions", self.completion),
            ("POST", "/embeddings", self.embeddings),
            ("GET", "/models", self.models),
            ("GET", "/models/{model:path}", self.model),
            ("GET", "/usage", self.usage),
            ("POST", "/files", self.upload),
            ("GET", "/files", self.files),
            ("GET", "/files/{file_id}", self.file),
            ("DELETE", "/files/{file_id}", self.delete_file),
            ("GET", "/files/{file_id}/content", self.file_content),
            ("POST", "/batches", self.create_batch),
            ("GET", "/batches", self.list_batches),
            ("GET", "/batches/{batch_id}", self.batch),
            ("POST", "/batches/{batch_id}/cancel", self.cancel_batch),
        ):
            router.add_api_route(path, route, methods=[method], name=route.__name__, response_class=JSONResponse)
        return router

    async def health(self) -> Response:
        """The process answers and its engine runs: what a supervisor should watch, and restart the server by."""
        why = self.service.engine_fault
        return JSONResponse({"status": "ok" if why is None else why}, 200 if why is None else 503)

    async def ready(self) -> Response:
        """New requests would be taken."""
        why = self.service.unready
        return JSONResponse({"status": "ready" if why is None else why}, 200 if why is None else 503)

    async def metrics_text(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def chat(self, request: Request) -> Response:
        return await self.complete(request, "/v1/chat/completions", read_chat)

    async def completion(self, request: Request) -> Response:
        return await self.complete(request, "/v1/completions", read_completion)

    async def embeddings(self, request: Request) -> Response:
        return await self.complete(request, "/v1/embeddings", read_embedding)

    async def complete(self, request: Request, route: str, reader: Callable[[bytes], Ask]) -> Response:
        body, key, request_id = request.state.body, request.state.key, request.state.request_id
        ask = await self.service.beside(len(body), lambda: reader(body))
        request.state.visit.facts |= {"user": ask.user} if ask.user else {}
        name = request.headers.get("idempotency-key")
        if name is not None and (kept := self.replays.begin(key.tenant, route, name, body)) is not None:
            return streamed_again(kept.body or b"", kept.streamed)

        keep = None if name is None else partial(self.replays.finish, key.tenant, route, name, ask.stream)
        try:
            generation = await self.service.admit(ask, key, request_id, route)
        except BaseException:
            if keep is not None:
                keep(None)
            raise
        kind, turns = "chatcmpl" if ask.chat else "cmpl", self.service.turns
        answer_id = f"{kind}-{request_id.removeprefix('req-')}"
        if ask.embed:
            answer = Vectors(turns, answer_id, ask.model, ask.embed)
        else:
            answer = Answer(turns, ask.chat, answer_id, now_ms() // 1000, ask.model, ask.sampling.logprobs is not None)
        return Answering(generation, answer, self.service.limits, ask.stream, ask.include_usage, keep)

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self.described(name) for name in self.service.names]})

    async def model(self, model: str) -> Response:
        if model not in self.service.names:
            raise Problem(404, f"no such model; there are {', '.join(self.service.names)}", "model", "model_not_found")
        return JSONResponse(self.described(model))

    def described(self, name: str) -> dict[str, Any]:
        facts = {"id": name, "object": "model", "created": self.created, "owned_by": "shoal"}
        return facts | {"context_length": self.service.engine.context, "root": self.service.name}

    async def usage(self, request: Request) -> Response:
        """The asking key's sums, ?by=key, model or day."""
        by = request.query_params.get("by", "day")
        if by not in USAGE_BY:
            raise Problem(400, f"by is one of {', '.join(USAGE_BY)}", "by", "invalid_value")
        rows = await asyncio.to_thread(self.service.ledger.usage, by, 0, request.state.key.id)
        found = [{k: v for k, v in row.items() if k != "cost"} | {"cost_usd": row["cost"] / NANO} for row in rows]
        return JSONResponse({"object": "list", "data": found})

    async def upload(self, request: Request) -> Response:
        file, purpose = await self.form(request)
        return await answered(
            self.batches.files.add, tenant(request), file.filename or "file", purpose, file.file.read()
        )

    async def form(self, request: Request) -> tuple[UploadFile, str]:
        body: bytes = request.state.body

        async def chunks() -> AsyncGenerator[bytes, None]:
            yield body

        try:
            form = await MultiPartParser(request.headers, chunks(), max_files=1, max_fields=8).parse()
        except (MultiPartException, MultipartParseError, KeyError, ValueError, UnicodeDecodeError):
            raise Problem(400, "not a valid multipart form", code="invalid_form") from None
        file, purpose = form.get("file"), form.get("purpose")
        if unknown := sorted(set(form) - {"file", "purpose"}):
            raise Problem(400, f"unknown field {unknown[0][:64]!r}", unknown[0][:64], "unknown_field")
        if not isinstance(file, UploadFile) or not isinstance(purpose, str):
            raise Problem(400, "a file and its purpose are needed", "file", "missing_field")
        if "\0" in f"{file.filename}{purpose}":
            raise Problem(400, "a NUL in a name", "file", "invalid_value")
        return file, purpose

    async def files(self, request: Request) -> Response:
        return listing(await asyncio.to_thread(self.batches.files.of, tenant(request)))

    async def file(self, request: Request, file_id: str) -> Response:
        return await answered(self.batches.files.facts, tenant(request), file_id)

    async def delete_file(self, request: Request, file_id: str) -> Response:
        await asyncio.to_thread(self.batches.files.delete, tenant(request), file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def file_content(self, request: Request, file_id: str) -> Response:
        content = await asyncio.to_thread(self.batches.files.content, tenant(request), file_id)
        return Response(content, media_type="application/jsonl")

    async def create_batch(self, request: Request) -> Response:
        body, key = request.state.body, request.state.key
        if (why := self.service.unready) is not None:
            raise Problem(503, why, code="unavailable", retry_after=5)
        asked = await self.service.beside(len(body), lambda: read(BatchRequest, body))
        facts = await asyncio.to_thread(self.batches.create, key, asked)
        self.batches.begin(facts["id"])
        return JSONResponse(facts)

    async def list_batches(self, request: Request) -> Response:
        return listing(await asyncio.to_thread(self.batches.of, tenant(request)))

    async def batch(self, request: Request, batch_id: str) -> Response:
        return await answered(self.batches.facts, tenant(request), batch_id)

    async def cancel_batch(self, request: Request, batch_id: str) -> Response:
        return await answered(self.batches.cancel, tenant(request), batch_id)


async def answered(work: Callable[..., Any], *args: Any) -> Response:
    return JSONResponse(await asyncio.to_thread(work, *args))


def listing(rows: list[Any]) -> Response:
    return JSONResponse({"object": "list", "data": rows, "has_more": False})


def tenant(request: Request) -> str:
    key: Key = request.state.key
    return key.tenant


async def told(request: Request, error: Exception) -> Response:
    """Any refusal in the API's shape."""
    if isinstance(error, RequestError):
        error = Problem.of(error)
    if isinstance(error, HTTPException):
        says = {404: "no such path", 405: "no such method here"}.get(error.status_code, "not possible")
        error = Problem(error.status_code, says, code="not_found" if error.status_code == 404 else "invalid_request")
    if isinstance(error, SQLAlchemyError):
        log.error("request %s: the ledger: %s", request.state.request_id, reason(error))
        error = Problem(503, "the database can't be reached at the moment", code="unavailable", retry_after=5)
    if not isinstance(error, Problem):  # the gate logs it
        error = Problem(500, "an error of ours; the log has it by this request id", code="internal")
    response = Response(error.body(request.state.request_id), error.status)
    response.raw_headers += error.headers(request.state.request_id)
    return response


def described(app: FastAPI) -> dict[str, Any]:
    """OpenAPI with the bodies that the gate and `strict` read by hand."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version="1", routes=app.routes)
        models = [(model, "validation") for model in BODIES.values()]
        _, defined = models_json_schema(models, ref_template="#/components/schemas/{model}")  # pyright: ignore
        found.setdefault("components", {}).setdefault("schemas", {}).update(defined["$defs"])
        for methods in found["paths"].values():
            for operation in methods.values():
                name = operation["summary"].lower().replace(" ", "_")
                if model := BODIES.get(name):
                    ref = {"$ref": f"#/components/schemas/{model.__name__}"}
                    operation["requestBody"] = body_of("application/json", ref)
                elif name == "upload":
                    operation["requestBody"] = body_of("multipart/form-data", UPLOAD)
        app.openapi_schema = found
    return app.openapi_schema


def body_of(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {kind: {"schema": schema}}}


class Server(uvicorn.Server):
    """On SIGTERM or Ctrl-C: unready at once, new requests 503, open ones may end in the drain time; a second ends."""

    def __init__(self, service: Service, app: ASGIApp, host: str, port: int):
        limits = service.limits
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=wire(limits),
                ws="none",
                lifespan="on",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=limits.idle_seconds,
                timeout_graceful_shutdown=max(1, round(limits.cancel_seconds)),
                h11_max_incomplete_event_size=limits.header_bytes,
            )
        )
        self.service = service

    async def startup(self, sockets: Any = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    @property
    def address(self) -> tuple[str, int]:
        return self.servers[0].sockets[0].getsockname()[:2]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining:
            self.should_exit = self.force_exit = True
            return
        self.service.draining = True
        self.loop.call_soon_threadsafe(self.start_draining)

    def start_draining(self) -> None:
        self.drainer = self.loop.create_task(self.drain())

    async def drain(self) -> None:
        if not await self.service.idle(self.service.limits.drain_seconds):
            await self.service.cancel_all()
        self.should_exit = True
