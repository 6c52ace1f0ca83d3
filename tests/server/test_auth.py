"""Keys, rates and budgets, with a clock of our own, then through a server."""

import hmac

import pytest

from shoal.server import auth
from shoal.server.auth import Key, Keys
from shoal.server.ledger import digest
from shoal.server.problem import Problem
from tests.server.running import Running, assert_refused, until


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_03_a_comparison_happens_in_constant_time_for_unknown_keys_too(monkeypatch):
    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    keys = Keys(required=True)
    keys.rows = {"a": Key("a", "t", digest("right"))}
    assert keys.who("Bearer sk-a-right").id == "a"
    for wrong in ("sk-a-wrong", "sk-b-right", "nonsense", "sk-a-"):
        with pytest.raises(Problem) as e:
            keys.who(f"Bearer {wrong}")
        assert e.value.status == 401
    assert len(compared) == 5 and all(len(a) == len(b) == 64 for a, b in compared)


def test_so_many_requests_a_minute_and_then_a_wait(clock):
    keys, key = Keys(True, clock), Key("a", "t", requests_per_minute=3)
    for _ in range(3):
        keys.request(key)
    with pytest.raises(Problem) as e:
        keys.request(key)
    assert e.value.status == 429 and 19 <= (e.value.retry_after or 0) <= 22
    clock.now += e.value.retry_after or 0
    keys.request(key)
    with pytest.raises(Problem):
        keys.request(key)


def test_tokens_go_into_debt_and_are_paid_back(clock):
    keys, key = Keys(True, clock), Key("a", "t", tokens_per_minute=600)
    keys.allowed(key, 10, None, 100)
    keys.used(key, 0, 1200)
    with pytest.raises(Problem) as e:
        keys.allowed(key, 10, None, 100)
    assert 59 <= (e.value.retry_after or 0) <= 62
    clock.now += 61
    assert keys.allowed(key, 10, None, 100) == 100


def test_tokens_are_reserved_from_the_start_and_corrected_at_the_end(clock):
    keys, key = Keys(True, clock), Key("a", "t", tokens_per_minute=600)
    keys.take(key, 700)
    with pytest.raises(Problem, match="more than 600 tokens a minute"):
        keys.allowed(key, 10, None, 100)
    keys.used(key, 700, 50)
    assert keys.allowed(key, 10, None, 100) == 100


def test_a_budget_never_lowers_what_was_asked_for(clock):
    keys, key = Keys(True, clock), Key("a", "t", token_budget=1000)
    assert keys.allowed(key, 10, 800, 100) == 800
    assert keys.allowed(key, 10, None, 100) == 100


def test_a_budget_counts_what_is_spent_promised_and_asked(clock):
    keys, key = Keys(True, clock), Key("a", "t", token_budget=1000, spent_tokens=300)
    keys.rows = {"a": key}
    assert keys.allowed(key, 100, None, 5000) == 600, "what is left where nothing is asked for"
    assert keys.allowed(key, 100, 600, 5000) == 600
    with pytest.raises(Problem, match="at most 600 fits") as e:
        keys.allowed(key, 100, 601, 5000)
    assert e.value.status == 402
    keys.take(key, 500)
    assert keys.allowed(key, 100, None, 5000) == 100
    keys.settled("a", 500, 50)
    assert keys.allowed(keys.rows["a"], 100, None, 5000) == 550
    with pytest.raises(Problem, match="nothing is left"):
        keys.allowed(keys.rows["a"], 650, None, 5000)


@pytest.mark.slow
def test_a_server_enforces_them(tmp_path):
    with Running(tmp_path) as s:
        made = {
            "budget": s.ledger.new_key("a", token_budget=40),
            "rate": s.ledger.new_key("b", requests_per_minute=2),
            "free": s.ledger.new_key("c"),
        }
        header = {name: {"Authorization": f"Bearer {key.secret}"} for name, key in made.items()}
        until(lambda: made["free"].id in s.service.keys.rows)
        assert s.ask(headers=header["budget"]).status_code == 200  # 3 + 14
        until(lambda: s.ledger.all_keys()[1]["spent_tokens"] == 17 and not s.service.promised)
        assert_refused(s.ask(headers=header["budget"], max_tokens=21), 402, "at most 20 fits")
        assert s.ask(headers=header["budget"], max_tokens=20).status_code == 200
        until(lambda: s.service.keys.rows[made["budget"].id].spent_tokens == 34)
        answer = s.ask(headers=header["budget"])
        assert answer.json()["usage"]["completion_tokens"] == 3, "cut to what is left"
        assert [s.ask(headers=header["rate"]).status_code for _ in range(2)] == [200, 200]
        refused = s.ask(headers=header["rate"])
        assert_refused(refused, 429)
        assert int(refused.headers["retry-after"]) > 0
        assert s.ask(headers=header["free"]).status_code == 200


@pytest.mark.slow
def test_whatever_a_key_asks_counts(tmp_path):
    with Running(tmp_path) as s:
        for i, visit in enumerate(
            (
                lambda h: s.http.get("/v1/files", headers=h),
                lambda h: s.http.get("/v1/batches", headers=h),
                lambda h: s.http.post("/page/markdown", json={"texts": []}, headers=h),
                lambda h: s.ask(headers=h, model="nobody"),
            )
        ):
            key = s.ledger.new_key(str(i), requests_per_minute=2)
            until(lambda key=key: key.id in s.service.keys.rows)
            header = {"Authorization": f"Bearer {key.secret}"}
            assert [visit(header).status_code == 429 for _ in range(3)] == [False, False, True]


@pytest.mark.slow
def test_many_at_once_cannot_overdraw_a_budget(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with Running(tmp_path) as s:
        key = s.ledger.new_key("a", token_budget=100)
        until(lambda: key.id in s.service.keys.rows)
        header = {"Authorization": f"Bearer {key.secret}"}
        with ThreadPoolExecutor(12) as pool:
            statuses = list(pool.map(lambda _: s.ask(headers=header, max_tokens=20).status_code, range(12)))
        assert set(statuses) <= {200, 402} and 402 in statuses and 200 in statuses
        assert sum(r["prompt"] + r["completion"] for r in s.rows() if r["key"] == key.id) <= 100
