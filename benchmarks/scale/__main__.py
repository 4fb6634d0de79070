"""Measure how far the service scales on this machine.

    python -m benchmarks.scale [--quick] [--parts rows herds connections messages] [--write]

Owns: which measurements are made with which numbers, and where they go. With `--write`: a report and rows
in `benchmarks/results`. `--quick` makes every measurement that needs no Celery worker on a few rows: it shows
that they work, and says nothing about speed.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.report import machine
from benchmarks.run import RESULTS, append
from benchmarks.scale import connections, messages, plans, report, rows
from benchmarks.scale.herd import Herd, play
from benchmarks.scale.stack import (
    DATABASES,
    DurablePostgres,
    database,
    disk_folder,
    redis_of,
    statistics_of,
    versions,
)
from tests.services import RedisServer

PARTS = ("rows", "connections", "messages", "herds")
#: Mean seconds that a 7B job runs beside 31 others.
JOB_S = 4.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    #: Jobs whose calls are timed one by one.
    calls: int
    #: Times that other calls are repeated, and looks of the dispatcher.
    repeats: int
    looks: int
    #: Queued rows at which the dispatcher is timed; the plans are asked for at the last one.
    queued: tuple[int, ...]
    ended: int
    delayed: int
    #: Jobs that run elsewhere while calls are timed.
    held: tuple[int, ...]
    idle_connections: tuple[int, ...]
    #: With a Celery worker: its jobs; 0 measures hints alone.
    worker_jobs: int
    #: Until one is too large.
    herds: tuple[Herd, ...]
    #: Another one, with the default window.
    window_herd: Herd | None
    leases: tuple[Herd, ...]


FULL = Sizes(
    calls=1000,
    repeats=100,
    looks=20,
    queued=(10_000, 100_000, 1_000_000),
    ended=300_000,
    delayed=30_000,
    held=(0, 4_096, 16_384),
    idle_connections=(0, 100, 200),
    worker_jobs=1000,
    herds=tuple(Herd(w, 32, JOB_S, run_s=18, settle_s=8) for w in (1, 8, 32, 128, 512)),
    window_herd=Herd(32, 32, JOB_S, run_s=18, settle_s=8, publish_window=64),
    leases=tuple(Herd(w, 32, None, run_s=12, settle_s=0) for w in (8, 128, 512)),
)
QUICK = Sizes(
    calls=20,
    repeats=3,
    looks=2,
    queued=(300,),
    ended=600,
    delayed=10,
    held=(0, 50),
    idle_connections=(0, 3),
    worker_jobs=0,
    herds=(Herd(3, 4, 0.3, 2, 0.5, heartbeat_s=0.5, lease_s=30, reap_interval_s=0.5, finish_s=60),),
    window_herd=None,
    leases=(Herd(3, 4, None, 2, 0, heartbeat_s=0.5, lease_s=30, reap_interval_s=0.5),),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and store if asked to; return the exit status."""
    options = _parser().parse_args(argv)
    started_at = time.monotonic()
    load_before = os.getloadavg()[0]
    sizes = QUICK if options.quick else FULL
    with DurablePostgres() as postgres, RedisServer() as redis:
        found = []
        for row in measure(sizes, options.parts, postgres, redis):
            found.append(row)
            _tell(f"{time.monotonic() - started_at:.0f} s: {row}")
        facts = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "load average before and after": f"{load_before:.1f}, {os.getloadavg()[0]:.1f}",
            "one synced write to the disk": f"{sync_ms():.2f} ms",
            "versions": ", ".join(f"{k} {v}" for k, v in _versions(postgres, redis).items()),
            "time": f"{(time.monotonic() - started_at) / 60:.1f} minutes",
        }
    text = report.document(found, facts)
    print(text)
    if options.write:
        append([row | facts for row in found], RESULTS / "scale.jsonl")
        (RESULTS / f"{facts['date']}-scale-cpu.md").write_text(text, encoding="utf-8")
    return 0


def measure(
    sizes: Sizes, parts: Sequence[str], postgres: DurablePostgres, redis: RedisServer
) -> Iterator[dict[str, Any]]:
    """Give a row for each figure or group of figures, as they come."""
    if "rows" in parts:
        for kind in DATABASES:
            yield from _rows(sizes, kind, postgres)
    if "connections" in parts:
        with database("postgresql", postgres) as url:
            for row in connections.measure(url, postgres, counts=sizes.idle_connections, calls=sizes.repeats):
                yield {"part": "connections", **row}
    if "messages" in parts:
        if sizes.worker_jobs:
            yield {"part": "messages", **messages.measure(jobs=sizes.worker_jobs, idle_s=10.0, flood_s=3.0)}
        else:
            yield {"part": "messages", **messages.measure_hints(redis)}
    if "herds" in parts:
        for kind in DATABASES:
            yield from _herds(sizes, kind, postgres, redis)


def sync_ms(writes: int = 50) -> float:
    """Return the milliseconds of a small write that is synced, as a commit of SQLite is."""
    with tempfile.NamedTemporaryFile(dir=disk_folder()) as file:
        started_at = time.perf_counter()
        for _ in range(writes):
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        return (time.perf_counter() - started_at) / writes * 1000


def _rows(sizes: Sizes, kind: str, postgres: DurablePostgres) -> Iterator[dict[str, Any]]:
    server = postgres if kind == "postgresql" else None
    with database(kind, postgres) as url:
        costs = rows.time_calls(url, server, jobs=sizes.calls, repeats=sizes.repeats)
        for call, cost in costs.items():
            if isinstance(cost, dict):
                yield {"part": "call", "database": kind, "call": call, **cost}
        figures = {name: cost for name, cost in costs.items() if not isinstance(cost, dict)}
        yield {"part": "bytes", "database": kind, **figures, **(rows.updates(url) if server else {})}
    with database(kind, postgres) as url:
        rows.fill(url, first=0, count=sizes.ended, ended=True)
        filled = 0
        for queued in sizes.queued:
            rows.fill(url, first=sizes.ended + filled, count=queued - filled)
            filled = queued
            statistics_of(url)
            yield {
                "part": "due", "database": kind, "queued": queued, "delayed": 0,
                **rows.time_due(url, server, looks=sizes.looks),
            }  # fmt: skip
        for before, held in pairwise((0, *sizes.held)):
            yield {
                "part": "held", "database": kind, "held": held, "statistics": "made while none ran",
                **rows.time_held(url, server, held=held - before, repeats=sizes.repeats),
            }  # fmt: skip
        if server:
            statistics_of(url)
            yield {
                "part": "held", "database": kind, "held": sizes.held[-1], "statistics": "made now",
                **rows.time_held(url, server, held=0, repeats=sizes.repeats),
            }  # fmt: skip
        for plan in plans.examine(url):
            yield {
                "part": "plan", "database": kind, "call": plan.call, "statement": plan.statement,
                "call_ms": round(plan.call_ms, 2), "faults": plan.faults, "words": plan.words,
            }  # fmt: skip
        rows.delay(url, sizes.delayed)
        statistics_of(url)
        yield {
            "part": "due", "database": kind, "queued": filled, "delayed": sizes.delayed,
            **rows.time_due(url, server, looks=sizes.looks),
        }  # fmt: skip


def _herds(
    sizes: Sizes, kind: str, postgres: DurablePostgres, redis: RedisServer
) -> Iterator[dict[str, Any]]:
    def played(part: str, herd: Herd) -> dict[str, Any]:
        with database(kind, postgres) as url:
            server = postgres if kind == "postgresql" else None
            return {"part": part, "database": kind, **play(herd, url, redis, server)}

    for herd in sizes.leases:
        yield played("leases", herd)
    for herd in sizes.herds:
        row = played("herd", herd)
        yield row
        if row["behind"]:
            break
    if sizes.window_herd is not None:
        yield played("herd", sizes.window_herd)


def _versions(postgres: DurablePostgres, redis: RedisServer) -> dict[str, str]:
    client = redis_of(redis)
    try:
        packages = {name: version(name) for name in ("celery", "kombu", "sqlalchemy", "psycopg")}
        return {"Python": platform.python_version()} | versions(postgres, client) | packages
    finally:
        client.close()


def _tell(text: str) -> None:
    print(text[:3000], file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description="Measure how far the service scales."
    )
    parser.add_argument("--quick", action="store_true", help="a few rows: shows that it works, not how fast")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--write", action="store_true", help=f"write to {Path('benchmarks/results')}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
