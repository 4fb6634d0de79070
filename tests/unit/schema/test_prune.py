from __future__ import annotations

import threading

import pytest

from codeherd_schema.janitor import PRUNE_LIMIT
from codeherd_schema.store import Claim, Store
from tests.samples import a_request, a_result, rewrite

DAY_S = 86_400


def submit(store: Store, count: int = 1, **request: object) -> list[str]:
    return [answer.job_id for answer in store.submit([a_request(**request) for _ in range(count)])]


def claimed(store: Store, job_id: str) -> Claim:
    claim = store.claim(job_id, worker_id="w", lease_s=60)
    assert claim is not None
    return claim


def test_what_ended_long_ago_is_deleted_with_its_result_and_history(store: Store, database_url: str) -> None:
    old, fresh = submit(store, 2)
    for job_id in (old, fresh):
        claim = claimed(store, job_id)
        store.succeed(claim, a_result(claim))
    rewrite(database_url, old, finished_at=store.clock() - 2 * DAY_S)

    assert store.count_old(keep_s=DAY_S) == 1
    assert store.prune(keep_s=DAY_S) == 1

    assert store.get(old) is None
    assert store.result(old) is None
    assert store.attempts(old) == []
    assert store.get(fresh) is not None
    assert store.result(fresh) is not None
    assert len(store.attempts(fresh)) == 1
    assert store.prune(keep_s=DAY_S) == 0


def test_nothing_that_has_not_ended_is_ever_deleted(store: Store, database_url: str) -> None:
    queued, running = submit(store, 2)
    claimed(store, running)
    for job_id in (queued, running):
        rewrite(database_url, job_id, created_at=1.0, run_at=1.0)

    assert store.count_old(keep_s=0) == 0
    assert store.prune(keep_s=0) == 0
    assert store.pending([queued, running]) == {queued, running}


@pytest.mark.parametrize("how", ["cancelled", "failed", "expired"])
def test_every_ending_grows_old(store: Store, database_url: str, how: str) -> None:
    [job_id] = submit(store)
    match how:
        case "cancelled":
            store.request_cancel(job_id)
        case "failed":
            store.fail(claimed(store, job_id), code="internal_error", message="no")
        case "expired":
            rewrite(database_url, job_id, expires_at=1.0)
            store.expire_due()
    job = store.get(job_id)
    assert job is not None
    assert job.state == how
    rewrite(database_url, job_id, finished_at=1.0)

    assert store.prune(keep_s=DAY_S) == 1
    assert store.get(job_id) is None


def test_a_deleted_jobs_key_is_free_again(store: Store, database_url: str) -> None:
    [job_id] = submit(store, idempotency_key="once")
    store.request_cancel(job_id)
    assert submit(store, idempotency_key="once") == [job_id]
    rewrite(database_url, job_id, finished_at=1.0)

    store.prune(keep_s=DAY_S)

    assert submit(store, idempotency_key="once") != [job_id]


def test_many_are_deleted_a_part_at_a_time_and_by_any_number_at_once(store: Store, database_url: str) -> None:
    count = PRUNE_LIMIT + 100
    for job_id in submit(store, count):
        store.request_cancel(job_id)
    [kept] = submit(store)
    deleted: list[int] = []

    def prune() -> None:
        while found := store.prune(keep_s=-DAY_S):
            assert found <= PRUNE_LIMIT
            deleted.append(found)

    threads = [threading.Thread(target=prune) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert store.prune(keep_s=-DAY_S) == 0
    assert sum(deleted) == count
    assert store.get(kept) is not None
