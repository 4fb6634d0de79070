"""Ask both databases how they find the rows of every statement, when there are very many.

Owns: calling everything that `Store` offers, catching the SQL that it sends, and what counts as reading too
much. Does not know who fills the tables (`benchmarks.scale.rows`).

PostgreSQL is asked twice: for the plan with these values, and for the generic plan that a prepared statement
may turn to after some uses.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event

from benchmarks.scale.jobs import make_request, make_result
from benchmarks.scale.rows import QUEUE, SLOTS, WINDOW, claim_some
from codeherd_schema.requests import Request
from codeherd_schema.states import JobState, PauseScope
from codeherd_schema.store import Store

#: The tables that grow with the jobs.
_GROWING = ("jobs", "results", "attempts")
#: Rows that a planner may expect to read of a growing table before it is worth a line, whatever the index.
_MANY = 20_000
#: Seconds.
_LEASE_S = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How one statement of one call finds its rows."""

    call: str
    #: Verb and table, such as `UPDATE jobs`.
    statement: str
    #: Wall time of the whole call, its transaction included, milliseconds.
    call_ms: float
    #: What reads a growing table from end to end, or much of it; empty is good.
    faults: tuple[str, ...]
    #: The planner's own words.
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Sent:
    statement: str
    parameters: Any


def examine(url: str) -> list[Plan]:
    """Call everything once on the database at `url`, which changes a few rows, and return the plans."""
    store = Store.open(url)
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        plans = []
        for name, call in _calls(store):
            with _caught() as sent:
                started_at = time.perf_counter()
                call()
                call_ms = (time.perf_counter() - started_at) * 1000
            with engine.connect() as connection:
                for one in {one.statement: one for one in sent}.values():
                    words = _ask(connection, one)
                    verb = _verb(one.statement)
                    plans.append(Plan(name, verb, call_ms, tuple(faults_of(words)), tuple(words)))
                connection.rollback()
        return plans
    finally:
        engine.dispose()
        store.close()


def faults_of(words: Sequence[str]) -> list[str]:
    """Return those lines of a plan that say that much of a growing table is read."""
    return [line for line in words if _is_sqlite_scan(line) or _is_postgres_scan(line)]


def _is_sqlite_scan(line: str) -> bool:
    # An index is read from end to end too: "SCAN jobs USING INDEX"; a search of a part says SEARCH.
    return re.match(rf"SCAN ({'|'.join(_GROWING)})\b", line) is not None


def _is_postgres_scan(line: str) -> bool:
    found = re.match(rf"(?:generic: )?(.*) on ({'|'.join(_GROWING)})\b.*rows=(\d+)", line)
    return found is not None and (found[1] == "Seq Scan" or int(found[3]) >= _MANY)


def _calls(store: Store) -> Iterator[tuple[str, Callable[[], object]]]:
    """Give each call with a name, in an order in which every one has something to do."""

    def submitted(**options: Any) -> str:
        return store.submit([make_request(0, **options)], queue_of=_queue_of, batch_id="batch1")[0].job_id

    keyed = {"idempotency_key": "once"}
    yield "submit", lambda: submitted(**keyed)
    yield "submit again, same key", lambda: submitted(**keyed)
    fresh = submitted()
    yield "mark_published", lambda: store.mark_published([fresh])
    yield "queues_with_work", store.queues_with_work
    hints = store.due(QUEUE, limit=WINDOW)
    yield "due, 64 hints", lambda: store.due(QUEUE, limit=WINDOW)
    yield "unpublish, 64 hints", lambda: store.unpublish(hints)
    yield "claim", lambda: store.claim(fresh, worker_id="gpu0@host", lease_s=_LEASE_S)
    claims = claim_some(store, SLOTS)
    yield "heartbeat, 32 leases", lambda: store.heartbeat(claims, lease_s=_LEASE_S)
    yield "succeed", lambda: store.succeed(claims[0], make_result(claims[0], 0))
    yield "succeed again", lambda: store.succeed(claims[0], make_result(claims[0], 0))
    yield "fail", lambda: store.fail(claims[1], code="x", message="x")
    yield "retry", lambda: store.retry(claims[2], code="x", message="x", delay_s=1)
    yield "release", lambda: store.release(claims[3])
    yield "cancel_running", lambda: store.cancel_running(claims[4])
    yield "expire_running", lambda: store.expire_running(claims[5])
    store.heartbeat(claims[6:10], lease_s=-1)
    yield "reap, 4 lost", lambda: store.reap(max_crashes=3)
    yield "reap, none lost", lambda: store.reap(max_crashes=3)
    yield "expire_due", store.expire_due
    yield "count_old", lambda: store.count_old(keep_s=86_400)
    yield "prune, none old", lambda: store.prune(keep_s=86_400)
    yield "prune, 500 old", lambda: store.prune(keep_s=0)
    ended = claims[1].job.id
    yield "get", lambda: store.get(ended)
    yield "result", lambda: store.result(claims[0].job.id)
    yield "attempts", lambda: store.attempts(ended)
    yield "pending, 64 ids", lambda: store.pending([hint.job_id for hint in hints])
    yield "requeue", lambda: store.requeue(ended)
    yield "request_cancel", lambda: store.request_cancel(ended)
    yield "queue_depths", store.queue_depths
    yield "count_by_state", store.count_by_state
    yield "count_by_state, batch", lambda: store.count_by_state(batch_id="batch1")
    yield "list", store.list
    yield "list, state", lambda: store.list(state=JobState.SUCCEEDED)
    yield "list, queued", lambda: store.list(state=JobState.QUEUED)
    yield "list, running", lambda: store.list(state=JobState.RUNNING)
    yield "list, batch", lambda: store.list(batch_id="batch1")
    yield "list, other model", lambda: store.list(model="none-of-these")
    yield "list, label", lambda: store.list(labels={"team": "none"})
    for scope in PauseScope:
        yield f"pause {scope}", lambda scope=scope: store.pause(scope, "nobody")  # type: ignore[misc]
        yield f"resume {scope}", lambda scope=scope: store.resume(scope, "nobody")  # type: ignore[misc]
    store.submit([make_request(1, expires_at=timedelta(hours=1))], queue_of=_queue_of)
    for claim in claims[10:]:
        store.release(claim)


def _queue_of(_request: Request) -> str:
    return QUEUE


@contextmanager
def _caught() -> Iterator[list[_Sent]]:
    """Collect what any engine of this process sends to its database."""
    sent: list[_Sent] = []

    def catch(_c: object, _cursor: object, text: str, parameters: Any, _x: object, many: bool) -> None:
        if _verb(text).split()[0] in {"SELECT", "UPDATE", "INSERT", "DELETE", "WITH"}:
            sent.append(_Sent(text, parameters[0] if many else parameters))

    event.listen(Engine, "before_cursor_execute", catch)
    try:
        yield sent
    finally:
        event.remove(Engine, "before_cursor_execute", catch)


def _verb(statement: str) -> str:
    words = statement.split()
    table = re.search(r"\b(?:FROM|UPDATE|INTO)\s+(\w+)", statement)
    return f"{words[0]} {table[1]}" if words and table else (words[0] if words else "?")


def _ask(connection: Connection, sent: _Sent) -> list[str]:
    if connection.dialect.name == "sqlite":
        rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sent.statement}", sent.parameters)
        return [row.detail for row in rows]
    plan = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {sent.statement}", sent.parameters).scalar()
    return [*_nodes(plan), *(f"generic: {line}" for line in _generic(connection, sent.statement))]


def _generic(connection: Connection, statement: str) -> list[str]:
    names: dict[str, int] = {}
    # Every parameter has a cast, so its type is known.
    text = re.sub(r"%\((\w+)\)s", lambda m: f"${names.setdefault(m[1], len(names) + 1)}", statement)
    driver: Any = connection.connection.dbapi_connection
    driver.execute("SET LOCAL plan_cache_mode = force_generic_plan")
    driver.execute(f"PREPARE asked AS {text.replace('%%', '%')}", prepare=False)
    values = f"({', '.join(['NULL'] * len(names))})" if names else ""
    plan = driver.execute(f"EXPLAIN (FORMAT JSON) EXECUTE asked{values}").fetchone()[0]
    driver.execute("DEALLOCATE asked")
    driver.execute("SET LOCAL plan_cache_mode = auto")
    return list(_nodes(plan))


def _nodes(plan: Any) -> Iterator[str]:
    top = json.loads(plan) if isinstance(plan, str) else plan
    waiting = [top[0]["Plan"]]
    while waiting:
        node = waiting.pop()
        waiting += node.get("Plans", ())
        if "Relation Name" in node and node["Node Type"] != "ModifyTable":
            index = f" using {node['Index Name']}" if "Index Name" in node else ""
            yield f"{node['Node Type']} on {node['Relation Name']}{index} rows={node['Plan Rows']}"
        elif node["Node Type"] in {"Sort", "Bitmap Index Scan"}:
            yield f"{node['Node Type']} {node.get('Index Name', '')} rows={node['Plan Rows']}"
