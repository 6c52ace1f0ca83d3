"""The ledger's schema has a version, and steps lead from each to the next. They are taken when a ledger is opened.

In one transaction, under a lock: an empty database gets today's tables, an older one the steps it lacks, and a newer
one is refused. What fails leaves the database as it was. A ledger of before there were versions is recognised by its
tables: version 1.

Whoever changes a table adds a step; a test holds tables that steps made against tables made anew. Alembic would bring
a folder of scripts, an ini file and its own command for the same; SQLAlchemy and these lines do for one small schema.
"""

from collections.abc import Callable, Sequence

from sqlalchemy import MetaData, delete, func, insert, inspect, select
from sqlalchemy.engine import Connection, Engine

from shoal.errors import ResourceError

STEPS: Sequence[Callable[[Connection], None]] = ()  # the first leads from version 1 to 2
FIRST = {"keys", "prices", "usage", "files", "batches", "batch_lines"}  # tables of version 1
LOCK = 0x53484F414C  # among PostgreSQL's advisory locks


def bring_up(engine: Engine, meta: MetaData) -> None:
    """Leave the database with the tables of `meta`. Raises ResourceError where it is newer or not a ledger."""
    latest = 1 + len(STEPS)
    with engine.connect() as db:
        if stamped(db, meta) == latest:
            return
    with engine.begin() as db:
        if engine.dialect.name == "sqlite":
            db.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            db.execute(select(func.pg_advisory_xact_lock(LOCK)))
        found = stamped(db, meta) or unstamped(db)
        for step in STEPS[found - 1 :] if found else ():
            step(db)
        meta.create_all(db)
        stands = meta.tables["schema_version"]
        db.execute(delete(stands))
        db.execute(insert(stands).values(version=latest))


def stamped(db: Connection, meta: MetaData) -> int:
    """The version that the database says it has; 0 where it says none."""
    if not inspect(db).has_table("schema_version"):
        return 0
    found, latest = db.scalar(select(func.max(meta.tables["schema_version"].c.version))), 1 + len(STEPS)
    if found is None or not 1 <= found <= latest:
        got, fix = f"a ledger of schema {found}", "use the newer shoal that wrote it, or another --db"
        raise ResourceError(got, f"schema {latest} or older", fix)
    return found


def unstamped(db: Connection) -> int:
    """1 where there is a ledger of before there were versions, 0 where there is none."""
    names = set(inspect(db).get_table_names())
    if not names & FIRST:
        return 0
    if names >= FIRST and "lease" in {column["name"] for column in inspect(db).get_columns("batches")}:
        return 1
    got, fix = "a database whose tables are not a ledger's", "give it a database of its own with --db"
    raise ResourceError(got, "a ledger, or no tables of these names", fix)
