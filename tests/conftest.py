"""Fixtures for all tests: a clean environment, real servers, an empty database per test.

Session-wide servers are shared: a test that kills, pauses or fills one starts its own from
`tests.services`.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from hypothesis import settings

from codeherd_schema.migrations import upgrade
from codeherd_schema.store import Store
from tests.services import PostgresServer, RedisServer

# Before torch is imported: its threads must not spin while others share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Time limits of single examples say more about the machine than about the code.
settings.register_profile("codeherd", deadline=None, print_blob=True)
settings.load_profile("codeherd")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = os.environ.get("CODEHERD_TEST_SEED", str(random.getrandbits(32)))


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: repeat this run with CODEHERD_TEST_SEED={config.getoption('hypothesis_seed')}"


@pytest.fixture(scope="session", autouse=True)
def _clean_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("CODEHERD_") and not name.startswith("CODEHERD_TEST_"):
                patch.delenv(name)
        yield


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Randomness that CODEHERD_TEST_SEED repeats."""
    return random.Random(f"{request.config.getoption('hypothesis_seed')} {request.node.nodeid}")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def broker_url(redis_server: RedisServer) -> str:
    """The shared Redis, emptied."""
    with socket.create_connection(("127.0.0.1", redis_server.port)) as connection:
        connection.sendall(b"FLUSHALL\r\n")
        assert connection.recv(64).startswith(b"+OK")
    return redis_server.url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def migrated_postgres_url(postgres_server: PostgresServer) -> str:
    url = postgres_server.url_of(postgres_server.create_database())
    upgrade(url)
    return url


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file to copy."""
    path = tmp_path_factory.mktemp("migrated") / "codeherd.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_url(tmp_path: Path, migrated_sqlite: Path) -> str:
    """A migrated SQLite database without jobs."""
    return f"sqlite:///{shutil.copy(migrated_sqlite, tmp_path / 'codeherd.db')}"


@pytest.fixture
def postgres_url(migrated_postgres_url: str) -> str:
    """A migrated PostgreSQL database without jobs."""
    # Emptied, not created anew: that takes ten times as long.
    with psycopg.connect(migrated_postgres_url) as connection:
        connection.execute("DELETE FROM jobs")
        connection.execute("DELETE FROM pauses")
        connection.execute("DELETE FROM backfill_runs")
    return migrated_postgres_url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A migrated database without jobs, once of each kind."""
    url: str = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    return url


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    store = Store.open(database_url, pool_size=20)
    yield store
    store.close()
