from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, text

from codeherd_schema.database import Database
from codeherd_schema.errors import IllegalMove, JobNotFound, SchemaOutdated
from codeherd_schema.requests import InfillRequest, JobKind
from codeherd_schema.states import MOVES, JobState, Move, target
from codeherd_schema.store import Claim, Commit, Store
from tests.samples import a_request, a_result, delete_all_jobs, rewrite


def submit(store: Store, **options: Any) -> str:
    return store.submit([a_request(**options)])[0].job_id


def claim(store: Store, job_id: str, *, lease_s: float = 60) -> Claim:
    claimed = store.claim(job_id, worker_id="w", lease_s=lease_s)
    assert claimed is not None
    return claimed


def state(store: Store, job_id: str) -> JobState:
    job = store.get(job_id)
    assert job is not None
    return job.state


def bring_to(store: Store, goal: JobState) -> Claim:
    """Bring a new job to a state by legal moves; return its last claim, whose lease ran out."""
    job_id = submit(store)
    claimed = claim(store, job_id, lease_s=-1)
    endings: dict[JobState, Callable[[], object]] = {
        JobState.QUEUED: lambda: store.release(claimed),
        JobState.RUNNING: lambda: None,
        JobState.SUCCEEDED: lambda: store.succeed(claimed, a_result(claimed)),
        JobState.FAILED: lambda: store.fail(claimed, code="c", message="m"),
        JobState.CANCELLED: lambda: store.cancel_running(claimed),
        JobState.EXPIRED: lambda: store.expire_running(claimed),
        JobState.DEAD: lambda: store.reap(max_crashes=1),
    }
    endings[goal]()
    assert state(store, job_id) is goal
    return claimed


#: The janitor that buries would take the running one along.
BURIED_FIRST = [JobState.DEAD, *(goal for goal in JobState if goal is not JobState.DEAD)]


def make(store: Store, move: Move, claimed: Claim, database_url: str) -> None:
    """Try a move by every way there is, as if the claim were still good."""
    job_id = claimed.job.id
    match move:
        case Move.CLAIM:
            store.claim(job_id, worker_id="w", lease_s=60)
        case Move.SUCCEED:
            store.succeed(claimed, a_result(claimed))
        case Move.FAIL:
            store.fail(claimed, code="c", message="m")
        case Move.RETRY:
            store.retry(claimed, code="c", message="m", delay_s=0)
        case Move.RELEASE:
            store.release(claimed)
        case Move.REAP:
            store.reap(max_crashes=9)
        case Move.BURY:
            store.reap(max_crashes=1)
        case Move.CANCEL:
            store.cancel_running(claimed)
            store.request_cancel(job_id)
        case Move.EXPIRE:
            store.expire_running(claimed)
            rewrite(database_url, job_id, deadline=1.0)
            store.expire_due()
        case Move.REQUEUE:
            try:
                store.requeue(job_id)
            except IllegalMove:
                assert (move, state(store, job_id)) not in MOVES


@pytest.mark.parametrize("source", JobState)
def test_every_legal_move_and_no_other(store: Store, database_url: str, source: JobState) -> None:
    for move in Move:
        claimed = bring_to(store, source)
        history = len(store.attempts(claimed.job.id))

        make(store, move, claimed, database_url)

        legal = (move, source) in MOVES
        assert state(store, claimed.job.id) is (target(move) if legal else source), move
        ended = legal and source is JobState.RUNNING
        assert len(store.attempts(claimed.job.id)) == history + ended, move
        # Leave nothing behind that the next move's janitor could meet.
        delete_all_jobs(database_url)


# What a person does.


def test_queued_job_is_cancelled_at_once(store: Store) -> None:
    job_id = submit(store)

    assert store.request_cancel(job_id) is JobState.CANCELLED
    assert store.request_cancel(job_id) is JobState.CANCELLED

    job = store.get(job_id)
    assert job is not None
    assert job.finished_at == job.cancel_requested_at
    assert store.attempts(job_id) == []


def test_running_job_is_asked_to_stop(store: Store) -> None:
    claimed = claim(store, submit(store))

    assert store.request_cancel(claimed.job.id) is JobState.RUNNING
    asked = store.get(claimed.job.id)
    assert store.request_cancel(claimed.job.id) is JobState.RUNNING

    assert store.get(claimed.job.id) == asked
    assert store.heartbeat([claimed], lease_s=60)[claimed.lease_id].cancel_requested


def test_job_that_is_requeued_while_it_is_cancelled_is_cancelled(store: Store, database_url: str) -> None:
    job_id = bring_to(store, JobState.FAILED).job.id
    database = Database.open(database_url)

    @event.listens_for(database._writers, "before_cursor_execute")
    def requeue(_1: object, _2: object, statement: str, *_: object) -> None:
        # The cancel found the job ended, and looks how.
        if statement.startswith("SELECT jobs.state") and state(store, job_id) is JobState.FAILED:
            store.requeue(job_id)

    assert Store(database).request_cancel(job_id) is JobState.CANCELLED
    assert state(store, job_id) is JobState.CANCELLED
    database.close()


def test_result_that_came_before_the_cancel_stays(store: Store) -> None:
    claimed = claim(store, submit(store))
    store.request_cancel(claimed.job.id)

    assert store.succeed(claimed, a_result(claimed)) is Commit.STORED
    assert store.request_cancel(claimed.job.id) is JobState.SUCCEEDED
    assert store.result(claimed.job.id) is not None


@pytest.mark.parametrize("_turn", range(3))
def test_cancel_races_a_claim(store: Store, _turn: int) -> None:
    job_id = submit(store)
    start = threading.Barrier(2)
    claims: list[Claim | None] = []
    states: list[JobState] = []

    def take() -> None:
        start.wait()
        claims.append(store.claim(job_id, worker_id="w", lease_s=60))

    def cancel() -> None:
        start.wait()
        states.append(store.request_cancel(job_id))

    threads = [threading.Thread(target=take), threading.Thread(target=cancel)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    [claimed], [told] = claims, states
    assert told is (JobState.CANCELLED if claimed is None else JobState.RUNNING)
    if claimed is not None:
        assert store.heartbeat([claimed], lease_s=60)[claimed.lease_id].cancel_requested


def test_requeue_starts_afresh(store: Store) -> None:
    job_id = submit(store, deadline=timedelta(days=1), expires_at=timedelta(days=1))
    claim(store, job_id, lease_s=-1)
    store.reap(max_crashes=1)

    store.requeue(job_id)

    job = store.get(job_id)
    assert job is not None
    assert (job.state, job.attempt, job.crash_count) == (JobState.QUEUED, 0, 0)
    assert (job.deadline, job.expires_at, job.finished_at, job.error_code) == (None, None, None, None)
    assert claim(store, job_id).attempt == 1
    assert len(store.attempts(job_id)) == 1


def test_requeue_of_a_living_or_succeeded_job_is_illegal(store: Store) -> None:
    job_id = submit(store)

    with pytest.raises(IllegalMove, match="is `queued`") as caught:
        store.requeue(job_id)

    assert caught.value.hint is not None


def test_unknown_jobs(store: Store) -> None:
    with pytest.raises(JobNotFound, match="`nope`"):
        store.request_cancel("nope")
    with pytest.raises(JobNotFound, match="`nope`"):
        store.requeue("nope")
    assert (store.get("nope"), store.result("nope"), store.attempts("nope")) == (None, None, [])
    assert (store.get_many(["nope"]), store.results([]), store.pending(["nope"])) == ({}, {}, set())


# Reading.


def test_pages_go_from_newest_to_oldest(store: Store) -> None:
    ids = [answer.job_id for answer in store.submit([a_request() for _ in range(5)])]

    first = store.list(limit=2)
    second = store.list(limit=2, before=first[-1].id)

    assert [job.id for job in [*first, *second]] == [ids[4], ids[3], ids[2], ids[1]]


def test_filters_narrow_lists_and_counts(store: Store) -> None:
    plain = submit(store, labels={"team": "docs", "x": "1"})
    [infill] = store.submit(
        [InfillRequest(prefix="", suffix="", model="codellama-7b", labels={"team": "Docs"})],
        tenant="acme",
        batch_id="b1",
    )
    store.request_cancel(plain)
    filters: list[tuple[dict[str, Any], list[str]]] = [
        ({"state": JobState.CANCELLED}, [plain]),
        ({"state": JobState.QUEUED}, [infill.job_id]),
        ({"model": "codellama-7b"}, [infill.job_id]),
        ({"kind": JobKind.GENERATE}, [plain]),
        ({"labels": {"team": "docs"}}, [plain]),
        ({"labels": {"x": "1", "team": "docs"}}, [plain]),
        ({"labels": {"x": "1", "team": "Docs"}}, []),
        ({"labels": {"team": "doc"}}, []),
        ({"labels": {"eam": "docs"}}, []),
        ({"tenant": "acme"}, [infill.job_id]),
        ({"batch_id": "b1", "tenant": "default"}, []),
        ({}, [infill.job_id, plain]),
    ]

    for chosen, ids in filters:
        assert [job.id for job in store.list(**chosen)] == ids, chosen
        if "state" not in chosen:
            assert sum(store.count_by_state(**chosen).values()) == len(ids), chosen


@pytest.mark.parametrize("value", ['"', "\\", "%", "_", "'", "\0", "é😀", 'a":"b', '","x":"1'])
def test_any_label_value_is_found_again_and_no_other(store: Store, value: str) -> None:
    job_id = submit(store, labels={"team": value})
    submit(store, labels={"team": value + "x"})

    assert [job.id for job in store.list(labels={"team": value})] == [job_id]
    assert store.list(labels={"x": "1"}) == []


def test_counts_name_every_state(store: Store) -> None:
    for goal in BURIED_FIRST:
        bring_to(store, goal)

    assert store.count_by_state() == dict.fromkeys(JobState, 1)


def test_pending_jobs_are_those_not_ended(store: Store) -> None:
    ids = {goal: bring_to(store, goal).job.id for goal in BURIED_FIRST}

    assert store.pending(ids.values()) == {ids[JobState.QUEUED], ids[JobState.RUNNING]}


def test_depths_of_queues(store: Store, database_url: str) -> None:
    waiting, started, later = (submit(store) for _ in range(3))
    store.submit([a_request()], queue_of=lambda _: "other")
    claim(store, started)
    now_s = store.clock()
    rewrite(database_url, waiting, run_at=now_s - 100)
    rewrite(database_url, started, started_at=now_s - 50)
    rewrite(database_url, later, run_at=now_s + 1000)
    ended = submit(store)
    store.request_cancel(ended)

    depths = store.queue_depths()

    assert list(depths) == ["other", "tiny"]
    tiny = depths["tiny"]
    assert (tiny.queue, tiny.queued, tiny.running) == ("tiny", 2, 1)
    assert tiny.oldest_due_age_s is not None
    assert tiny.oldest_lease_age_s is not None
    assert 100 <= tiny.oldest_due_age_s == pytest.approx(tiny.oldest_lease_age_s + 50, abs=5)
    assert depths["other"].oldest_lease_age_s is None


def test_many_results_are_read_at_once(store: Store) -> None:
    claims = [claim(store, submit(store)) for _ in range(3)]
    for claimed in claims[:2]:
        store.succeed(claimed, a_result(claimed))

    found = store.results([claimed.job.id for claimed in claims])

    assert found == {claimed.job.id: a_result(claimed) for claimed in claims[:2]}


# The schema.


def test_migrated_database_passes_the_check(store: Store) -> None:
    store.check_schema()


@pytest.mark.parametrize("found", ["9999", None])
def test_other_schema_is_refused_with_a_hint(sqlite_url: str, found: str | None) -> None:
    database = Database.open(sqlite_url)
    with database.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :found"), {"found": found or ""})
    store = Store(database)

    with pytest.raises(SchemaOutdated) as caught:
        store.check_schema()

    assert caught.value.hint == "run `codeherd db upgrade`"
    store.close()
