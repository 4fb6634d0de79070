r"""Submit jobs and fetch their answers from a program.

Owns: the order of a submit (judge, commit, hint), what a caller is told about the end of a job.
Does not know SQL (`codeherd_schema.store`), Celery (`codeherd_producer.broker_courier`), tokenizers
(`codeherd_producer.counter`) or the command line. Once a row is committed no call here fails for
want of a broker: the dispatcher publishes what a client could not.

    with Client(settings) as client:
        job = client.submit(InfillRequest(prefix="def add(a, b):\n    return ", suffix="\n"))
        print(job.result(timeout_s=60).text)
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Self

from sqlalchemy import Connection

from codeherd_producer.counter import PromptCounter
from codeherd_producer.courier import Courier
from codeherd_producer.waiting import Watch
from codeherd_schema import store
from codeherd_schema.errors import (
    DatabaseUnavailable,
    InvalidRequest,
    JobCancelled,
    JobError,
    JobExpired,
    JobFailed,
    JobNotFound,
    WaitTimeout,
)
from codeherd_schema.hints import Hint
from codeherd_schema.models import ModelTable, ServedModel
from codeherd_schema.queues import queue_name
from codeherd_schema.requests import JobKind, Request
from codeherd_schema.results import Result
from codeherd_schema.settings import SharedSettings
from codeherd_schema.states import FINAL_STATES, JobState, PauseScope

logger = logging.getLogger(__name__)

#: Requests that `submit_many` commits in one transaction.
CHUNK = 1000
#: Seconds of one turn of an endless wait: nothing happens between two, it only bounds a number.
TURN_S = 3600.0


class Job:
    """A handle on one job; cheap to make, and it reads the row only when asked."""

    __slots__ = ("_client", "deduplicated", "id", "known_row")

    def __init__(
        self, client: Client, job_id: str, *, deduplicated: bool = False, row: store.Job | None = None
    ) -> None:
        """Made by a client, not by you."""
        self._client = client
        self.id = job_id
        #: True when the job was there before, under the same idempotency key.
        self.deduplicated = deduplicated
        #: The job as it was last read; None if it never was.
        self.known_row = row

    def __repr__(self) -> str:
        return f"<Job {self.id}>"

    @property
    def row(self) -> store.Job:
        """The job as it was last read: at `refresh`, or at the first use.

        Raises:
            JobNotFound: no job has this id.
        """
        return self.known_row or self.refresh()

    @property
    def state(self) -> JobState:
        """Where the job is now: reads the row again."""
        return self.refresh().state

    def refresh(self) -> store.Job:
        """Read the job again.

        Raises:
            JobNotFound: no job has this id.
        """
        self.known_row = self._client.row(self.id)
        return self.known_row

    def result(self, timeout_s: float | None = None) -> Result:
        """Wait for the result; see `Client.result`."""
        return self._client.result(self.id, timeout_s)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the job has ended, well or not; see `Client.wait`."""
        self._client.wait([self], timeout_s)

    def cancel(self) -> JobState:
        """Withdraw the job; see `Client.cancel`."""
        return self._client.cancel(self.id)

    def retry(self) -> None:
        """Queue the ended job again; see `Client.retry`."""
        self._client.retry(self.id)


class Client:
    """Submits, finds, cancels and waits; threads may share it."""

    def __init__(
        self,
        settings: SharedSettings,
        *,
        publish: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the database lazily: the first call connects.

        Args:
            settings: where the database and the broker are.
            publish: False leaves every hint to the dispatcher and never imports Celery, for one-shot
                programs: a job then starts up to `dispatch_interval_s` later.
            clock: seconds, from any start.

        Raises:
            InvalidSetting: the database URL or the models file is wrong.
        """
        self._settings = settings
        self._clock = clock
        self._models = ModelTable.from_file(settings.models_file)
        self._counter = PromptCounter(clock=clock)
        self._courier = _broker_courier(settings, clock) if publish else Courier()
        self._store = store.Store.open(
            settings.database, max_attempts=settings.max_attempts, **settings.database_options
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection; jobs go on."""
        self._courier.close()
        self._store.close()

    # Submitting

    def faults(self, requests: Sequence[Request]) -> dict[int, InvalidRequest]:
        """Return why requests cannot be submitted, by their places; empty when all can."""
        return self._judge(requests)[1]

    def submit(self, request: Request, *, connection: Connection | None = None) -> Job:
        """Queue a job; once this returns it is never lost.

        Args:
            request: what to do.
            connection: insert the row in this open transaction of yours, on the same database. The
                job exists when you commit, and the dispatcher publishes it.

        Raises:
            UnknownModel, UnsupportedByModel, PromptTooLong: nothing was queued; change the request.
            IdempotencyConflict: the key was used with another request.
            DatabaseUnavailable: nothing is known to be queued; submit again, with an idempotency key
                if a second job would do harm.
        """
        [job] = self._insert([request], self._accept([request], queued=None), connection=connection)
        return job

    def submit_many(
        self, requests: Iterable[Request], *, batch_id: str | None = None, run_id: str | None = None
    ) -> list[Job]:
        """Queue many jobs and return their handles in order.

        A list or tuple is judged as a whole before anything is queued. Any other iterable is read,
        judged and committed in chunks of 1000, so that it may be larger than memory: a fault then
        leaves the chunks before it queued. The same holds for an idempotency conflict and for a
        database that goes away in between; with idempotency keys the whole call can be repeated.

        Args:
            requests: what to do.
            batch_id: what the jobs belong to, for filters.
            run_id: the backfill or review that they belong to, to be paused as a whole.

        Raises:
            InvalidRequest: names the place of the first wrong request and how many were queued.
            DatabaseUnavailable: as in `submit`.
        """
        handles: list[Job] = []
        if isinstance(requests, Sequence):
            models = self._accept(requests, queued=0)
            for start in range(0, len(requests), CHUNK):
                part = slice(start, start + CHUNK)
                handles += self._insert(requests[part], models[part], batch_id=batch_id, run_id=run_id)
            return handles
        remaining = iter(requests)
        while chunk := list(itertools.islice(remaining, CHUNK)):
            models = self._accept(chunk, queued=len(handles))
            handles += self._insert(chunk, models, batch_id=batch_id, run_id=run_id)
        return handles

    def _insert(
        self,
        requests: Sequence[Request],
        models: Sequence[ServedModel],
        *,
        connection: Connection | None = None,
        batch_id: str | None = None,
        run_id: str | None = None,
    ) -> list[Job]:
        # One name per model in the rows, whichever way the request spelled it.
        named = [
            request if request.model == model.name else request.model_copy(update={"model": model.name})
            for request, model in zip(requests, models, strict=True)
        ]
        submitted = self._store.submit(
            named,
            tenant=self._settings.tenant,
            queue_of=lambda request: queue_name(request.model),
            connection=connection,
            batch_id=batch_id,
            run_id=run_id,
        )
        if connection is None:
            fresh = [(s.job_id, r) for s, r in zip(submitted, named, strict=True) if not s.deduplicated]
            logger.info("jobs_queued count=%d first_job_id=%s", len(fresh), submitted[0].job_id)
            # Most urgent first, as far as there is room.
            fresh.sort(key=lambda item: item[1].priority)
            self._publish((job_id, queue_name(request.model)) for job_id, request in fresh)
        return [Job(self, s.job_id, deduplicated=s.deduplicated) for s in submitted]

    def _accept(self, requests: Sequence[Request], *, queued: int | None) -> list[ServedModel]:
        models, faults = self._judge(requests)
        _raise_first(faults, queued=queued)
        return models

    def _judge(self, requests: Sequence[Request]) -> tuple[list[ServedModel], dict[int, InvalidRequest]]:
        faults: dict[int, InvalidRequest] = {}
        models: list[ServedModel] = []
        places: list[int] = []
        for place, request in enumerate(requests):
            try:
                models.append(self._models.check(request))
                places.append(place)
            except InvalidRequest as err:
                faults[place] = err
        pairs = [(requests[place], model) for place, model in zip(places, models, strict=True)]
        faults |= {places[i]: err for i, err in self._counter.faults(pairs).items()}
        return models, dict(sorted(faults.items()))

    def _publish(self, jobs: Iterable[tuple[str, str]]) -> None:
        by_queue: dict[str, list[str]] = {}
        for job_id, queue in jobs:
            by_queue.setdefault(queue, []).append(job_id)
        for queue, job_ids in by_queue.items():
            # No more than the dispatcher would send: what waits in SQL still has its priority.
            chosen = job_ids[: self._courier.room(queue)]
            if chosen:
                self._send(chosen)

    def _send(self, job_ids: Collection[str]) -> None:
        hints: list[Hint] = []
        try:
            hints = self._store.mark_published(job_ids)
            if not self._courier.publish(hints):
                self._store.unpublish(hints)
        except DatabaseUnavailable as err:
            # The rows are committed, so the submit has succeeded; the dispatcher finds these hints.
            logger.warning("hints_left count=%d reason=%s", len(job_ids), err)

    # Looking

    def row(self, job_id: str) -> store.Job:
        """Return the job as it is now.

        Raises:
            JobNotFound: no job has this id.
        """
        row = self._store.get(job_id)
        if row is None:
            raise JobNotFound(f"no job has the id `{job_id}`")
        return row

    def get(self, job_id: str) -> Job:
        """Return a handle on a job that was submitted by anybody.

        Raises:
            JobNotFound: no job has this id.
        """
        return Job(self, job_id, row=self.row(job_id))

    def attempts(self, job_id: str) -> Sequence[store.Attempt]:
        """Return the ended attempts of a job, oldest first."""
        return self._store.attempts(job_id)

    def alive(self, job_ids: Collection[str]) -> set[str]:
        """Return those of the jobs that have not ended: one look, no waiting."""
        return self._store.pending(job_ids)

    # Changing

    def cancel(self, job_id: str) -> JobState:
        """Withdraw a job: a queued one at once, a running one at its worker's next token.

        Returns:
            The state after the call: `running` while the worker has yet to stop; a job that had
            already ended keeps its state.

        Raises:
            JobNotFound: no job has this id.
        """
        state = self._store.request_cancel(job_id)
        if state is JobState.RUNNING:
            self._courier.request_cancel(job_id)
        elif state is JobState.CANCELLED:
            self._courier.announce(job_id)
        return state

    def retry(self, job_id: str) -> None:
        """Queue again a job that ended without a result; its time limits no longer hold.

        Raises:
            JobNotFound: no job has this id.
            IllegalMove: it is queued, running or succeeded.
        """
        self._store.requeue(job_id)
        self._publish([(job_id, self.row(job_id).queue)])

    def pause(self, scope: PauseScope, name: str, *, reason: str = "") -> bool:
        """Start no job of this queue, batch, run or tenant until it is resumed; running ones go on.

        Returns:
            Whether it was not paused before.
        """
        return self._store.pause(scope, name, reason=reason)

    def resume(self, scope: PauseScope, name: str) -> bool:
        """Let the jobs of something paused start again; return whether it was paused."""
        return self._store.resume(scope, name)

    def pauses(self) -> Sequence[store.Pause]:
        """Return everything that is paused, the longest first."""
        return self._store.pauses()

    def count_old(self, *, keep_s: float) -> int:
        """Return how many jobs of all tenants ended more than `keep_s` seconds ago."""
        return self._store.count_old(keep_s=keep_s)

    def prune(self, *, keep_s: float) -> int:
        """Delete these jobs with their results and history; return how many."""
        total = 0
        while count := self._store.prune(keep_s=keep_s):
            total += count
        return total

    # Waiting

    def result(self, job_id: str, timeout_s: float | None = None) -> Result:
        """Wait for a job's result.

        Args:
            job_id: whose.
            timeout_s: most seconds to wait; 0 looks once, None waits as long as it takes.

        Raises:
            JobFailed, JobCancelled, JobExpired: it ended without one; the message says why.
            WaitTimeout: it has not ended yet, and goes on.
            JobNotFound: no job has this id.
        """
        row = self.row(job_id)
        if row.state not in FINAL_STATES and timeout_s != 0:
            for _ in self._ended([job_id], timeout_s):
                row = self.row(job_id)
        if row.state is JobState.SUCCEEDED:
            result = self._store.result(job_id)
            if result is None:
                raise JobNotFound(f"the result of job {job_id} is gone")
            return result
        raise _without_result(row)

    def results(self, job_ids: Collection[str]) -> dict[str, Result]:
        """Return the results of those jobs that have one, by job id: one look, no waiting."""
        return self._store.results(job_ids)

    def wait(self, jobs: Iterable[Job | str], timeout_s: float | None = None) -> None:
        """Wait until every job has ended, well or not.

        Ctrl-C leaves the wait; the jobs go on.

        Raises:
            WaitTimeout: says how many have not; they go on.
            JobNotFound: one of the ids does not exist.
        """
        for _ in self.as_completed(jobs, timeout_s):
            pass

    def as_completed(self, jobs: Iterable[Job | str], timeout_s: float | None = None) -> Iterator[Job]:
        """Yield each job when it has ended, well or not; those that already have come first.

        Raises:
            WaitTimeout: says how many have not; they go on.
            JobNotFound: one of the ids does not exist; raised before the first job.
        """
        handles = self.handles(jobs)
        return (handles[job_id] for job_id in self._ended(handles, timeout_s))

    def handles(self, jobs: Iterable[Job | str]) -> dict[str, Job]:
        """Return one handle for each job, by id and in order.

        Raises:
            JobNotFound: one of the ids does not exist.
        """
        given = list(jobs)
        # A handle was made for a row; a bare id may be mistyped, and would look like a job that ended.
        rows = self._store.get_many([job for job in given if isinstance(job, str)])
        handles: dict[str, Job] = {}
        for job in given:
            if isinstance(job, Job):
                handles[job.id] = job
            elif job in rows:
                handles[job] = Job(self, job, row=rows[job])
            else:
                raise JobNotFound(f"no job has the id `{job}`")
        return handles

    def watch(self) -> Watch:
        """Return an empty watch, for a wait of your own making; close it after use."""
        return Watch(
            self._store,
            self._courier,
            poll_interval_s=self._settings.poll_interval_s,
            clock=self._clock,
        )

    def _ended(self, job_ids: Collection[str], timeout_s: float | None) -> Iterator[str]:
        until = None if timeout_s is None else self._clock() + timeout_s
        with self.watch() as watch:
            watch.add(job_ids)
            while len(watch):
                left_s = TURN_S if until is None else until - self._clock()
                ended = watch.wait(max(0.0, left_s))
                yield from sorted(ended)
                if until is not None and not ended and self._clock() >= until:
                    raise _still_alive(len(watch), timeout_s)

    # The last method: after it, `list` in this class is no longer the type.
    def list(
        self,
        *,
        state: JobState | None = None,
        model: str | None = None,
        kind: JobKind | None = None,
        labels: Mapping[str, str] | None = None,
        batch_id: str | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> list[Job]:
        """Return this tenant's newest jobs that pass every filter, newest first.

        Args:
            state: only these.
            model: only these; any of the model's names.
            kind: only these.
            labels: only jobs that have all of these.
            batch_id: only these.
            before: only jobs older than this one: the last id of the page before.
            limit: most jobs.
        """
        rows = self._store.list(
            state=state,
            model=None if model is None else self._models.find(model).name,
            kind=kind,
            labels=labels,
            tenant=self._settings.tenant,
            batch_id=batch_id,
            before=before,
            limit=limit,
        )
        return [Job(self, row.id, row=row) for row in rows]


def _broker_courier(settings: SharedSettings, clock: Callable[[], float]) -> Courier:
    # Imported here and not above: Celery costs 0.2 s, which a one-shot program that leaves its hint to
    # the dispatcher must not pay.
    from codeherd_producer.broker_courier import BrokerCourier

    return BrokerCourier(settings, clock=clock)


def _raise_first(faults: Mapping[int, InvalidRequest], *, queued: int | None) -> None:
    """Raise the first fault; `queued` is None for a submit of one request, which needs no place."""
    for place, fault in faults.items():
        if queued is None:
            raise fault
        more = f" ({len(faults) - 1} more are wrong)" if len(faults) > 1 else ""
        raise type(fault)(
            f"request {queued + place}: {fault.message}{more}; {queued} jobs were queued", hint=fault.hint
        ) from fault


def _without_result(row: store.Job) -> JobError:
    reason = f": {row.error_code}: {row.error_message}" if row.error_code else ""
    match row.state:
        case JobState.CANCELLED:
            return JobCancelled(f"job {row.id} was cancelled")
        case JobState.EXPIRED:
            return JobExpired(f"job {row.id} passed its deadline or its latest start")
        case JobState.FAILED | JobState.DEAD:
            return JobFailed(f"job {row.id} is {row.state}{reason}")
        case _:
            return WaitTimeout(f"job {row.id} is still {row.state}")


def _still_alive(count: int, timeout_s: float | None) -> WaitTimeout:
    return WaitTimeout(f"jobs that have not ended within {timeout_s:g} s and go on: {count}")
