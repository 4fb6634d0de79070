"""The one door to a SQL database: SQLite or PostgreSQL, opened so that a commit is a promise.

Owns: engines, transactions, the two dialects' differences, the database's clock, and which driver
error means that the database is away. Does not know any table.

The statements of `codeherd_schema` are the same text on both databases; what differs (the clock, a
case-sensitive search, `BEGIN IMMEDIATE`) is compiled here.
"""

from __future__ import annotations

import select as sockets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from sqlalchemy import (
    URL,
    Column,
    ColumnElement,
    Connection,
    Double,
    Engine,
    Executable,
    Insert,
    Row,
    Table,
    create_engine,
    event,
    make_url,
    select,
)
from sqlalchemy import exc as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import Boolean

from codeherd_schema.errors import (
    CodeherdError,
    DatabaseUnavailable,
    InvalidRequest,
    InvalidSetting,
    SchemaOutdated,
)

T = TypeVar("T")

#: Tries of a transaction that the database broke off for the sake of another one.
MAX_TRIES: Final = 5
#: Seconds to wait for a PostgreSQL server to accept a connection.
CONNECT_TIMEOUT_S: Final = 5
#: PostgreSQL broke the transaction off and asks for a new try: serialization failure, deadlock.
_TRY_AGAIN: Final = frozenset({"40001", "40P01"})
#: PostgreSQL: no such table, no such column.
_NO_SUCH_THING: Final = frozenset({"42P01", "42703"})
#: PostgreSQL error classes that say nothing about the statement: connection, resources, operator
#: intervention, system, authorization, catalog, transaction rollback, locks, read-only replica.
_AWAY: Final = ("08", "53", "57", "58", "28", "3D", "40", "55", "25")
#: Execution option that marks a connection as a reader.
_READER: Final = "codeherd_reader"
#: Rows from which on COPY is worth its start.
COPY_FROM: Final = 32
#: Marks connections whose commits may be taken back.
_FLEETING: Final = "codeherd_fleeting"
#: Shortest and longest pause between two tries to write to SQLite while another process does, seconds.
SHORTEST_PAUSE_S: Final = 0.0005
LONGEST_PAUSE_S: Final = 0.02
_IDLE_SINCE: Final = "codeherd_idle_since"
#: Seconds that a connection must have been idle for to be asked whether it still works before it is used.
IDLE_S: Final = 1.0


class _Now(FunctionElement[float]):
    """The database's clock."""

    type = Double()
    inherit_cache = True
    name = "now"


class _Holds(FunctionElement[bool]):
    """Whether the first text holds the second, case and all."""

    type = Boolean()
    inherit_cache = True
    name = "holds"


@compiles(_Now, "sqlite")
def _now_on_sqlite(_element: _Now, _compiler: SQLCompiler, **_: Any) -> str:
    # Milliseconds; stands still within one statement.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(_Now, "postgresql")
def _now_on_postgresql(_element: _Now, _compiler: SQLCompiler, **_: Any) -> str:
    # clock_timestamp() would differ from row to row and keep conditions on time out of the indexes;
    # now() stands still in a caller's long transaction.
    return "extract(epoch from statement_timestamp())::float8"


@compiles(_Holds, "sqlite")
def _holds_on_sqlite(element: _Holds, compiler: SQLCompiler, **kw: Any) -> str:
    # SQLite's LIKE ignores case.
    return f"(instr({compiler.process(element.clauses, **kw)}) > 0)"


@compiles(_Holds, "postgresql")
def _holds_on_postgresql(element: _Holds, compiler: SQLCompiler, **kw: Any) -> str:
    return f"(strpos({compiler.process(element.clauses, **kw)}) > 0)"


def now() -> ColumnElement[float]:
    """Return the database's clock as an expression: seconds since 1970, at the statement's start."""
    return _Now()


def holds(text: ColumnElement[str], part: str) -> ColumnElement[bool]:
    """Return the condition that `text` holds `part`, with case, on both databases."""
    return _Holds(text, part)


class Database:
    """A pool of connections to one SQLite file or PostgreSQL database; threads may share it."""

    def __init__(self, engine: Engine, *, timeout_s: float = 30.0, pooled: bool = False) -> None:
        """Take an engine made by `open`, with the limits that it was made with."""
        self._writers = engine
        self._readers = engine.execution_options(**{_READER: True})
        self._fleeting = engine.execution_options(**{_FLEETING: True})
        self._timeout_s = timeout_s
        self._has_single = engine.dialect.name == "postgresql" and not pooled
        # SQLite lets one write at a time, and has the others look again after pauses of up to 0.1 s: threads
        # of one process wait for each other here instead, and go on at once.
        self._turn = threading.Lock() if engine.dialect.name == "sqlite" else None

    @classmethod
    def open(cls, url: str, *, pool_size: int = 8, timeout_s: float = 30.0, pooled: bool = False) -> Self:
        """Make the pool; nothing connects before the first transaction.

        Args:
            url: `sqlite:///relative.db`, `sqlite:////absolute.db` or `postgresql://user:pw@host/name`.
            pool_size: most connections at a time.
            timeout_s: longest wait for a lock, a free connection or one PostgreSQL statement, seconds.
            pooled: a pooler in transaction mode is between: PostgreSQL's own limits are the role's.

        Raises:
            InvalidSetting: the URL is none of these.
        """
        parsed = _parse(url)
        if parsed.get_backend_name() == "sqlite":
            return cls(_sqlite_engine(parsed, pool_size, timeout_s), timeout_s=timeout_s)
        engine = _postgresql_engine(parsed, pool_size, timeout_s, pooled=pooled)
        return cls(engine, timeout_s=timeout_s, pooled=pooled)

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._writers.dialect.name

    @property
    def place(self) -> str:
        """Where the database is, without user and password."""
        return place(self._writers.url)

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Give a connection in a writing transaction, committed at the end of the block.

        Raises:
            DatabaseUnavailable: nothing was committed, unless the connection broke during the commit.
            SchemaOutdated: a table or column is missing.
        """
        with self._begin(fleeting=False) as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Give a connection in a reading transaction; on SQLite it never waits for a writer."""
        with translated(self._writers), self._readers.begin() as connection:
            yield connection

    def write(self, work: Callable[[Connection], T], *, fleeting: bool = False) -> T:
        """Run `work` in a writing transaction, again when the database broke it off.

        Args:
            work: must have no other effect than its SQL.
            fleeting: a power cut may take this commit back, with all fleeting ones after it and no other: for
                what means nothing once the processes of this machine are gone, such as a claim. Saves SQLite
                a sync of the disk.

        Raises:
            DatabaseUnavailable: see `begin`; also when every try was broken off.
        """
        for _ in range(MAX_TRIES - 1):
            try:
                with self._begin(fleeting) as connection:
                    return work(connection)
            except DatabaseUnavailable as err:
                # Our statements lock several jobs by id (`row_locks`); left are two leases of one job whose
                # ends met in a group, and rows that a caller's own transaction holds.
                if not _asks_for_another_try(err.__cause__):
                    raise
        with self._begin(fleeting) as connection:
            return work(connection)

    def change(
        self, statement: Executable, values: Mapping[str, Any], *, fleeting: bool = False
    ) -> Sequence[Row[Any]]:
        """Run one statement as a transaction of its own, and return the rows that it returns.

        As `write`, in one instead of three round trips to PostgreSQL.

        Raises:
            DatabaseUnavailable: the statement may have been done.
        """
        if not self._has_single:
            return self.write(
                lambda connection: connection.execute(statement, values).all(), fleeting=fleeting
            )
        for _ in range(MAX_TRIES - 1):
            try:
                return self._changed(statement, values)
            except DatabaseUnavailable as err:
                if not _asks_for_another_try(err.__cause__):
                    raise
        return self._changed(statement, values)

    def _changed(self, statement: Executable, values: Mapping[str, Any]) -> Sequence[Row[Any]]:
        with translated(self._writers), self._writers.connect() as connection:
            # SQLAlchemy's own way asks the driver four times; it begins nothing on this driver by itself.
            driver: Any = connection.connection.driver_connection
            try:
                driver.autocommit = True
                rows = connection.execute(statement, values).all()
                driver.autocommit = False
            except BaseException as err:
                # Back in the pool as it is, it would commit each statement of somebody's transaction.
                connection.invalidate()
                if isinstance(err, self._writers.dialect.loaded_dbapi.Error):
                    # Of the driver itself; what SQLAlchemy would have made of it.
                    raise sa.DBAPIError.instance(str(statement), None, err, type(err)) from err
                raise
            return rows

    @contextmanager
    def _begin(self, fleeting: bool) -> Iterator[Connection]:
        engine = self._fleeting if fleeting else self._writers
        with self._in_turn(), translated(self._writers), engine.begin() as connection:
            yield connection

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        if self._turn is None:
            yield
            return
        if not self._turn.acquire(timeout=self._timeout_s):
            raise _away("another thread has been writing for too long", self._writers.url)
        try:
            yield
        finally:
            self._turn.release()

    def clock(self) -> float:
        """Return the database's time: seconds since 1970."""
        with self.read() as connection:
            return clock(connection)

    def close(self) -> None:
        """Close every idle connection; a later use opens new ones."""
        self._writers.dispose()


def insert_or_leave(connection: Connection, table: Table, keys: Sequence[Column[Any]]) -> Insert:
    """Return an INSERT that leaves a row alone which has the same unique keys already."""
    # Imported here, since importing a dialect takes longer than a submit and only one is needed.
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table).on_conflict_do_nothing(index_elements=keys)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(table).on_conflict_do_nothing(index_elements=keys)


def insert_many(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows that nothing stands in the way of; on PostgreSQL by COPY, in half the time.

    Args:
        connection: in a writing transaction.
        table: where to.
        rows: values by column, the same columns in each.
    """
    if connection.dialect.name != "postgresql" or len(rows) < COPY_FROM:
        connection.execute(table.insert(), rows)
        return
    # Imported here, since SQLite needs none of it.
    import psycopg

    names = list(rows[0])
    driver: Any = connection.connection.driver_connection
    statement = f"COPY {table.name} ({', '.join(names)}) FROM STDIN"
    try:
        with driver.cursor() as cursor, cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row([row[name] for name in names])
    except psycopg.Error as err:
        # Past SQLAlchemy; what it would have made of it.
        raise sa.DBAPIError.instance(statement, None, err, psycopg.Error) from err


def clock(connection: Connection) -> float:
    """Return the database's time on this connection: seconds since 1970."""
    return connection.execute(select(now())).scalar_one()


@contextmanager
def translated(engine: Engine) -> Iterator[None]:
    """Turn a driver's errors inside the block into ours, where they say more than a fault in our SQL."""
    try:
        yield
    except sa.TimeoutError as err:
        raise DatabaseUnavailable(f"no free connection to database {place(engine.url)}") from err
    except sa.DBAPIError as err:
        error = _translate(err, engine.url)
        if error is None:
            raise
        raise error from err


def place(url: URL) -> str:
    """Say where a database is, without its user, password and options."""
    if url.get_backend_name() == "sqlite":
        return f"`{url.database}`"
    return f"`{url.database}` on {url.host or 'the local socket'}" + (f":{url.port}" if url.port else "")


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (sa.ArgumentError, ValueError):
        # The cause is left out: it quotes the URL with its password.
        raise InvalidSetting(
            "the database URL cannot be read",
            hint="use `sqlite:///file.db` or `postgresql://user:password@host/name`",
        ) from None
    match parsed.drivername:
        case "sqlite" | "sqlite+pysqlite":
            return _checked_file(parsed)
        case "postgresql" | "postgres" | "postgresql+psycopg":
            return parsed.set(drivername="postgresql+psycopg")
        case other:
            raise InvalidSetting(
                f"no support for `{other}` databases", hint="use `sqlite:///...` or `postgresql://...`"
            )


def _checked_file(url: URL) -> URL:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise InvalidSetting(
            "SQLite needs a file, since several processes share it", hint="use `sqlite:///codeherd.db`"
        )
    folder = Path(url.database).parent
    if not folder.is_dir():
        raise InvalidSetting(f"folder `{folder}` of the SQLite file does not exist")
    return url


def _sqlite_engine(url: URL, pool_size: int, timeout_s: float) -> Engine:
    engine = create_engine(
        url,
        connect_args={"timeout": timeout_s},
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=timeout_s,
        hide_parameters=True,
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _record: object) -> None:
        # Python's own transaction control would begin too late and without IMMEDIATE.
        connection.isolation_level = None
        # Asked first: setting WAL takes an exclusive lock even if it is set, and the file remembers.
        if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A deferred writer that reads first fails at once with "database is locked" when another
        # writer came between; IMMEDIATE waits its turn. Readers stay deferred: they wait for nobody.
        options = connection.get_execution_options()
        if options.get(_READER, False):
            _execute(connection, "BEGIN")
            return
        # With NORMAL a power cut takes back the last commits of a WAL database; a job whose id was given
        # away must survive. FULL costs one fsync per commit (docs/decisions/0005).
        _execute(connection, f"PRAGMA synchronous = {'NORMAL' if options.get(_FLEETING) else 'FULL'}")
        _begin_when_free(connection, timeout_s)

    return engine


def _begin_when_free(connection: Connection, timeout_s: float) -> None:
    """Begin to write as soon as no other process does.

    SQLite itself would look again after pauses of 1, 2, 5, 10 and up to 100 ms, though most writes last two.
    """
    driver: Any = connection.connection.driver_connection
    until = time.monotonic() + timeout_s
    pause_s = SHORTEST_PAUSE_S
    driver.execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                driver.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as err:
                if err.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= until:
                    raise sa.OperationalError("BEGIN IMMEDIATE", None, err) from err
            time.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 1.2 * pause_s)
    finally:
        driver.execute(f"PRAGMA busy_timeout = {round(1000 * timeout_s)}")


def _execute(connection: Connection, statement: str) -> None:
    """Run a statement that every transaction begins with, past SQLAlchemy: 0.01 instead of 0.1 ms."""
    driver: Any = connection.connection.driver_connection
    try:
        driver.execute(statement)
    except sqlite3.Error as err:
        raise sa.OperationalError(statement, None, err) from err


def _postgresql_engine(url: URL, pool_size: int, timeout_s: float, *, pooled: bool) -> Engine:
    timeout_ms = round(timeout_s * 1000)
    # No statement here is worth compiling: of those that look at many rows it was half of the time.
    # Transactions say how isolated they are; a single statement is what the connection is.
    ours = (
        f"-c statement_timeout={timeout_ms} -c lock_timeout={timeout_ms} -c jit=off "
        "-c default_transaction_isolation=read\\ committed"
    )
    options = f"{ours} {url.query.get('options', '')}"
    # A pooler gives each transaction another connection: neither options nor prepared statements are there
    # in the next (tried with pgbouncer 1.18, which refuses the first and breaks on the second).
    kept: dict[str, Any] = {"prepare_threshold": None} if pooled else {"options": options.strip()}
    engine = create_engine(
        url,
        connect_args={
            "application_name": "codeherd",
            "connect_timeout": CONNECT_TIMEOUT_S,
            **kept,
            # A server that vanished without a word is noticed within 30 s.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 4,
            "tcp_user_timeout": 30_000,
        },
        # The conditional updates rely on it: a waiting one looks again at the row that the first left.
        isolation_level="READ COMMITTED",
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=timeout_s,
        hide_parameters=True,
    )
    _ask_idle_connections(engine)
    return engine


def _ask_idle_connections(engine: Engine) -> None:
    """Ask a connection whether it works when it was idle for a while, or the server has said something.

    A server that ends says so. SQLAlchemy's own `pool_pre_ping` asks before every transaction: with short
    ones, a fifth of their time.
    """

    @event.listens_for(engine, "checkin")
    def _note(_connection: Any, record: Any) -> None:
        record.info[_IDLE_SINCE] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _ask(connection: Any, record: Any, _fairy: Any) -> None:
        idle_since = record.info.get(_IDLE_SINCE)
        # A new one has just answered.
        if idle_since is None:
            return
        try:
            if time.monotonic() - idle_since >= IDLE_S or _has_news(connection):
                engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as err:
            if not engine.dialect.is_disconnect(err, connection, None):
                raise
            # The others are as old: a new one is made in place of each.
            raise sa.InvalidatePoolError from err


def _has_news(connection: Any) -> bool:
    """Whether a server has sent what nobody asked for: its last words, or the end of the connection."""
    poll = sockets.poll()
    poll.register(connection.fileno(), sockets.POLLIN)
    return bool(poll.poll(0))


def _translate(err: sa.DBAPIError, url: URL) -> CodeherdError | None:
    reason = _without_secrets(str(err.orig).partition("\n")[0], url)
    if url.get_backend_name() == "sqlite":
        return _translate_sqlite(err.orig, reason, url)
    return _translate_postgresql(err, reason, url)


def _translate_sqlite(driver: BaseException | None, reason: str, url: URL) -> CodeherdError | None:
    if reason.startswith(("no such table", "no such column")) or "has no column named" in reason:
        return _outdated(reason, url)
    code = getattr(driver, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_NOTADB:
        return InvalidSetting(f"{place(url)} is not a SQLite database")
    # SQLITE_ERROR is a fault in our own statement; the other codes are about locks, files and disks.
    if isinstance(driver, sqlite3.OperationalError) and code != sqlite3.SQLITE_ERROR:
        return _away(reason, url)
    return None


def _translate_postgresql(err: sa.DBAPIError, reason: str, url: URL) -> CodeherdError | None:
    state = _sqlstate(err)
    if state in _NO_SUCH_THING:
        return _outdated(reason, url)
    if isinstance(err, sa.DataError) and "NUL" in reason:
        return InvalidRequest("a name or key holds a NUL character, which PostgreSQL cannot keep")
    if isinstance(err, sa.ProgrammingError) and "connection option" in reason:
        return InvalidSetting(f"the database URL has an option that does not exist: {reason}")
    if isinstance(err, (sa.OperationalError, sa.InterfaceError)) or state.startswith(_AWAY):
        return _away(reason, url)
    return None


def _sqlstate(err: sa.DBAPIError) -> str:
    # Missing when the error is the driver's own and not the server's.
    return getattr(err.orig, "sqlstate", None) or ""


def _away(reason: str, url: URL) -> DatabaseUnavailable:
    return DatabaseUnavailable(f"database {place(url)} did not answer: {reason}")


def _outdated(reason: str, url: URL) -> SchemaOutdated:
    return SchemaOutdated(
        f"database {place(url)} lacks a part of the schema: {reason}", hint="run `codeherd db upgrade`"
    )


def _without_secrets(text: str, url: URL) -> str:
    secrets = [url.password, *(value for key, value in url.query.items() if "password" in key)]
    for secret in secrets:
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "***")
    return text


def _asks_for_another_try(cause: BaseException | None) -> bool:
    return isinstance(cause, sa.DBAPIError) and _sqlstate(cause) in _TRY_AGAIN
