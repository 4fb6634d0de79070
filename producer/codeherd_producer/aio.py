"""Submit jobs and fetch their answers from asyncio.

Owns: the same verbs as `codeherd_producer.client`, as coroutines. Short calls run in
`asyncio.to_thread`; SQLAlchemy's own asyncio is out, for it needs greenlet and would be a second way
to the same rows. All waiting coroutines of a client share one thread, one subscription and one look
at SQL per `poll_interval_s`, so ten thousand of them cost little more than one. Does not know SQL or
Celery.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Self

from codeherd_producer.client import Client, Job
from codeherd_producer.waiting import Watch
from codeherd_schema import store
from codeherd_schema.errors import InvalidRequest, ServiceUnavailable, WaitTimeout
from codeherd_schema.requests import JobKind, Request
from codeherd_schema.results import Result
from codeherd_schema.settings import SharedSettings
from codeherd_schema.states import JobState, PauseScope

#: What the waiting thread tells a coroutine: jobs that ended, or why it cannot go on.
News = frozenset[str] | Exception
Tell = Callable[[News], None]
#: Longest turn of the waiting thread, seconds; it ends within one once nobody waits.
TURN_S = 0.5


class AsyncJob:
    """A handle on one job; cheap to make, and it reads the row only when asked."""

    __slots__ = ("_client", "deduplicated", "id", "row")

    def __init__(self, client: AsyncClient, job: Job) -> None:
        """Made by a client, not by you."""
        self._client = client
        self.id = job.id
        #: True when the job was there before, under the same idempotency key.
        self.deduplicated = job.deduplicated
        #: The job as it was last read; None before the first `refresh` of a fresh submit.
        self.row: store.Job | None = job.known_row

    def __repr__(self) -> str:
        return f"<AsyncJob {self.id}>"

    async def refresh(self) -> store.Job:
        """Read the job again; see `Job.refresh`."""
        self.row = await self._client.row(self.id)
        return self.row

    async def result(self, timeout_s: float | None = None) -> Result:
        """Wait for the result; see `Client.result`."""
        return await self._client.result(self.id, timeout_s)

    async def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the job has ended, well or not; see `Client.wait`."""
        await self._client.wait([self], timeout_s)

    async def cancel(self) -> JobState:
        """Withdraw the job; see `Client.cancel`."""
        return await self._client.cancel(self.id)

    async def retry(self) -> None:
        """Queue the ended job again; see `Client.retry`."""
        await self._client.retry(self.id)


class AsyncClient:
    """Submits, finds, cancels and waits without blocking an event loop."""

    def __init__(
        self,
        settings: SharedSettings,
        *,
        publish: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the database lazily; arguments are those of `Client`."""
        self._client = Client(settings, publish=publish, clock=clock)
        self._clock = clock
        self._lookout = _Lookout(self._client.watch)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection; jobs go on."""
        await asyncio.to_thread(self._lookout.close)
        await asyncio.to_thread(self._client.close)

    async def faults(self, requests: Sequence[Request]) -> dict[int, InvalidRequest]:
        """Return why requests cannot be submitted; see `Client.faults`."""
        return await asyncio.to_thread(self._client.faults, requests)

    async def submit(self, request: Request) -> AsyncJob:
        """Queue a job; see `Client.submit`. A transaction of your own stays with the thread it is in."""
        return AsyncJob(self, await asyncio.to_thread(self._client.submit, request))

    async def submit_many(
        self, requests: Iterable[Request], *, batch_id: str | None = None, run_id: str | None = None
    ) -> list[AsyncJob]:
        """Queue many jobs; see `Client.submit_many`. The iterable is read in another thread."""
        submit = self._client.submit_many
        jobs = await asyncio.to_thread(submit, requests, batch_id=batch_id, run_id=run_id)
        return [AsyncJob(self, job) for job in jobs]

    async def row(self, job_id: str) -> store.Job:
        """Return the job as it is now; see `Client.row`."""
        return await asyncio.to_thread(self._client.row, job_id)

    async def get(self, job_id: str) -> AsyncJob:
        """Return a handle on a job; see `Client.get`."""
        return AsyncJob(self, await asyncio.to_thread(self._client.get, job_id))

    async def attempts(self, job_id: str) -> Sequence[store.Attempt]:
        """Return the ended attempts of a job, oldest first."""
        return await asyncio.to_thread(self._client.attempts, job_id)

    async def cancel(self, job_id: str) -> JobState:
        """Withdraw a job; see `Client.cancel`."""
        return await asyncio.to_thread(self._client.cancel, job_id)

    async def retry(self, job_id: str) -> None:
        """Queue an ended job again; see `Client.retry`."""
        await asyncio.to_thread(self._client.retry, job_id)

    async def pause(self, scope: PauseScope, name: str, *, reason: str = "") -> bool:
        """Start no job of this queue, batch, run or tenant; see `Client.pause`."""
        return await asyncio.to_thread(self._client.pause, scope, name, reason=reason)

    async def resume(self, scope: PauseScope, name: str) -> bool:
        """Let the jobs of something paused start again; see `Client.resume`."""
        return await asyncio.to_thread(self._client.resume, scope, name)

    async def pauses(self) -> Sequence[store.Pause]:
        """Return everything that is paused, the longest first."""
        return await asyncio.to_thread(self._client.pauses)

    async def count_old(self, *, keep_s: float) -> int:
        """Return how many jobs of all tenants ended more than `keep_s` seconds ago."""
        return await asyncio.to_thread(self._client.count_old, keep_s=keep_s)

    async def prune(self, *, keep_s: float) -> int:
        """Delete these jobs with their results and history; see `Client.prune`."""
        return await asyncio.to_thread(self._client.prune, keep_s=keep_s)

    async def result(self, job_id: str, timeout_s: float | None = None) -> Result:
        """Wait for a job's result; see `Client.result`."""
        with contextlib.suppress(WaitTimeout):
            return await asyncio.to_thread(self._client.result, job_id, 0)
        if timeout_s != 0:
            async for _ in self._ended([job_id], timeout_s):
                pass
        return await asyncio.to_thread(self._client.result, job_id, 0)

    async def wait(self, jobs: Iterable[AsyncJob | str], timeout_s: float | None = None) -> None:
        """Wait until every job has ended, well or not; see `Client.wait`."""
        async for _ in self.as_completed(jobs, timeout_s):
            pass

    async def as_completed(
        self, jobs: Iterable[AsyncJob | str], timeout_s: float | None = None
    ) -> AsyncIterator[AsyncJob]:
        """Yield each job when it has ended, well or not; see `Client.as_completed`."""
        given = list(jobs)
        handles = {job.id: job for job in given if isinstance(job, AsyncJob)}
        named = [job for job in given if isinstance(job, str) and job not in handles]
        found = await asyncio.to_thread(self._client.handles, named)
        handles.update((job_id, AsyncJob(self, job)) for job_id, job in found.items())
        async for job_id in self._ended(handles, timeout_s):
            yield handles[job_id]

    async def _ended(self, job_ids: Collection[str], timeout_s: float | None) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        until = None if timeout_s is None else loop.time() + timeout_s
        inbox: asyncio.Queue[News] = asyncio.Queue()

        def tell(news: News) -> None:
            # A loop that is closed has no coroutine left to tell.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(inbox.put_nowait, news)

        left = set(job_ids)
        with self._lookout.watching(frozenset(left), tell):
            news: News = frozenset(left - await asyncio.to_thread(self._client.alive, left))
            while True:
                if isinstance(news, Exception):
                    raise news
                for job_id in sorted(news & left):
                    left.discard(job_id)
                    yield job_id
                if not left:
                    return
                try:
                    left_s = None if until is None else until - loop.time()
                    news = await asyncio.wait_for(inbox.get(), left_s)
                except TimeoutError as err:
                    raise WaitTimeout(
                        f"jobs that have not ended within {timeout_s:g} s and go on: {len(left)}"
                    ) from err

    # The last method: after it, `list` in this class is no longer the type.
    async def list(
        self,
        *,
        state: JobState | None = None,
        model: str | None = None,
        kind: JobKind | None = None,
        labels: Mapping[str, str] | None = None,
        batch_id: str | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> list[AsyncJob]:
        """Return the newest jobs that pass every filter; see `Client.list`."""
        call = functools.partial(
            self._client.list,
            state=state,
            model=model,
            kind=kind,
            labels=labels,
            batch_id=batch_id,
            before=before,
            limit=limit,
        )
        return [AsyncJob(self, job) for job in await asyncio.to_thread(call)]


class _Lookout:
    """The one thread that waits for all coroutines; it lives as long as somebody waits."""

    def __init__(self, open_watch: Callable[[], Watch]) -> None:
        self._open_watch = open_watch
        self._lock = threading.Lock()
        self._tellers: dict[str, list[Tell]] = {}
        self._watch: Watch | None = None
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watching(self, job_ids: frozenset[str], tell: Tell) -> Iterator[None]:
        """Call `tell` in the waiting thread with news of these jobs, until the block ends."""
        with self._lock:
            for job_id in job_ids:
                self._tellers.setdefault(job_id, []).append(tell)
            self._wait_for(job_ids)
        try:
            yield
        finally:
            with self._lock:
                self._forget(job_ids, tell)

    def close(self) -> None:
        """Let everybody go, and wait for the thread."""
        with self._lock:
            thread = self._thread
        self._give_up(ServiceUnavailable("the client was closed"))
        if thread is not None:
            thread.join()

    def _wait_for(self, job_ids: frozenset[str]) -> None:
        if self._watch is None:
            self._watch = self._open_watch()
            # A daemon: a hung broker may hold it for seconds, and nobody waits for its news then.
            self._thread = threading.Thread(
                target=self._loop, args=(self._watch,), name="codeherd-lookout", daemon=True
            )
            self._thread.start()
        self._watch.add(job_ids)

    def _forget(self, job_ids: Collection[str], tell: Tell) -> None:
        for job_id in job_ids:
            tellers = self._tellers.get(job_id, [])
            if tell in tellers:
                tellers.remove(tell)
            if not tellers:
                self._tellers.pop(job_id, None)
                if self._watch is not None:
                    self._watch.drop([job_id])

    def _loop(self, watch: Watch) -> None:
        with watch:
            while self._is_needed():
                try:
                    self._spread(watch.wait(TURN_S))
                except Exception as err:  # raised again in every coroutine that waits
                    self._give_up(err)

    def _is_needed(self) -> bool:
        with self._lock:
            if not self._tellers:
                # Whoever comes next starts a new thread, even before this one has ended.
                self._watch = self._thread = None
            return bool(self._tellers)

    def _spread(self, ended: frozenset[str]) -> None:
        with self._lock:
            told: dict[Tell, set[str]] = {}
            for job_id in ended:
                for tell in self._tellers.get(job_id, ()):
                    told.setdefault(tell, set()).add(job_id)
        for tell, job_ids in told.items():
            tell(frozenset(job_ids))

    def _give_up(self, err: Exception) -> None:
        with self._lock:
            told = {tell for tellers in self._tellers.values() for tell in tellers}
            self._tellers.clear()
        for tell in told:
            tell(err)
