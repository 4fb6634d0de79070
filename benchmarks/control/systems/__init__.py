"""Every queue that takes part, what it promises, and how it is started.

Owns: the names in the tables, the packages that must be installed, and the promises. A module in this
package holds one system as a class `System` that follows `benchmarks.control.protocol.System`; it is imported
only in a process of that system.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

SQLITE, POSTGRESQL, REDIS = "sqlite", "postgresql", "redis"


@dataclass(frozen=True, slots=True)
class Promise:
    """What is left of a job when something dies; `benchmarks.control.faults` shows most of it."""

    #: All of it in few words, for the table of figures.
    short: str
    #: Where a result is, and for how long.
    result: str
    #: What becomes of a job whose worker is killed.
    kill: str
    #: What becomes of waiting jobs when Redis loses its data.
    flush: str
    #: Whether a job that ran twice can have two results.
    once: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the tables."""

    name: str
    #: Module in this package.
    module: str
    #: Distributions that must be installed; the first one's version is reported.
    packages: tuple[str, ...]
    #: Where results are kept: `sqlite`, `postgresql` or `redis`.
    results: str
    promise: Promise
    #: Arguments of the module's `System`.
    options: Mapping[str, Any] = field(default_factory=dict)
    #: Whether it is measured with very many queued jobs; its siblings would show the same.
    has_backlog: bool = True
    #: Of the jobs that are submitted together and waited for, one in this many: the others are too slow for a
    #: run of minutes.
    share: int = 1
    #: Whether `benchmarks.control.faults` shows it; its siblings would do the same.
    shows_faults: bool = True

    @property
    def version(self) -> str | None:
        """The first package's version; None if one of them is missing."""
        try:
            versions = [importlib.metadata.version(package) for package in self.packages]
        except importlib.metadata.PackageNotFoundError:
            return None
        return versions[0]


_OURS = Promise(
    short="durable row; survives kill and flush; one result",
    result="row, until pruned",
    kill="runs again when its lease of 30 s ends",
    flush="published again from SQL",
    once="one: commits are fenced by lease",
)
_CELERY_RESULT = "row, deleted by celery beat after a day"
_CELERY_EARLY = Promise(
    short="durable row; kill and flush lose jobs",
    result=_CELERY_RESULT,
    kill="lost: acknowledged before it ran",
    flush="lost",
    once="the last run overwrites",
)
_CELERY_LATE = Promise(
    short="durable row; survives kill (after 1 h); flush loses jobs",
    result=_CELERY_RESULT,
    kill="runs again after the visibility timeout, 1 h",
    flush="lost",
    once="the last run overwrites",
)
_RQ = Promise(
    short="result expires; kill fails, flush loses jobs",
    result="Redis, expires (500 s by default)",
    kill="ends as failed; runs again only with `Retry`",
    flush="lost, results too",
    once="one for each run",
)
_DRAMATIQ = Promise(
    short="result expires; survives kill (after 60 s and more); flush loses jobs",
    result="Redis, expires (600 s by default)",
    kill="runs again, found by chance 60 s after the last heartbeat",
    flush="lost, results too",
    once="the last run overwrites",
)
_PROCRASTINATE = Promise(
    short="durable row by the task's own hand; kill leaves jobs `doing`",
    result="row that the task writes itself",
    kill="stays `doing`; runs again if a periodic task of your own asks for it",
    flush="no Redis",
    once="one: the task inserts it by job id",
)
_SQL = ("sqlalchemy", "psycopg")


def _ours(results: str, label: str, *, processes: int = 1) -> Entry:
    is_one = processes == 1
    return Entry(
        f"codeherd, {label}" + ("" if is_one else f", {processes} processes"),
        "codeherd",
        ("codeherd",),
        results,
        _OURS,
        options={"processes": processes},
        # What waits, and what faults leave, is the same.
        has_backlog=is_one,
        shows_faults=is_one,
    )


#: A worker process has one device, and Python computes on one core of it; a machine with two devices has two.
OURS = (
    _ours(SQLITE, "SQLite"),
    _ours(SQLITE, "SQLite", processes=2),
    _ours(POSTGRESQL, "PostgreSQL"),
    _ours(POSTGRESQL, "PostgreSQL", processes=2),
)


def _celery(
    results: str, label: str, *, pool: str, late: bool = False, stands_for_all: bool = False
) -> Entry:
    acks = "acks late" if late else "default acks"
    return Entry(
        f"Celery, {label}, {pool}, {acks}",
        "celery",
        ("celery", *_SQL),
        results,
        _CELERY_LATE if late else _CELERY_EARLY,
        options={"pool": pool, "acks_late": late},
        has_backlog=stands_for_all,
        shows_faults=stands_for_all or (late and results == POSTGRESQL),
        # Submission is the same, and so is the queue: fewer jobs tell the difference of the acknowledgement.
        share=2 if late else 1,
    )


PLAIN_CELERY = (
    _celery(SQLITE, "SQLite", pool="threads"),
    _celery(SQLITE, "SQLite", pool="threads", late=True),
    _celery(SQLITE, "SQLite", pool="prefork"),
    _celery(POSTGRESQL, "PostgreSQL", pool="threads", stands_for_all=True),
    _celery(POSTGRESQL, "PostgreSQL", pool="threads", late=True),
    _celery(POSTGRESQL, "PostgreSQL", pool="prefork"),
)
_ENTRIES = (
    *OURS,
    *PLAIN_CELERY,
    Entry("rq, fork per job", "rq", ("rq",), REDIS, _RQ, share=4),
    Entry(
        "rq, SimpleWorker",
        "rq",
        ("rq",),
        REDIS,
        _RQ,
        options={"worker_class": "rq.SimpleWorker"},
        has_backlog=False,
        shows_faults=False,
    ),
    Entry("dramatiq", "dramatiq", ("dramatiq", "redis"), REDIS, _DRAMATIQ),
    Entry("procrastinate", "procrastinate", ("procrastinate",), POSTGRESQL, _PROCRASTINATE),
)

#: By name, in the order of the tables.
SYSTEMS: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
