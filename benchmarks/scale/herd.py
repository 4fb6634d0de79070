"""Many worker processes' worth of SQL and Redis traffic, without engines, from few processes.

Owns: what a worker does and when, the load, and when a herd counts as too large for its database. Does not
know what is written about it (`benchmarks.scale.report`).

A simulated worker makes the calls of a real one on the real `Store` and sends Redis what a real one sends:
it takes a hint, claims, waits as long as a job would run, succeeds with a result, announces; one statement
renews all its leases every `heartbeat_s`; every `reap_interval_s` it looks for lost ones. Two processes play
all workers, each with a few threads, so there are far fewer connections than a real herd would hold. Jobs
arrive at the rate that keeps the slots 90 % busy, whether the herd keeps up or not, and the product's own
dispatcher publishes them.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import multiprocessing
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import redis

from benchmarks.scale import rows
from benchmarks.scale.jobs import MODEL, duration_s, make_request, make_result
from benchmarks.scale.stack import DurablePostgres, redis_cpu_s, redis_of, statistics_of
from codeherd_producer.dispatcher import Dispatcher
from codeherd_schema.broker import DONE_CHANNEL, PRIORITY_STEPS, Broker
from codeherd_schema.errors import DatabaseUnavailable
from codeherd_schema.janitor import Reaped
from codeherd_schema.settings import SharedSettings, Url
from codeherd_schema.states import JobState
from codeherd_schema.store import Claim, Commit, Store
from tests.services import RedisServer, wait_until

#: Share of the slots that the arriving jobs keep busy.
LOAD = 0.9
#: Processes that play the workers, and threads in each: for jobs, and for heartbeats and rescuers.
PROCESSES, JOB_THREADS, BEAT_THREADS = 2, 6, 6
#: Seconds within which 99 of 100 claims must be made once a slot has taken the hint.
CLAIM_BOUND_S = 1.0
#: Share of the jobs that must be claimed while they arrive.
KEEPS_UP = 0.9
#: Seconds between two submits of the producer.
_SUBMIT_S = 0.1
#: Different prompts of the producer.
_REQUESTS = 200
#: As large as an event of a task.
_EVENT = b"x" * 620


@dataclass(frozen=True, slots=True)
class Herd:
    """A herd and its load; times in seconds."""

    workers: int
    slots: int
    #: Mean time that a job runs; None for jobs that run all the time: nothing but leases to keep.
    job_s: float | None
    #: From the first arrival to the last one; figures are taken after `settle_s` of them.
    run_s: float
    settle_s: float
    heartbeat_s: float = 10.0
    lease_s: float = 30.0
    reap_interval_s: float = 5.0
    #: None is as many as arrive in two looks of the dispatcher, or the default.
    publish_window: int | None = None
    #: Wait for all jobs at the end, at most this long.
    finish_s: float = 0.0

    @property
    def jobs_per_s(self) -> float:
        """How fast jobs arrive."""
        return 0.0 if self.job_s is None else LOAD * self.workers * self.slots / self.job_s

    @property
    def window(self) -> int:
        """Messages in Redis at most."""
        return self.publish_window or max(64, round(self.jobs_per_s))


@dataclass(slots=True)
class Seen:
    """What one process saw after the herd had settled."""

    #: Seconds of calls; a claim's from the moment that a slot has the hint.
    claims_s: list[float] = field(default_factory=list)
    commits_s: list[float] = field(default_factory=list)
    beats_s: list[float] = field(default_factory=list)
    #: Seconds by which heartbeats ended after the moment at which they should have begun.
    late_s: list[float] = field(default_factory=list)
    #: Over the whole run.
    claimed: int = 0
    stored: int = 0
    #: Hints that led to no claim.
    dropped: int = 0
    lost_leases: int = 0
    errors: int = 0
    cpu_s: float = 0.0


class Timetable:
    """Actions and the moments at which they are due, for several threads."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._is_closed = False

    def put(self, at: float, action: Callable[[], None]) -> None:
        """Have `action` called at `at`, a moment of `time.monotonic()`."""
        with self._changed:
            heapq.heappush(self._heap, (at, next(self._numbers), action))
            self._changed.notify()

    def work(self) -> None:
        """Call what is due, until `close`."""
        while (action := self._take()) is not None:
            action()

    def close(self) -> None:
        """Let every thread end after what it is doing."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _take(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._is_closed:
                wait_s = self._heap[0][0] - time.monotonic() if self._heap else None
                if wait_s is not None and wait_s <= 0:
                    return heapq.heappop(self._heap)[2]
                self._changed.wait(wait_s)
        return None


class Worker:
    """One simulated worker process."""

    def __init__(self, number: int) -> None:
        self.name = f"w{number}@simulated"
        self.claims: dict[str, Claim] = {}
        #: Leases of these that are being given back: from before the commit until no claim is held.
        self.ending: set[str] = set()


class Share:
    """The workers that one process plays."""

    def __init__(self, herd: Herd, index: int, url: str, redis_url: str, prefix: str) -> None:
        self._herd, self._index = herd, index
        self._store = Store.open(url, pool_size=JOB_THREADS + BEAT_THREADS)
        self._redis = redis.Redis.from_url(redis_url)
        self._prefix = prefix
        self._jobs, self._beats = Timetable(), Timetable()
        self._workers = [Worker(number) for number in range(index, herd.workers, PROCESSES)]
        self._free = deque(worker for worker in self._workers for _ in range(herd.slots))
        self._room = threading.Semaphore(len(self._free))
        self._chance = random.Random(f"share {index}")
        self._stop = threading.Event()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self.seen = Seen()

    def run(self, start_at: float) -> Seen:
        """Play until the run is over; `start_at` is of `time.monotonic()`, which all processes share."""
        herd = self._herd
        self._settled_at = start_at + herd.settle_s
        self._end_at = start_at + herd.run_s
        self._adopt()
        for worker in self._workers:
            self._beat_later(worker, start_at + self._chance.uniform(0, herd.heartbeat_s))
            self._look_later(start_at + self._chance.uniform(0, herd.reap_interval_s))
        loops: list[Callable[[], None]] = [
            *[self._jobs.work] * JOB_THREADS,
            *[self._beats.work] * BEAT_THREADS,
        ]
        threads = [
            threading.Thread(target=loop) for loop in (loops if herd.job_s is None else [*loops, self._take])
        ]
        time.sleep(max(0.0, start_at - time.monotonic()))
        cpu_before = time.process_time()
        for thread in threads:
            thread.start()
        time.sleep(max(0.0, self._end_at - time.monotonic()))
        self.seen.cpu_s = time.process_time() - cpu_before
        return self.seen

    def close(self) -> None:
        """End all threads."""
        self._stop.set()
        self._jobs.close()
        self._beats.close()
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        self._store.close()
        self._redis.close()

    def _adopt(self) -> None:
        """Take over the jobs that run already."""
        if self._herd.job_s is not None:
            return
        by_name = {
            f"w{number}": worker
            for number, worker in zip(self._numbers_of_mine(), self._workers, strict=True)
        }
        for job in self._store.list(state=JobState.RUNNING, limit=1_000_000):
            worker = by_name.get(job.worker_id or "")
            if worker is not None and job.lease_id is not None:
                worker.claims[job.lease_id] = Claim(job, job.lease_id, 1, job.created_at, 0.0, None)

    def _numbers_of_mine(self) -> range:
        return range(self._index, self._herd.workers, PROCESSES)

    def _take(self) -> None:
        """Take hints as long as a slot is free, as a worker without prefetch does."""
        queue = f"{self._prefix}{rows.QUEUE}"
        keys = [queue if step == 0 else f"{queue}\x06\x16{step}" for step in PRIORITY_STEPS]
        while not self._stop.is_set():
            if not self._room.acquire(timeout=0.2):
                continue
            found: Any = self._redis.brpop(keys, timeout=1)
            if found is None:
                self._room.release()
                continue
            job_id = json.loads(found[1])["headers"]["id"].partition(".")[0]
            with self._lock:
                worker = self._free.popleft()
            taken_at = time.monotonic()
            self._jobs.put(taken_at, lambda w=worker, j=job_id, t=taken_at: self._claim(w, j, t))  # type: ignore[misc]

    def _claim(self, worker: Worker, job_id: str, taken_at: float) -> None:
        herd, seen = self._herd, self.seen
        try:
            claim = self._store.claim(job_id, worker_id=worker.name, lease_s=herd.lease_s)
        except DatabaseUnavailable:
            seen.errors += 1
            claim = None
        ended_at = time.monotonic()
        self._tell()
        if claim is None:
            seen.dropped += 1
            self._let_go(worker)
            return
        seen.claimed += 1
        if taken_at >= self._settled_at:
            seen.claims_s.append(ended_at - taken_at)
        worker.claims[claim.lease_id] = claim
        runs_s = duration_s(self._chance, herd.job_s or 0.0)
        self._jobs.put(ended_at + runs_s, lambda: self._succeed(worker, claim))

    def _succeed(self, worker: Worker, claim: Claim) -> None:
        started_at = time.monotonic()
        result = make_result(claim, next(self._numbers) % 1000)
        worker.ending.add(claim.lease_id)
        try:
            commit = self._store.succeed(claim, result)
        except DatabaseUnavailable:
            self.seen.errors += 1
            self._jobs.put(started_at + 0.5, lambda: self._succeed(worker, claim))
            return
        del worker.claims[claim.lease_id]
        worker.ending.discard(claim.lease_id)
        if commit is Commit.STORED:
            self.seen.stored += 1
        else:
            self.seen.lost_leases += 1
        if started_at >= self._settled_at:
            self.seen.commits_s.append(time.monotonic() - started_at)
        self._tell(claim.job.id)
        self._let_go(worker)

    def _tell(self, done: str | None = None) -> None:
        """Send Redis what Celery sends: two events of a task that starts, or its last one and our news."""
        pipe = self._redis.pipeline(transaction=False)
        for event in ("received", "started") if done is None else ("succeeded",):
            pipe.publish(f"{self._prefix}/0.celeryev/task.{event}", _EVENT)
        if done is not None:
            pipe.publish(f"{self._prefix}{DONE_CHANNEL}", done)
        pipe.execute()

    def _let_go(self, worker: Worker) -> None:
        with self._lock:
            self._free.append(worker)
        self._room.release()

    def _beat_later(self, worker: Worker, at: float) -> None:
        self._beats.put(at, lambda: self._beat(worker, at))

    def _beat(self, worker: Worker, planned_at: float) -> None:
        held = dict(worker.claims)
        started_at = time.monotonic()
        try:
            beats = self._store.heartbeat(list(held.values()), lease_s=self._herd.lease_s)
        except DatabaseUnavailable:
            self.seen.errors += 1
        else:
            # What was stored a moment ago is missing too. In this order: it leaves the claims first.
            ending = set(worker.ending)
            self.seen.lost_leases += len((held.keys() - beats.keys() - ending) & worker.claims.keys())
        ended_at = time.monotonic()
        if planned_at >= self._settled_at and held:
            self.seen.beats_s.append(ended_at - started_at)
            self.seen.late_s.append(ended_at - planned_at)
        self._beat_later(worker, ended_at + self._herd.heartbeat_s)

    def _look_later(self, at: float) -> None:
        self._beats.put(at, self._look)

    def _look(self) -> None:
        reaped = Reaped()
        try:
            reaped = self._store.reap(max_crashes=3)
            self._store.expire_due()
        except DatabaseUnavailable:
            self.seen.errors += 1
        self.seen.lost_leases += len(reaped.requeued) + len(reaped.buried)
        interval_s = self._herd.reap_interval_s
        self._look_later(time.monotonic() + self._chance.uniform(0.5, 1.5) * interval_s)


def play(herd: Herd, url: str, redis_server: RedisServer, server: DurablePostgres | None) -> dict[str, Any]:
    """Run one herd on an empty database and return its row; what is left running is left."""
    client = redis_of(redis_server)
    client.flushall()
    settings = SharedSettings(
        database_url=Url(url), broker_url=Url(redis_server.url), publish_window=herd.window
    )
    if herd.job_s is None:
        rows.fill(url, first=0, count=herd.workers * herd.slots)
        rows.hold(url, workers=herd.workers, slots=herd.slots, lease_s=herd.lease_s + 20)
    statistics_of(url)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for index in range(PROCESSES):
        ours, theirs = context.Pipe()
        processes.append(
            context.Process(
                target=_play_share, args=(theirs, herd, index, url, redis_server.url, settings.key_prefix)
            )
        )
        pipes.append(ours)
    for process in processes:
        process.start()
    try:
        with _Producer(herd, settings) as producer:
            for pipe in pipes:
                pipe.recv()
            start_at = time.monotonic() + 0.2
            for pipe in pipes:
                pipe.send(start_at)
            server_before = server.cpu_s() if server else 0.0
            redis_before = redis_cpu_s(client)
            time.sleep(0.2)
            producer.run(herd.run_s)
            shares: list[Seen] = [pipe.recv() for pipe in pipes]
            server_s = (server.cpu_s() - server_before) if server else None
            redis_s = redis_cpu_s(client) - redis_before
            backends_kb = server.backends_kb() if server else []
            store = Store.open(url)
            with contextlib.closing(store):
                if herd.finish_s:
                    wait_until(
                        lambda: store.count_by_state()[JobState.SUCCEEDED] >= producer.submitted,
                        "the last job", timeout_s=herd.finish_s,
                    )  # fmt: skip
                # Whoever has just stored a job counts it a moment later.
                for pipe in pipes:
                    pipe.send(None)
                finals: list[Seen] = [pipe.recv() for pipe in pipes]
                states = store.count_by_state()
        row = _row(herd, shares, finals, producer, states, server_s, redis_s)
        return row | {"backend_kb": round(statistics.mean(backends_kb)) if backends_kb else None}
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(60)
            if process.is_alive():
                process.kill()
                process.join()
        client.close()


def _play_share(pipe: Any, herd: Herd, index: int, url: str, redis_url: str, prefix: str) -> None:
    share = Share(herd, index, url, redis_url, prefix)
    pipe.send("ready")
    pipe.send(share.run(pipe.recv()))
    pipe.recv()
    share.close()
    pipe.send(share.seen)


class _Producer:
    """Submits at an even rate, and runs the dispatcher."""

    def __init__(self, herd: Herd, settings: SharedSettings) -> None:
        self._herd, self._settings = herd, settings
        self._store = Store.open(settings.database)
        self._broker = Broker(settings)
        self._stop = threading.Event()
        dispatcher = Dispatcher(self._store, self._broker, settings)
        self._dispatcher = threading.Thread(target=dispatcher.run, args=(self._stop,))
        self.submitted = 0
        self.cpu_s = 0.0

    def __enter__(self) -> _Producer:
        self._requests = [make_request(seed) for seed in range(_REQUESTS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._dispatcher.ident is not None:
            self._dispatcher.join()
        self._broker.close()
        self._store.close()

    def run(self, run_s: float) -> None:
        """Submit for `run_s` seconds; the dispatcher goes on until the end of the block."""
        cpu_before = time.process_time()
        self._dispatcher.start()
        started_at = time.monotonic()
        while (elapsed_s := time.monotonic() - started_at) < run_s:
            missing = int(elapsed_s * self._herd.jobs_per_s) - self.submitted
            if missing > 0:
                part = [self._requests[(self.submitted + i) % _REQUESTS] for i in range(min(missing, 500))]
                self._store.submit(part, queue_of=lambda _: rows.QUEUE)
                self.submitted += len(part)
            if missing < 500:
                time.sleep(_SUBMIT_S)
        self.cpu_s = time.process_time() - cpu_before


def _row(
    herd: Herd,
    shares: Sequence[Seen],
    finals: Sequence[Seen],
    producer: _Producer,
    states: Mapping[JobState, int],
    server_s: float | None,
    redis_s: float,
) -> dict[str, Any]:
    claims = [s for seen in shares for s in seen.claims_s]
    commits = [s for seen in shares for s in seen.commits_s]
    beats = [s for seen in shares for s in seen.beats_s]
    late = [s for seen in shares for s in seen.late_s]
    window_s = herd.run_s - herd.settle_s
    row = {
        **{k: v for k, v in asdict(herd).items() if k not in {"finish_s", "publish_window"}},
        "publish_window": herd.window,
        "model": MODEL,
        "offered_jobs_per_s": round(herd.jobs_per_s, 2),
        "claims_per_s": round(len(claims) / window_s, 2),
        "commits_per_s": round(len(commits) / window_s, 2),
        "claim_p50_ms": _quantile_ms(claims, 0.5),
        "claim_p99_ms": _quantile_ms(claims, 0.99),
        "commit_p50_ms": _quantile_ms(commits, 0.5),
        "commit_p99_ms": _quantile_ms(commits, 0.99),
        "beat_p50_ms": _quantile_ms(beats, 0.5),
        "beat_p99_ms": _quantile_ms(beats, 0.99),
        "beats": len(beats),
        "late_worst_s": round(max(late, default=0.0), 3),
        "submitted": producer.submitted,
        "claimed": sum(seen.claimed for seen in finals),
        "stored": sum(seen.stored for seen in finals),
        "dropped": sum(seen.dropped for seen in finals),
        "lost_leases": sum(seen.lost_leases for seen in shares),
        "errors": sum(seen.errors for seen in shares),
        "states": {state.value: count for state, count in states.items() if count},
        "worker_cpu_cores": round(sum(seen.cpu_s for seen in shares) / herd.run_s, 2),
        "producer_cpu_cores": round(producer.cpu_s / herd.run_s, 2),
        "redis_cpu_cores": round(redis_s / herd.run_s, 3),
        "server_cpu_cores": None if server_s is None else round(server_s / herd.run_s, 2),
    }
    return row | {"behind": behind(row)}


def behind(row: Mapping[str, Any]) -> list[str]:
    """Return in which ways a herd of this row is too large; empty if it keeps up."""
    found = []
    if row["late_worst_s"] > row["heartbeat_s"] / 2:
        found.append("heartbeats")
    if row["claim_p99_ms"] is not None and row["claim_p99_ms"] > CLAIM_BOUND_S * 1000:
        found.append("claims")
    if row["claims_per_s"] < KEEPS_UP * row["offered_jobs_per_s"]:
        found.append("rate")
    if row["lost_leases"]:
        found.append("leases")
    return found


def _quantile_ms(seconds: Sequence[float], share: float) -> float | None:
    if not seconds:
        return None
    if len(seconds) == 1:
        return round(seconds[0] * 1000, 2)
    return round(statistics.quantiles(seconds, n=1000, method="inclusive")[round(share * 1000) - 1] * 1000, 2)
