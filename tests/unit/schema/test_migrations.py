from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import exc, text

from codeherd_schema import migrations
from codeherd_schema.database import Database
from codeherd_schema.errors import DatabaseUnavailable
from codeherd_schema.migrations import current, upgrade
from codeherd_schema.store import Store
from codeherd_schema.tables import REVISION, metadata
from tests.samples import a_request, rewrite
from tests.services import PostgresServer, free_port


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without any table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    with server.database() as url:
        yield url


def definitions(url: str) -> set[str]:
    """Every table, column, index and constraint as the database itself words it."""
    database = Database.open(url)
    tables = f"({', '.join(repr(name) for name in metadata.tables)})"
    catalogues = {
        "sqlite": [f"SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND tbl_name IN {tables}"],
        "postgresql": [
            f"SELECT indexdef FROM pg_indexes WHERE tablename IN {tables}",
            f"""
            SELECT conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid)
            FROM pg_constraint WHERE conrelid::regclass::text IN {tables}
            """,
            f"""
            SELECT concat_ws(' ', table_name, ordinal_position, column_name, data_type, is_nullable,
                             character_maximum_length, column_default)
            FROM information_schema.columns WHERE table_name IN {tables}
            """,
        ],
    }
    with database.read() as connection:
        found = {
            " ".join(row.split())
            for query in catalogues[database.dialect]
            for row in connection.scalars(text(query))
        }
    database.close()
    return found


def test_upgrade_brings_an_empty_database_to_this_versions_revision(empty_url: str) -> None:
    assert current(empty_url) is None

    assert upgrade(empty_url) == REVISION
    assert upgrade(empty_url) == REVISION

    assert current(empty_url) == REVISION
    store = Store.open(empty_url)
    store.check_schema()
    store.submit([a_request()])
    assert upgrade(empty_url) == REVISION
    assert len(store.list()) == 1
    store.close()


def test_migrations_lead_to_the_tables_that_the_code_knows(empty_url: str, tmp_path: Path) -> None:
    upgrade(empty_url)
    database = Database.open(empty_url)

    with database.read() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
    migrated = definitions(empty_url)
    with database.begin() as connection:
        metadata.drop_all(connection)
        metadata.create_all(connection)

    assert differences == []
    assert migrated == definitions(empty_url)
    database.close()


def test_last_migration_is_the_revision_of_the_tables() -> None:
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))

    assert scripts.get_heads() == [REVISION]
    assert all(
        Path(script.path).name.startswith(f"{script.revision}_") for script in scripts.walk_revisions()
    )


def test_processes_may_upgrade_at_the_same_time(empty_url: str) -> None:
    start = threading.Barrier(4)
    found: list[str] = []

    def run() -> None:
        start.wait()
        found.append(upgrade(empty_url))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [REVISION] * 4


def test_upgrade_runs_from_any_folder(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    code = f"from codeherd_schema.migrations import upgrade; print(upgrade({url!r}))"

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )

    assert (done.stdout, done.stderr) == (f"{REVISION}\n", "")


def test_server_that_is_away_is_said_to_be(empty_url: str) -> None:
    for call in (upgrade, current):
        with pytest.raises(DatabaseUnavailable):
            call(f"postgresql://u@127.0.0.1:{free_port()}/x")


@pytest.mark.parametrize(
    "columns",
    [
        {"state": "paused"},
        {"priority": 10},
        {"priority": -1},
        {"attempt": 6},
        {"attempt": -1},
        {"state": "running"},
        {"lease_id": "x", "lease_until": 1.0},
        {"state": "dead"},
        {"finished_at": 1.0},
        {"kind": None},
    ],
    ids=str,
)
def test_database_refuses_rows_that_make_no_sense(
    store: Store, database_url: str, columns: dict[str, object]
) -> None:
    [submitted] = store.submit([a_request()])

    with pytest.raises(exc.IntegrityError):
        rewrite(database_url, submitted.job_id, **columns)
