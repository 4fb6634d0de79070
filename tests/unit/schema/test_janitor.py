from __future__ import annotations

import threading
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from codeherd_schema.janitor import Reaped, fate
from codeherd_schema.states import JobState, Move
from codeherd_schema.store import Claim, Store
from tests.samples import a_request, rewrite


def lost(store: Store) -> Claim:
    """A claim whose lease ran out."""
    [submitted] = store.submit([a_request()])
    claimed = store.claim(submitted.job_id, worker_id="w", lease_s=-1)
    assert claimed is not None
    return claimed


def test_lost_worker_gives_the_job_back_once(store: Store) -> None:
    claimed = lost(store)
    store.mark_published([claimed.job.id])

    assert store.reap(max_crashes=3) == Reaped(requeued=(claimed.job.id,))
    assert store.reap(max_crashes=3) == Reaped()

    job = store.get(claimed.job.id)
    assert job is not None
    assert (job.state, job.attempt, job.crash_count) == (JobState.QUEUED, 1, 1)
    assert (job.lease_id, job.published_at) == (None, None)
    [attempt] = store.attempts(job.id)
    assert (attempt.outcome, attempt.error_code) == (Move.REAP, "worker_lost")


def test_living_leases_are_left_alone(store: Store) -> None:
    [submitted] = store.submit([a_request()])
    store.claim(submitted.job_id, worker_id="w", lease_s=60)

    assert store.reap(max_crashes=1) == Reaped()


def test_job_that_kills_its_workers_is_buried(store: Store) -> None:
    job_id = lost(store).job.id
    store.reap(max_crashes=2)
    store.claim(job_id, worker_id="w", lease_s=-1)

    assert store.reap(max_crashes=2) == Reaped(buried=(job_id,))

    job = store.get(job_id)
    assert job is not None
    assert (job.state, job.crash_count, job.error_code) == (JobState.DEAD, 2, "worker_lost")


def test_cancelled_and_late_jobs_of_lost_workers_end(store: Store, database_url: str) -> None:
    cancelled, late = lost(store).job.id, lost(store).job.id
    store.request_cancel(cancelled)
    rewrite(database_url, late, deadline=1.0)

    assert store.reap(max_crashes=3) == Reaped(cancelled=(cancelled,), expired=(late,))


@pytest.mark.parametrize(
    ("row", "move"),
    [
        ({}, Move.REAP),
        ({"deadline": 11.0}, Move.REAP),
        ({"deadline": 10.0}, Move.EXPIRE),
        ({"attempt": 5}, Move.BURY),
        ({"crash_count": 1}, Move.REAP),
        ({"crash_count": 2}, Move.BURY),
        ({"cancel_requested_at": 1.0, "deadline": 1.0, "attempt": 5}, Move.CANCEL),
        ({"deadline": 1.0, "attempt": 5}, Move.EXPIRE),
    ],
)
def test_fate_of_a_job_whose_worker_was_lost(row: dict[str, Any], move: Move) -> None:
    plain = {"cancel_requested_at": None, "deadline": None, "now": 10.0}
    counts = {"attempt": 1, "max_attempts": 5, "crash_count": 0}

    assert fate(SimpleNamespace(**{**plain, **counts, **row}), max_crashes=3) is move  # type: ignore[arg-type]


def test_racing_janitors_take_each_job_back_once(store: Store) -> None:
    ids = {lost(store).job.id for _ in range(20)}
    start = threading.Barrier(4)
    found: list[str] = []

    def reap() -> None:
        start.wait()
        found.extend(store.reap(max_crashes=3).requeued)

    threads = [threading.Thread(target=reap) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.extend(store.reap(max_crashes=3).requeued)

    assert sorted(found) == sorted(ids)


def test_jobs_that_are_too_late_expire(store: Store, database_url: str) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"expires_at": timedelta(days=1), "deadline": timedelta(days=1)},
        {"expires_at": timedelta(days=1)},
        {"deadline": timedelta(days=1)},
    ]
    never, later, unstarted, late = [
        answer.job_id for answer in store.submit([a_request(**each) for each in options])
    ]
    rewrite(database_url, unstarted, expires_at=1.0)
    rewrite(database_url, late, deadline=1.0)

    assert store.expire_due() == (unstarted, late)
    assert store.expire_due() == ()

    jobs = store.get_many([never, later, unstarted, late])
    assert [jobs[job_id].state for job_id in (never, later, unstarted, late)] == [
        JobState.QUEUED,
        JobState.QUEUED,
        JobState.EXPIRED,
        JobState.EXPIRED,
    ]
    assert store.attempts(late) == []
