"""Ledgers of every schema there was become today's, whole or not at all, on SQLite and on a real PostgreSQL."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import create_engine, inspect, select, text
from sqlalchemy.engine import Connection, Engine

from shoal.errors import ResourceError
from shoal.server import migrate
from shoal.server.ledger import META, USAGE, Ledger, UsageRow, checked

ROW = UsageRow("r0", 1_700_000_000_000, "k", "t", "m", "/x", 100, 64, 10, 3, 70, 270, 1100, "stop")

FIRST = """
CREATE TABLE batch_lines (batch VARCHAR(64) NOT NULL, number INTEGER NOT NULL, ok INTEGER NOT NULL,
    answer TEXT NOT NULL, PRIMARY KEY (batch, number));
CREATE TABLE batches (id VARCHAR(64) NOT NULL, tenant VARCHAR(200) NOT NULL, key VARCHAR(16) NOT NULL,
    endpoint VARCHAR(64) NOT NULL, input_file VARCHAR(64) NOT NULL, metadata TEXT, status VARCHAR(16) NOT NULL,
    created BIGINT NOT NULL, ended BIGINT, total INTEGER NOT NULL, output_file VARCHAR(64), error_file VARCHAR(64),
    model VARCHAR(256) NOT NULL, owner VARCHAR(64) NOT NULL, lease BIGINT NOT NULL, PRIMARY KEY (id));
CREATE TABLE files (id VARCHAR(64) NOT NULL, tenant VARCHAR(200) NOT NULL, name VARCHAR(256) NOT NULL,
    purpose VARCHAR(32) NOT NULL, created BIGINT NOT NULL, bytes BIGINT NOT NULL, content BYTES NOT NULL,
    PRIMARY KEY (id));
CREATE TABLE keys (id VARCHAR(16) NOT NULL, name VARCHAR(200) NOT NULL, tenant VARCHAR(200) NOT NULL,
    sha256 VARCHAR(64) NOT NULL, created BIGINT NOT NULL, revoked BIGINT, requests_per_minute INTEGER,
    tokens_per_minute BIGINT, token_budget BIGINT, spent_tokens BIGINT NOT NULL, PRIMARY KEY (id));
CREATE TABLE prices (model VARCHAR(256) NOT NULL, hit BIGINT NOT NULL, miss BIGINT NOT NULL, out BIGINT NOT NULL,
    PRIMARY KEY (model));
CREATE TABLE usage (id VARCHAR(64) NOT NULL, at BIGINT NOT NULL, key VARCHAR(16) NOT NULL,
    tenant VARCHAR(200) NOT NULL, model VARCHAR(256) NOT NULL, route VARCHAR(64) NOT NULL, prompt BIGINT NOT NULL,
    cached BIGINT NOT NULL, completion BIGINT NOT NULL, reasoning BIGINT NOT NULL, hit BIGINT NOT NULL,
    miss BIGINT NOT NULL, out BIGINT NOT NULL, cost BIGINT NOT NULL, finish VARCHAR(16) NOT NULL,
    first_token_ms BIGINT, ms BIGINT, PRIMARY KEY (id));
CREATE INDEX usage_key_at ON usage (key, at);
INSERT INTO keys VALUES ('k', 'a name', 't', 'x', 1, NULL, NULL, NULL, NULL, 7);
"""


@pytest.fixture
def engine(database):
    found = create_engine(checked(database))
    yield found
    found.dispose()


def first(engine: Engine) -> None:
    """A ledger as the first version made it, with a key in it."""
    blob = "BLOB" if engine.dialect.name == "sqlite" else "BYTEA"
    with engine.begin() as db:
        for statement in FIRST.replace("BYTES", blob).split(";")[:-1]:
            db.execute(text(statement))


def shape(engine: Engine) -> dict[str, object]:
    found = inspect(engine)
    return {
        table: (
            {(c["name"], str(c["type"]), c["nullable"]) for c in found.get_columns(table)},
            found.get_pk_constraint(table)["constrained_columns"],
            sorted((i["name"], tuple(i["column_names"])) for i in found.get_indexes(table)),
        )
        for table in found.get_table_names()
    }


def versions(engine: Engine) -> list[int]:
    with engine.connect() as db:
        return list(db.scalars(select(META.tables["schema_version"].c.version)))


def test_the_first_ledger_becomes_todays(database, engine):
    """Whoever changes a table in ledger.py without a step in migrate.py meets this test."""
    first(engine)
    Ledger(database).close()
    brought = shape(engine)
    assert versions(engine) == [1 + len(migrate.STEPS)]
    META.drop_all(engine)
    Ledger(database).close()
    assert brought == shape(engine)


def test_rows_outlive_it_and_a_second_start_changes_nothing(database, engine):
    first(engine)
    for i in range(2):
        ledger = Ledger(database)
        assert ledger.settle([replace(ROW, id=f"r{i}")]) == 1
        assert [(row["name"], row["spent_tokens"]) for row in ledger.all_keys()] == [("a name", 117 + 110 * i)]
        ledger.close()


def adds_a_column(db: Connection) -> None:
    db.execute(text("ALTER TABLE keys ADD COLUMN note VARCHAR(9) DEFAULT 'none' NOT NULL"))


def fills_it(db: Connection) -> None:
    db.execute(text("UPDATE keys SET note = 'old'"))


def fails(db: Connection) -> None:
    db.execute(text("UPDATE keys SET note = nonsense"))


def notes(engine: Engine) -> list[str]:
    with engine.connect() as db:
        return list(db.scalars(text("SELECT note FROM keys")))


def test_each_step_is_taken_once_and_in_order(database, engine, monkeypatch):
    first(engine)
    monkeypatch.setattr(migrate, "STEPS", (adds_a_column,))
    Ledger(database).close()
    assert (versions(engine), notes(engine)) == ([2], ["none"])
    monkeypatch.setattr(migrate, "STEPS", (adds_a_column, fills_it))
    Ledger(database).close()
    assert (versions(engine), notes(engine)) == ([3], ["old"])
    with engine.begin() as db:
        db.execute(text("UPDATE keys SET note = 'new'"))
    Ledger(database).close()
    assert notes(engine) == ["new"]


def test_steps_that_fail_leave_the_ledger_as_it_was(database, engine, monkeypatch):
    first(engine)
    before = shape(engine)
    monkeypatch.setattr(migrate, "STEPS", (adds_a_column, fails))
    with pytest.raises(ResourceError, match="no ledger at"):
        Ledger(database)
    assert shape(engine) == before
    monkeypatch.setattr(migrate, "STEPS", (adds_a_column, fills_it))
    Ledger(database).close()
    assert notes(engine) == ["old"]


def test_a_newer_ledger_is_refused_and_left_alone(database, engine, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr(migrate, "STEPS", (lambda db: None,) * 5)
        Ledger(database).close()
    before = shape(engine)
    with pytest.raises(ResourceError, match="schema 6") as e:
        Ledger(database)
    assert "newer shoal" in str(e.value) and (versions(engine), shape(engine)) == ([6], before)


@pytest.mark.parametrize("table", ["usage", "batches"])
def test_a_database_of_something_else_is_refused_and_left_alone(database, engine, table: str):
    with engine.begin() as db:
        db.execute(text(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY)"))
    with pytest.raises(ResourceError, match="not a ledger's"):
        Ledger(database)
    assert list(shape(engine)) == [table]


def test_other_tables_beside_it_are_no_matter(database, engine):
    with engine.begin() as db:
        db.execute(text("CREATE TABLE notes (id INTEGER PRIMARY KEY)"))
    Ledger(database).close()
    assert {"notes", "usage"} <= set(shape(engine))


@pytest.mark.parametrize("old", [False, True])
def test_many_that_start_at_once_take_the_steps_once(database, engine, monkeypatch, old: bool):
    if old:
        first(engine)
    monkeypatch.setattr(migrate, "STEPS", (adds_a_column, fills_it) if old else ())
    with ThreadPoolExecutor(8) as pool:
        for ledger in pool.map(lambda _: Ledger(database), range(8)):
            ledger.close()
    assert versions(engine) == [1 + len(migrate.STEPS)]
    if old:
        assert notes(engine) == ["old"]


@pytest.mark.multiprocess
def test_a_kill_in_the_middle_leaves_the_ledger_as_it_was(database, engine, monkeypatch):
    first(engine)
    before = shape(engine)
    code = f"""
import os, signal
from shoal.server import ledger, migrate
from tests.server.test_migrate import adds_a_column
migrate.STEPS = (adds_a_column, lambda db: os.kill(os.getpid(), signal.SIGKILL))
ledger.Ledger({database!r})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert shape(engine) == before
    monkeypatch.setattr(migrate, "STEPS", (adds_a_column, fills_it))
    ledger = Ledger(database)
    assert notes(engine) == ["old"] and ledger.settle([ROW]) == 1
    with engine.connect() as db:
        assert db.scalar(select(USAGE.c.cost)) == ROW.cost
    ledger.close()
