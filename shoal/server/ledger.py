"""Who may ask, what a token costs, and what every request used: three tables, SQLite (WAL) or PostgreSQL.

    cost = prices.hit · cached + prices.miss · (prompt − cached) + prices.out · completion

Money is whole nanodollars: a price of $0.07 a million tokens is 70 of them a token, so nothing is ever rounded. A usage
row carries the prices of its day. Its id is the request's, so a row that is settled twice (a journal read after a kill)
is there once, and a key's `spent_tokens` moves in the same transaction.
"""

import hashlib
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from shoal.errors import ConfigError, ResourceError
from shoal.server.migrate import bring_up

NANO = 10**9
BUSY_MS = 5000

META = MetaData()
KEYS = Table(
    "keys",
    META,
    Column("id", String(16), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("tenant", String(200), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("revoked", BigInteger),
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", BigInteger),
    Column("token_budget", BigInteger),
    Column("spent_tokens", BigInteger, nullable=False, default=0),
)
PRICES = Table(
    "prices",
    META,
    Column("model", String(256), primary_key=True),
    Column("hit", BigInteger, nullable=False),
    Column("miss", BigInteger, nullable=False),
    Column("out", BigInteger, nullable=False),
)
USAGE = Table(
    "usage",
    META,
    Column("id", String(64), primary_key=True),
    Column("at", BigInteger, nullable=False),  # ms since 1970
    Column("key", String(16), nullable=False),
    Column("tenant", String(200), nullable=False),
    Column("model", String(256), nullable=False),
    Column("route", String(64), nullable=False),
    Column("prompt", BigInteger, nullable=False),
    Column("cached", BigInteger, nullable=False),
    Column("completion", BigInteger, nullable=False),
    Column("reasoning", BigInteger, nullable=False),
    Column("hit", BigInteger, nullable=False),
    Column("miss", BigInteger, nullable=False),
    Column("out", BigInteger, nullable=False),
    Column("cost", BigInteger, nullable=False),
    Column("finish", String(16), nullable=False),
    Column("first_token_ms", BigInteger),
    Column("ms", BigInteger),
    Index("usage_key_at", "key", "at"),
)
FILES = Table(
    "files",
    META,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(200), nullable=False),
    Column("name", String(256), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("content", LargeBinary, nullable=False),
)
BATCHES = Table(
    "batches",
    META,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(200), nullable=False),
    Column("key", String(16), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file", String(64), nullable=False),
    Column("metadata", Text),
    Column("status", String(16), nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("ended", BigInteger),
    Column("total", Integer, nullable=False),
    Column("output_file", String(64)),
    Column("error_file", String(64)),
    Column("model", String(256), nullable=False),
    Column("owner", String(64), nullable=False),  # the server that runs it
    Column("lease", BigInteger, nullable=False),  # until then, ms since 1970; afterwards another may take it
)
LINES = Table(
    "batch_lines",
    META,
    Column("batch", String(64), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("ok", Integer, nullable=False),
    Column("answer", Text, nullable=False),
)
Table("schema_version", META, Column("version", Integer, primary_key=True, autoincrement=False))  # migrate.py


class Prices(NamedTuple):
    """Nanodollars a token: dollars a million tokens, times a thousand."""

    hit: int = 0
    miss: int = 0
    out: int = 0

    @classmethod
    def parse(cls, text: str) -> "Prices":
        """`hit/miss/out` in dollars a million tokens, as in 0.07/0.27/1.10. Raises ConfigError."""
        try:
            values = [Decimal(part) * 1000 for part in text.split("/")]
            whole = len(values) == 3 and all(0 <= v < NANO and v == int(v) for v in values)
        except (InvalidOperation, ValueError):
            whole, values = False, []
        if not whole:
            expected = "hit/miss/out in dollars a million tokens, at most three decimals"
            raise ConfigError(f"the prices {text!r}", expected, "write them like 0.07/0.27/1.10")
        return cls(*map(int, values))

    def cost(self, prompt: int, cached: int, completion: int) -> int:
        return self.hit * cached + self.miss * (prompt - cached) + self.out * completion


@dataclass(frozen=True)
class UsageRow:
    id: str
    at: int
    key: str
    tenant: str
    model: str
    route: str
    prompt: int
    cached: int
    completion: int
    reasoning: int
    hit: int
    miss: int
    out: int
    finish: str
    first_token_ms: int | None = None
    ms: int | None = None

    @property
    def cost(self) -> int:
        return Prices(self.hit, self.miss, self.out).cost(self.prompt, self.cached, self.completion)


class NewKey(NamedTuple):
    id: str
    secret: str  # shown once, never stored


class Ledger:
    """All methods may be called from any thread, and block. Faults of the database are SQLAlchemyError."""

    def __init__(self, url: str):
        parsed = checked(url)
        try:
            self.engine = create_engine(parsed, pool_pre_ping=parsed.get_backend_name() != "sqlite")
        except ModuleNotFoundError as e:
            got = f"no driver for {parsed.get_backend_name()} ({e.name})"
            raise ResourceError(got, "psycopg, where --db names PostgreSQL", "pip install 'shoal-lm[pg]'") from None
        if parsed.get_backend_name() == "sqlite":
            event.listen(self.engine, "connect", prepare_sqlite)
        try:
            bring_up(self.engine, META)
        except SQLAlchemyError as e:
            raise ResourceError(
                f"no ledger at {parsed.render_as_string(hide_password=True)}: {reason(e)}",
                "a database that can be written",
                "check --db, the folder's permissions, and that the database runs",
            ) from None

    def new_key(
        self,
        name: str,
        tenant: str | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        token_budget: int | None = None,
    ) -> NewKey:
        """A tenant (by default the key itself) shares prefix cache, files and batches."""
        key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        row = {
            "id": key_id,
            "name": name,
            "tenant": tenant or key_id,
            "sha256": digest(secret),
            "created": now_ms(),
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "token_budget": token_budget,
            "spent_tokens": 0,
        }
        with self.engine.begin() as db:
            db.execute(insert(KEYS).values(row))
        return NewKey(key_id, f"sk-{key_id}-{secret}")

    def revoke(self, key_id: str) -> bool:
        """Whether there was such a key, not revoked yet."""
        with self.engine.begin() as db:
            which = (KEYS.c.id == key_id) & KEYS.c.revoked.is_(None)
            return db.execute(update(KEYS).where(which).values(revoked=now_ms())).rowcount == 1

    def all_keys(self) -> list[Mapping[str, Any]]:
        with self.engine.connect() as db:
            return [dict(row) for row in db.execute(select(KEYS).order_by(KEYS.c.created)).mappings()]

    def set_prices(self, model: str, prices: Prices) -> None:
        with self.engine.begin() as db:
            changed = db.execute(update(PRICES).where(PRICES.c.model == model).values(prices._asdict()))
            if not changed.rowcount:
                db.execute(insert(PRICES).values(model=model, **prices._asdict()))

    def prices(self, model: str) -> Prices | None:
        with self.engine.connect() as db:
            row = db.execute(select(PRICES.c.hit, PRICES.c.miss, PRICES.c.out).where(PRICES.c.model == model)).first()
        return None if row is None else Prices(*row)

    def settle(self, rows: Sequence[UsageRow]) -> int:
        """Put rows down once, whatever was put down before. Returns how many were new."""
        if not rows:
            return 0
        with self.engine.begin() as db:
            return settle(db, rows)

    def usage(self, by: str, since_ms: int = 0, key: str | None = None) -> list[dict[str, Any]]:
        """Sums by "key", "model" or "day" (UTC), the costliest first, or days in order."""
        groups = {"key": USAGE.c.key, "model": USAGE.c.model, "day": USAGE.c.at - USAGE.c.at % 86_400_000}
        group = groups[by].label("group")
        names = ("prompt", "cached", "completion", "reasoning", "cost")
        sums = [func.sum(USAGE.c[name]).label(name) for name in names]
        asked = select(group, func.count().label("requests"), *sums).where(USAGE.c.at >= since_ms).group_by(group)
        if key is not None:
            asked = asked.where(USAGE.c.key == key)
        asked = asked.order_by(group if by == "day" else func.sum(USAGE.c.cost).desc())
        with self.engine.connect() as db:
            rows = [{k: int(v) if k in names else v for k, v in row.items()} for row in db.execute(asked).mappings()]
        return [row | {"group": day(int(row["group"]))} for row in rows] if by == "day" else rows

    def close(self) -> None:
        self.engine.dispose()


def settle(db: Connection, rows: Sequence[UsageRow]) -> int:
    unique = {row.id: row for row in rows}
    known = set(db.scalars(select(USAGE.c.id).where(USAGE.c.id.in_(unique))))
    new = [row for name, row in unique.items() if name not in known]
    if new:
        db.execute(insert(USAGE), [asdict(row) | {"cost": row.cost} for row in new])
    spent: dict[str, int] = {}
    for row in new:
        spent[row.key] = spent.get(row.key, 0) + row.prompt + row.completion
    for key, tokens in sorted(spent.items()):
        db.execute(update(KEYS).where(KEYS.c.id == key).values(spent_tokens=KEYS.c.spent_tokens + tokens))
    return len(new)


def checked(url: str) -> URL:
    expected = "sqlite:///path.db or postgresql+psycopg://user:password@host/name"
    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError):
        raise ConfigError("a database URL that can't be read", expected, "check --db") from None
    if parsed.get_backend_name() == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise ConfigError("a ledger in memory", expected, "give it a file")
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    elif parsed.get_backend_name() != "postgresql":
        raise ConfigError(f"a database of {parsed.get_backend_name()}", expected, "use one of these")
    return parsed


def prepare_sqlite(connection: Any, _record: Any) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", f"busy_timeout={BUSY_MS}"):
        connection.execute(f"PRAGMA {pragma}")


def reason(e: SQLAlchemyError) -> str:
    """One line of a database's complaint, without SQL or parameters."""
    return str(getattr(e, "orig", None) or type(e).__name__).splitlines()[0][:200]


def digest(secret: str) -> str:
    """Secrets are 256 random bits, so one round of SHA-256 is as good as a slow hash, and costs a microsecond."""
    return hashlib.sha256(secret.encode()).hexdigest()


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def day(ms: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(ms / 1000))
