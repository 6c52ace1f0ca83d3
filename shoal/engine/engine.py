"""The engine in this process: a thread that steps, and a queue in front of it.

    submit → inbox → waiting → running → its sink gets Steps, the last one says why it ended
                        scheduler: who computes what
                           runner: tokens → hidden states, logits
                          sampler: logits → tokens
                       speculator: hidden states → drafts for the next step

Requests and cancellations are taken in between steps, so a cancelled one ends within a step. What fails in a step ends
the requests that were in it, with finish "error", and nobody else; pages they filled are wiped and never found again.
Whenever it idles the engine checks all of its books.

What a step can't contain (books that are wrong, a thread told to end, FAULTS failed steps in a row) ends everybody, and
the engine begins anew with an empty cache. Where that keeps happening, with no whole step between, it rests before,
longer each time; while it rests, whoever submits or asks for stats is told.
"""

import logging
import random
from collections.abc import Callable, Sequence
from math import isfinite
from threading import Condition, Thread
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.engine import native, offload, sampler
from shoal.engine.cache import Cache, bytes_per_token, page_fits, pages_that_fit
from shoal.engine.disk import Disk
from shoal.engine.gather import Gatherer, Result
from shoal.engine.loader import Loader
from shoal.engine.pages import UNIT, Pages, units
from shoal.engine.request import Finish, Request, Stats, Step, Token
from shoal.engine.runner import RowByRow, Runner
from shoal.engine.scheduler import Scheduler, Work
from shoal.engine.speculate import Speculator
from shoal.engine.stream import Stream
from shoal.errors import RequestError, StorageError
from shoal.model.transformer import Transformer
from shoal.ops.dispatch import describe

log = logging.getLogger(__name__)

MAX_BATCH_TOKENS = 512  # in a step: prompts are cut into chunks so that decoding streams never wait for long
TOGETHER_SECONDS = 0.05  # of steps that are taken together: as long a cancellation may wait
IDLE_SECONDS = 0.2  # without a request, before the books are checked
FAULTS = 3  # in a row, before the engine rests
LONGEST_REST = 60  # seconds

FAILED = "the engine failed on this request; it has been logged"
UNREAD = "a part of the model could not be read from the disk; it has been logged"
DOWN = "the engine is down after a fault; the log says of what"
NOT_FINITE = "the model gave numbers that are not finite"


class Gain(NamedTuple):
    """What a stream got from a step, and what went wrong with it."""

    stream: Stream
    tokens: tuple[Token, ...]
    error: str | None


class LocalEngine:
    """Implements `Engine` (request.py) on a model's own weights; a trainer may change them in place, then `forget`."""

    def __init__(
        self,
        model: Transformer,
        memory_bytes: int | None = None,
        context: int | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        speculate: int = 0,
        deterministic: bool = False,
        disk: Disk | None = None,
        unchanged: Callable[[], None] = lambda: None,
    ):
        """`memory_bytes` are for the cache. `speculate`: how many tokens ahead the model's module may draft (0: none).

        `deterministic`: a request's tokens and log-probabilities depend on nothing but itself (see runner.RowByRow).
        `disk` keeps full pages beyond memory; it is closed with the engine. `unchanged` is called before and
        after every step; it raises StorageError where the files that weights are mapped from aren't what they were.
        """
        weight, config = model.embed.weight, model.config
        depth = speculate if config.n_mtp else 0
        n_layers = config.n_layers + (1 if depth else 0)
        self.bytes_per_token = bytes_per_token(config, n_layers, weight.dtype)
        context = min(context or config.max_positions, config.max_positions)
        n_pages = pages_that_fit(memory_bytes, self.bytes_per_token * UNIT, units(context), weight.device)
        self.model, self._unchanged, self._context = model, unchanged, min(context, n_pages * UNIT)
        self._cache = Cache(config, n_layers, n_pages, weight.dtype, weight.device)
        self._runner = _runner(model, self._cache, deterministic)
        self._speculator = Speculator(self._runner, depth) if depth else None
        self._disk, on_disk = disk, disk.has if disk else lambda key: False
        self._loader = Loader(disk, self._cache, self.bytes_per_token) if disk else None
        if disk:
            page_fits(disk.max_bytes, self.bytes_per_token * UNIT, "the cache on disk")
            disk.depends_on(n_layers, *_facts(model, self._runner, deterministic))
        ahead = max(depth, self._runner.most_steps - 1)
        self._make_scheduler = lambda: Scheduler(Pages(n_pages), max_batch_tokens, ahead, on_disk)
        self._scheduler = self._make_scheduler()
        self._live: dict[Request, Stream] = {}
        self._inbox: list[Stream] = []
        self._cancelled: list[Stream] = []
        self._arrivals = self._steps = self._tokens_in = self._tokens_cached = 0
        self._tokens_out = self._drafted = self._accepted = 0
        self._faults = 0  # since the last whole step
        self._closing = self._forgetting = self._down = False
        self._seeds = random.SystemRandom()
        self._paces: dict[int, float] = {}  # seconds of a step of about so many streams that only decode, of late
        self._wake = Condition()  # its lock guards all of the above but the tensors
        self._thread = Thread(target=self._live_on, name="engine", daemon=True)
        self._thread.start()

    @property
    def context(self) -> int:
        return self._context

    def submit(self, request: Request) -> None:
        self._check(request)
        with self._wake:
            if self._closing:
                raise RequestError("a request to a closed engine", "a running one", "start it again", code="closed")
            self._check_alive()
            assert request not in self._live, "this request is already under way"
            given = request.sampling.seed
            seed = self._seeds.getrandbits(64) if given is None else given
            self._live[request] = stream = Stream(request, self._arrivals, seed)
            self._arrivals += 1
            self._inbox.append(stream)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        with self._wake:
            if request in self._live:
                self._cancelled.append(self._live[request])
                self._wake.notify()

    def position(self, request: Request) -> int:
        with self._wake:
            stream = self._live.get(request)
            if stream is None or stream.pages:
                return 0
            queued = sum(other.order < stream.order for other in self._inbox)
            return self._scheduler.position(stream) + queued

    def stats(self) -> Stats:
        """Raises RuntimeError while the engine is down."""
        with self._wake:
            self._check_alive()
            s = self._scheduler
            return Stats(
                running=len(s.running),
                waiting=len(s.waiting) + len(self._inbox),
                pages=s.pages.n,
                pages_used=s.pages.used,
                tokens_in=self._tokens_in,
                tokens_cached=self._tokens_cached + sum(stream.cached or 0 for stream in self._live.values()),
                tokens_out=self._tokens_out,
                drafted=self._drafted,
                accepted=self._accepted,
                steps=self._steps,
                draft_speedup=self._speculator.worth.speedup if self._speculator else 1.0,
                disk_pages=self._disk.pages if self._disk else 0,
                disk_hits=self._loader.loaded if self._loader else 0,
                **offload.counted(self.model),
            )

    def forget(self) -> None:
        """The weights have changed: from the next step on, nothing computed before counts.

        Streams on their way keep their tokens and have them computed anew.
        """
        with self._wake:
            self._forgetting = True
            self._wake.notify()

    def close(self, seconds: float | None = None) -> None:
        """End everybody after the step under way, which is waited for: so many `seconds` at most."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.critical("the engine is stuck in a step and not waited for")
        elif self._disk:
            self._disk.close()
            self._disk = None

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Submit all, wait for all; their sinks are called as well. Interrupted, it cancels what still runs."""
        gatherers = [Gatherer(request) for request in requests]
        try:
            with self._wake:  # the next step meets all of them: the same requests are the same batches
                for gatherer in gatherers:
                    self.submit(gatherer.request)
            return [gatherer.result() for gatherer in gatherers]
        except BaseException:
            for gatherer in gatherers:
                self.cancel(gatherer.request)
            raise

    def _check(self, request: Request) -> None:
        n, vocab = len(request.tokens), self.model.config.vocab_size
        if not n:
            raise RequestError("no tokens", "at least one", "give a prompt", "prompt")
        assert not (request.embed and request.max_tokens), "what is embedded draws nothing"
        if request.max_tokens < 1 and not request.embed:
            raise RequestError(f"max_tokens {request.max_tokens}", "1 or more", "ask for a token", "max_tokens")
        if n + request.max_tokens > self._context:
            raise RequestError(
                f"a prompt of {n} tokens and {request.max_tokens} more",
                f"at most {self._context} together",
                f"ask for up to {self._context - n} tokens" if n < self._context else "shorten the prompt",
                "max_tokens" if n < self._context else "prompt",
                "context_length_exceeded",
            )
        if not 0 <= min(request.tokens) <= max(request.tokens) < vocab:
            fix = "use this model's tokenizer"
            raise RequestError("a token outside the vocabulary", f"0 to {vocab - 1}", fix, "prompt")
        sampler.check(request.sampling, vocab)

    def _check_alive(self) -> None:
        if not self._closing and (self._down or not self._thread.is_alive()):
            raise RuntimeError(DOWN)

    # From here on, the engine's thread.

    def _live_on(self) -> None:
        while True:
            try:
                return self._loop()
            except BaseException:  # also what would end a thread: it is the only one we have
                log.critical("the engine begins anew", exc_info=True)
                if self._loader:
                    self._loader.forget()
                self._begin_anew()

    def _loop(self) -> None:
        if self._faults:
            self._cache.clear(range(self._scheduler.pages.n))
        while True:
            with self._wake:
                if not self._wake.wait_for(self._due, IDLE_SECONDS):
                    self._scheduler.check()
                    self._wake.wait_for(self._due)
                if self._closing:
                    break
            self._step()
        self._take_in()
        for stream in list(self._live.values()):
            self._end(stream, "cancelled")

    def _due(self) -> bool:
        s = self._scheduler
        return bool(self._closing or self._forgetting or self._inbox or self._cancelled or s.running or s.waiting)

    def _begin_anew(self) -> None:
        """End all requests, keep nothing of what was computed, and rest if this isn't the first fault in a row."""
        with self._wake:
            self._faults += 1
            rest = min(2 ** (self._faults - FAULTS - 1), LONGEST_REST) if self._faults > FAULTS else 0
            streams, self._scheduler = list(self._live.values()), self._make_scheduler()
            self._live.clear()
            self._tokens_cached += sum(stream.cached or 0 for stream in streams)
            self._inbox, self._down = [], rest > 0
        for stream in streams:
            self._tell(stream, finish="error", error=FAILED)
        with self._wake:
            self._wake.wait_for(lambda: self._closing, rest)
            self._down = False

    def _step(self) -> None:
        self._take_in()
        if self._loader:
            self._loader.step(self._scheduler, self._wake)
        with self._wake:
            work = self._scheduler.schedule()
        if not work:
            if self._loader:
                self._loader.wait(TOGETHER_SECONDS)
            return
        try:
            with torch.inference_mode():
                gains = self._compute(work)
            self._faults = self._faults + 1 if all(gain.error == NOT_FINITE for gain in gains) else 0
        except Exception as e:
            self._faults += 1
            log.exception("a step of %d requests failed", len(work))
            gains = [Gain(w.stream, (), UNREAD if isinstance(e, StorageError) else FAILED) for w in work]
        self._down = self._faults >= FAULTS  # before anybody is told
        for stream, tokens, error in gains:
            if error or stream.finish:
                self._end(stream, "error" if error else stream.finish, tokens, error)
            elif tokens:
                self._tell(stream, tokens)
        if self._down:
            log.critical("the engine begins anew: %d faults in a row", self._faults)
            self._begin_anew()

    def _take_in(self) -> None:
        with self._wake:
            inbox, cancelled, self._inbox, self._cancelled = self._inbox, self._cancelled, [], []
            if self._forgetting:
                self._forgetting = False
                self._scheduler.forget()
                if self._loader:
                    self._loader.forget()
            for stream in inbox:
                self._scheduler.add(stream)
                self._tokens_in += stream.n_prompt
        for stream in inbox:
            try:
                stream.steer()
            except Exception:
                log.exception("a guide failed")
                self._end(stream, "error", error=FAILED)
        for stream in cancelled:
            self._end(stream, "cancelled")

    def _compute(self, work: list[Work]) -> list[Gain]:
        """One step of the model or a stretch of them, and what each stream got from it."""
        self._unchanged()
        start, only_decoding = perf_counter(), all(w.stream.decoding for w in work)
        chosen = [] if any(w.stream.request.routes for w in work) else None
        gains, fed, hidden = self._advance_together(work, chosen)
        steps = max(fed, default=1)
        if not gains:
            hidden_TD, logits_RV = self._runner.run(work, chosen)
            fed = [len(w.tokens) for w in work]
            gains, hidden = self._draw(work, hidden_TD, logits_RV), hidden_TD.split(fed)
        for w, routes_TLK in zip(work, torch.cat(chosen).split(fed) if chosen else ()):
            if w.stream.request.routes:
                w.stream.follow_routes(w.start, routes_TLK)
        for w, rows_TD in zip(work, hidden):
            if w.stream.request.echo:
                sampler.echo(w.stream, w.start, rows_TD, self._runner.head)
            if w.stream.request.embed:
                w.stream.pool(rows_TD)
            elif self._speculator:
                w.stream.pending.append(rows_TD[: w.stream.computed - w.start])
        whole = [gain.stream for gain in gains if not gain.error and not gain.stream.request.embed]
        seconds = perf_counter() - start
        if self._speculator:
            self._speculator.follow(whole, self._speculator.worth(len(work)))
            if only_decoding:
                seconds = perf_counter() - start
                self._speculator.worth.record(len(work), sum(len(gain.tokens) for gain in gains), seconds, steps)
        self._unchanged()  # before anybody is told
        if only_decoding:
            self._paces[pace_of(work)] = seconds / steps
        with self._wake:
            self._steps += steps
            self._tokens_out += sum(len(gain.tokens) for gain in gains)
            for stream in whole:
                self._keep_full_pages(stream)
        if self._disk:
            for stream in whole:
                self._store(self._disk, stream)
        return gains

    def _advance_together(
        self, work: Sequence[Work], chosen: list[Tensor] | None
    ) -> tuple[list[Gain], list[int], list[Tensor]]:
        """Steps in one call of the native program: how many of each stream, and their hidden states where something
        drafts. None where another than the seed has a say in a draw, or numbers aren't finite."""
        runner = self._runner
        if not isinstance(runner, native.Native) or runner.segments or len(work) > runner.most_drawn:
            return [], [], []
        if any(w.draws != 1 or not w.stream.plain for w in work):
            return [], [], []
        drafting = self._speculator and self._speculator.worth(len(work)) is not None
        pace = self._paces.get(pace_of(work), TOGETHER_SECONDS)
        steps = 1 if drafting else max(1, min(runner.most_steps, int(TOGETHER_SECONDS / pace)))
        tokens, hidden = runner.steps(work, steps, bool(self._speculator), chosen)
        gains = [self._advance(w, its, certain=True) for w, its in zip(work, tokens) if its]
        return gains, [len(its) for its in tokens] if gains else [], hidden

    def _store(self, disk: Disk, stream: Stream) -> None:
        """Offer the stream's full pages to the disk, each once."""
        for unit in range(stream.stored, stream.kept):
            if disk.wants(stream.key(unit), UNIT * self.bytes_per_token):
                disk.write(stream.key(unit), self._cache.page(stream.pages[unit]))
        stream.stored = stream.kept

    def _draw(self, work: list[Work], hidden_TD: Tensor, logits_RV: Tensor) -> list[Gain]:
        finite, gains, start, end = [isfinite(total) for total in logits_RV.sum(-1).tolist()], [], 0, 0
        if not all(finite):  # their streams end here; the draws of others must not stumble over them
            logits_RV[[r for r, whole in enumerate(finite) if not whole]] = 0
        drawn = sampler.choose(logits_RV, [row for w in work for row in sampler.rows(w.stream, w.draws)])
        fed = finite  # of all rows: others find their pages, or get them next
        if len(hidden_TD) > len(finite):
            fed = [isfinite(total) for total in hidden_TD.sum(-1).tolist()]
        for w in work:
            mine, its = slice(end, end + w.draws), slice(start, start + len(w.tokens))
            start, end = its.stop, mine.stop
            taken = [] if w.stream.request.embed else drawn[mine]
            whole = all(finite[mine]) and all(fed[its])
            gains.append(self._advance(w, taken) if whole else Gain(w.stream, (), NOT_FINITE))
        return gains

    def _advance(self, w: Work, drawn: Sequence[Token], certain: bool = False) -> Gain:
        """Take what was drawn, as long as the tokens that were fed are right: drafts by luck, or `certain` ones."""
        stream, taken, accepted, error = w.stream, [], 0, None
        if certain and stream.request.guide is None:
            stream.accept(*(token.id for token in drawn))
            stream.computed = w.start + len(drawn)
            return Gain(stream, tuple(drawn), None)
        drafts, stream.drafts = stream.drafts, []
        try:
            for i, token in enumerate(drawn):
                taken.append(token)
                stream.accept(token.id)
                right = i < len(drafts) and drafts[i].token == token.id
                accepted += right
                if stream.finish or stream.steered or not (right or certain):
                    break
        except Exception:
            log.exception("a guide failed")
            error = FAILED
        stream.computed = w.start + (len(taken) if drafts or certain else len(w.tokens))
        if drafts:
            stream.drafted += len(drafts)
            stream.accepted += accepted
            with self._wake:
                self._drafted += len(drafts)
                self._accepted += accepted
        return Gain(stream, tuple(taken), error)

    def _keep_full_pages(self, stream: Stream) -> None:
        """Let others find what this stream computed."""
        while (stream.kept + 1) * UNIT <= stream.computed:
            self._scheduler.pages.keep(stream.pages[stream.kept], stream.key(stream.kept))
            stream.kept += 1

    def _end(
        self, stream: Stream, finish: Finish | None, tokens: tuple[Token, ...] = (), error: str | None = None
    ) -> None:
        with self._wake:
            if self._live.get(stream.request) is not stream:
                return
            del self._live[stream.request]
            pages = stream.pages
            self._tokens_cached += stream.cached or 0
            if error:
                self._scheduler.pages.forget(pages)
                if self._disk:
                    self._disk.drop([stream.key(unit) for unit in range(stream.kept)])
            self._scheduler.remove(stream)
            if error:
                self._cache.clear([page for page in pages if not self._scheduler.pages.owners(page)])
        self._tell(stream, tokens, finish, error)

    def _tell(
        self, stream: Stream, tokens: tuple[Token, ...] = (), finish: Finish | None = None, error: str | None = None
    ) -> None:
        stream.told += len(tokens)
        try:
            step = Step(tokens, finish, stream.usage, error)
            if finish and not error:
                step = step._replace(hidden=stream.hidden, prompt=tuple(stream.echoed), routes=stream.routes)
            stream.request.sink(step)
        except BaseException:  # even one that would end a thread: this one isn't the sink's
            log.exception("a sink failed; its request is cancelled")
            self.cancel(stream.request)


def pace_of(work: Sequence[Work]) -> int:
    """Batches of up to twice as many streams go at one pace."""
    return len(work).bit_length()


def _runner(model: Transformer, cache: Cache, deterministic: bool) -> Runner:
    if native.takes(model):
        return native.Native(model, cache, invariant=deterministic)
    return (RowByRow if deterministic else Runner)(model, cache)


def _facts(model: Transformer, runner: Runner, deterministic: bool) -> tuple[object, ...]:
    """What numbers in a page depend on besides the model's files; to the last bit where that is promised."""
    weights = [(name, weight.dtype, weight.shape) for name, weight in model.state_dict().items()]
    if not deterministic:
        return (weights,)
    return weights, type(runner), torch.__version__, torch.get_num_threads(), describe()
