from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Connection, exc, text
from sqlalchemy.engine.interfaces import DBAPIConnection

import codeherd_schema.database
from codeherd_schema.database import MAX_TRIES, Database
from codeherd_schema.errors import (
    CodeherdError,
    DatabaseUnavailable,
    InvalidRequest,
    InvalidSetting,
    SchemaOutdated,
)
from codeherd_schema.store import Store
from tests.samples import a_request
from tests.services import PostgresServer, free_port


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database.open(database_url)
    yield database
    database.close()


# URLs.


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "cannot be read"),
        ("no url at all", "cannot be read"),
        ("postgresql://u:hunter2@host:port/name", "cannot be read"),
        ("mysql://u:hunter2@host/name", "no support for `mysql`"),
        ("postgresql+asyncpg://u:hunter2@host/name", "no support for `postgresql\\+asyncpg`"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("sqlite:///file:x?mode=memory&uri=true", "needs a file"),
        ("sqlite:////no/such/folder/x.db", "`/no/such/folder` of the SQLite file does not exist"),
    ],
)
def test_impossible_url_is_refused_without_its_secret(url: str, message: str) -> None:
    with pytest.raises(InvalidSetting, match=message) as caught:
        Database.open(url)

    assert "hunter2" not in f"{caught.value} {caught.value.hint} {caught.value.__cause__}"


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_every_usual_scheme_of_postgresql_works(postgres_url: str, scheme: str) -> None:
    database = Database.open(postgres_url.replace("postgresql", scheme))

    assert database.clock() > 0
    database.close()


def test_option_that_does_not_exist_is_named(postgres_url: str) -> None:
    database = Database.open(f"{postgres_url}?colour=blue")

    with pytest.raises(InvalidSetting, match="colour"):
        database.clock()


# A database that is away.


def test_unreachable_server_is_named_without_user_and_password() -> None:
    port = free_port()
    database = Database.open(f"postgresql://alice:hunter2@127.0.0.1:{port}/name?sslpassword=hunter3")

    with pytest.raises(DatabaseUnavailable, match=f"`name` on 127.0.0.1:{port} did not answer") as caught:
        database.clock()

    assert not {"alice", "hunter2", "hunter3"} & set(f"{caught.value} {caught.value.__cause__}".split())
    assert "hunter" not in f"{caught.value} {caught.value.__cause__}"
    assert caught.value.retryable


def test_server_that_comes_back_is_used_again() -> None:
    with PostgresServer() as server:
        database = Database.open(server.url)
        before = database.clock()

        def crash_midway() -> None:
            with database.begin() as connection:
                server.kill()
                connection.execute(text("SELECT 1"))

        with pytest.raises(DatabaseUnavailable):
            crash_midway()
        with pytest.raises(DatabaseUnavailable):
            database.clock()
        server.start()

        assert database.clock() > before
        database.close()


@pytest.mark.parametrize("idle_s", [0.0, math.inf], ids=["asked", "by its last words"])
def test_a_restart_between_two_transactions_is_not_noticed(
    monkeypatch: pytest.MonkeyPatch, idle_s: float
) -> None:
    monkeypatch.setattr(codeherd_schema.database, "IDLE_S", idle_s)
    with PostgresServer() as server:
        database = Database.open(server.url, pool_size=2)
        with database.begin(), database.begin():
            pass

        server.kill()
        server.start()

        with database.begin() as one, database.begin() as two:
            assert [one.scalar(text("SELECT 1")), two.scalar(text("SELECT 2"))] == [1, 2]
        assert database.change(text("SELECT :n AS n"), {"n": 3})[0].n == 3
        database.close()


def test_a_connection_in_use_is_not_asked_whether_it_works(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database.open(postgres_url)
    asked: list[object] = []
    dialect = database._writers.dialect
    ping = dialect.do_ping

    def ask(connection: DBAPIConnection) -> bool:
        asked.append(connection)
        return ping(connection)

    monkeypatch.setattr(dialect, "do_ping", ask)

    monkeypatch.setattr(codeherd_schema.database, "IDLE_S", math.inf)
    for _ in range(3):
        database.clock()
    in_use = len(asked)
    monkeypatch.setattr(codeherd_schema.database, "IDLE_S", 0.0)
    for _ in range(3):
        database.clock()

    assert (in_use, len(asked)) == (0, 3)
    database.close()


def test_a_connection_that_was_closed_in_the_pool_is_replaced(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codeherd_schema.database, "IDLE_S", math.inf)
    database = Database.open(postgres_url, pool_size=1)

    def close() -> None:
        with database.read() as connection:
            driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        driver.close()

    close()
    assert database.clock() > 0
    close()
    assert database.change(text("SELECT :n AS n"), {"n": 3})[0].n == 3
    database.close()


def test_one_statement_on_a_connection_that_breaks_is_an_outage(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database.open(postgres_url, pool_size=1)
    database.clock()

    def closed(_connection: object) -> bool:
        assert isinstance(_connection, psycopg.Connection)
        _connection.close()
        return False

    # Right after it was looked at.
    with monkeypatch.context() as patch:
        patch.setattr(codeherd_schema.database, "_has_news", closed)
        with pytest.raises(DatabaseUnavailable, match="closed"):
            database.change(text("SELECT :n AS n"), {"n": 3})

    assert database.change(text("SELECT :n AS n"), {"n": 3})[0].n == 3
    database.close()


def test_one_statement_is_a_transaction_and_leaves_none_behind(database_url: str) -> None:
    database = Database.open(database_url, pool_size=1)
    with database.begin() as connection:
        connection.execute(text("CREATE TABLE single (n INTEGER PRIMARY KEY)"))
    add = text("INSERT INTO single VALUES (:n) RETURNING n")

    def add_and_give_up(n: int) -> None:
        with database.begin() as connection:
            connection.execute(add, {"n": n})
            raise RuntimeError

    assert [row.n for row in database.change(add, {"n": 1})] == [1]
    with pytest.raises(exc.IntegrityError):
        database.change(add, {"n": 1})
    # The only connection of the pool: would it commit each statement, the 2 would stay.
    with pytest.raises(RuntimeError):
        add_and_give_up(2)
    assert [row.n for row in database.change(add, {"n": 3})] == [3]
    with pytest.raises(RuntimeError):
        add_and_give_up(4)

    with database.begin() as connection:
        assert connection.execute(text("SELECT n FROM single ORDER BY n")).scalars().all() == [1, 3]
        connection.execute(text("DROP TABLE single"))
    database.close()


def test_broken_commit_is_unavailable(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin_and_break() -> None:
        with database.begin() as connection:
            driver = connection.connection.dbapi_connection
            assert driver is not None
            if database.dialect == "sqlite":
                connection.exec_driver_sql("PRAGMA query_only = ON")
                connection.exec_driver_sql("DELETE FROM jobs")
            else:
                connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")

    with pytest.raises(DatabaseUnavailable):
        begin_and_break()


def test_locked_file_is_unavailable_in_the_end(sqlite_url: str) -> None:
    holder, waiter = Database.open(sqlite_url), Database.open(sqlite_url, timeout_s=0.05)

    with holder.begin(), pytest.raises(DatabaseUnavailable, match="locked"):
        waiter.write(lambda connection: connection.execute(text("DELETE FROM jobs")))

    holder.close()
    waiter.close()


def test_a_thread_that_writes_for_too_long_is_an_outage_for_the_others(sqlite_url: str) -> None:
    database = Database.open(sqlite_url, timeout_s=0.05)

    with database.begin(), pytest.raises(DatabaseUnavailable, match="another thread"):
        database.write(lambda connection: connection.execute(text("DELETE FROM jobs")))
    # And none any more once it is done.
    database.write(lambda connection: connection.execute(text("DELETE FROM jobs")))
    database.close()


def test_a_write_goes_on_when_the_other_process_is_done(sqlite_url: str) -> None:
    holder, waiter = Database.open(sqlite_url), Database.open(sqlite_url)
    waits = threading.Event()

    def delete() -> None:
        waits.set()
        waiter.write(lambda connection: connection.execute(text("DELETE FROM jobs")))

    thread = threading.Thread(target=delete)
    with holder.begin():
        thread.start()
        waits.wait()
        # SQLite itself finds it locked.
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), timeout=0).execute("BEGIN IMMEDIATE")
        assert thread.is_alive()
    thread.join(60)

    assert not thread.is_alive()
    # What a connection waits for otherwise is as long as before.
    with waiter.read() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 30_000
    holder.close()
    waiter.close()


def test_statement_that_takes_too_long_is_unavailable(postgres_url: str) -> None:
    database = Database.open(postgres_url, timeout_s=0.05)

    with pytest.raises(DatabaseUnavailable, match="timeout"):
        database.write(lambda connection: connection.execute(text("SELECT pg_sleep(60)")))
    database.close()


def test_used_up_pool_is_unavailable(database_url: str) -> None:
    database = Database.open(database_url, pool_size=1, timeout_s=0.05)

    with database.read(), pytest.raises(DatabaseUnavailable, match="no free connection"):
        database.clock()
    database.close()


def test_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, " * 100)
    database = Database.open(f"sqlite:///{path}")

    with pytest.raises(InvalidSetting, match=r"notes\.txt` is not a SQLite database"):
        database.clock()


def test_database_without_our_tables_is_outdated(tmp_path: Path, postgres_server: PostgresServer) -> None:
    with postgres_server.database() as postgres_url:
        for url in (f"sqlite:///{tmp_path / 'empty.db'}", postgres_url):
            store = Store.open(url)
            for call in (store.check_schema, store.list, lambda store=store: store.submit([a_request()])):
                with pytest.raises(SchemaOutdated) as caught:
                    call()
                assert caught.value.hint == "run `codeherd db upgrade`"
            store.close()


def test_fault_in_a_statement_is_no_outage_and_shows_no_values(database: Database) -> None:
    def wrong(connection: Connection) -> None:
        connection.execute(text("SELEC :prompt"), {"prompt": "SECRET"})

    with pytest.raises(exc.SQLAlchemyError) as caught:
        database.write(wrong)

    assert not isinstance(caught.value, CodeherdError)
    assert "SECRET" not in str(caught.value)


def test_nul_in_a_name_is_the_callers_fault(postgres_url: str) -> None:
    store = Store.open(postgres_url)

    with pytest.raises(InvalidRequest, match="NUL"):
        store.get("a\0b")
    store.close()


# Transactions.


def test_block_that_raises_leaves_nothing(database: Database) -> None:
    def change_of_mind() -> None:
        with database.begin() as connection:
            connection.execute(text("DELETE FROM alembic_version"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change_of_mind()

    with database.read() as connection:
        assert connection.scalar(text("SELECT count(*) FROM alembic_version")) == 1


def test_reader_does_not_wait_for_a_writer(database_url: str) -> None:
    database = Database.open(database_url, timeout_s=5)
    store = Store(database)

    with database.begin() as writer:
        store.submit([a_request()], connection=writer)
        assert store.list() == []

    assert len(store.list()) == 1
    database.close()


def test_sqlite_commits_survive_a_power_cut_and_references_hold(sqlite_url: str) -> None:
    database = Database.open(sqlite_url)

    with database.read() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }

    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
    database.close()


def test_only_what_dies_with_its_processes_may_be_taken_back_by_a_power_cut(sqlite_url: str) -> None:
    database = Database.open(sqlite_url, pool_size=1)

    def asked(connection: Connection) -> int | None:
        return connection.exec_driver_sql("PRAGMA synchronous").scalar()

    # One connection: what a fleeting commit changed must not stay.
    levels = [database.write(asked, fleeting=fleeting) for fleeting in (False, True, False, True, False)]

    assert levels == [2, 1, 2, 1, 2]
    database.close()


def test_deadlock_is_tried_again(postgres_url: str) -> None:
    database = Database.open(postgres_url)
    with database.begin() as connection:
        connection.execute(text("CREATE TABLE pair (id INT PRIMARY KEY, n INT)"))
        connection.execute(text("INSERT INTO pair VALUES (1, 0), (2, 0)"))
    both_hold_one = threading.Barrier(2)
    tries: list[int] = []

    def count_up(first: int) -> None:
        is_first_try = True

        def work(connection: Connection) -> None:
            nonlocal is_first_try
            tries.append(first)
            connection.execute(text("UPDATE pair SET n = n + 1 WHERE id = :id"), {"id": first})
            if is_first_try:
                is_first_try = False
                both_hold_one.wait()
            connection.execute(text("UPDATE pair SET n = n + 1 WHERE id = :id"), {"id": 3 - first})

        database.write(work)

    threads = [threading.Thread(target=count_up, args=(first,)) for first in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(tries) >= 3
    with database.begin() as connection:
        assert connection.execute(text("SELECT n FROM pair")).scalars().all() == [2, 2]
        connection.execute(text("DROP TABLE pair"))
    database.close()


def test_tries_are_bounded(postgres_url: str) -> None:
    database = Database.open(postgres_url)
    tries: list[int] = []

    def work(connection: Connection) -> None:
        tries.append(1)
        connection.execute(text("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$"))

    with pytest.raises(DatabaseUnavailable):
        database.write(work)

    assert len(tries) == MAX_TRIES
    database.close()


# The clock.


@pytest.fixture
def hour_ahead(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store on a database whose clock is an hour ahead of this machine's."""
    if database_url.startswith("sqlite"):
        store = Store.open(database_url)
        with store._database.read() as connection:
            driver = connection.connection.dbapi_connection
            assert driver is not None
            driver.create_function("julianday", 1, _in_an_hour)
        yield store
        store.close()
        return
    admin = Database.open(database_url)
    with admin.begin() as connection:
        connection.execute(text("CREATE SCHEMA ahead"))
        connection.execute(
            text(
                "CREATE FUNCTION ahead.statement_timestamp() RETURNS timestamptz STABLE LANGUAGE sql "
                "AS 'SELECT pg_catalog.statement_timestamp() + interval ''1 hour'''"
            )
        )
    store = Store.open(f"{database_url}?options=-csearch_path%3Dahead,pg_catalog,public")
    yield store
    store.close()
    with admin.begin() as connection:
        connection.execute(text("DROP SCHEMA ahead CASCADE"))
    admin.close()


def _in_an_hour(_when: str) -> float:
    import time

    return time.time() / 86_400 + 2_440_587.5 + 1 / 24


def test_every_time_is_by_the_databases_clock(hour_ahead: Store, database_url: str) -> None:
    plain = Store.open(database_url)
    now_s = plain.clock()

    [submitted] = hour_ahead.submit([a_request()])
    not_due_by_the_other_clock = plain.claim(submitted.job_id, worker_id="w", lease_s=60)
    claimed = hour_ahead.claim(submitted.job_id, worker_id="w", lease_s=60)
    assert claimed is not None
    hour_ahead.heartbeat([claimed], lease_s=60)
    hour_ahead.request_cancel(submitted.job_id)
    hour_ahead.cancel_running(claimed)

    assert not_due_by_the_other_clock is None
    job = hour_ahead.get(submitted.job_id)
    [attempt] = hour_ahead.attempts(submitted.job_id)
    assert job is not None
    moments = [
        job.created_at,
        job.run_at,
        job.started_at,
        job.cancel_requested_at,
        job.finished_at,
        attempt.started_at,
        attempt.ended_at,
    ]
    assert all(moment is not None and moment.timestamp() >= now_s + 3_599 for moment in moments)
    plain.close()


def test_opening_a_store_imports_no_other_heavy_package() -> None:
    heavy = ["alembic", "psycopg", "redis", "celery", "kombu", "torch", "sqlalchemy.orm"]
    code = f"import sys, codeherd_schema.store; print([name for name in {heavy} if name in sys.modules])"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout == "[]\n"


def test_behind_a_pooler_nothing_is_kept_in_a_connection(postgres_url: str) -> None:
    database = Database.open(postgres_url, pooled=True)
    direct = Database.open(postgres_url)
    counted = text("SELECT count(*) FROM pg_prepared_statements")
    for opened, expected in ((database, ("0", False)), (direct, ("30s", True))):
        with opened.begin() as connection:
            # psycopg prepares what it sees for the sixth time.
            for number in range(8):
                connection.execute(text("SELECT CAST(:number AS integer)"), {"number": number})
            limit = connection.scalar(text("SHOW statement_timeout"))
            assert (limit, connection.scalar(counted) > 0) == expected
        opened.close()
