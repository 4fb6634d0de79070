"""The queue of record: everything that can be asked of the jobs and done to them, in one object.

Owns: reading jobs, results and counts, and what a person does to a job: cancel, requeue. The rest of
`Store` is inherited, a noun each: `submissions` (rows come in), `leases` (a worker's claims),
`janitor` (what was lost), `hints` (what is to be published), `pauses` (what is not to start).
Does not know brokers, models or torch.

Every move of `codeherd_schema.states` is one conditional UPDATE that decides by the row as it is at
that moment and by the database's clock, so any number of processes may call anything at any time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from sqlalchemy import ColumnElement, Select, bindparam, case, func, select, union_all, update

from codeherd_schema.database import Database, holds, now
from codeherd_schema.errors import IllegalMove, JobNotFound, SchemaOutdated
from codeherd_schema.hints import Hint, Hints
from codeherd_schema.janitor import Janitor, Reaped
from codeherd_schema.jobs import Attempt, Job, attempt_of, job_of
from codeherd_schema.leases import Beat, Claim, Commit, Leases
from codeherd_schema.pauses import Pause, Pauses
from codeherd_schema.requests import JobKind
from codeherd_schema.results import Result
from codeherd_schema.states import JobState, Move, sources, target
from codeherd_schema.submissions import IN_LIST, MAX_ATTEMPTS, Submissions, Submitted, json_of_labels
from codeherd_schema.tables import (
    REVISION,
    attempts,
    jobs,
    results,
    revisions,
    state_is,
    unseen_state_is,
)

__all__ = [
    "Attempt",
    "Beat",
    "Claim",
    "Commit",
    "Hint",
    "Job",
    "Pause",
    "QueueDepth",
    "Reaped",
    "Store",
    "Submitted",
]

_UPGRADE: Final = "run `codeherd db upgrade`"
# Built once: whoever waits for jobs asks this all the time.
_PENDING: Final = select(jobs.c.id).where(
    jobs.c.id.in_(bindparam("these_jobs", expanding=True)),
    unseen_state_is(JobState.QUEUED, JobState.RUNNING),
)


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """How one queue stands at one moment."""

    queue: str
    #: Waiting, due or not.
    queued: int
    running: int
    #: Seconds that the longest waiting due job has been due; None when none is.
    oldest_due_age_s: float | None
    #: Seconds since the claim of the longest running job; None when none runs.
    oldest_lease_age_s: float | None


class Store(Submissions, Leases, Janitor, Hints, Pauses):
    """All jobs of one database; threads may share it."""

    def __init__(self, database: Database, *, max_attempts: int = MAX_ATTEMPTS) -> None:
        """Work on `database`; a job that needs more than `max_attempts` is dead."""
        super().__init__(database, max_attempts=max_attempts)

    @classmethod
    def open(cls, url: str, *, max_attempts: int = MAX_ATTEMPTS, **options: Any) -> Self:
        """Open the database at `url`; `options` are those of `Database.open`."""
        return cls(Database.open(url, **options), max_attempts=max_attempts)

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def clock(self) -> float:
        """Return the database's time: seconds since 1970."""
        return self._database.clock()

    def check_schema(self) -> None:
        """Make sure that the database has the tables that this version needs.

        Raises:
            SchemaOutdated: it has not, or it has newer ones.
            DatabaseUnavailable: it did not answer.
        """
        with self._database.read() as connection:
            found = connection.scalars(select(revisions.c.version_num)).all()
        if list(found) != [REVISION]:
            raise SchemaOutdated(
                f"database {self._database.place} has schema {', '.join(found) or 'none'}, "
                f"this version of codeherd needs {REVISION}",
                hint=_UPGRADE,
            )

    def get(self, job_id: str) -> Job | None:
        """Return the job as it is now."""
        return self.get_many([job_id]).get(job_id)

    def get_many(self, job_ids: Collection[str]) -> dict[str, Job]:
        """Return those of the jobs that exist, by id."""
        with self._database.read() as connection:
            return {
                row.id: job_of(row)
                for part in _parts(job_ids)
                for row in connection.execute(select(*jobs.c).where(jobs.c.id.in_(part)))
            }

    def result(self, job_id: str) -> Result | None:
        """Return the job's result; None when there is none, or no such job."""
        return self.results([job_id]).get(job_id)

    def results(self, job_ids: Collection[str]) -> dict[str, Result]:
        """Return the results of those jobs that have one, by job id."""
        with self._database.read() as connection:
            return {
                row.job_id: Result.model_validate_json(row.payload)
                for part in _parts(job_ids)
                for row in connection.execute(
                    select(results.c.job_id, results.c.payload).where(results.c.job_id.in_(part))
                )
            }

    def attempts(self, job_id: str) -> list[Attempt]:
        """Return the ended attempts of a job, oldest first."""
        statement = select(*attempts.c).where(attempts.c.job_id == job_id).order_by(attempts.c.id)
        with self._database.read() as connection:
            return [attempt_of(row) for row in connection.execute(statement)]

    def pending(self, job_ids: Collection[str]) -> set[str]:
        """Return those of the jobs that are queued or running; reads no payload."""
        with self._database.read() as connection:
            return {
                job_id
                for part in _parts(job_ids)
                for job_id in connection.scalars(_PENDING, {"these_jobs": part})
            }

    def count_by_state(
        self,
        *,
        model: str | None = None,
        kind: JobKind | None = None,
        labels: Mapping[str, str] | None = None,
        tenant: str | None = None,
        batch_id: str | None = None,
    ) -> dict[JobState, int]:
        """Return how many jobs are in each state, zeros included; filters as in `list`."""
        filters = tuple(_filters(model=model, kind=kind, labels=labels, tenant=tenant, batch_id=batch_id))
        # One part for each partial index, so that nothing reads the payloads.
        parts = (jobs.c.finished_at.is_not(None), state_is(JobState.QUEUED), state_is(JobState.RUNNING))
        statement = union_all(
            *(
                select(jobs.c.state, func.count().label("jobs")).where(part, *filters).group_by(jobs.c.state)
                for part in parts
            )
        )
        with self._database.read() as connection:
            found = {row.state: row.jobs for row in connection.execute(statement)}
        return {state: found.get(state.value, 0) for state in JobState}

    def queue_depths(self) -> dict[str, QueueDepth]:
        """Return how each queue with queued or running jobs stands, by its name."""
        queued = (
            select(
                jobs.c.queue,
                func.count().label("jobs"),
                (now() - func.min(case((jobs.c.run_at <= now(), jobs.c.run_at)))).label("oldest_s"),
            )
            .where(state_is(JobState.QUEUED))
            .group_by(jobs.c.queue)
        )
        running = (
            select(
                jobs.c.queue,
                func.count().label("jobs"),
                (now() - func.min(jobs.c.started_at)).label("oldest_s"),
            )
            .where(state_is(JobState.RUNNING))
            .group_by(jobs.c.queue)
        )
        with self._database.read() as connection:
            waiting = {row.queue: row for row in connection.execute(queued)}
            held = {row.queue: row for row in connection.execute(running)}
        return {
            queue: QueueDepth(
                queue=queue,
                queued=waiting[queue].jobs if queue in waiting else 0,
                running=held[queue].jobs if queue in held else 0,
                oldest_due_age_s=waiting[queue].oldest_s if queue in waiting else None,
                oldest_lease_age_s=held[queue].oldest_s if queue in held else None,
            )
            for queue in sorted({*waiting, *held})
        }

    def request_cancel(self, job_id: str) -> JobState:
        """Cancel a queued job at once, ask the worker of a running one to stop, leave an ended one.

        Returns:
            The state after the call; `running` means that the worker will hear of it at its next
            heartbeat.

        Raises:
            JobNotFound: no job has this id.
        """
        is_queued = state_is(JobState.QUEUED)
        statement = (
            update(jobs)
            .where(jobs.c.id == job_id, unseen_state_is(*sources(Move.CANCEL)))
            .values(
                cancel_requested_at=func.coalesce(jobs.c.cancel_requested_at, now()),
                # One statement for both: between two the job could slip from one state to the other.
                state=case((is_queued, target(Move.CANCEL).value), else_=jobs.c.state),
                finished_at=case((is_queued, now()), else_=jobs.c.finished_at),
            )
            .returning(jobs.c.state)
        )
        while True:
            state = self._database.write(lambda connection: connection.execute(statement).scalar())
            if state is not None:
                return JobState(state)
            ended = self._state(job_id)
            # Else it was queued again between the two looks, and would run although it was withdrawn.
            if ended not in sources(Move.CANCEL):
                return ended

    def requeue(self, job_id: str) -> None:
        """Queue an ended job again with all its attempts; its time limits no longer hold.

        Raises:
            JobNotFound: no job has this id.
            IllegalMove: the job is queued, running or succeeded.
        """
        statement = (
            update(jobs)
            .where(jobs.c.id == job_id, unseen_state_is(*sources(Move.REQUEUE)))
            .values(
                state=target(Move.REQUEUE).value,
                attempt=0,
                crash_count=0,
                run_at=now(),
                expires_at=None,
                deadline=None,
                cancel_requested_at=None,
                published_at=None,
                error_code=None,
                error_message=None,
                started_at=None,
                finished_at=None,
                worker_id=None,
            )
        )
        if self._database.write(lambda connection: connection.execute(statement).rowcount) == 0:
            raise IllegalMove(
                f"job {job_id} is `{self._state(job_id)}`",
                hint="only jobs that ended without a result can be queued again",
            )

    def _state(self, job_id: str) -> JobState:
        with self._database.read() as connection:
            state = connection.scalar(select(jobs.c.state).where(jobs.c.id == job_id))
        if state is None:
            raise JobNotFound(f"no job has the id `{job_id}`")
        return JobState(state)

    # The last method: after it, `list` in this class is no longer the type.
    def list(
        self,
        *,
        state: JobState | None = None,
        model: str | None = None,
        kind: JobKind | None = None,
        labels: Mapping[str, str] | None = None,
        tenant: str | None = None,
        batch_id: str | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> list[Job]:
        """Return the newest jobs that pass every filter, newest first.

        Args:
            state: only these.
            model: only these.
            kind: only these.
            labels: only jobs that have all of these.
            tenant: only these.
            batch_id: only these.
            before: only jobs older than this one: the last id of the page before.
            limit: most jobs.
        """
        statement: Select[Any] = select(*jobs.c).where(
            *_filters(model=model, kind=kind, labels=labels, tenant=tenant, batch_id=batch_id)
        )
        if state is not None:
            statement = statement.where(state_is(state))
        if before is not None:
            statement = statement.where(jobs.c.id < before)
        with self._database.read() as connection:
            return [
                job_of(row) for row in connection.execute(statement.order_by(jobs.c.id.desc()).limit(limit))
            ]


def _filters(
    *,
    model: str | None,
    kind: JobKind | None,
    labels: Mapping[str, str] | None,
    tenant: str | None,
    batch_id: str | None,
) -> Iterator[ColumnElement[bool]]:
    wanted = {jobs.c.model: model, jobs.c.kind: kind, jobs.c.tenant: tenant, jobs.c.batch_id: batch_id}
    for column, value in wanted.items():
        if value is not None:
            yield column == value
    for name, value in (labels or {}).items():
        # Names hold no quotes and quotes in values are escaped, so this text is a whole pair.
        yield holds(jobs.c.labels, json_of_labels({name: value})[1:-1])


def _parts(job_ids: Collection[str]) -> Iterator[list[str]]:
    ids = sorted(set(job_ids))
    for start in range(0, len(ids), IN_LIST):
        yield ids[start : start + IN_LIST]
