"""The ledger: whole nanodollars, every request once, on SQLite and on a real PostgreSQL server where there is one."""

import sys
import threading
from dataclasses import replace

import pytest

from shoal.errors import ConfigError, ResourceError
from shoal.server.ledger import Ledger, Prices, UsageRow
from tests.server.running import NAME, Running, until

ROW = UsageRow("r0", 1_700_000_000_000, "k", "t", "m", "/x", 100, 64, 10, 3, 70, 270, 1100, "stop")


@pytest.fixture
def ledger(database):
    found = Ledger(database)
    yield found
    found.close()


def test_a_cost_is_exact():
    prices = Prices.parse("0.07/0.27/1.10")
    assert prices == (70, 270, 1100)
    assert prices.cost(1_000_000, 250_000, 2_000_000) == (70 * 250_000 + 270 * 750_000 + 1100 * 2_000_000)
    assert ROW.cost == 64 * 70 + 36 * 270 + 10 * 1100


@pytest.mark.parametrize("text", ["", "1/2", "1/2/3/4", "a/b/c", "-1/0/0", "nan/0/0", "0.0001/0/0", "1e30/0/0"])
def test_prices_that_are_none(text):
    with pytest.raises(ConfigError):
        Prices.parse(text)


@pytest.mark.parametrize("url", ["", "nonsense", "sqlite://", "sqlite:///:memory:", "mysql://x/y", "oracle://x"])
def test_urls_that_lead_nowhere(url):
    with pytest.raises(ConfigError):
        Ledger(url)


def test_a_missing_driver_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ResourceError, match=r"shoal-lm\[pg\]"):
        Ledger("postgresql://u:secret@127.0.0.1:1/x")


def test_a_database_that_is_not_there_is_one_clear_error_without_its_password(tmp_path):
    with pytest.raises(ResourceError, match="no ledger at") as e:
        Ledger("postgresql://u:secret@127.0.0.1:1/x?connect_timeout=2")
    assert "secret" not in str(e.value)


def test_keys_come_and_go(ledger):
    key_id, secret = ledger.new_key("a name", "a tenant", 10, 20, 30)
    row = ledger.all_keys()[0]
    limits = (row["requests_per_minute"], row["tokens_per_minute"], row["token_budget"])
    assert (row["id"], row["name"], row["tenant"], limits) == (key_id, "a name", "a tenant", (10, 20, 30))
    assert secret.startswith(f"sk-{key_id}-") and secret.split("-", 2)[2] not in str(row)
    assert ledger.revoke(key_id) and not ledger.revoke(key_id) and not ledger.revoke("nobody")
    assert ledger.all_keys()[0]["revoked"] is not None
    assert ledger.all_keys()[0]["tenant"] != ledger.new_key("b").id


def test_a_row_settled_twice_stands_once_and_spends_once(ledger):
    key_id, _ = ledger.new_key("a")
    rows = [replace(ROW, id=f"r{i}", key=key_id) for i in range(5)]
    assert ledger.settle(rows[:3]) == 3 and ledger.settle(rows) == 2 and ledger.settle(rows) == 0
    assert ledger.settle([]) == 0 and ledger.settle([replace(ROW, id="z", key=key_id)] * 2) == 1
    used = ledger.usage("key")[0]
    assert (used["group"], used["requests"], used["prompt"], used["cost"]) == (key_id, 6, 600, 6 * ROW.cost)
    assert ledger.all_keys()[0]["spent_tokens"] == 6 * 110


def test_sums_by_key_model_and_day(ledger):
    day = 86_400_000
    rows = [
        replace(ROW, id=f"{k}{m}{d}", key=k, model=m, at=ROW.at + d * day) for k in "ab" for m in "xyz" for d in (0, 1)
    ]
    ledger.settle(rows)
    assert [r["requests"] for r in ledger.usage("key")] == [6, 6]
    assert sorted(r["group"] for r in ledger.usage("model")) == ["x", "y", "z"]
    days = ledger.usage("day")
    assert [r["group"] for r in days] == ["2023-11-14", "2023-11-15"] and days[0]["completion"] == 60
    assert ledger.usage("day", since_ms=ROW.at + day)[0]["requests"] == 6
    assert ledger.usage("model", key="a")[0]["requests"] == 2


def test_prices_can_change_and_old_rows_keep_theirs(ledger):
    assert ledger.prices("m") is None
    ledger.set_prices("m", Prices(1, 2, 3))
    ledger.settle([ROW])
    ledger.set_prices("m", Prices(10, 20, 30))
    assert ledger.prices("m") == (10, 20, 30) and ledger.usage("model")[0]["cost"] == ROW.cost


def test_two_writers_lose_nothing(ledger):
    key_id, _ = ledger.new_key("a")

    def write(name: str) -> None:
        for i in range(20):
            ledger.settle([replace(ROW, id=f"{name}{i}", key=key_id)])

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.usage("key")[0]["requests"] == 60 and ledger.all_keys()[0]["spent_tokens"] == 60 * 110


@pytest.mark.slow
def test_a_server_on_postgresql(tmp_path, on_postgres):
    with Running(tmp_path) as s:
        s.ledger.close()
    with Running(tmp_path / "b", url=on_postgres) as s:
        assert s.ask().status_code == 200
        assert [(r["prompt"], r["completion"], r["model"]) for r in s.rows()] == [(3, 14, NAME)]
        until(lambda: s.ledger.all_keys()[0]["spent_tokens"] == 17)
