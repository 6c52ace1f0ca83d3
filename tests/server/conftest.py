"""What the tests of this room share: a server that most of them ask (nothing may change it), and databases."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from secrets import token_hex
from tempfile import TemporaryDirectory

import pytest
from sqlalchemy import create_engine, make_url

from tests.server.running import Running


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Nothing a test does to it may change what the next one sees."""
    with Running(tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture(scope="session")
def postgres():
    """SHOAL_TEST_POSTGRES, or a server of our own in a temporary folder, where PostgreSQL is installed.

    Not in pytest's folder: for root, PostgreSQL runs as another user, and every session of pytest that begins closes
    that folder to others.
    """
    if url := os.environ.get("SHOAL_TEST_POSTGRES"):
        yield url
        return
    pytest.importorskip("psycopg")
    if not shutil.which("initdb") or not shutil.which("pg_ctl"):
        pytest.skip("no PostgreSQL here")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory() as folder:
        user = "postgres" if os.getuid() == 0 else None
        if user:
            shutil.chown(folder, user)

        def run(*command: str) -> None:
            null = subprocess.DEVNULL
            subprocess.run(command, check=True, stdout=null, stderr=null, cwd="/", user=user)

        run("initdb", "-D", f"{folder}/data", "-U", "shoal", "--auth=trust", "-N")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-D", f"{folder}/data", "-o", options, "-l", f"{folder}/log", "-w", "start")
        yield f"postgresql://shoal@127.0.0.1:{port}/postgres"
        run("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")


@pytest.fixture
def on_postgres(postgres) -> Iterator[str]:
    """The URL of an empty database there."""
    server = create_engine(postgres.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    name = f"test_{token_hex(8)}"
    with server.connect() as db:
        db.exec_driver_sql(f"CREATE DATABASE {name}")
        yield make_url(postgres).set(database=name).render_as_string(hide_password=False)
        db.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    server.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def database(request, tmp_path) -> str:
    """The URL of an empty one, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.db"
    return request.getfixturevalue("on_postgres")
