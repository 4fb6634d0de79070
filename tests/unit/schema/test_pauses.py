from __future__ import annotations

import threading

import pytest
from sqlalchemy import text

from codeherd_schema.states import JobState, PauseScope
from codeherd_schema.store import Store
from tests.samples import a_request, opened, rewrite


def submit(store: Store, *, tenant: str = "default", batch_id: str | None = None) -> list[str]:
    return [answer.job_id for answer in store.submit([a_request()], tenant=tenant, batch_id=batch_id)]


def is_claimed(store: Store, job_id: str) -> bool:
    return store.claim(job_id, worker_id="w", lease_s=60) is not None


@pytest.mark.parametrize(
    ("scope", "name"),
    [
        (PauseScope.QUEUE, "tiny"),
        (PauseScope.BATCH, "nightly"),
        (PauseScope.RUN, "review-7"),
        (PauseScope.TENANT, "team"),
    ],
)
def test_nothing_of_what_is_paused_starts_until_it_is_resumed(
    store: Store, database_url: str, scope: PauseScope, name: str
) -> None:
    [job_id] = submit(store, tenant="team", batch_id="nightly")
    rewrite(database_url, job_id, run_id="review-7")

    assert store.pause(scope, name)
    [later] = submit(store, tenant="team", batch_id="nightly")
    rewrite(database_url, later, run_id="review-7")

    assert store.due("tiny", limit=9) == []
    assert store.mark_published([job_id, later]) == []
    assert not is_claimed(store, job_id)
    assert store.resume(scope, name)
    assert {hint.job_id for hint in store.due("tiny", limit=9)} == {job_id, later}
    assert is_claimed(store, job_id)
    assert is_claimed(store, later)


def test_a_pause_touches_nothing_else(store: Store) -> None:
    [mine] = submit(store, tenant="team", batch_id="nightly")
    [other] = submit(store, tenant="tiny", batch_id="nightly-2")
    [loose] = submit(store, tenant="queue")

    store.pause(PauseScope.TENANT, "team")
    store.pause(PauseScope.BATCH, "night")
    store.pause(PauseScope.QUEUE, "nightly-2")
    store.pause(PauseScope.RUN, "None")

    assert not is_claimed(store, mine)
    assert is_claimed(store, other)
    assert is_claimed(store, loose)


def test_a_running_job_of_what_is_paused_goes_on_to_its_end(store: Store) -> None:
    [job_id] = submit(store)
    claim = store.claim(job_id, worker_id="w", lease_s=60)
    assert claim is not None

    store.pause(PauseScope.QUEUE, "tiny")

    beat = store.heartbeat([claim], lease_s=60)[claim.lease_id]
    assert not beat.cancel_requested
    store.release(claim)
    job = store.get(job_id)
    assert job is not None
    assert job.state is JobState.QUEUED
    assert not is_claimed(store, job_id)


def test_a_queued_job_of_what_is_paused_can_be_cancelled(store: Store) -> None:
    [job_id] = submit(store)
    store.pause(PauseScope.QUEUE, "tiny")

    assert store.request_cancel(job_id) is JobState.CANCELLED


def test_hints_that_workers_dropped_meanwhile_are_owed_again_at_once(store: Store) -> None:
    [job_id] = submit(store)
    [first] = store.due("tiny", limit=1)
    store.pause(PauseScope.QUEUE, "tiny")
    assert not is_claimed(store, job_id)

    store.resume(PauseScope.QUEUE, "tiny")

    [again] = store.due("tiny", limit=1)
    assert (again.job_id, again.publish_no) == (first.job_id, 2)


def test_pausing_and_resuming_twice_does_no_harm(store: Store) -> None:
    assert store.pause(PauseScope.QUEUE, "tiny", reason="new driver")
    assert not store.pause(PauseScope.QUEUE, "tiny", reason="another")
    [pause] = store.pauses()
    assert (pause.scope, pause.name, pause.reason) == (PauseScope.QUEUE, "tiny", "new driver")
    assert abs(pause.since.timestamp() - store.clock()) < 60

    assert store.resume(PauseScope.QUEUE, "tiny")
    assert not store.resume(PauseScope.QUEUE, "tiny")
    assert store.pauses() == []


def test_two_pauses_of_one_job_both_have_to_end(store: Store) -> None:
    [job_id] = submit(store, batch_id="nightly")
    store.pause(PauseScope.QUEUE, "tiny")
    store.pause(PauseScope.BATCH, "nightly")

    store.resume(PauseScope.QUEUE, "tiny")
    assert not is_claimed(store, job_id)

    store.resume(PauseScope.BATCH, "nightly")
    assert is_claimed(store, job_id)


def test_odd_names_are_kept_as_they_can_be(store: Store) -> None:
    store.pause(PauseScope.TENANT, "a'; DROP TABLE jobs --\0" + "é" * 200, reason="\ud800")

    [pause] = store.pauses()

    assert pause.name.startswith("a'; DROP TABLE jobs --\\0é")
    assert len(pause.name) == 128
    assert store.resume(PauseScope.TENANT, "a'; DROP TABLE jobs --\0" + "é" * 200)


def test_of_many_who_pause_at_once_one_did_it(store: Store) -> None:
    start = threading.Barrier(6)
    answers: list[bool] = []

    def pause() -> None:
        start.wait()
        answers.append(store.pause(PauseScope.QUEUE, "tiny"))

    threads = [threading.Thread(target=pause) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(answers) == [False] * 5 + [True]


def test_a_scope_that_nobody_knows_is_refused_by_the_database(database_url: str) -> None:
    with (
        opened(database_url) as database,
        pytest.raises(Exception, match="ck_pauses_scope"),
        database.begin() as connection,
    ):
        connection.execute(text("INSERT INTO pauses VALUES ('planet', 'earth', '', 0)"))
