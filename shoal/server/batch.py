"""Offline work: a file of requests in, a file of answers out, behind everyone who waits.

Lines run a few at a time at low priority. An answer and its usage row are written in one transaction, so a batch that a
kill interrupts goes on at the lines that have no answer, and each line is answered once and billed once. (That is why
lines are not journaled: nothing of them is sent before they stand.)

Servers may share a ledger. A batch belongs to the one that holds its lease, renewed while it lives; one of the same
model takes over what a dead server left, when its lease has run out. No more batches are in memory than lines can run.
"""

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import func, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from shoal.errors import RequestError
from shoal.server import files, strict
from shoal.server.answer import Answer, Written
from shoal.server.auth import LOCAL, Key
from shoal.server.generation import Generation, engine_failed
from shoal.server.ledger import BATCHES, LINES, now_ms, reason, settle
from shoal.server.problem import Problem, new_id
from shoal.server.protocol import BatchRequest, read_chat, read_completion
from shoal.server.service import Service

PRIORITY = 10
PARALLEL = 4
MAX_LINES = 50_000
RETRY = (429, 503)
TRIES = 3  # of a line that the engine fails on
LIVE = ("in_progress", "cancelling")
READERS = {"/v1/chat/completions": read_chat, "/v1/completions": read_completion}

log = logging.getLogger("shoal.server")


class Line(NamedTuple):
    number: int
    custom_id: str
    body: bytes


class Batches:
    """Methods without `async` block."""

    def __init__(self, service: Service):
        self.service, self.ledger = service, service.ledger
        self.files = files.Files(service.ledger, service.limits.stored_bytes)
        self.id, self.lease_ms = new_id("server"), round(1000 * service.limits.lease_seconds)
        self.loaded, self.slots = asyncio.Semaphore(PARALLEL), asyncio.Semaphore(PARALLEL)
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Go on with what a stop or a kill interrupted, now and whenever another server's lease runs out."""
        self.watcher = asyncio.create_task(self.watch())

    async def stop(self) -> None:
        tasks = [self.watcher, *self.tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await asyncio.to_thread(self.release)
        except SQLAlchemyError as e:
            log.warning("leases of batches are left to run out: %s", reason(e))

    async def watch(self) -> None:
        while True:
            try:
                for batch_id in await asyncio.to_thread(self.claim, list(self.tasks)):
                    self.begin(batch_id)
            except SQLAlchemyError as e:
                log.warning("batches can't be claimed: %s", reason(e))
            await asyncio.sleep(self.service.limits.lease_seconds / 3)

    def claim(self, running: list[str]) -> list[str]:
        """Renew the leases of what runs; the batches of this model that nobody holds are ours from now on."""
        now, found = now_ms(), []
        ours = (BATCHES.c.owner == self.id) & BATCHES.c.id.in_(running)
        free = (BATCHES.c.lease < now) & BATCHES.c.status.in_(LIVE) & (BATCHES.c.model == self.service.name)
        with self.ledger.engine.begin() as db:
            db.execute(update(BATCHES).where(ours).values(lease=now + self.lease_ms))
            for batch_id in list(db.scalars(select(BATCHES.c.id).where(free & BATCHES.c.id.not_in(running)))):
                mine = update(BATCHES).where(free & (BATCHES.c.id == batch_id))
                if db.execute(mine.values(owner=self.id, lease=now + self.lease_ms)).rowcount:
                    found.append(batch_id)
        return found

    def release(self) -> None:
        with self.ledger.engine.begin() as db:
            db.execute(update(BATCHES).where(BATCHES.c.owner == self.id).values(lease=0))

    def begin(self, batch_id: str) -> None:
        self.tasks[batch_id] = asyncio.create_task(self.run(batch_id))
        self.tasks[batch_id].add_done_callback(lambda _: self.tasks.pop(batch_id, None))

    def create(self, key: Key, asked: BatchRequest) -> Mapping[str, Any]:
        """Raises RequestError or Problem for a file that can't be run."""
        lines = read_lines(self.files.content(key.tenant, asked.input_file_id), asked.endpoint)
        row = {
            "id": new_id("batch"),
            "tenant": key.tenant,
            "key": key.id,
            "endpoint": asked.endpoint,
            "input_file": asked.input_file_id,
            "metadata": json.dumps(asked.metadata),
            "status": "in_progress",
            "created": now_ms(),
            "total": len(lines),
            "model": self.service.name,
            "owner": self.id,
            "lease": now_ms() + self.lease_ms,
        }
        most = self.service.limits.live_batches
        with self.ledger.engine.begin() as db:
            live = select(func.count()).where((BATCHES.c.tenant == key.tenant) & BATCHES.c.status.in_(LIVE))
            if (db.scalar(live) or 0) >= most:
                raise Problem(429, f"{most} batches are under way already", code="too_many_batches", retry_after=60)
            db.execute(insert(BATCHES).values(row))
        return self.facts(key.tenant, row["id"])

    def of(self, tenant: str) -> list[Mapping[str, Any]]:
        with self.ledger.engine.connect() as db:
            ids = list(
                db.scalars(select(BATCHES.c.id).where(BATCHES.c.tenant == tenant).order_by(BATCHES.c.created.desc()))
            )
        return [self.facts(tenant, batch_id) for batch_id in ids]

    def facts(self, tenant: str, batch_id: str) -> Mapping[str, Any]:
        with self.ledger.engine.connect() as db:
            row = db.execute(select(BATCHES).where(owned(tenant, batch_id))).mappings().first()
            if row is None:
                raise missing()
            counted = select(LINES.c.ok, func.count()).where(LINES.c.batch == batch_id).group_by(LINES.c.ok)
            counts = [(int(ok), int(n)) for ok, n in db.execute(counted)]
        return shown(dict(row), dict(counts))

    def cancel(self, tenant: str, batch_id: str) -> Mapping[str, Any]:
        """No other line begins; lines under way are finished, and what is answered stays answered and billed."""
        with self.ledger.engine.begin() as db:
            which = owned(tenant, batch_id) & (BATCHES.c.status == "in_progress")
            db.execute(update(BATCHES).where(which).values(status="cancelling"))
        return self.facts(tenant, batch_id)

    def row(self, batch_id: str) -> Mapping[str, Any]:
        with self.ledger.engine.connect() as db:
            return dict(db.execute(select(BATCHES).where(BATCHES.c.id == batch_id)).mappings().one())

    def open_lines(self, row: Mapping[str, Any]) -> list[Line]:
        lines = read_lines(self.files.content(row["tenant"], row["input_file"]), row["endpoint"])
        with self.ledger.engine.connect() as db:
            done = set(db.scalars(select(LINES.c.number).where(LINES.c.batch == row["id"])))
        return [line for line in lines if line.number not in done]

    async def run(self, batch_id: str) -> None:
        try:
            async with self.loaded:
                row = await asyncio.to_thread(self.row, batch_id)
                lines = iter(await asyncio.to_thread(self.open_lines, row))
                async with asyncio.TaskGroup() as group:
                    for _ in range(PARALLEL):
                        group.create_task(self.work(batch_id, lines))
                if (await asyncio.to_thread(self.row, batch_id))["owner"] == self.id:
                    await asyncio.to_thread(self.finish, batch_id)
        except (RequestError, Problem) as e:  # its file was deleted meanwhile
            log.warning("batch %s failed: %s", batch_id, e)
            await asyncio.to_thread(self.end, batch_id, "failed")
        except (SQLAlchemyError, ExceptionGroup):
            log.exception("batch %s stands still until its lease has run out", batch_id)

    async def work(self, batch_id: str, lines: Any) -> None:
        """Line after line, shared with the others of this batch; all batches together fill so many slots."""
        for line in lines:
            request_id, failures = new_id("req"), 0
            while True:
                async with self.slots:
                    row = await asyncio.to_thread(self.row, batch_id)
                    if row["status"] != "in_progress" or row["owner"] != self.id:
                        return
                    problem = await self.answer(row, line, request_id, last=failures == TRIES - 1)
                if problem is None:
                    break
                failures += problem.code == "engine_failed"
                await asyncio.sleep(problem.retry_after or 1)  # without a slot: others' lines go on

    async def answer(self, row: Mapping[str, Any], line: Line, request_id: str, last: bool) -> Problem | None:
        """None where the line has its answer, for good or bad; else why it has to be tried again."""
        try:
            await self.generate(row, line, self.key(row), request_id)
            return None
        except Problem as problem:
            if problem.status in RETRY and (problem.code != "engine_failed" or not last):
                return problem
            body = problem.body(request_id)
            await asyncio.to_thread(self.put, row["id"], line, request_id, problem.status, body, None)
            return None

    def key(self, row: Mapping[str, Any]) -> Key:
        """The key it was made with, as it is now. Raises Problem where that may ask no more."""
        key = self.service.keys.rows.get(row["key"]) if row["key"] else LOCAL
        if key is None or key.revoked:
            raise Problem(401, "an API key that is unknown or revoked", code="invalid_api_key")
        return key

    async def generate(self, row: Mapping[str, Any], line: Line, key: Key, request_id: str) -> None:
        """One line's answer, put down with what it cost. Raises Problem."""
        self.service.keys.request(key)
        ask = await self.service.beside(len(line.body), lambda: READERS[row["endpoint"]](line.body))
        if ask.stream:
            raise Problem(400, "a line of a batch can't stream", "stream", "invalid_value")
        ended = asyncio.Event()

        def end(generation: Generation) -> None:
            ended.set()

        generation = await self.service.admit(ask, key, request_id, row["endpoint"], PRIORITY, end)
        try:
            await ended.wait()
        except asyncio.CancelledError:  # a stop: the line has no answer, costs nothing, and runs again
            generation.billed = False
            generation.cancel("shutdown")
            raise
        finally:
            generation.billed = generation.billed and generation.why is None
            used = self.service.account(generation)
            spent = used.prompt + used.completion if generation.billed else 0
            self.service.keys.settled(key.id, generation.promised, spent)
        if generation.why is not None:  # half an answer is none
            raise generation.problem or engine_failed()
        written = [Written() for _ in generation.choices]
        for event in generation.drained():
            for delta in event.deltas:
                written[event.index].add(delta)
            written[event.index].prompt += event.prompt
            written[event.index].end += event.end
        shape = Answer(
            self.service.turns,
            ask.chat,
            new_id("chatcmpl" if ask.chat else "cmpl"),
            now_ms() // 1000,
            ask.model,
            ask.sampling.logprobs is not None,
        )
        finishes = [choice.finish or "stop" for choice in generation.choices]
        body = shape.whole(list(zip(written, finishes)), generation.spent())
        await asyncio.to_thread(self.put, row["id"], line, request_id, 200, body, used)

    def put(self, batch_id: str, line: Line, request_id: str, status: int, body: bytes, used: Any) -> None:
        """The line's answer and what it cost, together or not at all."""
        answer = json.loads(body)
        whole = {
            "id": request_id,
            "custom_id": line.custom_id,
            "response": {"status_code": status, "request_id": request_id, "body": answer},
            "error": None if status == 200 else answer["error"],
        }
        row = {"batch": batch_id, "number": line.number, "ok": int(status == 200), "answer": json.dumps(whole)}
        with self.ledger.engine.begin() as db:
            if used is not None:
                settle(db, [used])
            db.execute(insert(LINES).values(row))

    def finish(self, batch_id: str) -> None:
        """Answers of good lines into one file, of bad ones into another, in the order of the input."""
        with self.ledger.engine.begin() as db:
            row = db.execute(select(BATCHES).where(BATCHES.c.id == batch_id)).mappings().one()
            made: dict[str, str | None] = {}
            for ok, name in ((1, "output"), (0, "error")):
                which = (LINES.c.batch == batch_id) & (LINES.c.ok == ok)
                answers = list(db.scalars(select(LINES.c.answer).where(which).order_by(LINES.c.number)))
                content = "".join(f"{answer}\n" for answer in answers).encode()
                file = f"{batch_id}_{name}.jsonl"
                made[name] = files.add(db, row["tenant"], file, "batch_output", content) if answers else None
            status = "cancelled" if row["status"] == "cancelling" else "completed"
            values = {"status": status, "output_file": made["output"], "error_file": made["error"], "ended": now_ms()}
            db.execute(update(BATCHES).where(BATCHES.c.id == batch_id).values(values))

    def end(self, batch_id: str, status: str) -> None:
        with self.ledger.engine.begin() as db:
            db.execute(update(BATCHES).where(BATCHES.c.id == batch_id).values(status=status, ended=now_ms()))


def read_lines(content: bytes, endpoint: str) -> list[Line]:
    """Raises Problem 400 that names the line. What a line asks is checked when it runs."""
    found, seen = [], set()
    for number, raw in enumerate(content.splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            line = strict.parse(raw)
        except Problem as e:
            raise bad(number, e.message) from None
        custom_id, body = line.get("custom_id"), line.get("body")
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 256 or custom_id in seen:
            raise bad(number, "custom_id has to be a text of its own")
        if line.get("method") != "POST" or line.get("url") != endpoint or not isinstance(body, dict):
            raise bad(number, f"method POST, url {endpoint} and a body are needed")
        seen.add(custom_id)
        found.append(Line(number, custom_id, json.dumps(body).encode()))
        if len(found) > MAX_LINES:
            raise bad(number, f"more than {MAX_LINES:,} requests")
    if not found:
        raise Problem(400, "a file without requests", "input_file_id", "empty")
    return found


def bad(number: int, why: str) -> Problem:
    return Problem(400, f"line {number}: {why}", "input_file_id", "invalid_file")


def owned(tenant: str, batch_id: str) -> Any:
    return (BATCHES.c.id == batch_id) & (BATCHES.c.tenant == tenant)


def missing() -> RequestError:
    expected, fix = "the id of a batch of yours", "list them at /v1/batches"
    return RequestError("no such batch", expected, fix, "batch_id", "batch_not_found")


def shown(row: Mapping[str, Any], counts: Mapping[int, int]) -> Mapping[str, Any]:
    ended = None if row["ended"] is None else row["ended"] // 1000
    return {
        "id": row["id"],
        "object": "batch",
        "endpoint": row["endpoint"],
        "errors": None,
        "input_file_id": row["input_file"],
        "completion_window": "24h",
        "status": row["status"],
        "output_file_id": row["output_file"],
        "error_file_id": row["error_file"],
        "created_at": row["created"] // 1000,
        "in_progress_at": row["created"] // 1000,
        "completed_at": ended if row["status"] == "completed" else None,
        "cancelled_at": ended if row["status"] == "cancelled" else None,
        "failed_at": ended if row["status"] == "failed" else None,
        "request_counts": {"total": row["total"], "completed": counts.get(1, 0), "failed": counts.get(0, 0)},
        "metadata": json.loads(row["metadata"] or "null"),
    }
