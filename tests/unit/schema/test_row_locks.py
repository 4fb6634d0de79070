"""In which order statements on several jobs lock them. On PostgreSQL alone: SQLite has one lock for all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest

from codeherd_schema.leases import _result_row
from codeherd_schema.states import JobState, PauseScope
from codeherd_schema.store import Claim, Store
from tests.samples import a_request, a_result, rewrite
from tests.services import wait_until

Call = Callable[[], object]


@pytest.fixture
def store(postgres_url: str) -> Iterator[Store]:
    store = Store.open(postgres_url)
    yield store
    store.close()


def submit(store: Store, count: int = 3) -> list[str]:
    return [answer.job_id for answer in store.submit([a_request()] * count)]


def claim(store: Store, job_id: str) -> Claim:
    claimed = store.claim(job_id, worker_id="w", lease_s=60)
    assert claimed is not None
    return claimed


@contextmanager
def held(url: str, job_id: str, change: str = "tenant = tenant") -> Iterator[None]:
    """Change a job in another transaction, which is committed at the end of the block."""
    with psycopg.connect(url) as connection:
        connection.execute(f"UPDATE jobs SET {change} WHERE id = %s".encode(), [job_id])
        yield


def free(url: str, job_ids: Collection[str]) -> set[str]:
    """Return those of the jobs that nobody has locked."""
    with psycopg.connect(url) as connection:
        statement = "SELECT id FROM jobs WHERE id = ANY(%s) FOR UPDATE SKIP LOCKED"
        found = connection.execute(statement, [list(job_ids)]).fetchall()
        connection.rollback()
    return {job_id for (job_id,) in found}


def wait_for_a_waiting_one(url: str) -> None:
    statement = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    with psycopg.connect(url, autocommit=True) as connection:

        def waits() -> bool:
            return connection.execute(statement).fetchone() == (1,)

        wait_until(waits, "a statement to wait for the held job")


# Statements that wait. Each is prepared so that the jobs lie in the table the other way round.


def heartbeat(store: Store, ids: Sequence[str]) -> Call:
    claims = [claim(store, job_id) for job_id in reversed(ids)]
    return lambda: store.heartbeat(claims, lease_s=60)


def ends_that_met(store: Store, ids: Sequence[str]) -> Call:
    claims = [claim(store, job_id) for job_id in reversed(ids)]
    return lambda: store._succeed_together([(one, _result_row(a_result(one))) for one in claims])


def unpublish(store: Store, ids: Sequence[str]) -> Call:
    hints = [hint for job_id in reversed(ids) for hint in store.mark_published([job_id])]
    return lambda: store.unpublish(hints)


def resume(store: Store, ids: Sequence[str]) -> Call:
    for job_id in reversed(ids):
        store.mark_published([job_id])
    store.pause(PauseScope.QUEUE, "tiny")
    return lambda: store.resume(PauseScope.QUEUE, "tiny")


@pytest.mark.parametrize("prepare", [heartbeat, ends_that_met, unpublish, resume])
def test_who_waits_for_several_jobs_has_locked_those_before_and_none_after(
    store: Store, postgres_url: str, prepare: Callable[[Store, Sequence[str]], Call]
) -> None:
    ids = submit(store)
    call = prepare(store, ids)

    with ThreadPoolExecutor(1) as pool:
        with held(postgres_url, ids[1]):
            waiting = pool.submit(call)
            wait_for_a_waiting_one(postgres_url)
            unlocked = free(postgres_url, [ids[0], ids[2]])
        waiting.result()

    assert unlocked == {ids[2]}


def test_a_heartbeat_that_had_to_wait_tells_what_happened_meanwhile(store: Store, postgres_url: str) -> None:
    claims = [claim(store, job_id) for job_id in submit(store)]
    cancelled, lost, other = claims
    given_back = "state = 'queued', lease_id = NULL, lease_until = NULL"

    with ThreadPoolExecutor(1) as pool:
        with (
            held(postgres_url, cancelled.job.id, "cancel_requested_at = 1"),
            held(postgres_url, lost.job.id, given_back),
        ):
            waiting = pool.submit(store.heartbeat, claims, lease_s=6000)
            wait_for_a_waiting_one(postgres_url)
        beats = waiting.result()

    assert {lease_id: beat.cancel_requested for lease_id, beat in beats.items()} == {
        cancelled.lease_id: True,
        other.lease_id: False,
    }
    rows = store.get_many([one.job.id for one in claims])
    assert rows[lost.job.id].lease_until is None
    for one in (cancelled, other):
        until = rows[one.job.id].lease_until
        assert until is not None
        assert (until - one.claimed_at).total_seconds() > 5000


def test_an_end_that_had_to_wait_stores_nothing_of_a_job_that_was_given_back(
    store: Store, postgres_url: str
) -> None:
    first, lost, last = (claim(store, job_id) for job_id in submit(store))
    ends = [(one, _result_row(a_result(one))) for one in (first, lost, last)]
    given_back = "state = 'queued', lease_id = NULL, lease_until = NULL"

    with ThreadPoolExecutor(1) as pool:
        with held(postgres_url, lost.job.id, given_back):
            waiting = pool.submit(store._succeed_together, ends)
            wait_for_a_waiting_one(postgres_url)
        commits = waiting.result()

    assert commits == ["stored", "lost", "stored"]
    assert set(store.results([one.job.id for one, _ in ends])) == {first.job.id, last.job.id}
    row = store.get(lost.job.id)
    assert row is not None
    assert row.state is JobState.QUEUED


# Statements that pass by what another holds.


def test_whoever_chooses_waiting_jobs_passes_by_what_another_holds(store: Store, postgres_url: str) -> None:
    ids = first, second, third = submit(store)

    with held(postgres_url, second):
        hinted = [hint.job_id for hint in store.mark_published(ids)]
    later = [hint.job_id for hint in store.mark_published(ids)]
    with held(postgres_url, second):
        owed = store.owe_again(ids)
    still = store.unclaimed("tiny")
    for job_id in ids:
        rewrite(postgres_url, job_id, expires_at=1.0)
    with held(postgres_url, second):
        expired = store.expire_due()

    assert (hinted, later) == ([first, third], [second])
    assert owed == 2
    assert still == {second}
    assert expired == (first, third)
    assert store.expire_due() == (second,)
