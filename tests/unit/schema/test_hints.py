from __future__ import annotations

import threading
from datetime import timedelta

import pytest

from codeherd_schema.requests import JobKind
from codeherd_schema.states import JobState, PauseScope
from codeherd_schema.store import Hint, Store
from codeherd_schema.submissions import IN_LIST
from tests.samples import a_request, rewrite


def submit(store: Store, *priorities: int) -> list[str]:
    return [answer.job_id for answer in store.submit([a_request(priority=p) for p in priorities])]


def test_due_jobs_are_hinted_at_once_and_in_order(store: Store) -> None:
    ids = submit(store, 5, 0, 5, 9)

    first = store.due("tiny", limit=3)
    second = store.due("tiny", limit=3)

    assert [hint.job_id for hint in first] == [ids[1], ids[0], ids[2]]
    assert first[0] == Hint(ids[1], queue="tiny", kind=JobKind.GENERATE, priority=0, publish_no=1)
    assert [hint.job_id for hint in second] == [ids[3]]


def test_lost_hints_are_owed_again_with_the_next_number(store: Store, database_url: str) -> None:
    lost, held, claimed, other = submit(store, 5, 5, 5, 5)
    store.due("tiny", limit=9)
    [fresh] = submit(store, 5)
    store.claim(claimed, worker_id="w", lease_s=60)
    rewrite(database_url, other, queue="other")

    assert [store.unclaimed(queue) for queue in ("tiny", "other", "none")] == [{lost, held}, {other}, set()]
    assert store.owe_again([lost, claimed, fresh, "no-such-job"]) == 1
    assert store.owe_again([]) == 0

    assert [(h.job_id, h.publish_no) for h in store.due("tiny", limit=9)] == [(lost, 2), (fresh, 1)]


def test_any_number_of_lost_hints_is_owed_again(store: Store) -> None:
    ids = [answer.job_id for answer in store.submit([a_request()] * (IN_LIST + 5))]
    store.due("tiny", limit=IN_LIST + 5)

    assert store.owe_again(ids[3:]) == IN_LIST + 2

    assert [hint.job_id for hint in store.due("tiny", limit=2 * IN_LIST)] == ids[3:]


def test_only_due_jobs_of_the_queue_are_hinted_at(store: Store) -> None:
    store.submit([a_request(run_at=timedelta(days=1))])
    store.submit([a_request()], queue_of=lambda _: "other")
    cancelled, running = submit(store, 5, 5)
    store.request_cancel(cancelled)
    store.claim(running, worker_id="w", lease_s=60)

    assert store.due("tiny", limit=9) == []


def test_submitter_publishes_what_nobody_published(store: Store, database_url: str) -> None:
    fresh, hinted, early = submit(store, 5, 0, 5)
    store.due("tiny", limit=1)
    rewrite(database_url, early, run_at=9e9)

    hints = store.mark_published([fresh, hinted, early, "no-such-job"])

    assert [(hint.job_id, hint.publish_no) for hint in hints] == [(fresh, 1)]
    assert store.mark_published([fresh]) == []
    assert store.mark_published([]) == []


def test_failed_publish_is_owed_again_at_once(store: Store) -> None:
    ids = submit(store, 5, 5)
    hints = store.mark_published(ids)

    store.unpublish(hints)
    store.unpublish([])

    assert [hint.publish_no for hint in store.due("tiny", limit=9)] == [2, 2]


def test_failed_publish_takes_back_no_newer_hint(store: Store) -> None:
    ids = submit(store, 5)
    old = store.mark_published(ids)
    store.owe_again(ids)
    store.due("tiny", limit=1)

    store.unpublish(old)

    assert store.due("tiny", limit=1) == []


def test_racing_dispatchers_hint_at_each_job_once(store: Store) -> None:
    ids = submit(store, *[5] * 60)
    start = threading.Barrier(4)
    found: list[str] = []

    def dispatch() -> None:
        start.wait()
        for _ in range(4):
            found.extend(hint.job_id for hint in store.due("tiny", limit=10))

    threads = [threading.Thread(target=dispatch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.extend(hint.job_id for hint in store.due("tiny", limit=60))

    assert sorted(found) == ids


@pytest.mark.parametrize("queues", [[], ["a"], ["b", "a", "c", "a"]])
def test_queues_with_queued_jobs_are_listed(store: Store, queues: list[str]) -> None:
    for queue in queues:
        store.submit([a_request(model=queue)])
    [ended] = store.submit([a_request()], queue_of=lambda _: "ended")
    assert store.request_cancel(ended.job_id) is JobState.CANCELLED

    assert store.queues_with_work() == sorted(set(queues))


def test_a_single_job_waits_for_no_backfill(store: Store) -> None:
    backfill = [answer.job_id for answer in store.submit([a_request()] * 200, batch_id="backfill")]
    store.due("tiny", limit=16)
    [single] = submit(store, 5)
    [neighbour] = store.submit([a_request()], tenant="other")

    hints = [hint.job_id for hint in store.due("tiny", limit=4)]

    assert hints[:2] == [neighbour.job_id, single]
    assert hints[2:] == backfill[16:18]


def test_runs_of_a_tenant_share_what_the_tenant_gets(store: Store) -> None:
    lanes = {
        name: {answer.job_id for answer in store.submit([a_request()] * 40, tenant=tenant, batch_id=name)}
        for name, tenant in (("one", "a"), ("two", "a"), ("three", "b"))
    }

    hints = {hint.job_id for hint in store.due("tiny", limit=20)}

    assert {name: len(ids & hints) for name, ids in lanes.items()} == {"one": 5, "two": 5, "three": 10}


def test_running_jobs_count_as_places(store: Store) -> None:
    first = [answer.job_id for answer in store.submit([a_request()] * 9, batch_id="first")]
    for job_id in first[:4]:
        store.claim(job_id, worker_id="w", lease_s=60)
    second = {answer.job_id for answer in store.submit([a_request()] * 9, batch_id="second")}

    hints = {hint.job_id for hint in store.due("tiny", limit=4)}

    assert hints <= second


def test_priority_comes_before_fairness(store: Store) -> None:
    urgent = {answer.job_id for answer in store.submit([a_request(priority=0)] * 9, batch_id="urgent")}
    store.submit([a_request(priority=5)], tenant="other")

    assert {hint.job_id for hint in store.due("tiny", limit=9)} == urgent


def test_places_that_one_lane_cannot_use_go_to_the_others(store: Store) -> None:
    few = {answer.job_id for answer in store.submit([a_request()] * 2, tenant="few")}
    store.submit([a_request(run_at=timedelta(days=1))] * 5, tenant="later")
    many = {answer.job_id for answer in store.submit([a_request()] * 50, tenant="many")}

    hints = {hint.job_id for hint in store.due("tiny", limit=20)}

    assert few <= hints
    assert len(hints & many) == 18


def test_a_paused_backfill_hides_nobody(store: Store) -> None:
    store.submit([a_request()] * 50, batch_id="backfill")
    store.pause(PauseScope.BATCH, "backfill")
    [single] = submit(store, 5)

    assert [hint.job_id for hint in store.due("tiny", limit=4)] == [single]


def test_a_pause_hides_no_job_that_it_does_not_name(store: Store) -> None:
    [single] = submit(store, 5)
    [batched] = store.submit([a_request()], batch_id="nightly")
    store.pause(PauseScope.BATCH, "")
    store.pause(PauseScope.RUN, "nightly")

    hints = {hint.job_id for hint in store.due("tiny", limit=4)}

    assert hints == {single, batched.job_id}
