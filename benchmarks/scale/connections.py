"""What a PostgreSQL connection costs that does nothing.

Owns: memory of a backend that has run what a worker runs, and what many of them do to the others' calls.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import psycopg

from benchmarks.scale import rows
from benchmarks.scale.jobs import make_request, make_result
from benchmarks.scale.stack import DurablePostgres
from codeherd_schema.store import Store


def measure(
    url: str, server: DurablePostgres, *, counts: tuple[int, ...], calls: int
) -> list[dict[str, Any]]:
    """Return a row per number of idle connections; each has run a claim's statement."""
    found = []
    idle: list[psycopg.Connection[Any]] = []
    store = Store.open(url)
    try:
        for count in counts:
            while len(idle) < count:
                connection = psycopg.connect(url, autocommit=True, application_name="codeherd")
                # Fills the backend's caches, as a worker's first statements do.
                connection.execute(
                    "SELECT * FROM jobs JOIN results ON job_id = jobs.id WHERE state = 'queued'"
                )
                connection.execute("UPDATE jobs SET state = 'queued' WHERE id = 'none'")
                idle.append(connection)
            job_ms = _job_ms(store, calls)
            # One backend at least: that of the calls.
            sizes = server.backends_kb()
            found.append(
                {
                    "idle_connections": count,
                    "backend_kb": round(statistics.mean(sizes)) if sizes else 0,
                    "connect_ms": _connect_ms(url),
                    "job_ms": job_ms,
                }
            )
        return found
    finally:
        for connection in idle:
            connection.close()
        store.close()


def _connect_ms(url: str) -> float:
    walls = []
    for _ in range(5):
        started_at = time.perf_counter()
        psycopg.connect(url).close()
        walls.append(time.perf_counter() - started_at)
    return round(statistics.median(walls) * 1000, 2)


def _job_ms(store: Store, calls: int) -> float:
    """Return the milliseconds of a job's claim and success."""
    walls = []
    for seed in range(calls):
        [submitted] = store.submit([make_request(seed)], queue_of=lambda _: rows.QUEUE)
        started_at = time.perf_counter()
        claim = store.claim(submitted.job_id, worker_id="w", lease_s=30.0)
        if claim is None:
            raise RuntimeError("a queued job could not be claimed")
        store.succeed(claim, make_result(claim, seed))
        walls.append(time.perf_counter() - started_at)
    return round(statistics.median(walls) * 1000, 2)
