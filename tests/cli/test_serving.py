"""serve, keys and usage as a user calls them: what they print, what they refuse, and what a server does with them."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from shoal.cli import keys, serve, sizes, usage
from shoal.cli.main import run_verb
from shoal.errors import ConfigError, ResourceError
from shoal.server.ledger import Ledger, UsageRow


@pytest.fixture
def db(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/ledger.db"


def made(db, capsys, *flags) -> str:
    assert keys.main(["new", "a name", "--db", db, *flags]) == 0
    return capsys.readouterr().out.strip()


def test_a_key_is_printed_once_listed_without_its_secret_and_revoked(db, capsys):
    secret = made(db, capsys, "--token-budget", "1_000_000", "--tenant", "team")
    assert re.fullmatch(r"sk-[0-9a-f]{12}-[\w-]{43}", secret)
    assert keys.main(["ls", "--db", db]) == 0
    listed = capsys.readouterr().out
    assert secret.split("-")[1] in listed and secret.split("-", 2)[2] not in listed and "1,000,000" in listed
    assert keys.main(["revoke", secret, "--db", db]) == 0
    with pytest.raises(ConfigError, match="no active key"):
        keys.main(["revoke", secret, "--db", db])
    assert run_verb("keys", ["revoke", "nobody", "--db", db]) == 2


def test_usage_as_a_table_and_as_csv(db, capsys):
    key = made(db, capsys).split("-")[1]
    row = UsageRow("r", 1_700_000_000_000, key, "t", "=cmd()", "/x", 100, 64, 10, 3, 70, 270, 1100, "stop")
    Ledger(db).settle([row, replace(row, id="s", key="")])
    assert usage.main(["--db", db]) == 0
    assert "a name" in capsys.readouterr().out
    assert usage.main(["--by", "model", "--csv", "--db", db]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert rows[0]["model"] == "'=cmd()", "a spreadsheet must not run it"
    assert (rows[0]["prompt"], float(rows[0]["cost_usd"])) == ("200", 2 * row.cost / 1e9)
    assert usage.main(["--by", "day", "--since", "2024-01-01", "--db", db]) == 0
    assert "nothing used" in capsys.readouterr().out
    with pytest.raises(ConfigError):
        usage.main(["--since", "yesterday", "--db", db])


def test_prices_that_are_none_are_said_before_a_model_is_looked_for(tmp_path, db):
    with pytest.raises(ConfigError, match="the prices '1/2'"):
        serve.main([str(tmp_path / "nothing"), "--prices", "1/2", "--port", "0", "--db", db])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_keys_are_required_wherever_others_can_reach(host):
    with pytest.raises(ConfigError, match="keys"):
        serve.keys_required(host, "off")
    assert serve.keys_required(host, None) and serve.keys_required(host, "required")


def test_keys_on_loopback_are_a_choice():
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert not serve.keys_required(host, None) and not serve.keys_required(host, "off")
        assert serve.keys_required(host, "required")


def test_sizes():
    assert (sizes.size("6GiB"), sizes.size("1.5kb"), sizes.size("12B")) == (6 * 2**30, 1500, 12)
    assert sizes.size("0") == 0 and sizes.size("6442450944") == 6 * 2**30
    for text in ("", "GiB", "6XB", "-1GiB", "1e9", "8", "4090"):
        with pytest.raises(ConfigError):
            sizes.size(text)


def test_a_port_that_was_left_to_us_is_one_that_can_be_named():
    port = serve.free_port("127.0.0.1", 0)
    assert port and serve.free_port("127.0.0.1", port) == port


def test_a_port_in_use_is_said_before_a_model_is_read(db):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(ResourceError, match="port"):
            serve.main(["/no/such/model", "--port", port, "--db", db])


@contextmanager
def serving(model, *flags):
    """`shoal serve` as a process of its own, until SIGTERM: a client of it."""
    import httpx

    command = [sys.executable, "-m", "shoal.cli.main", "serve", str(model), "--port", "18473", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        client = httpx.Client(base_url="http://127.0.0.1:18473", timeout=60)
        for _ in range(600):
            try:
                if client.get("/ready").status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None, process.communicate()
                time.sleep(0.1)
        yield client
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


@pytest.fixture
def saved(tmp_path):
    """A folder with a tiny model."""
    import torch

    from shoal.data.tokenizer import Tokenizer
    from shoal.model import hf
    from shoal.model.presets import PRESETS
    from shoal.model.transformer import Transformer

    tokenizer = Tokenizer.train(["def add(a, b):\n    return a + b\n" * 20], 400)
    model = Transformer(replace(PRESETS["tiny"], vocab_size=512, max_positions=512)).init_weights(0)
    hf.save(model.set_dtype(torch.bfloat16), tmp_path / "model", bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.multiprocess
def test_serve_a_model_ask_it_and_see_what_it_cost(saved, db, capsys):
    secret = made(db, capsys)
    flags = ["--keys", "required", "--prices", "0.07/0.27/1.10", "--cache", "16MiB", "--threads", "1", "--db", db]
    with serving(saved, *flags) as client:
        asked = {"model": "model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
        header = {"Authorization": f"Bearer {secret}"}
        answer = client.post("/v1/chat/completions", json=asked, headers=header).json()
        assert answer["usage"]["cost_usd"] > 0
    assert usage.main(["--by", "model", "--csv", "--db", db]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert float(rows[0]["cost_usd"]) == pytest.approx(answer["usage"]["cost_usd"], abs=1e-6)


@pytest.mark.multiprocess
def test_a_conversation_is_cached_across_restarts(saved, db, tmp_path):
    asked = {"model": "model", "messages": [{"role": "user", "content": "add " * 200}], "max_tokens": 5, "seed": 1}
    on_disk = ["--cache-disk", "16MiB", "--cache-folder", str(tmp_path / "pages")]
    answers = []
    for _ in range(2):
        with serving(saved, "--cache", "16MiB", "--threads", "1", "--db", db, *on_disk) as client:
            answers.append(client.post("/v1/chat/completions", json=asked).json())
    first, again = answers
    assert first["usage"]["prompt_cache_hit_tokens"] == 0 and again["usage"]["prompt_cache_hit_tokens"] >= 128
    assert first["choices"][0]["message"] == again["choices"][0]["message"]
