"""Servers for a herd that the tests of a module share: a database of each kind, and a Redis.

Owns: their lives. What a test breaks in them, it mends.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from codeherd_schema.migrations import upgrade
from tests.chaos.null_herd import NullHerd
from tests.services import PostgresServer, RedisServer, wait_until


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def module_database_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path
) -> Iterator[str]:
    """A migrated database for all tests of a module, once of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{shutil.copy(migrated_sqlite, tmp_path_factory.mktemp('database') / 'codeherd.db')}"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    with server.database() as url:
        upgrade(url)
        yield url


@pytest.fixture(scope="module")
def module_redis() -> Iterator[RedisServer]:
    """A Redis for all tests of a module, which may pause it."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def herd(shared_herd: NullHerd) -> Iterator[NullHerd]:
    """The herd that a module's tests share, each of which gets it whole."""
    shared_herd.mend()
    yield shared_herd
    wait_until(lambda: shared_herd.strays() == [], "lost processes to end")
