from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from codeherd_schema.database import Database
from codeherd_schema.errors import IllegalMove, JobNotFound, SchemaOutdated
from codeherd_schema.requests import InfillRequest, JobKind
from codeherd_schema.states import FINAL_STATES, MOVES, JobState, Move, target
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


# Any order of calls.


@dataclass
class Model:
    """What the rules say about one job."""

    state: JobState = JobState.QUEUED
    attempt: int = 0
    crashes: int = 0
    cancel_requested: bool = False
    lease_id: str | None = None
    endings: list[Move] = field(default_factory=list)


class StoreMachine(RuleBasedStateMachine):
    """Workers, zombies, janitors and people in any order, against a model in memory."""

    store: Store
    database_url: str
    max_attempts = 3
    max_crashes = 2

    job_ids = Bundle("job_ids")
    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        delete_all_jobs(self.database_url)
        self.models: dict[str, Model] = {}
        self.keys: dict[str, str] = {}
        self.lapsed: set[str] = set()

    @rule(target=job_ids, count=st.integers(1, 3))
    def submit(self, count: int) -> Any:
        answers = self.store.submit([a_request() for _ in range(count)])
        for answer in answers:
            self.models[answer.job_id] = Model()
        return multiple(*(answer.job_id for answer in answers))

    @rule(target=job_ids, key=st.sampled_from(["a", "b"]))
    def submit_with_key(self, key: str) -> str:
        [answer] = self.store.submit([a_request(idempotency_key=key)])
        assert answer.deduplicated == (key in self.keys)
        assert self.keys.setdefault(key, answer.job_id) == answer.job_id
        self.models.setdefault(answer.job_id, Model())
        return answer.job_id

    @rule(target=claims, job_id=job_ids)
    def claim(self, job_id: str) -> Any:
        claimed = self.store.claim(job_id, worker_id="w", lease_s=600)
        assert (claimed is not None) == (self.models[job_id].state is JobState.QUEUED)
        return multiple() if claimed is None else self._claimed(claimed)

    @rule(target=claims)
    def claim_next(self) -> Any:
        queued = sorted(job_id for job_id, model in self.models.items() if model.state is JobState.QUEUED)
        claimed = self.store.claim_next("tiny", worker_id="w", lease_s=600)
        assert (claimed and claimed.job.id) == (queued[0] if queued else None)
        return multiple() if claimed is None else self._claimed(claimed)

    def _claimed(self, claimed: Claim) -> Claim:
        model = self.models[claimed.job.id]
        model.state, model.lease_id = JobState.RUNNING, claimed.lease_id
        model.attempt += 1
        assert model.attempt == claimed.attempt <= self.max_attempts
        return claimed

    @rule(claimed=claims, lapses=st.booleans())
    def heartbeat(self, claimed: Claim, lapses: bool) -> None:
        beats = self.store.heartbeat([claimed], lease_s=-600 if lapses else 600)
        model = self.models[claimed.job.id]
        assert (claimed.lease_id in beats) == (model.lease_id == claimed.lease_id)
        if beats:
            assert beats[claimed.lease_id].cancel_requested == model.cancel_requested
            (self.lapsed.add if lapses else self.lapsed.discard)(claimed.lease_id)

    @rule(claimed=claims)
    def succeed(self, claimed: Claim) -> None:
        self._end(claimed, Move.SUCCEED, self.store.succeed(claimed, a_result(claimed)))

    @rule(claimed=claims)
    def fail(self, claimed: Claim) -> None:
        self._end(claimed, Move.FAIL, self.store.fail(claimed, code="c", message="m"))

    @rule(claimed=claims)
    def retry(self, claimed: Claim) -> None:
        move = Move.BURY if claimed.attempt == self.max_attempts else Move.RETRY
        self._end(claimed, move, self.store.retry(claimed, code="c", message="m", delay_s=0), gives_way=True)

    @rule(claimed=claims)
    def release(self, claimed: Claim) -> None:
        self._end(claimed, Move.RELEASE, self.store.release(claimed), gives_way=True)

    @rule(claimed=claims)
    def cancel_running(self, claimed: Claim) -> None:
        self._end(claimed, Move.CANCEL, self.store.cancel_running(claimed))

    @rule(claimed=claims)
    def expire_running(self, claimed: Claim) -> None:
        self._end(claimed, Move.EXPIRE, self.store.expire_running(claimed))

    def _end(self, claimed: Claim, move: Move, commit: Commit, *, gives_way: bool = False) -> None:
        model = self.models[claimed.job.id]
        if model.lease_id != claimed.lease_id:
            assert commit is not Commit.STORED
            return
        assert commit is Commit.STORED
        self._leave(model, Move.CANCEL if gives_way and model.cancel_requested else move)

    def _leave(self, model: Model, move: Move) -> None:
        model.state, model.lease_id = target(move), None
        model.attempt -= move is Move.RELEASE
        model.endings.append(move)

    @rule()
    def reap(self) -> None:
        reaped = self.store.reap(max_crashes=self.max_crashes)
        lost = {job_id: m for job_id, m in self.models.items() if m.lease_id in self.lapsed}
        fates: dict[Move, set[str]] = {Move.REAP: set(), Move.BURY: set(), Move.CANCEL: set()}
        for job_id, model in lost.items():
            model.crashes += 1
            used_up = model.attempt == self.max_attempts or model.crashes >= self.max_crashes
            move = Move.CANCEL if model.cancel_requested else Move.BURY if used_up else Move.REAP
            fates[move].add(job_id)
            self._leave(model, move)
        assert fates == {
            Move.REAP: set(reaped.requeued),
            Move.BURY: set(reaped.buried),
            Move.CANCEL: set(reaped.cancelled),
        }

    @rule(job_id=job_ids)
    def request_cancel(self, job_id: str) -> None:
        model = self.models[job_id]
        if model.state is JobState.QUEUED:
            model.state = JobState.CANCELLED
        model.cancel_requested |= model.state in {JobState.RUNNING, JobState.CANCELLED}
        assert self.store.request_cancel(job_id) is model.state

    @rule(job_id=job_ids)
    def requeue(self, job_id: str) -> None:
        model = self.models[job_id]
        if (Move.REQUEUE, model.state) in MOVES:
            self.store.requeue(job_id)
            self.models[job_id] = Model(endings=model.endings)
        else:
            with pytest.raises(IllegalMove):
                self.store.requeue(job_id)

    @rule(limit=st.integers(1, 3))
    def dispatch(self, limit: int) -> None:
        queued = sorted(job_id for job_id, m in self.models.items() if m.state is JobState.QUEUED)
        hints = self.store.due("tiny", limit=limit)
        assert [hint.job_id for hint in hints] == queued[:limit]

    @invariant()
    def rows_are_as_the_model_says(self) -> None:
        found = self.store.get_many(self.models)
        results = self.store.results(self.models)
        assert {
            job_id: (job.state, job.attempt, job.crash_count, job.lease_id) for job_id, job in found.items()
        } == {job_id: (m.state, m.attempt, m.crashes, m.lease_id) for job_id, m in self.models.items()}
        assert set(results) == {j for j, m in self.models.items() if m.state is JobState.SUCCEEDED}
        assert all((job.finished_at is not None) == (job.state in FINAL_STATES) for job in found.values())

    def teardown(self) -> None:
        for job_id, model in self.models.items():
            assert [attempt.outcome for attempt in self.store.attempts(job_id)] == model.endings


def test_any_order_of_calls_keeps_the_rules(database_url: str) -> None:
    store = Store.open(database_url, max_attempts=StoreMachine.max_attempts)
    machine = type("Machine", (StoreMachine,), {"store": store, "database_url": database_url})

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )

    store.close()
