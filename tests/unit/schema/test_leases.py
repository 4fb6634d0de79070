from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import update

from codeherd_schema.leases import _result_row
from codeherd_schema.requests import SCHEMA_VERSION
from codeherd_schema.states import JobState, Move
from codeherd_schema.store import Beat, Claim, Commit, Job, Store
from codeherd_schema.tables import jobs
from tests.samples import a_request, a_result, rewrite
from tests.services import wait_until


def submit(store: Store, **options: object) -> str:
    return store.submit([a_request(**options)])[0].job_id


def claim(store: Store, job_id: str, *, lease_s: float = 60, worker_id: str = "w") -> Claim:
    claimed = store.claim(job_id, worker_id=worker_id, lease_s=lease_s)
    assert claimed is not None
    return claimed


def get(store: Store, job_id: str) -> Job:
    job = store.get(job_id)
    assert job is not None
    return job


# Claim.


def test_a_job_of_a_kind_that_nobody_here_knows_waits_and_can_be_looked_at(
    store: Store, database_url: str
) -> None:
    [submitted] = store.submit([a_request()])
    rewrite(database_url, submitted.job_id, kind="embed")

    assert [hint.kind for hint in store.due("tiny", limit=1)] == ["embed"]
    assert store.claim(submitted.job_id, worker_id="w", lease_s=60) is None
    job = store.get(submitted.job_id)
    assert job is not None
    assert (job.kind, job.state, job.attempt) == ("embed", JobState.QUEUED, 0)
    assert store.request_cancel(job.id) is JobState.CANCELLED


def test_claim_takes_the_job(store: Store) -> None:
    job_id = submit(store, deadline=timedelta(seconds=50))

    claimed = claim(store, job_id, lease_s=30, worker_id="gpu0@host")

    job = get(store, job_id)
    assert claimed.job == job
    assert (job.state, job.attempt, job.worker_id) == (JobState.RUNNING, 1, "gpu0@host")
    assert (job.lease_id, job.started_at) == (claimed.lease_id, claimed.claimed_at)
    assert job.lease_until is not None
    assert (job.lease_until - claimed.claimed_at).total_seconds() == pytest.approx(30, abs=0.01)
    assert claimed.queue_s == pytest.approx((claimed.claimed_at - job.run_at).total_seconds(), abs=1e-5)
    assert claimed.deadline_in_s == pytest.approx(50 - claimed.queue_s, abs=0.01)


def test_second_claim_gets_nothing(store: Store) -> None:
    job_id = submit(store)
    claim(store, job_id)

    assert store.claim(job_id, worker_id="other", lease_s=60) is None


@pytest.mark.parametrize(
    "columns",
    [
        {"run_at": 9e9},
        {"expires_at": 1.0},
        {"deadline": 1.0},
        {"cancel_requested_at": 1.0},
        {"schema_version": SCHEMA_VERSION + 1},
        {"attempt": 5},
    ],
    ids=lambda columns: next(iter(columns)),
)
def test_claim_leaves_what_is_early_late_cancelled_or_too_new(
    store: Store, database_url: str, columns: dict[str, float]
) -> None:
    job_id = submit(store)
    rewrite(database_url, job_id, **columns)

    assert store.claim(job_id, worker_id="w", lease_s=60) is None
    assert get(store, job_id).state is JobState.QUEUED


def test_claim_of_an_unknown_job_gets_nothing(store: Store) -> None:
    assert store.claim("no-such-job", worker_id="w", lease_s=60) is None


def test_claim_is_for_the_workers_own_queues(store: Store) -> None:
    job_id = submit(store)

    assert store.claim(job_id, worker_id="w", lease_s=60, queues=["other"]) is None
    assert store.claim(job_id, worker_id="w", lease_s=60, queues=[]) is None
    assert store.claim(job_id, worker_id="w", lease_s=60, queues=["other", "tiny"]) is not None


# Heartbeat.


def test_heartbeat_keeps_every_lease_and_tells_of_cancel_and_deadline(
    store: Store, database_url: str
) -> None:
    plain, cancelled, late = (claim(store, submit(store), lease_s=-1) for _ in range(3))
    store.request_cancel(cancelled.job.id)
    rewrite(database_url, late.job.id, deadline=1.0)

    beats = store.heartbeat([plain, cancelled, late], lease_s=60)

    assert beats == {
        plain.lease_id: Beat(cancel_requested=False, deadline_passed=False),
        cancelled.lease_id: Beat(cancel_requested=True, deadline_passed=False),
        late.lease_id: Beat(cancel_requested=False, deadline_passed=True),
    }
    assert store.reap(max_crashes=3).requeued == ()


def test_lost_lease_is_missing_from_the_heartbeat(store: Store) -> None:
    job_id = submit(store)
    zombie = claim(store, job_id, lease_s=-1)
    store.reap(max_crashes=3)
    owner = claim(store, job_id)

    before = get(store, job_id)

    assert store.heartbeat([zombie], lease_s=6000) == {}
    assert get(store, job_id) == before
    assert set(store.heartbeat([zombie, owner], lease_s=60)) == {owner.lease_id}
    assert store.heartbeat([], lease_s=60) == {}


# The end of an attempt.


def test_success_stores_one_result_and_the_history(store: Store) -> None:
    claimed = claim(store, submit(store))
    result = a_result(claimed, text='NUL \0, emoji 😀, "quotes" and \u2028')

    commit = store.succeed(claimed, result)

    job = get(store, claimed.job.id)
    assert commit is Commit.STORED
    assert store.result(job.id) == result
    assert (job.state, job.lease_id, job.lease_until) == (JobState.SUCCEEDED, None, None)
    [attempt] = store.attempts(job.id)
    assert (attempt.attempt, attempt.worker_id, attempt.outcome) == (1, "w", Move.SUCCEED)
    assert (attempt.started_at, attempt.ended_at) == (claimed.claimed_at, job.finished_at)


def test_result_of_another_attempt_is_a_programming_error(store: Store) -> None:
    one, other = claim(store, submit(store)), claim(store, submit(store))

    with pytest.raises(ValueError, match="another attempt"):
        store.succeed(one, a_result(other))


def test_failure_keeps_code_and_message(store: Store) -> None:
    claimed = claim(store, submit(store))

    assert store.fail(claimed, code="prompt_too_long", message="bad \0 \udc80" + "x" * 5000) is Commit.STORED

    job = get(store, claimed.job.id)
    assert (job.state, job.error_code) == (JobState.FAILED, "prompt_too_long")
    assert job.error_message is not None
    assert job.error_message.startswith("bad \\0 \\udc80xxx")
    assert len(job.error_message) == 2000
    assert store.attempts(job.id)[0].error_message == job.error_message


def test_retry_waits_and_owes_a_hint(store: Store) -> None:
    job_id = submit(store)
    store.mark_published([job_id])
    claimed = claim(store, job_id)

    assert store.retry(claimed, code="out_of_memory", message="m", delay_s=100) is Commit.STORED

    job = get(store, job_id)
    assert (job.state, job.attempt, job.error_code) == (JobState.QUEUED, 1, "out_of_memory")
    assert job.published_at is None
    assert (job.run_at - store.attempts(job_id)[0].ended_at).total_seconds() == pytest.approx(100, abs=0.01)


def test_retry_of_the_last_attempt_buries(database_url: str) -> None:
    store = Store.open(database_url, max_attempts=2)
    job_id = submit(store)

    store.retry(claim(store, job_id), code="engine_failed", message="m", delay_s=0)
    store.retry(claim(store, job_id), code="engine_failed", message="m", delay_s=0)

    assert get(store, job_id).state is JobState.DEAD
    assert [attempt.outcome for attempt in store.attempts(job_id)] == [Move.RETRY, Move.BURY]
    store.close()


def test_release_burns_no_attempt(store: Store) -> None:
    job_id = submit(store)
    store.mark_published([job_id])

    assert store.release(claim(store, job_id)) is Commit.STORED

    job = get(store, job_id)
    assert (job.state, job.attempt, job.crash_count) == (JobState.QUEUED, 0, 0)
    assert [hint.job_id for hint in store.mark_published([job_id])] == [job_id]
    assert claim(store, job_id).attempt == 1


Ending = Callable[[Store, Claim], Commit]
ENDINGS: dict[Move, Ending] = {
    Move.SUCCEED: lambda store, claimed: store.succeed(claimed, a_result(claimed)),
    Move.FAIL: lambda store, claimed: store.fail(claimed, code="c", message="m"),
    Move.RETRY: lambda store, claimed: store.retry(claimed, code="c", message="m", delay_s=0),
    Move.RELEASE: lambda store, claimed: store.release(claimed),
    Move.CANCEL: lambda store, claimed: store.cancel_running(claimed),
    Move.EXPIRE: lambda store, claimed: store.expire_running(claimed),
}


@pytest.mark.parametrize("move", [Move.RETRY, Move.RELEASE])
def test_job_that_is_given_back_with_a_cancel_request_is_cancelled(store: Store, move: Move) -> None:
    claimed = claim(store, submit(store))
    store.request_cancel(claimed.job.id)

    assert ENDINGS[move](store, claimed) is Commit.STORED
    assert ENDINGS[move](store, claimed) is Commit.ALREADY

    assert get(store, claimed.job.id).state is JobState.CANCELLED


@pytest.mark.parametrize("move", ENDINGS)
def test_repeated_end_is_known(store: Store, move: Move) -> None:
    claimed = claim(store, submit(store))

    assert ENDINGS[move](store, claimed) is Commit.STORED
    after = get(store, claimed.job.id)
    assert ENDINGS[move](store, claimed) is Commit.ALREADY

    assert get(store, claimed.job.id) == after
    assert len(store.attempts(claimed.job.id)) == 1


@pytest.mark.parametrize("move", ENDINGS)
def test_zombie_changes_nothing(store: Store, move: Move) -> None:
    job_id = submit(store)
    zombie = claim(store, job_id, lease_s=-1)
    store.reap(max_crashes=3)
    claim(store, job_id, worker_id="owner")
    before = get(store, job_id)

    assert ENDINGS[move](store, zombie) is Commit.LOST

    assert get(store, job_id) == before
    assert store.result(job_id) is None
    assert len(store.attempts(job_id)) == 1


@pytest.mark.parametrize("move", ENDINGS)
def test_every_part_of_the_fence_holds(store: Store, move: Move) -> None:
    claimed = claim(store, submit(store))

    assert ENDINGS[move](store, replace(claimed, lease_id=str(uuid.uuid4()))) is Commit.LOST
    assert ENDINGS[move](store, replace(claimed, attempt=2)) is Commit.LOST
    assert get(store, claimed.job.id).state is JobState.RUNNING


def test_other_end_after_an_end_is_lost(store: Store) -> None:
    claimed = claim(store, submit(store))
    store.succeed(claimed, a_result(claimed))

    assert store.fail(claimed, code="c", message="m") is Commit.LOST
    assert store.release(claimed) is Commit.LOST
    assert get(store, claimed.job.id).state is JobState.SUCCEEDED


def test_attempt_number_given_twice_does_not_confuse_the_fence(store: Store) -> None:
    job_id = submit(store)
    first = claim(store, job_id)
    store.release(first)
    second = claim(store, job_id)

    assert first.attempt == second.attempt == 1
    assert store.succeed(first, a_result(first)) is Commit.LOST
    assert store.succeed(second, a_result(second)) is Commit.STORED


# Ends that meet.


def test_successes_that_meet_are_stored_together_and_each_by_its_own_lease(store: Store) -> None:
    first, *others = (claim(store, submit(store)) for _ in range(3))
    job_id = submit(store)
    lost = claim(store, job_id)
    store.release(lost)
    held = claim(store, job_id)

    def store_all() -> list[Future[Commit]]:
        with ThreadPoolExecutor(6) as pool:
            with store._database.begin() as connection:
                # Holds up whoever comes first, on SQLite by the lock of all writers.
                connection.execute(update(jobs).where(jobs.c.id == first.job.id).values(tenant="t"))
                ends = [pool.submit(store.succeed, first, a_result(first))]
                wait_until(lambda: store._successes._is_led and not store._successes._waiting, "a leader")
                for number, one in enumerate((lost, others[0], held, others[1]), start=1):
                    ends.append(pool.submit(store.succeed, one, a_result(one, text=f"text {number}")))
                    wait_until(
                        lambda number=number: len(store._successes._waiting) == number,  # type: ignore[misc]
                        "the next to wait",
                    )
            return ends

    commits = [end.result() for end in store_all()]

    assert commits == [Commit.STORED, Commit.LOST, Commit.STORED, Commit.STORED, Commit.STORED]
    for one, text in ((others[0], "text 2"), (held, "text 3"), (others[1], "text 4")):
        assert get(store, one.job.id).state is JobState.SUCCEEDED
        result = store.result(one.job.id)
        assert result is not None
        assert result.text == text
    assert [a.outcome for a in store.attempts(job_id)] == [Move.RELEASE, Move.SUCCEED]


def test_a_claim_that_nobody_can_have_ends_nothing(store: Store) -> None:
    one, two = (claim(store, submit(store)) for _ in range(2))
    ends = [(c, _result_row(a_result(c))) for c in (replace(one, attempt=2), two)]

    if store._database.dialect == "postgresql":
        assert store._succeed_together(ends) == [Commit.LOST, Commit.STORED]
        assert [get(store, c.job.id).state for c in (one, two)] == [JobState.RUNNING, JobState.SUCCEEDED]
    else:
        with pytest.raises(ValueError, match="another attempt"):
            store._succeed_together(ends)
        assert {get(store, c.job.id).state for c in (one, two)} == {JobState.RUNNING}


def test_one_end_that_comes_twice_is_stored_once(store: Store) -> None:
    one, two = (claim(store, submit(store)) for _ in range(2))
    ends = [(c, _result_row(a_result(c))) for c in (one, two, one)]

    commits = store._succeed_together(ends)

    assert commits[:2] == [Commit.STORED, Commit.STORED]
    assert commits[2] is not Commit.LOST
    assert [len(store.attempts(c.job.id)) for c in (one, two)] == [1, 1]


# Races.


@pytest.mark.parametrize("_turn", range(3))
def test_racing_ends_leave_one(store: Store, _turn: int) -> None:
    claimed = claim(store, submit(store), lease_s=-1)
    contenders: list[Callable[[], object]] = [
        *(lambda end=end: end(store, claimed) for end in ENDINGS.values()),
        lambda: store.request_cancel(claimed.job.id),
        lambda: store.reap(max_crashes=3),
    ]
    start = threading.Barrier(len(contenders))
    answers: list[object] = []

    def contend(act: Callable[[], object]) -> None:
        start.wait()
        answers.append(act())

    threads = [threading.Thread(target=contend, args=(act,)) for act in contenders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(answers) == len(contenders)
    assert answers.count(Commit.STORED) <= 1
    assert len(store.attempts(claimed.job.id)) == 1
    job = get(store, claimed.job.id)
    assert (store.result(job.id) is not None) == (job.state is JobState.SUCCEEDED)


_WORKER = """
import sys
from codeherd_schema.store import Store
worker_id, url, *ids = sys.argv[1:]
store = Store.open(url)
for job_id in ids:
    claim = store.claim(job_id, worker_id=worker_id, lease_s=60)
    assert claim is None or store.fail(claim, code="c", message="m") == "stored"
store.close()
"""


def test_each_job_is_claimed_once_by_a_storm_of_processes(store: Store, database_url: str) -> None:
    ids = [answer.job_id for answer in store.submit([a_request() for _ in range(90)])]

    command = [sys.executable, "-W", "error", "-c", _WORKER]
    workers = [
        subprocess.Popen([*command, f"w{i}", database_url, *ids], stderr=subprocess.PIPE) for i in range(3)
    ]
    failures = [worker.communicate()[1].decode() for worker in workers]

    assert failures == [""] * 3
    assert store.count_by_state()[JobState.FAILED] == 90
    assert {len(store.attempts(job_id)) for job_id in ids} == {1}
