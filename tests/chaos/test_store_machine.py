"""Any order of calls to the store, against a model in plain Python, on SQLite and PostgreSQL.

The model (`World`) says what must be in every row after every call; it was written from docs/states.md
and shares no word and no line with the SQL. Workers come back with claims of long ago, answers get lost
and calls are repeated, hints come twice, janitors and people come in between.

Time: the store knows no clock but the database's, and no test can turn that. "1000 seconds pass" is
therefore every stored moment moved 1000 s into the past, in all tables: since statements do nothing with
a moment but compare it with the clock or subtract it, none can tell the difference. Time passes in whole
`STEP_S` while every limit ends half a step off, so no comparison is ever closer than 500 s and the
seconds that a test itself takes decide nothing.

CODEHERD_TEST_EXAMPLES multiplies the number of tried orders, for long runs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Final, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, text

from codeherd_schema.database import Database
from codeherd_schema.errors import IdempotencyConflict, IllegalMove, InvalidRequest, JobNotFound
from codeherd_schema.requests import GenerateRequest, InfillRequest, JobKind, Request
from codeherd_schema.states import JobState, PauseScope
from codeherd_schema.store import Claim, Commit, Hint, Store, Submitted
from tests.samples import a_result

T = TypeVar("T")

EXAMPLES: Final = 15 * int(os.environ.get("CODEHERD_TEST_EXAMPLES", "1"))
STEPS: Final = 40

#: Seconds that pass at a time.
STEP_S: Final = 1000
#: Seconds by which a stored moment may differ from the model's: what the test itself took.
SLACK_S: Final = 250
MAX_ATTEMPTS: Final = 3
QUEUES: Final = ("tiny", "other")
TENANTS: Final = ("ann", "bob")
BATCHES: Final = (None, "nightly", "weekly")
NOBODY: Final = "00000000-0000-7000-8000-000000000000"

#: Where each ending of an attempt leads.
STATE_AFTER: Final = {
    "succeed": "succeeded",
    "fail": "failed",
    "retry": "queued",
    "release": "queued",
    "reap": "queued",
    "bury": "dead",
    "cancel": "cancelled",
    "expire": "expired",
}
FINAL: Final = ("succeeded", "failed", "dead", "cancelled", "expired")


@dataclass(frozen=True)
class Spec:
    """One request, in words of the model; limits in steps from now."""

    body: int = 0
    key: str | None = None
    model: str = "tiny"
    priority: int = 5
    infill: bool = False
    label: str | None = None
    run_at: int | None = None
    expires_at: int | None = None
    deadline: int | None = None

    def request(self) -> Request:
        moments = {"run_at": self.run_at, "expires_at": self.expires_at, "deadline": self.deadline}
        options: dict[str, Any] = {
            "model": self.model,
            "priority": self.priority,
            "idempotency_key": self.key,
            "labels": {} if self.label is None else {"colour": self.label},
            **{name: timedelta(seconds=seconds(n)) for name, n in moments.items() if n is not None},
        }
        if self.infill:
            return InfillRequest(prefix=str(self.body), suffix="", **options)
        return GenerateRequest(prompt=str(self.body), **options)

    @property
    def kind(self) -> str:
        return "infill" if self.infill else "generate"

    @property
    def is_impossible(self) -> bool:
        limits = [limit for limit in (self.expires_at, self.deadline) if limit is not None]
        return self.run_at is not None and any(limit <= self.run_at for limit in limits)


def seconds(steps: int) -> int:
    """Return a length of time that ends half a step off."""
    return steps * STEP_S + STEP_S // 2


@dataclass(frozen=True)
class Ended:
    """One line of a job's history."""

    lease: str
    attempt: int
    worker: str
    outcome: str
    error: str | None


@dataclass
class ModelJob:
    """What must be true of one job; moments in seconds since the world began."""

    id: str
    tenant: str
    batch: str | None
    spec: Spec
    run_at: int
    expires_at: int | None
    deadline: int | None
    run: str | None = None
    state: str = "queued"
    attempt: int = 0
    crashes: int = 0
    lease: str | None = None
    lease_until: int | None = None
    worker: str | None = None
    cancel_requested: bool = False
    published_at: int | None = None
    publish_no: int = 0
    started_at: int | None = None
    finished_at: int | None = None
    error: str | None = None
    history: list[Ended] = field(default_factory=list)
    #: Lease that committed the one result.
    result_of: str | None = None

    @property
    def queue(self) -> str:
        return self.spec.model

    @property
    def lane(self) -> tuple[str, str | None]:
        return self.tenant, self.batch

    def ending_of(self, lease: str) -> str | None:
        return next((ended.outcome for ended in self.history if ended.lease == lease), None)


class Refused(Exception):
    """The model's word for a submit that must fail; `error` is the class that must be raised."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error


class World:
    """All jobs as they must be."""

    def __init__(self) -> None:
        self.now = 0
        self.jobs: dict[str, ModelJob] = {}
        self.pauses: set[tuple[str, str]] = set()

    # Submits.

    def expect(self, specs: Sequence[Spec], tenant: str) -> list[str | int]:
        """Return for each request the job that has its key already, or its place in the submit."""
        owners: list[str | int] = []
        for place, spec in enumerate(specs):
            owner, content = self._holder(spec, specs[:place], tenant)
            if content is not None and replace(content, key=None) != replace(spec, key=None):
                raise Refused(IdempotencyConflict)
            if owner is None and spec.is_impossible:
                raise Refused(InvalidRequest)
            owners.append(place if owner is None else owner)
        return owners

    def _holder(
        self, spec: Spec, earlier: Sequence[Spec], tenant: str
    ) -> tuple[str | int | None, Spec | None]:
        if spec.key is None:
            return None, None
        for job in self.jobs.values():
            if (job.tenant, job.spec.key) == (tenant, spec.key):
                return job.id, job.spec
        return next(((i, other) for i, other in enumerate(earlier) if other.key == spec.key), (None, None))

    def add(self, job_id: str, spec: Spec, tenant: str, batch: str | None) -> None:
        assert job_id not in self.jobs
        self.jobs[job_id] = ModelJob(
            job_id,
            tenant,
            batch,
            spec,
            run_at=self.now if spec.run_at is None else self.now + seconds(spec.run_at),
            expires_at=None if spec.expires_at is None else self.now + seconds(spec.expires_at),
            deadline=None if spec.deadline is None else self.now + seconds(spec.deadline),
        )

    # Questions.

    def is_paused(self, job: ModelJob) -> bool:
        names = {("queue", job.queue), ("tenant", job.tenant), ("batch", job.batch), ("run", job.run)}
        return bool(names & self.pauses)

    def is_due(self, job: ModelJob) -> bool:
        return (
            job.state == "queued"
            and job.run_at <= self.now
            and (job.expires_at is None or job.expires_at > self.now)
            and (job.deadline is None or job.deadline > self.now)
            and not self.is_paused(job)
        )

    def is_unclaimed(self, job: ModelJob) -> bool:
        return job.state == "queued" and job.published_at is not None

    # Moves.

    def claim(self, job: ModelJob, claimed: Claim, worker: str, lease_s: int) -> None:
        job.state = "running"
        job.attempt += 1
        job.lease, job.lease_until = claimed.lease_id, self.now + lease_s
        job.worker, job.started_at = worker, self.now

    def leave(self, job: ModelJob, outcome: str, error: str | None = None) -> None:
        """End the attempt that runs."""
        assert job.state == "running"
        assert job.lease is not None
        assert job.worker is not None
        job.history.append(Ended(job.lease, job.attempt, job.worker, outcome, error))
        job.state = STATE_AFTER[outcome]
        job.error = error or job.error
        job.result_of = job.lease if outcome == "succeed" else job.result_of
        job.lease = job.lease_until = None
        if job.state == "queued":
            job.run_at, job.published_at = self.now, None
        else:
            job.finished_at = self.now
        job.attempt -= outcome == "release"

    def hint(self, job: ModelJob) -> None:
        job.published_at = self.now
        job.publish_no += 1


#: Which of the things that there are, counted from the newest; more than there are starts again.
which = st.integers(0, 7)
some = st.lists(which, max_size=4)
lease_lengths = st.sampled_from([seconds(0), seconds(1), seconds(50)])
workers = st.sampled_from(["w1", "w2"])
# Mostly plain requests: what waits or is refused keeps the world from moving.
specs = st.builds(
    Spec,
    body=st.integers(0, 1),
    key=st.sampled_from([None, None, "k1", "k2"]),
    model=st.sampled_from(QUEUES),
    priority=st.sampled_from([5, 0, 9]),
    infill=st.booleans(),
    label=st.sampled_from([None, "red", 'bl"ue']),
    run_at=st.sampled_from([None, None, None, 0, 1]),
    expires_at=st.sampled_from([None, None, None, 1, 2]),
    deadline=st.sampled_from([None, None, None, 1, 3]),
)
submits = st.tuples(st.lists(specs, max_size=4), st.sampled_from(TENANTS), st.sampled_from(BATCHES))
#: What is paused and resumed; one name has no jobs.
scopes = st.sampled_from(
    [
        (PauseScope.QUEUE, "tiny"),
        (PauseScope.TENANT, "ann"),
        (PauseScope.BATCH, "nightly"),
        (PauseScope.RUN, "review-7"),
        (PauseScope.BATCH, "tiny"),
    ]
)


class StoreMachine(RuleBasedStateMachine):
    """Producers, workers, zombies, dispatchers, janitors and people in any order."""

    store: Store
    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        # Also of jobs that were pruned.
        self.ids: list[str] = []
        self.claims: list[Claim] = []
        self.hints: list[Hint] = []
        with self.database.begin() as connection:
            for table in ("jobs", "pauses"):
                connection.execute(text(f"DELETE FROM {table}"))

    # Submits.

    @initialize()
    def three_jobs_wait(self) -> None:
        self._submit([Spec(), Spec(), Spec(priority=0)], "ann", None)

    @rule(submit=submits, run=st.sampled_from([None, None, "review-7"]))
    def submit(self, submit: tuple[list[Spec], str, str | None], run: str | None) -> None:
        new = self._submit(*submit)
        # No call sets the run yet.
        with self.database.begin() as connection:
            for job_id in new:
                connection.execute(
                    text("UPDATE jobs SET run_id = :run WHERE id = :id"), {"run": run, "id": job_id}
                )
                self.world.jobs[job_id].run = run

    @rule(parts=st.lists(submits, min_size=1, max_size=3), commits=st.booleans())
    def submit_in_own_transaction(
        self, parts: list[tuple[list[Spec], str, str | None]], commits: bool
    ) -> None:
        new: list[str] = []
        with self.database.begin() as connection:
            for part in parts:
                # A refusal leaves the transaction usable and nothing in it.
                new += self._submit(*part, connection=connection)
            assert self.store.get_many(new) == {}
            if not commits:
                connection.rollback()
        if not commits:
            for job_id in new:
                del self.world.jobs[job_id]

    def _submit(
        self, specs: list[Spec], tenant: str, batch: str | None, connection: Connection | None = None
    ) -> list[str]:
        """Submit and compare the answers; return the ids of new jobs."""

        def act() -> list[Submitted]:
            requests = [spec.request() for spec in specs]
            return self.store.submit(requests, tenant=tenant, batch_id=batch, connection=connection)

        try:
            owners = self.world.expect(specs, tenant)
        except Refused as refused:
            with pytest.raises(refused.error):
                act()
            return []
        answers = act()
        expected = [answers[owner].job_id if isinstance(owner, int) else owner for owner in owners]
        assert [answer.job_id for answer in answers] == expected
        is_new = [owner == place for place, owner in enumerate(owners)]
        assert [not answer.deduplicated for answer in answers] == is_new
        new = [answer.job_id for answer, fresh in zip(answers, is_new, strict=True) if fresh]
        for answer, spec, fresh in zip(answers, specs, is_new, strict=True):
            if fresh:
                self.world.add(answer.job_id, spec, tenant, batch)
        self.ids += new
        return new

    # Workers.

    @rule(
        nth=which,
        queues=st.sampled_from([None, [*QUEUES], ["other"], []]),
        worker=workers,
        lease_s=lease_lengths,
        times=st.integers(1, 2),
    )
    def claim(self, nth: int, queues: list[str] | None, worker: str, lease_s: int, times: int) -> None:
        for _ in range(times):
            self._claim(self._id(nth), queues, worker, lease_s)

    @rule(queue=st.sampled_from(QUEUES), limit=st.integers(1, 4), worker=workers, lease_s=lease_lengths)
    def work_off_hints(self, queue: str, limit: int, worker: str, lease_s: int) -> None:
        for hint in self._due(queue, limit):
            assert self._claim(hint.job_id, [queue], worker, lease_s)

    @rule(queue=st.sampled_from(QUEUES), limit=st.integers(1, 4), max_crashes=st.integers(1, 3))
    def lose_a_worker(self, queue: str, limit: int, max_crashes: int) -> None:
        self.work_off_hints(queue, limit, "lost", seconds(0))
        self.time_passes(1)
        self.reap(max_crashes)

    @rule(steps=st.integers(0, 2))
    def claim_all(self, steps: int) -> None:
        self.time_passes(steps)
        for job_id in self.ids:
            self._claim(job_id, None, "greedy", seconds(1))

    def _claim(self, job_id: str, queues: list[str] | None, worker: str, lease_s: int) -> bool:
        job = self.world.jobs.get(job_id)
        claimed = self.store.claim(job_id, worker_id=worker, lease_s=lease_s, queues=queues)
        is_to_be_had = job is not None and self.world.is_due(job) and (queues is None or job.queue in queues)
        assert (claimed is not None) == is_to_be_had
        if claimed is None or job is None:
            return False
        self.world.claim(job, claimed, worker, lease_s)
        assert claimed.attempt == job.attempt <= MAX_ATTEMPTS
        assert claimed.queue_s == pytest.approx(self.world.now - job.run_at, abs=SLACK_S)
        assert (claimed.deadline_in_s is None) == (job.deadline is None)
        assert all(claimed.lease_id != other.lease_id for other in self.claims)
        self.claims.append(claimed)
        return True

    def _has_claims(self) -> bool:
        return bool(self.claims)

    @rule(nths=some, lease_s=lease_lengths)
    def heartbeat(self, nths: list[int], lease_s: int) -> None:
        claims = [self._claim_of(nth) for nth in nths if self.claims]

        beats = self.store.heartbeat(claims, lease_s=lease_s)

        held = {claimed.lease_id: job for claimed in claims if (job := self._held(claimed)) is not None}
        assert set(beats) == set(held)
        for lease, job in held.items():
            job.lease_until = self.world.now + lease_s
            assert beats[lease].cancel_requested == job.cancel_requested
            assert beats[lease].deadline_passed == (
                job.deadline is not None and job.deadline <= self.world.now
            )

    @precondition(_has_claims)
    @rule(nth=which, times=st.integers(1, 2))
    def succeed(self, nth: int, times: int) -> None:
        claimed = self._claim_of(nth)
        result = a_result(claimed, text=claimed.lease_id)
        self._end(claimed, "succeed", times, lambda: self.store.succeed(claimed, result))

    @precondition(_has_claims)
    @rule(nth=which, times=st.integers(1, 2))
    def fail(self, nth: int, times: int) -> None:
        claimed = self._claim_of(nth)
        self._end(
            claimed, "fail", times, lambda: self.store.fail(claimed, code="bad", message="m"), error="bad"
        )

    @precondition(_has_claims)
    @rule(nth=which, times=st.integers(1, 2), delay_s=st.sampled_from([0, seconds(0), seconds(1)]))
    def retry(self, nth: int, times: int, delay_s: int) -> None:
        claimed = self._claim_of(nth)
        job = self._held(claimed)
        outcome = "bury" if claimed.attempt == MAX_ATTEMPTS else "retry"
        self._end(
            claimed,
            outcome,
            times,
            lambda: self.store.retry(claimed, code="oom", message="m", delay_s=delay_s),
            error="oom",
            gives_way=True,
        )
        if job is not None and job.state == "queued":
            job.run_at += delay_s

    @precondition(_has_claims)
    @rule(nth=which, times=st.integers(1, 2))
    def release(self, nth: int, times: int) -> None:
        claimed = self._claim_of(nth)
        self._end(claimed, "release", times, lambda: self.store.release(claimed), gives_way=True)

    @precondition(_has_claims)
    @rule(nth=which, times=st.integers(1, 2))
    def cancel_running(self, nth: int, times: int) -> None:
        claimed = self._claim_of(nth)
        self._end(claimed, "cancel", times, lambda: self.store.cancel_running(claimed))

    @precondition(_has_claims)
    @rule(nth=which, times=st.integers(1, 2))
    def expire_running(self, nth: int, times: int) -> None:
        claimed = self._claim_of(nth)
        self._end(claimed, "expire", times, lambda: self.store.expire_running(claimed))

    def _end(
        self,
        claimed: Claim,
        outcome: str,
        times: int,
        act: Callable[[], Commit],
        *,
        error: str | None = None,
        gives_way: bool = False,
    ) -> None:
        """Make the same call `times`; `gives_way`: it cancels instead if that was asked for."""
        for _ in range(times):
            commit = act()
            job = self._held(claimed)
            if job is not None:
                assert commit is Commit.STORED
                if gives_way and job.cancel_requested:
                    self.world.leave(job, "cancel")
                else:
                    self.world.leave(job, outcome, error)
                continue
            known = self.world.jobs.get(claimed.job.id)
            ending = None if known is None else known.ending_of(claimed.lease_id)
            is_same = ending == outcome or (gives_way and ending == "cancel")
            assert commit is (Commit.ALREADY if is_same else Commit.LOST)

    # Dispatchers.

    @rule(queue=st.sampled_from(QUEUES), limit=st.integers(1, 5))
    def dispatch(self, queue: str, limit: int) -> None:
        self._due(queue, limit)

    @rule(queue=st.sampled_from(QUEUES), nths=some)
    def lose_hints(self, queue: str, nths: list[int]) -> None:
        lost = {self._id(nth) for nth in nths} | {NOBODY}
        hinted = [job for job in self.world.jobs.values() if self.world.is_unclaimed(job)]

        assert self.store.unclaimed(queue) == {job.id for job in hinted if job.queue == queue}
        assert self.store.owe_again(lost) == sum(job.id in lost for job in hinted)

        for job in hinted:
            if job.id in lost:
                job.published_at = None

    def _due(self, queue: str, limit: int) -> list[Hint]:
        there = [job for job in self.world.jobs.values() if job.queue == queue]
        owed = [job for job in there if self.world.is_due(job) and job.published_at is None]
        held = Counter(
            job.lane
            for job in there
            if job.state == "running" or (job.state == "queued" and job.published_at is not None)
        )

        hints = self.store.due(queue, limit=limit)

        chosen = [self.world.jobs[hint.job_id] for hint in hints]
        check_choice(chosen, owed, held, limit)
        self._hinted(hints, chosen)
        return hints

    @rule(nths=some)
    def publish_after_submit(self, nths: list[int]) -> None:
        ids = {self._id(nth) for nth in nths} | {NOBODY}
        jobs = [job for job_id in ids if (job := self.world.jobs.get(job_id)) is not None]
        owed = [job for job in jobs if self.world.is_due(job) and job.published_at is None]
        owed.sort(key=lambda job: (job.spec.priority, job.id))

        hints = self.store.mark_published(ids)

        assert [hint.job_id for hint in hints] == [job.id for job in owed]
        self._hinted(hints, owed)

    def _hinted(self, hints: Sequence[Hint], jobs: Sequence[ModelJob]) -> None:
        for hint, job in zip(hints, jobs, strict=True):
            self.world.hint(job)
            wanted = (job.id, job.queue, JobKind(job.spec.kind), job.spec.priority, job.publish_no)
            assert hint == Hint(*wanted)
        self.hints += hints

    @rule(nths=some)
    def unpublish(self, nths: list[int]) -> None:
        hints = [nth_newest(self.hints, nth) for nth in nths if self.hints]

        self.store.unpublish(hints)

        for hint in hints:
            job = self.world.jobs.get(hint.job_id)
            if job is not None and job.state == "queued" and job.publish_no == hint.publish_no:
                job.published_at = None

    # Janitors.

    @rule(max_crashes=st.integers(1, 3))
    def reap(self, max_crashes: int) -> None:
        fates: dict[str, set[str]] = {"reap": set(), "bury": set(), "cancel": set(), "expire": set()}
        for job in self.world.jobs.values():
            if job.state != "running" or job.lease_until is None or job.lease_until > self.world.now:
                continue
            job.crashes += 1
            if job.cancel_requested:
                fate = "cancel"
            elif job.deadline is not None and job.deadline <= self.world.now:
                fate = "expire"
            else:
                is_used_up = job.attempt == MAX_ATTEMPTS or job.crashes >= max_crashes
                fate = "bury" if is_used_up else "reap"
            self.world.leave(job, fate, "worker_lost")
            fates[fate].add(job.id)

        reaped = self.store.reap(max_crashes=max_crashes)

        found = (reaped.requeued, reaped.buried, reaped.cancelled, reaped.expired)
        assert [set(ids) for ids in found] == [*fates.values()]
        assert [len(ids) for ids in found] == [len(ids) for ids in fates.values()]

    @rule()
    def expire_due(self) -> None:
        late = [
            job
            for job in self.world.jobs.values()
            if job.state == "queued"
            and any(limit is not None and limit <= self.world.now for limit in (job.expires_at, job.deadline))
        ]
        for job in late:
            job.state, job.finished_at = "expired", self.world.now
        assert self.store.expire_due() == tuple(sorted(job.id for job in late))

    @rule(steps=st.sampled_from([0, 2, 5]))
    def prune(self, steps: int) -> None:
        keep_s = seconds(steps)
        old = [
            job.id
            for job in self.world.jobs.values()
            if job.finished_at is not None and job.finished_at < self.world.now - keep_s
        ]
        assert self.store.count_old(keep_s=keep_s) == len(old)
        assert self.store.prune(keep_s=keep_s) == len(old)
        for job_id in old:
            del self.world.jobs[job_id]

    # People.

    @rule(nth=which)
    def request_cancel(self, nth: int) -> None:
        job = self.world.jobs.get(self._id(nth))
        if job is None:
            with pytest.raises(JobNotFound):
                self.store.request_cancel(self._id(nth))
            return
        if job.state in ("queued", "running"):
            job.cancel_requested = True
        if job.state == "queued":
            job.state, job.finished_at = "cancelled", self.world.now
        assert self.store.request_cancel(job.id) == job.state

    @rule(nth=which)
    def requeue(self, nth: int) -> None:
        job = self.world.jobs.get(self._id(nth))
        if job is None:
            with pytest.raises(JobNotFound):
                self.store.requeue(self._id(nth))
        elif job.state not in ("failed", "dead", "cancelled", "expired"):
            with pytest.raises(IllegalMove):
                self.store.requeue(job.id)
        else:
            self.store.requeue(job.id)
            self.world.jobs[job.id] = ModelJob(
                **{name: getattr(job, name) for name in ("id", "tenant", "batch", "spec", "run", "history")},
                run_at=self.world.now,
                expires_at=None,
                deadline=None,
                publish_no=job.publish_no,
            )

    @rule(what=scopes)
    def pause(self, what: tuple[PauseScope, str]) -> None:
        is_new = what not in self.world.pauses
        self.world.pauses.add(what)
        assert self.store.pause(*what) is is_new

    @rule(what=scopes)
    def resume(self, what: tuple[PauseScope, str]) -> None:
        was_paused = what in self.world.pauses
        if was_paused:
            scope, name = what
            self.world.pauses.discard(what)
            for job in self.world.jobs.values():
                own = {"queue": job.queue, "tenant": job.tenant, "batch": job.batch, "run": job.run}
                if job.state == "queued" and own[scope] == name:
                    job.published_at = None
        assert self.store.resume(*what) is was_paused

    @rule(
        state=st.sampled_from([None, *JobState]),
        model=st.sampled_from([None, *QUEUES]),
        kind=st.sampled_from([None, JobKind.GENERATE, JobKind.INFILL, JobKind.CHAT]),
        label=st.sampled_from([None, None, "red", 'bl"ue', "re"]),
        tenant=st.sampled_from([None, *TENANTS]),
        batch=st.sampled_from(BATCHES),
        before=st.none() | which,
        limit=st.integers(1, 4),
    )
    def look(
        self,
        state: JobState | None,
        model: str | None,
        kind: JobKind | None,
        label: str | None,
        tenant: str | None,
        batch: str | None,
        before: int | None,
        limit: int,
    ) -> None:
        filters: dict[str, Any] = {"model": model, "kind": kind, "tenant": tenant, "batch_id": batch}
        filters["labels"] = None if label is None else {"colour": label}
        passed = [
            job
            for job in self.world.jobs.values()
            if model in (None, job.spec.model)
            and kind in (None, job.spec.kind)
            and label in (None, job.spec.label)
            and tenant in (None, job.tenant)
            and batch in (None, job.batch)
        ]
        before_id = None if before is None else self._id(before)
        listed = [
            job.id
            for job in sorted(passed, key=lambda job: job.id, reverse=True)
            if state in (None, job.state) and (before_id is None or job.id < before_id)
        ]

        found = self.store.list(state=state, before=before_id, limit=limit, **filters)

        assert [job.id for job in found] == listed[:limit]
        counts = Counter(job.state for job in passed)
        assert self.store.count_by_state(**filters) == {each: counts[each] for each in JobState}

    # Time.

    @rule(steps=st.integers(1, 3))
    def time_passes(self, steps: int) -> None:
        self.world.now += steps * STEP_S
        with self.database.begin() as connection:
            for table, columns in MOMENTS.items():
                earlier = ", ".join(f"{column} = {column} - :passed" for column in columns)
                connection.execute(text(f"UPDATE {table} SET {earlier}"), {"passed": steps * STEP_S})

    # What must be true after every step.

    @invariant()
    def every_row_is_as_the_model_says(self) -> None:
        with self.database.read() as connection:
            rows = {row.id: row for row in connection.execute(text("SELECT * FROM jobs"))}
            results = connection.execute(text("SELECT * FROM results")).all()
            history = connection.execute(text("SELECT * FROM attempts ORDER BY id")).all()
            now_s = self.store.clock()
        assert {job_id: facts_of_row(row) for job_id, row in rows.items()} == {
            job.id: facts_of_model(job) for job in self.world.jobs.values()
        }
        for job in self.world.jobs.values():
            for moment, at in moments_of(job).items():
                stored = getattr(rows[job.id], moment)
                assert (stored is None) == (at is None), (job.id, moment)
                if at is not None:
                    assert stored - now_s == pytest.approx(at - self.world.now, abs=SLACK_S), moment
        # One result for each job that succeeded and none else, of the attempt that committed it.
        assert sorted((row.job_id, row.attempt) for row in results) == sorted(
            (job.id, job.attempt) for job in self.world.jobs.values() if job.state == "succeeded"
        )
        assert [
            (row.job_id, row.lease_id, row.attempt, row.worker_id, row.outcome, row.error_code)
            for row in sorted(history, key=lambda row: (row.job_id, row.id))
        ] == [
            (job.id, ended.lease, ended.attempt, ended.worker, ended.outcome, ended.error)
            for job in sorted(self.world.jobs.values(), key=lambda job: job.id)
            for ended in job.history
        ]

    @invariant()
    def every_answer_is_as_the_model_says(self) -> None:
        jobs = self.world.jobs
        assert self.store.pending(self.ids) == {j.id for j in jobs.values() if j.state not in FINAL}
        assert {
            job_id: result.candidates[0].text for job_id, result in self.store.results(self.ids).items()
        } == {job.id: job.result_of for job in jobs.values() if job.result_of is not None}
        counts = Counter(job.state for job in jobs.values())
        assert self.store.count_by_state() == {state: counts[state] for state in JobState}
        alive = [job for job in jobs.values() if job.state not in FINAL]
        assert {
            queue: (
                depth.queued,
                depth.running,
                depth.oldest_due_age_s is not None,
                depth.oldest_lease_age_s is not None,
            )
            for queue, depth in self.store.queue_depths().items()
        } == {
            queue: self._depth([j for j in alive if j.queue == queue]) for queue in {j.queue for j in alive}
        }
        assert self.store.queues_with_work() == sorted({j.queue for j in alive if j.state == "queued"})
        assert {(pause.scope, pause.name) for pause in self.store.pauses()} == self.world.pauses

    def _depth(self, jobs: Collection[ModelJob]) -> tuple[int, int, bool, bool]:
        queued = [job for job in jobs if job.state == "queued"]
        running = len(jobs) - len(queued)
        return len(queued), running, any(j.run_at <= self.world.now for j in queued), running > 0

    # Picking.

    def _id(self, nth: int) -> str:
        return nth_newest(self.ids, nth)

    def _claim_of(self, nth: int) -> Claim:
        return nth_newest(self.claims, nth)

    def _held(self, claimed: Claim) -> ModelJob | None:
        """Return the job of a claim that is not lost."""
        job = self.world.jobs.get(claimed.job.id)
        return job if job is not None and job.lease == claimed.lease_id else None


#: Every stored moment.
MOMENTS: Final[Mapping[str, Sequence[str]]] = {
    "jobs": (
        "created_at",
        "run_at",
        "expires_at",
        "deadline",
        "cancel_requested_at",
        "published_at",
        "started_at",
        "finished_at",
        "lease_until",
    ),
    "results": ("created_at",),
    "attempts": ("started_at", "ended_at"),
    "pauses": ("since",),
}


def nth_newest(things: Sequence[T], nth: int) -> T:
    return things[-1 - nth % len(things)]


def facts_of_row(row: Any) -> tuple[object, ...]:
    """Return what is no moment."""
    return (
        row.state,
        row.attempt,
        row.crash_count,
        row.lease_id,
        row.worker_id,
        row.cancel_requested_at is not None,
        row.publish_no,
        row.error_code,
        row.tenant,
        row.batch_id,
        row.run_id,
        row.idempotency_key,
        row.queue,
        row.priority,
        row.kind,
    )


def facts_of_model(job: ModelJob) -> tuple[object, ...]:
    """Return the same as `facts_of_row`."""
    return (
        job.state,
        job.attempt,
        job.crashes,
        job.lease,
        job.worker,
        job.cancel_requested,
        job.publish_no,
        job.error,
        job.tenant,
        job.batch,
        job.run,
        job.spec.key,
        job.queue,
        job.spec.priority,
        job.spec.kind,
    )


def moments_of(job: ModelJob) -> dict[str, int | None]:
    return {
        "run_at": job.run_at,
        "expires_at": job.expires_at,
        "deadline": job.deadline,
        "lease_until": job.lease_until,
        "published_at": job.published_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
    }


def check_choice(
    chosen: Sequence[ModelJob],
    owed: Sequence[ModelJob],
    held: Mapping[tuple[str, str | None], int],
    limit: int,
) -> None:
    """Check that these are the right ones of the jobs that are owed a hint, and in the right order."""
    ids = [job.id for job in chosen]
    left = [job for job in owed if job.id not in ids]
    assert set(ids) <= {job.id for job in owed}
    assert len(set(ids)) == len(ids) == min(limit, len(owed))
    priorities = [job.spec.priority for job in chosen]
    assert priorities == sorted(priorities) == sorted(job.spec.priority for job in owed)[: len(ids)]
    loads = Counter(held) + Counter(job.lane for job in chosen)
    tenants = Counter[str]()
    for (tenant, _), load in loads.items():
        tenants[tenant] += load
    for job in chosen:
        for other in left:
            if other.spec.priority != job.spec.priority:
                continue
            # The oldest of a lane first, and no place for one who holds more than another who waits.
            assert other.lane != job.lane or job.id < other.id
            assert tenants[job.tenant] - 1 <= tenants[other.tenant] or job.tenant == other.tenant
            assert loads[job.lane] - 1 <= loads[other.lane] or job.tenant != other.tenant


def test_any_order_of_calls_keeps_every_rule(database_url: str) -> None:
    store = Store.open(database_url, max_attempts=MAX_ATTEMPTS)
    database = Database.open(database_url)
    machine = type("Machine", (StoreMachine,), {"store": store, "database": database})

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=[*HealthCheck],
        ),
    )

    database.close()
    store.close()
