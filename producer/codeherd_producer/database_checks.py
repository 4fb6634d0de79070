"""Judge the database: what it is, what it promises, how full it is, and what waits in it.

Owns: the questions to SQLite and PostgreSQL beside the jobs' own statements, and the judgement of the
answers. Changes nothing: `check_writes` rolls back, and matches no row to begin with.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Row, case, false, func, make_url, select, text, update
from sqlalchemy.exc import DBAPIError

from codeherd_producer.findings import Finding, Verdict, broken
from codeherd_producer.machine_checks import is_local
from codeherd_schema.database import Database, now
from codeherd_schema.errors import CodeherdError, DatabaseUnavailable
from codeherd_schema.pauses import Pause
from codeherd_schema.settings import SharedSettings
from codeherd_schema.store import QueueDepth, Store
from codeherd_schema.tables import is_due, jobs

#: Oldest SQLite with `RETURNING` (sqlite.org/lang_returning.html), oldest PostgreSQL that the driver speaks
#: to (psycopg 3.3, "Supported systems"). Tried with SQLite 3.40 and PostgreSQL 15.
OLDEST_SQLITE: Final = (3, 35, 0)
OLDEST_POSTGRESQL: Final = 10
#: Seconds between the database's clock and this machine's that nobody needs to look at.
CLOCK_SKEW_S: Final = 2.0
#: Connections that one worker, dispatcher or client may hold: the pool of `Database.open`.
CONNECTIONS_EACH: Final = 8
#: Share of PostgreSQL's connections from which on a person should look.
NEARLY_ALL: Final = 0.8
#: File systems whose locks or shared memory SQLite's WAL cannot rely on (sqlite.org/wal.html, "Overview").
NETWORK_FILE_SYSTEMS: Final = frozenset({
    "9p", "afs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs", "gfs2",
    "glusterfs", "lustre", "ncpfs", "nfs", "nfs4", "smb2", "smb3", "smbfs", "virtiofs",
})  # fmt: skip
#: PostgreSQL's settings that may lose what was committed, and what is lost.
_PROMISES: Final = {
    "fsync": "a power cut may ruin the whole database",
    "full_page_writes": "a power cut may ruin pages that were being written",
    "synchronous_commit": "a crash of the server takes back the last commits: jobs whose id was given away",
}
_MOUNTS: Final = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Backlog:
    """How the due jobs of one queue wait; paused ones are not due."""

    #: Seconds that the longest waiting one has been due.
    due_s: float
    #: Seconds since the hint that is the oldest of all; None if none was sent.
    hinted_s: float | None


@dataclass(frozen=True, slots=True)
class Work:
    """What waits in the database."""

    depths: Mapping[str, QueueDepth]
    backlogs: Mapping[str, Backlog]
    pauses: Collection[Pause]


@dataclass(frozen=True, slots=True)
class Room:
    """PostgreSQL's connections."""

    #: For users without privileges, of the whole server.
    most: int
    used: int


def examine_database(settings: SharedSettings, clock: Callable[[], float]) -> Iterator[Finding | Work | Room]:
    """Yield what is found, and what the judgement of other parts needs.

    Args:
        settings: which database.
        clock: this machine's time in seconds since 1970.
    """
    hint = "`codeherd up` makes one, or `codeherd db upgrade`"
    url = make_url(settings.database)
    if url.get_backend_name() == "sqlite" and url.database and not Path(url.database).is_file():
        # Opening it would make an empty one.
        yield Finding("database", Verdict.FAIL, f"there is no file `{url.database}`", hint)
        return
    try:
        database = Database.open(settings.database, pool_size=1)
    except CodeherdError as err:
        yield Finding("database", Verdict.FAIL, err.message, err.hint or hint)
        return
    try:
        yield from _examine(database, settings, clock)
    except CodeherdError as err:
        yield broken("schema" if err.code == "schema_outdated" else "database", err)
    finally:
        database.close()


def _examine(
    database: Database, settings: SharedSettings, clock: Callable[[], float]
) -> Iterator[Finding | Work | Room]:
    before = clock()
    skew_s = database.clock() - (before + clock()) / 2
    yield Finding("database", Verdict.OK, settings.database.masked())
    yield judge_clock(skew_s)
    with database.read() as connection:
        if database.dialect == "postgresql":
            yield from _postgresql(connection, make_url(settings.database).host)
        else:
            yield from _sqlite(connection, Path(str(make_url(settings.database).database)))
    store = Store(database)
    store.check_schema()
    yield Finding("schema", Verdict.OK, "up to date")
    try:
        check_writes(database)
        yield Finding("writes", Verdict.OK, "accepted")
    except DatabaseUnavailable as err:
        hint = "name the primary server, and a user that owns the tables; look at the disk and its rights"
        yield Finding("writes", Verdict.FAIL, err.message, hint)
    yield Work(store.queue_depths(), backlogs(database), store.pauses())


def check_writes(database: Database) -> None:
    """Make sure that a claim could be written now: a change of no row, under a claim's locks and rights.

    Raises:
        DatabaseUnavailable: a replica, a read-only or full disk, a user without the right, or no answer.
        SchemaOutdated: there is no table of jobs.
    """
    try:
        with database.begin() as connection:
            connection.execute(update(jobs).where(false()).values(state=jobs.c.state))
            connection.rollback()
    except DBAPIError as err:
        reason = str(err.orig).partition("\n")[0]
        raise DatabaseUnavailable(f"database {database.place} takes no writes: {reason}") from err


def backlogs(database: Database) -> dict[str, Backlog]:
    """Return how the due jobs wait, by queue; reads every due job."""
    statement = (
        select(
            jobs.c.queue,
            func.max(now() - jobs.c.run_at).label("due_s"),
            func.max(case((jobs.c.published_at.is_not(None), now() - jobs.c.published_at))).label("hinted_s"),
        )
        .where(is_due())
        .group_by(jobs.c.queue)
    )
    with database.read() as connection:
        return {row.queue: Backlog(row.due_s, row.hinted_s) for row in connection.execute(statement)}


def known_jobs(database: Database, job_ids: Collection[str]) -> frozenset[str]:
    """Return those of the ids that jobs have."""
    with database.read() as connection:
        return frozenset(connection.scalars(select(jobs.c.id).where(jobs.c.id.in_(job_ids))))


def judge_clock(skew_s: float) -> Finding:
    """Only the database's clock decides; another one here makes times look odd."""
    message = f"the database's clock is {abs(skew_s):.1f} s {'ahead' if skew_s > 0 else 'behind'}"
    if abs(skew_s) > CLOCK_SKEW_S:
        return Finding("clock", Verdict.WARN, message, "absolute times mean the database's; run NTP")
    return Finding("clock", Verdict.OK, message)


def judge_sqlite(version: tuple[int, ...], journal_mode: str, file_system: str | None) -> Iterator[Finding]:
    """Judge a SQLite file.

    Args:
        version: of the library.
        journal_mode: of the file.
        file_system: that it lies on, as in /proc/self/mountinfo; None if nobody knows.
    """
    name = ".".join(map(str, version))
    if version < OLDEST_SQLITE:
        oldest = ".".join(map(str, OLDEST_SQLITE))
        hint = f"a Python that is linked with SQLite {oldest} or later; or PostgreSQL"
        yield Finding("database version", Verdict.FAIL, f"SQLite {name}, {oldest} is needed", hint)
    else:
        yield Finding("database version", Verdict.OK, f"SQLite {name}")
    if file_system in NETWORK_FILE_SYSTEMS:
        yield Finding(
            "durability",
            Verdict.WARN,
            f"the SQLite file is on a network file system ({file_system}): its locks may not hold",
            "move it to a local disk (CODEHERD_DATA_DIR), or use PostgreSQL (CODEHERD_DATABASE_URL)",
        )
    elif journal_mode != "wal":
        yield Finding(
            "durability",
            Verdict.WARN,
            f"the SQLite file's journal_mode is `{journal_mode}`, not `wal`: readers block writers",
            "move it to a local disk, where `PRAGMA journal_mode = wal` takes effect",
        )
    else:
        yield Finding("durability", Verdict.OK, "journal_mode is `wal`, every commit is synced")


def judge_postgresql(version_num: int, settings: Mapping[str, str], *, is_replica: bool) -> Iterator[Finding]:
    """Judge a PostgreSQL server.

    Args:
        version_num: `server_version_num`: 150004 is 15.4.
        settings: values of `pg_settings` by name, as they are in force for our connections.
        is_replica: whether it replays another server's log.
    """
    major, minor = divmod(version_num, 10_000)
    if major < OLDEST_POSTGRESQL:
        message = f"PostgreSQL {major}, {OLDEST_POSTGRESQL} is needed"
        yield Finding("database version", Verdict.FAIL, message, "upgrade the server (pg_upgrade)")
    else:
        yield Finding("database version", Verdict.OK, f"PostgreSQL {major}.{minor}")
    if is_replica:
        hint = "name the primary server in CODEHERD_DATABASE_URL"
        yield Finding("role", Verdict.FAIL, "the server is a replica: it refuses every write", hint)
    off = [name for name in _PROMISES if settings.get(name) == "off"]
    for name in off:
        fix = f"`ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf()`"
        if name == "synchronous_commit":
            fix += ", and no other value for this user or database"
        yield Finding("durability", Verdict.WARN, f"{name} is off: {_PROMISES[name]}", fix)
    if not off:
        yield Finding("durability", Verdict.OK, "every commit is synced")


def judge_room(room: Room, workers: int) -> Finding:
    """Judge whether there are connections for all workers and a dispatcher.

    Args:
        room: what the server has.
        workers: how many answered.
    """
    message = f"{room.used} of {room.most} connections are used"
    need = CONNECTIONS_EACH * (workers + 1)
    hint = f"`ALTER SYSTEM SET max_connections = {2 * max(room.most, need)}`, and restart the server"
    if need > room.most:
        who = f"{workers} workers and a dispatcher"
        return Finding("connections", Verdict.WARN, f"{message}, {who} may need {need}", hint)
    if room.used >= NEARLY_ALL * room.most:
        return Finding("connections", Verdict.WARN, message, hint)
    return Finding("connections", Verdict.OK, message)


def file_system_of(path: Path, mounts: str) -> str | None:
    """Return the type of the file system that holds `path`.

    Args:
        path: absolute, without links.
        mounts: the text of /proc/self/mountinfo (proc_pid_mountinfo(5)).
    """
    found: tuple[int, str] | None = None
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        # Spaces and other odd characters are written as octal numbers.
        place = Path(fields.split()[4].encode().decode("unicode_escape"))
        if path.is_relative_to(place):
            # Of several at one place the last covers the others.
            depth = len(place.parts)
            found = (depth, rest.split()[0]) if found is None or depth >= found[0] else found
    return None if found is None else found[1]


def _sqlite(connection: Connection, path: Path) -> Iterator[Finding]:
    mode = connection.execute(text("PRAGMA journal_mode")).scalar_one()
    mounts = _MOUNTS.read_text(errors="replace") if _MOUNTS.exists() else ""
    yield from judge_sqlite(
        sqlite3.sqlite_version_info, mode, file_system_of(Path(os.path.realpath(path)), mounts)
    )


def _postgresql(connection: Connection, host: str | None) -> Iterator[Finding | Room]:
    version = int(connection.execute(text("SHOW server_version_num")).scalar_one())
    found = connection.execute(text("SELECT name, setting FROM pg_settings"))
    settings: dict[str, str] = {row.name: row.setting for row in found}
    state = _server_state(connection)
    yield from judge_postgresql(version, settings, is_replica=state.is_replica)
    if not is_local(host) and not state.is_encrypted:
        yield Finding(
            "database encryption",
            Verdict.WARN,
            f"the connection to {host} is not encrypted: prompts and the password can be read on the way",
            "switch on `ssl` in the server, and add `?sslmode=verify-full` to CODEHERD_DATABASE_URL",
        )
    reserved = int(settings["superuser_reserved_connections"]) + int(
        settings.get("reserved_connections", "0")
    )
    yield Room(int(settings["max_connections"]) - reserved, state.used)


def _server_state(connection: Connection) -> Row[tuple[bool, bool, int]]:
    return connection.execute(
        text(
            "SELECT pg_is_in_recovery() AS is_replica,"
            " coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false) AS is_encrypted,"
            " (SELECT sum(numbackends) FROM pg_stat_database)::int AS used"
        )
    ).one()
