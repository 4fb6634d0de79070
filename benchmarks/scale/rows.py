"""What the tables cost: seconds of the dispatcher per look, bytes per job, and time per call.

Owns: filling a database with very many rows, and measuring on it. Does not know Redis or load
(`benchmarks.scale.herd`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import psycopg
from sqlalchemy import create_engine, text

from benchmarks.scale.jobs import MODEL, make_request, make_result
from benchmarks.scale.stack import DurablePostgres, statistics_of
from codeherd_schema.queues import queue_name
from codeherd_schema.store import Claim, Store

QUEUE = queue_name(MODEL)
#: Hints of one look, as `publish_window` has it.
WINDOW = 64
#: Leases of one heartbeat: slots of a worker.
SLOTS = 32
_FILL = """
    WITH RECURSIVE numbers(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM numbers WHERE i < {last})
    INSERT INTO jobs (id, tenant, kind, model, queue, state, priority, schema_version, payload, attempt,
        content_sha256, max_attempts, run_at, lane, batch_id, created_at, finished_at, started_at)
    SELECT {digits} || '-0000-7000-8000-000000000000', 'default', 'generate', '{model}', '{queue}', '{state}',
        3 + i % 3, 1, {payload}, {attempt}, {digits}, 5, {now} - 60,
        CASE WHEN i % 10 = 0 THEN '["default", null]' ELSE '["default", "batch' || (i % 20) || '"]' END,
        CASE WHEN i % 10 = 0 THEN NULL ELSE 'batch' || (i % 20) END, {now} - 60, {finished}, {now} - 60
    FROM numbers
"""
_WITH = {
    "sqlite": {
        "digits": "printf('%08d', i)",
        "payload": "printf('%.*c', 400, 'x')",
        "now": "unixepoch()",
    },
    "postgresql": {
        "digits": "lpad(i::text, 8, '0')",
        "payload": "repeat('x', 400)",
        "now": "extract(epoch FROM now())",
    },
}
_RESULTS = """
    INSERT INTO results (job_id, attempt, payload, model, prompt_tokens, completion_tokens, finish_reason,
        created_at)
    SELECT id, 1, '{}', model, 1, 1, 'eos', 0 FROM jobs WHERE finished_at IS NOT NULL
"""
_ATTEMPTS = """
    INSERT INTO attempts (job_id, attempt, lease_id, worker_id, started_at, ended_at, outcome)
    SELECT id, 1, id, 'gpu0@host', 0, 0, 'succeed' FROM jobs WHERE finished_at IS NOT NULL
"""


def fill(url: str, *, first: int, count: int, ended: bool = False) -> None:
    """Insert `count` small jobs in 21 lanes and 3 priorities, queued and due, or ended with their history."""
    kind = "sqlite" if url.startswith("sqlite") else "postgresql"
    words = _WITH[kind]
    statement = _FILL.format(
        **words, first=first, last=first + count - 1, model=MODEL, queue=QUEUE,
        state="succeeded" if ended else "queued", attempt=int(ended),
        finished=words["now"] if ended else "NULL",
    )  # fmt: skip
    _execute(url, statement, *((_RESULTS, _ATTEMPTS) if ended else ()))


def hold(url: str, *, workers: int, slots: int, lease_s: float) -> None:
    """Make every queued job a running one, `slots` of them each worker's."""
    words = _WITH["sqlite" if url.startswith("sqlite") else "postgresql"]
    number = "CAST(substr(id, 1, 8) AS INTEGER)"
    _execute(
        url,
        f"UPDATE jobs SET state = 'running', attempt = 1, lease_id = id, started_at = run_at, "
        f"lease_until = {words['now']} + {lease_s}, worker_id = 'w' || (({number} / {slots}) % {workers}) "
        "WHERE state = 'queued'",
    )


def delay(url: str, count: int) -> None:
    """Make `count` of the queued jobs of one lane due tomorrow."""
    _execute(
        url,
        "UPDATE jobs SET run_at = run_at + 86400 WHERE id IN (SELECT id FROM jobs WHERE state = 'queued' "
        f"AND priority = 3 AND batch_id IS NULL AND publish_no = 0 ORDER BY id LIMIT {count})",
    )


def time_due(url: str, server: DurablePostgres | None, *, looks: int) -> dict[str, float]:
    """Return what a dispatcher's look at one queue costs: finding the queues, and `Store.due`."""
    store = Store.open(url)
    try:
        steps = _cost(lambda _: store.queues_with_work(), looks, server)
        due = _cost(lambda _: store.due(QUEUE, limit=WINDOW), looks, server)
        return {"queues_with_work_ms": steps["wall_ms"], **{f"due_{k}": v for k, v in due.items()}}
    finally:
        store.close()


def time_held(url: str, server: DurablePostgres | None, *, held: int, repeats: int) -> dict[str, float]:
    """Return what a heartbeat, a success and a reap cost while `held` more jobs run elsewhere."""
    words = _WITH["sqlite" if url.startswith("sqlite") else "postgresql"]
    if held:
        _execute(
            url,
            f"UPDATE jobs SET state = 'running', attempt = 1, lease_id = id, started_at = run_at, "
            f"lease_until = {words['now']} + 3600, worker_id = 'other' WHERE id IN "
            f"(SELECT id FROM jobs WHERE state = 'queued' ORDER BY queue, priority, id LIMIT {held})",
        )
    store = Store.open(url)
    try:
        claims = claim_some(store, SLOTS)
        costs = {
            "heartbeat": _cost(lambda _: store.heartbeat(claims, lease_s=3600.0), repeats, server),
            "reap": _cost(lambda _: store.reap(max_crashes=3), repeats, server),
            "succeed": _cost(
                lambda i: store.succeed(claims[i], make_result(claims[i], 1)), len(claims), server
            ),
        }
        return {f"{call}_{name}": value for call, cost in costs.items() for name, value in cost.items()}
    finally:
        store.close()


def claim_some(store: Store, count: int) -> list[Claim]:
    """Claim `count` queued jobs for as long as any measurement lasts."""
    hints = store.due(QUEUE, limit=count)
    claims = [store.claim(hint.job_id, worker_id="gpu0@host", lease_s=3600.0) for hint in hints]
    return [claim for claim in claims if claim is not None]


def time_calls(url: str, server: DurablePostgres | None, *, jobs: int, repeats: int) -> dict[str, Any]:
    """Return what one call costs when nobody else is there, and how the database grows with its jobs."""
    store = Store.open(url)
    try:
        costs: dict[str, Any] = {"empty_bytes": total_bytes(url)}
        requests = [make_request(seed) for seed in range(jobs)]
        ids: list[str] = []
        for start in range(0, jobs, 500):
            chunk = requests[start : start + 500]
            ids += [s.job_id for s in store.submit(chunk, queue_of=lambda _: QUEUE, batch_id="b")]
        costs |= _sizes(url, jobs, "queued", costs["empty_bytes"])
        wal_before = _wal_bytes(url)
        costs["submit"] = _cost(
            lambda i: store.submit([requests[i]], queue_of=lambda _: QUEUE), min(jobs, repeats), server
        )
        store.due(QUEUE, limit=jobs)
        claims: list[Claim] = []

        def claim(i: int) -> None:
            found = store.claim(ids[i], worker_id="gpu0@host", lease_s=3600.0)
            if found is None:
                raise RuntimeError("a queued job could not be claimed")
            claims.append(found)

        costs["claim"] = _cost(claim, jobs, server)
        held = claims[:SLOTS]
        costs[f"heartbeat of {SLOTS}"] = _cost(
            lambda _: store.heartbeat(held, lease_s=3600.0), repeats, server
        )
        costs["reap"] = _cost(lambda _: store.reap(max_crashes=3), repeats, server)
        costs["expire_due"] = _cost(lambda _: store.expire_due(), repeats, server)
        outcomes = [make_result(claim, seed) for seed, claim in enumerate(claims)]
        costs["succeed"] = _cost(lambda i: store.succeed(claims[i], outcomes[i]), jobs, server)
        costs["log_bytes_per_job"] = round((_wal_bytes(url) - wal_before) / jobs)
        statistics_of(url)
        costs |= _sizes(url, jobs, "ended", costs["empty_bytes"])
        costs["payload_bytes"] = round(statistics.mean(len(r.model_dump_json()) for r in requests))
        costs["result_bytes"] = round(statistics.mean(len(o.model_dump_json()) for o in outcomes))
        return costs
    finally:
        store.close()


def updates(url: str) -> dict[str, int]:
    """Return how many updates of `jobs` PostgreSQL has counted, and how many touched no index."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT pg_stat_force_next_flush()")
        row = connection.execute(
            "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'jobs'"
        ).fetchone()
    return {"updates": row[0], "hot": row[1]} if row else {}


def total_bytes(url: str) -> int:
    """Return the size of the whole database: of the file, or of tables and indexes."""
    if url.startswith("sqlite"):
        pages = _scalar(url, "PRAGMA page_count") * _scalar(url, "PRAGMA page_size")
        return int(pages)
    return _scalar(url, "SELECT sum(pg_total_relation_size(c)) FROM unnest(" + _TABLES + ") c")


_TABLES = "ARRAY['jobs'::regclass, 'results'::regclass, 'attempts'::regclass]"


def _sizes(url: str, jobs: int, state: str, empty: int) -> dict[str, int]:
    found = {f"{state}_bytes_per_job": round((total_bytes(url) - empty) / jobs)}
    if url.startswith("postgresql"):
        indexes = _scalar(url, f"SELECT sum(pg_indexes_size(c)) FROM unnest({_TABLES}) c")
        found[f"{state}_index_bytes_per_job"] = round(indexes / jobs)
    return found


def _wal_bytes(url: str) -> int:
    if url.startswith("sqlite"):
        return 0
    return _scalar(url, "SELECT pg_current_wal_lsn() - '0/0'::pg_lsn")


def _cost(call: Callable[[int], object], count: int, server: DurablePostgres | None) -> dict[str, float]:
    """Return milliseconds of a call: its median, and the processor's on either side."""
    cpu_before = server.cpu_s() if server else 0.0
    own_before = time.process_time()
    walls = [_timed(lambda i=i: call(i)) for i in range(count)]  # type: ignore[misc]
    cost = {
        "wall_ms": _ms(walls),
        "client_cpu_ms": round((time.process_time() - own_before) / count * 1000, 3),
    }
    if server is not None:
        cost["server_cpu_ms"] = round((server.cpu_s() - cpu_before) / count * 1000, 3)
    return cost


def _timed(call: Callable[[], object]) -> float:
    started_at = time.perf_counter()
    call()
    return time.perf_counter() - started_at


def _ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1000, 2)


def _execute(url: str, *statements: str) -> None:
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        with engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement.replace("::", "\\:\\:")))
    finally:
        engine.dispose()


def _scalar(url: str, statement: str) -> int:
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        with engine.connect() as connection:
            return int(connection.exec_driver_sql(statement).scalar_one())
    finally:
        engine.dispose()
