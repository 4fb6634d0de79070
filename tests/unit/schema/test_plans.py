"""How the databases find the jobs of a statement among twenty thousand, whatever their statistics say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from sqlalchemy import Engine, event

from codeherd_schema.leases import _result_row
from codeherd_schema.store import Claim, Store
from tests.samples import a_request, a_result

#: Enough that a planner sees a difference between all of them and a few.
MANY = 20_000
#: As many as a window of hints, and as the slots of a worker.
WINDOW, SLOTS = 64, 8

Statement = tuple[str, Any]


@pytest.fixture
def store(store: Store) -> Iterator[Store]:
    """A store whose database believes that there are hardly any jobs; emptied afterwards."""
    for answer in store.submit([a_request()] * 5):
        store.request_cancel(answer.job_id)
    analyze(store)
    yield store
    if store._database.dialect == "postgresql":
        # A test after this one must not read through what this one has left.
        with store._database.begin() as connection:
            connection.exec_driver_sql("TRUNCATE jobs CASCADE")
        analyze(store)


def analyze(store: Store) -> None:
    with store._database.begin() as connection:
        connection.exec_driver_sql("ANALYZE jobs")


def claim(store: Store, job_id: str) -> Claim:
    claimed = store.claim(job_id, worker_id="w", lease_s=60)
    assert claimed is not None
    return claimed


def sent_by(call: Callable[[], object], pattern: str = r"\bUPDATE jobs\b") -> list[Statement]:
    """Make a call and return its statements of this pattern with their values: those that changed jobs."""
    sent: list[Statement] = []

    def catch(_c: object, _cursor: object, words: str, values: Any, _x: object, many: bool) -> None:
        if re.search(pattern, words):
            sent.append((words, values[0] if many else values))

    event.listen(Engine, "before_cursor_execute", catch)
    try:
        call()
    finally:
        event.remove(Engine, "before_cursor_execute", catch)
    assert sent
    return sent


def plan(store: Store, statements: Sequence[Statement]) -> str:
    verb = "EXPLAIN QUERY PLAN" if store._database.dialect == "sqlite" else "EXPLAIN"
    with store._database.read() as connection:
        return "\n".join(
            str(row[-1])
            for words, values in statements
            for row in connection.exec_driver_sql(f"{verb} {words}", values)
        )


def test_jobs_that_are_named_are_looked_up_by_their_key(store: Store) -> None:
    ids = [answer.job_id for answer in store.submit([a_request()] * MANY)]
    hints = store.mark_published(ids[:WINDOW])
    claims = [claim(store, job_id) for job_id in ids[:SLOTS]]
    ends = [(one, _result_row(a_result(one))) for one in claims]
    spare = ids[-1]
    calls: dict[str, Callable[[], object]] = {
        "claim": lambda: store.claim(ids[SLOTS], worker_id="w", lease_s=60, queues=["tiny"]),
        "heartbeat": lambda: store.heartbeat(claims, lease_s=60),
        "succeed": lambda: store._succeed_together(ends),
        "mark_published": lambda: store.mark_published(ids[-WINDOW:]),
        "owe_again": lambda: store.owe_again(ids[:WINDOW]),
        "unpublish": lambda: store.unpublish(hints),
        "due": lambda: store.due("tiny", limit=WINDOW),
        "request_cancel": lambda: store.request_cancel(spare),
        "requeue": lambda: store.requeue(spare),
    }

    made = {name: sent_by(call) for name, call in calls.items()}
    made["pending"] = sent_by(lambda: store.pending(ids[:WINDOW]), "SELECT jobs")
    plans = {f"{name}, old": plan(store, statements) for name, statements in made.items()}
    analyze(store)
    plans |= {f"{name}, new": plan(store, statements) for name, statements in made.items()}

    is_key = "sqlite_autoindex_jobs_1 (id=?)" if store._database.dialect == "sqlite" else "jobs_pkey"
    detours = {
        name: words
        for name, words in plans.items()
        if is_key not in words or re.search(r"ix_jobs|SCAN jobs|Seq Scan on jobs", words)
    }
    assert detours == {}


def test_what_is_late_is_looked_up_by_its_limits(store: Store) -> None:
    store.submit([a_request()] * MANY)

    made = sent_by(store.expire_due)
    analyze(store)
    words = plan(store, made)

    assert "ix_jobs_queued_expires" in words
    assert "ix_jobs_queued_deadline" in words
    assert not re.search(r"SCAN jobs|Seq Scan on jobs|ix_jobs_lanes", words)
