"""Start what the measurements run against, and say what it uses.

Owns: a PostgreSQL that keeps its promises, databases and a Redis for each measurement, processor time of
servers. Does not know jobs.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import redis

from codeherd_schema.migrations import upgrade
from tests.services import PostgresServer, RedisServer

DATABASES = ("sqlite", "postgresql")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class DurablePostgres(PostgresServer):
    """A PostgreSQL as one would run it: synced commits, and memory for more than a test."""

    #: Connections that it takes.
    connections = 250

    def command(self) -> Sequence[str]:
        settings = {
            "fsync": "on",
            "full_page_writes": "on",
            "shared_buffers": "512MB",
            "max_wal_size": "4GB",
            "max_connections": str(self.connections),
        }
        return [*super().command(), *(word for k, v in settings.items() for word in ("-c", f"{k}={v}"))]

    @property
    def pid(self) -> int:
        """The first process of the server; all others are its children."""
        return int((self.folder / "data" / "postmaster.pid").read_text(encoding="utf-8").split()[0])

    def cpu_s(self) -> float:
        """Return the processor seconds that the server has used since it started."""
        return cpu_s_of(self.pid)

    def backends_kb(self) -> list[int]:
        """Return the memory of each backend, shared pages by share, in KiB."""
        found = []
        for pid in _children(self.pid):
            # A backend may end between two looks.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if b" idle" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(_pss_kb(pid))
        return found


def cpu_s_of(pid: int) -> float:
    """Return the processor seconds of a process and its children since they started."""
    # utime, stime, and those of children that have ended.
    own = _stat(pid)
    ticks = sum(int(own[i]) for i in (11, 12, 13, 14))
    for child in _children(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = _stat(child)
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_S


@contextmanager
def database(kind: str, server: PostgresServer | None) -> Iterator[str]:
    """Give the URL of a migrated, empty database of this kind, which ends with the block."""
    if kind == "sqlite":
        # Not in memory: a commit is synced to the disk that a user would have.
        with tempfile.TemporaryDirectory(dir=disk_folder()) as folder:
            url = f"sqlite:///{folder}/codeherd.db"
            upgrade(url)
            yield url
        return
    if server is None:
        raise ValueError("no PostgreSQL server was started")
    with server.database() as url:
        upgrade(url)
        yield url


def statistics_of(url: str) -> None:
    """Let PostgreSQL look at its tables, as its autovacuum would a minute later."""
    if url.startswith("postgresql"):
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE")


def redis_of(server: RedisServer) -> redis.Redis:
    """Return a client that keeps bytes as they are."""
    return redis.Redis.from_url(server.url)


def redis_cpu_s(client: redis.Redis) -> float:
    """Return the processor seconds of the server's own threads."""
    facts: Any = client.info("cpu")
    return float(facts["used_cpu_user"] + facts["used_cpu_sys"])


def versions(server: PostgresServer | None, client: redis.Redis | None) -> dict[str, str]:
    """Return the versions of what was measured."""
    found = {"sqlite": sqlite3.sqlite_version}
    if server is not None:
        with psycopg.connect(server.url) as connection:
            number = connection.info.server_version
            found["postgresql"] = f"{number // 10_000}.{number % 10_000}"
    if client is not None:
        facts: Any = client.info("server")
        found["redis"] = str(facts["redis_version"])
    return found


def disk_folder() -> Path:
    """Return a folder for temporary files on a disk."""
    # /tmp is in memory on many machines.
    return Path("/var/tmp") if Path("/var/tmp").is_dir() else Path(tempfile.gettempdir())


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
    return [int(word) for word in text.split()]


def _stat(pid: int) -> list[str]:
    # The name, which may hold spaces, ends with the last bracket.
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def _pss_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0
