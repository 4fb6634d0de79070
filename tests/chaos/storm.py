"""Carry out a plan of `tests.chaos.storm_plan` on a herd of null engines, and judge what is left.

Owns: how each deed is brought about, when the storm is over, and what must be true then. Real processes,
a real Redis and a real database of its own are handed in; every freeze ends by a timer, so that nothing
here waits for what it froze itself.
"""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeVar

import redis

from codeherd_producer.client import Client
from codeherd_schema.broker import PRIORITY_STEPS
from codeherd_schema.errors import (
    BrokerUnavailable,
    DatabaseUnavailable,
    IdempotencyConflict,
    IllegalMove,
)
from codeherd_schema.hints import Hint
from codeherd_schema.queues import queue_name
from codeherd_schema.results import Result
from codeherd_schema.states import FINAL_STATES, JobState
from codeherd_schema.store import Job
from tests.chaos.null_herd import QUICK, NullHerd
from tests.chaos.storm_plan import BACKLOG, MODEL, TENANTS, Deed, Ending, Plan, Planned, PlannedJob
from tests.chaos.witness import Witness
from tests.null_worker import FAILPOINTS
from tests.services import PostgresServer, RedisServer, wait_until

T = TypeVar("T")

#: Length of a lease, seconds.
LEASE_S: Final = float(QUICK["CODEHERD_LEASE_S"])
#: Seconds without one more ended job until the storm counts as stuck.
STUCK_S: Final = 180.0
#: Pause of the engines after each step, seconds: jobs last long enough to be hit.
STEP_S: Final = 0.01
#: Seconds between two looks at how many jobs have ended.
LOOK_S: Final = 0.05
#: Lines of each log that a failure shows.
TAIL: Final = 12
#: What a lost worker's job is buried with.
WORKER_LOST: Final = "worker_lost"
#: Bytes that a key in Redis may take when nothing waits.
KEY_BYTES: Final = 4_096
#: Connections to Redis per process that is left.
CLIENTS_PER_PROCESS: Final = 16

#: A model that can do everything, with the tokenizer of `tiny`.
_MODELS: Final = f"""
[models.{MODEL}]
source = "embedded"
parameters = 2557632
layers = 4
kv_heads = 3
head_dim = 64
vocab_size = 4096
context_window = 16384
infilling = true
chat = "inst"
"""

#: What is no message of ours, in the order of malice.
_GARBAGE: Final = (
    b"", b"\x00\xff\xfe", b"null", b"[]", b"{}", b'"text"', b"{not json", b"1e999", b"[" * 5_000,
    b'{"body": "", "headers": {}, "properties": {}}',
    b'{"body": "e30=", "content-type": "application/x-python-serialize", "content-encoding": "binary"}',
    b"x" * 20_000,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """What must be the same in every run: everything but ids, attempts, workers and times."""

    #: Text, finish reason, tokens, stop string and seed of each candidate.
    candidates: tuple[tuple[str, str, int, str | None, int], ...]
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, result: Result) -> Self:
        """Take it from a result."""
        return cls(
            tuple(
                (c.text, c.finish_reason.value, c.completion_tokens, c.stop_string, c.seed)
                for c in result.candidates
            ),
            result.prompt_tokens,
            result.completion_tokens,
        )


class StormDatabase(Protocol):
    """A database that things can be done to."""

    @property
    def url(self) -> str:
        """Of the migrated database."""

    @property
    def log(self) -> str:
        """What its server said last, if it has one."""

    def restart(self) -> None:
        """Break off what runs; return when it serves again."""

    def freeze(self) -> None:
        """Let nobody write until `thaw`."""

    def thaw(self) -> None:
        """End a freeze."""


class SqliteFile:
    """A SQLite file, which has no server: others get in the way."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.log = ""
        self._lock: sqlite3.Connection | None = None

    def restart(self) -> None:
        connection = self._connection()
        # The file is written anew, with everybody locked out.
        connection.execute("VACUUM")
        connection.close()

    def freeze(self) -> None:
        self._lock = self._connection()
        self._lock.execute("BEGIN IMMEDIATE")

    def thaw(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _connection(self) -> sqlite3.Connection:
        path = self.url.removeprefix("sqlite:///")
        return sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)


class PostgresDatabase:
    """A database of a server that nobody else uses."""

    def __init__(self, server: PostgresServer, name: str) -> None:
        self._server = server
        self.url = server.url_of(name)

    @property
    def log(self) -> str:
        return self._server.log

    def restart(self) -> None:
        self._server.crash()
        self._server.start()

    def freeze(self) -> None:
        self._server.freeze()

    def thaw(self) -> None:
        self._server.thaw()


class Storm:
    """One run of a plan."""

    def __init__(self, plan: Plan, *, database: StormDatabase, server: RedisServer, folder: Path) -> None:
        """Prepare; nothing starts.

        Args:
            plan: what to do.
            database: migrated and empty; nobody else uses it.
            server: running; nobody else uses it.
            folder: where logs and failpoints go.
        """
        self.plan = plan
        self._database, self._server = database, server
        self.witness = Witness(database.url)
        self.launchers = [f"worker-{n}" for n in range(plan.launchers)]
        self.dispatchers = [f"dispatcher-{n}" for n in range(plan.dispatchers)]
        self.herd = stormy_herd(
            database.url,
            server.url,
            folder,
            workers=self.launchers,
            dispatchers=self.dispatchers,
            step_s=STEP_S,
        )
        self._ids: dict[int, str] = {}
        self._done: list[str] = []
        #: What ends a freeze, by what is frozen.
        self._thaws: dict[str, tuple[threading.Timer, Callable[[], None]]] = {}
        self._thaws_lock = threading.Lock()
        self._pause = threading.Event()
        self._started_at = time.monotonic()
        self._stack = ExitStack()
        #: Buried jobs that were queued again since they only had bad company.
        self.innocents = 0

    def __enter__(self) -> Self:
        self.witness.start()
        self._stack.callback(self._thaw_all)
        self._stack.enter_context(self.herd)
        self._stack.callback(self._thaw_all)
        self._clients = {
            tenant: self._stack.enter_context(
                Client(self.herd.settings.model_copy(update={"tenant": tenant}))
            )
            for tenant in TENANTS
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> None:
        """Do everything that is planned, and return when every job has ended."""
        try:
            self._blow()
            self._settle()
        except BaseException as err:
            err.add_note(self.report())
            raise

    def check(self, expected: Mapping[int, Answer]) -> None:
        """Assert that nothing was lost, doubled, changed or left behind; ends all processes.

        Args:
            expected: what jobs answer without faults, by place.
        """
        try:
            self.herd.check(list(self._ids.values()))
            assert len(set(self._ids.values())) == len(self.plan.jobs), "a job is lost"
            assert not (found := list(self._wrong_endings())), found
            assert not (found := list(self._wrong_answers(expected))), found
            assert not (found := self.witness.problems()), found[:20]
            self._check_redis()
            self._check_processes()
        except BaseException as err:
            err.add_note(self.report())
            raise

    def summary(self) -> str:
        """Return what happened, in one line."""
        seconds = time.monotonic() - self._started_at
        counts = ", ".join(f"{s} {n}" for s, n in self.herd.store.count_by_state().items() if n)
        attempts = sum(noted.is_claim for noted in self.witness.moves())
        return (
            f"{seconds:.0f} s: {counts}; {attempts} attempts; {self.innocents} jobs queued again after bad "
            f"company; {self.witness.late_commits()} commits of an own lease that was over"
        )

    def report(self) -> str:
        """Return what was done so far, and the ends of all logs."""
        plan = self.plan
        lines = [
            f"storm of seed {plan.seed}: CHAOS_SEED={plan.seed} CHAOS_JOBS={len(plan.jobs)} make chaos",
            *self._done,
        ]
        for name in (*self.launchers, *self.dispatchers):
            lines += [f"--- {name}", *self.herd.log(name).splitlines()[-TAIL:]]
        lines += ["--- Redis", self._server.log, "--- database", self._database.log]
        return "\n".join(lines)

    # The storm

    def _blow(self) -> None:
        submissions = list(self.plan.submissions())
        deeds = list(self.plan.deeds)
        ended, progressed_at = 0, time.monotonic()
        while submissions or deeds or ended < len(self.plan.jobs):
            now_ended = sum(self._insist(self._count_ended).values())
            if now_ended > ended:
                ended, progressed_at = now_ended, time.monotonic()
            while submissions and submissions[0][0].place < ended + BACKLOG:
                self._submit(submissions.pop(0))
            while deeds and deeds[0].after <= ended:
                self._do(deeds.pop(0), ended)
            if time.monotonic() - progressed_at > STUCK_S:
                raise TimeoutError(f"no job ended in {STUCK_S:.0f} s; {ended} of {len(self.plan.jobs)} have")
            self._pause.wait(LOOK_S)

    def _count_ended(self) -> dict[JobState, int]:
        counts = self.herd.store.count_by_state()
        return {state: counts[state] for state in FINAL_STATES}

    def _submit(self, jobs: list[PlannedJob]) -> None:
        client = self._clients[jobs[0].tenant]
        requests, batch_id = [job.request for job in jobs], jobs[0].batch_id
        handles = self._insist(lambda: client.submit_many(requests, batch_id=batch_id))
        self._ids |= {job.place: handle.id for job, handle in zip(jobs, handles, strict=True)}

    def _do(self, planned: Planned, ended: int) -> None:
        seconds = time.monotonic() - self._started_at
        self._done.append(
            f"{seconds:6.1f} s, {ended} ended, planned after {planned.after}: {planned.deed}, "
            f"target {planned.target}, {planned.leases:.2f} leases"
        )
        worker = self.launchers[planned.target % len(self.launchers)]
        dispatcher = self.dispatchers[planned.target % len(self.dispatchers)]
        freeze_s = planned.leases * LEASE_S
        match planned.deed:
            case Deed.CANCEL | Deed.RESUBMIT | Deed.REPEAT | Deed.CONFLICT:
                self._do_as_people(planned)
            case Deed.KILL_PROCESS:
                self.herd.kill_workers(worker)
            case Deed.CUT_POWER:
                self._forget(worker)
                self.herd.kill(worker)
                self.herd.start_worker(worker)
            case Deed.STOP_WORKER:
                self._thaw(worker)
                self._stop(worker)
                self.herd.start_worker(worker)
            case Deed.FREEZE_WORKER:
                self._freeze(worker, freeze_s, self.herd.freeze, self.herd.thaw)
            case Deed.KILL_DISPATCHER:
                self._forget(dispatcher)
                self.herd.kill(dispatcher)
                self.herd.start_dispatcher(dispatcher)
            case Deed.FREEZE_DISPATCHER:
                self._freeze(dispatcher, freeze_s, self.herd.freeze, self.herd.thaw)
            case Deed.FREEZE_DATABASE | Deed.RESTART_DATABASE:
                self._do_to_database(planned.deed, freeze_s)
            case _:
                self._do_to_redis(planned, freeze_s)

    def _do_as_people(self, planned: Planned) -> None:
        job = self.plan.jobs[planned.target]
        job_id, client = self._ids[job.place], self._clients[job.tenant]
        match planned.deed:
            case Deed.CANCEL:
                self._insist(lambda: client.cancel(job_id))
            case Deed.RESUBMIT:
                self._resubmit(job)
            case Deed.REPEAT:
                again = self._insist(lambda: client.submit(job.request))
                assert (again.id, again.deduplicated) == (job_id, True), "a key was forgotten"
            case Deed.CONFLICT:
                other = job.request.model_copy(update={"priority": (job.request.priority + 1) % 10})
                try:
                    self._insist(lambda: client.submit(other))
                except IdempotencyConflict:
                    return
                raise AssertionError(f"the key of job {job.place} was given to two requests")

    def _resubmit(self, job: PlannedJob) -> None:
        def again() -> None:
            try:
                self._clients[job.tenant].retry(self._ids[job.place])
            except IllegalMove:
                # It goes on, it has a result, or the answer to the first call got lost.
                return

        self._insist(again)

    def _do_to_database(self, deed: Deed, freeze_s: float) -> None:
        self._thaw("database")
        if deed is Deed.RESTART_DATABASE:
            self._database.restart()
        else:
            self._freeze(
                "database", freeze_s, lambda _: self._database.freeze(), lambda _: self._database.thaw()
            )

    def _do_to_redis(self, planned: Planned, freeze_s: float) -> None:
        self._thaw("redis")
        rng = random.Random(planned.seed)
        match planned.deed:
            case Deed.FREEZE_REDIS:
                self._freeze(
                    "redis", freeze_s, lambda _: self._server.pause(), lambda _: self._server.resume()
                )
            case Deed.RESTART_REDIS:
                self._server.restart()
            case Deed.KILL_REDIS:
                self._server.kill()
                self._server.start()
            case _:
                with redis.Redis(port=self._server.port, socket_timeout=60) as client:
                    self._do_to_messages(planned.deed, client, rng)

    def _do_to_messages(self, deed: Deed, client: redis.Redis, rng: random.Random) -> None:
        match deed:
            case Deed.DROP_CONNECTIONS:
                for kind in ("normal", "pubsub"):
                    client.client_kill_filter(_type=kind, skipme=True)
            case Deed.WIPE_REDIS:
                client.flushall()
            case Deed.DUPLICATE:
                self._send_again(rng)
                for key, waiting in self._waiting(client).items():
                    client.lpush(key, *waiting, *waiting)
            case Deed.REORDER:
                for key, waiting in self._waiting(client).items():
                    rng.shuffle(waiting)
                    # What comes or goes between is lost or doubled, as any message may be.
                    client.delete(key)
                    client.rpush(key, *waiting)
            case Deed.CORRUPT:
                self._corrupt(client, rng)

    def _send_again(self, rng: random.Random) -> None:
        """Publish hints for jobs in any state, some of them ended long ago."""
        places = rng.choices(range(len(self._ids)), k=30)
        queue = queue_name(MODEL)
        hints = [
            Hint(self._ids[place], queue, job.request.kind, job.request.priority, rng.randint(1, 3))
            for place in places
            if (job := self.plan.jobs[place])
        ]
        self._insist(lambda: self.herd.broker.publish(hints))

    def _corrupt(self, client: redis.Redis, rng: random.Random) -> None:
        for key in self._queue_keys():
            # Something else than a list, if there is no list at this moment.
            client.set(key, b"no list", nx=True) if rng.random() < 0.3 else None
        waiting = [message for found in self._waiting(client).values() for message in found]
        spoiled = [_spoiled(message, rng) for message in waiting]
        for garbage in (*rng.sample(_GARBAGE, 6), *spoiled):
            for key in rng.sample(self._queue_keys(), 2):
                if client.type(key) != b"string":
                    client.lpush(key, garbage)
        channels: Any = client.pubsub_channels()
        for channel in channels:
            client.publish(channel, rng.choice(_GARBAGE))

    def _waiting(self, client: redis.Redis) -> dict[str, list[bytes]]:
        found: dict[str, list[bytes]] = {}
        for key in self._queue_keys():
            messages: Any = client.lrange(key, 0, -1) if client.type(key) == b"list" else []
            if messages:
                found[key] = messages
        return found

    def _queue_keys(self) -> list[str]:
        key = self.herd.settings.key_prefix + queue_name(MODEL)
        return [f"{key}\x06\x16{step}" if step else key for step in PRIORITY_STEPS]

    # Freezing and insisting

    def _freeze(
        self, name: str, seconds: float, freeze: Callable[[str], None], thaw: Callable[[str], None]
    ) -> None:
        self._thaw(name)
        freeze(name)
        timer = threading.Timer(seconds, self._thaw, (name,))
        with self._thaws_lock:
            self._thaws[name] = (timer, lambda: thaw(name))
        timer.start()

    def _thaw(self, name: str) -> None:
        with self._thaws_lock:
            timer, thaw = self._thaws.pop(name, (None, None))
            if timer is None or thaw is None:
                return
            timer.cancel()
            thaw()

    def _forget(self, name: str) -> None:
        """Leave frozen what is about to be killed."""
        with self._thaws_lock:
            timer, _ = self._thaws.pop(name, (None, None))
        if timer is not None:
            timer.cancel()

    def _thaw_all(self) -> None:
        for name in list(self._thaws):
            self._thaw(name)

    def _insist(self, call: Callable[[], T]) -> T:
        """Call until a server that is away answers, as a patient program would."""
        end = time.monotonic() + STUCK_S
        while True:
            try:
                return call()
            except (DatabaseUnavailable, BrokerUnavailable):
                if time.monotonic() > end:
                    raise
                self._pause.wait(LOOK_S)

    def _stop(self, name: str) -> None:
        self.herd.signal(name, 15)
        status = self.herd.wait_exit(name)
        assert status == 0, f"{name} was told to stop and ended with {status}"

    # The end

    def _settle(self) -> None:
        """Wait until every job has ended, and queue again what people would."""
        self._thaw_all()
        resubmitted = {deed.target for deed in self.plan.deeds if deed.deed is Deed.RESUBMIT}
        self._wait_for_all()
        while again := [job for job in self.plan.jobs if self._is_to_be_resubmitted(job, resubmitted)]:
            for job in again:
                self._resubmit(job)
            self._wait_for_all()

    def _wait_for_all(self) -> None:
        ids = list(self._ids.values())
        wait_until(
            lambda: not self._insist(lambda: self.herd.store.pending(ids)),
            "every job to end",
            timeout_s=STUCK_S,
        )

    def _is_to_be_resubmitted(self, job: PlannedJob, resubmitted: set[int]) -> bool:
        row = self._row(job)
        if row.state is JobState.DEAD and job.ending is not Ending.DEAD and row.error_code == WORKER_LOST:
            self.innocents += 1
            self._done.append(f"job {job.place} lost {row.crash_count} workers: queued again")
            return True
        return job.place in resubmitted and row.state in (JobState.CANCELLED, JobState.EXPIRED)

    def _row(self, job: PlannedJob) -> Job:
        row = self.herd.store.get(self._ids[job.place])
        assert row is not None, f"job {job.place} is lost"
        return row

    def _wrong_endings(self) -> Iterator[str]:
        allowed = {
            Ending.RESULT: {JobState.SUCCEEDED},
            Ending.EITHER: {JobState.SUCCEEDED, JobState.CANCELLED, JobState.EXPIRED},
            Ending.FAILED: {JobState.FAILED},
            Ending.DEAD: {JobState.DEAD},
        }
        for job in self.plan.jobs:
            row = self._row(job)
            if row.state not in allowed[job.ending]:
                yield f"job {job.place}: {row.state} instead of {job.ending}: {row.error_message}: {row}"

    def _wrong_answers(self, expected: Mapping[int, Answer]) -> Iterator[str]:
        results = self.herd.store.results(list(self._ids.values()))
        for job in self.plan.jobs:
            result = results.get(self._ids[job.place])
            if result is not None and Answer.of(result) != expected[job.place]:
                yield f"job {job.place}: {Answer.of(result)} instead of {expected[job.place]}"

    def _check_redis(self) -> None:
        prefix = self.herd.settings.key_prefix
        with redis.Redis(port=self._server.port, socket_timeout=60) as client:
            wait_until(lambda: not self._waiting(client), "the workers to take every message")
            keys = {key.decode() for key in client.scan_iter(count=1000)}
            unknown = {key for key in keys if not _is_expected(key.removeprefix(prefix))}
            assert not unknown, f"keys stay in Redis: {sorted(unknown)}"
            sizes = {key: client.memory_usage(key) or 0 for key in keys}
            assert all(size <= KEY_BYTES for size in sizes.values()), sizes
            clients = client.client_list()
            processes = len(self.launchers) + len(self.dispatchers) + len(self._clients) + 2
            assert len(clients) <= CLIENTS_PER_PROCESS * processes, clients

    def _check_processes(self) -> None:
        mark = f"{FAILPOINTS}={self.herd.failpoints}".encode()
        for name in (*self.launchers, *self.dispatchers):
            self._stop(name)
        wait_until(lambda: not processes_with(mark), f"no process to be left, but {processes_with(mark)} are")


def stormy_herd(
    database_url: str,
    broker_url: str,
    folder: Path,
    *,
    workers: list[str],
    dispatchers: list[str],
    step_s: float,
) -> NullHerd:
    """Return a herd that serves the storm's model, with a token every `step_s` seconds."""
    models = folder / "models.toml"
    models.write_text(_MODELS)
    return NullHerd(
        database_url=database_url,
        broker_url=broker_url,
        folder=folder,
        workers=workers,
        dispatchers=dispatchers,
        step_s=step_s,
        variables={
            "CODEHERD_MODELS_FILE": str(models),
            "CODEHERD_WORKER_MODEL": MODEL,
            "CODEHERD_DEFAULT_MODEL": MODEL,
            # Fewer than the default, since each failure waits twice as long as the one before.
            "CODEHERD_MAX_ATTEMPTS": "3",
        },
    )


def answers_in_calm(plan: Plan, *, database_url: str, broker_url: str, folder: Path) -> dict[int, Answer]:
    """Return what the plan's jobs answer when nothing goes wrong and no time is set, by place."""
    jobs = [job for job in plan.jobs if job.has_result]
    requests = [
        job.request.model_copy(update={"deadline": None, "run_at": None, "idempotency_key": None})
        for job in jobs
    ]
    with stormy_herd(
        database_url, broker_url, folder, workers=["calm"], dispatchers=["dispatcher"], step_s=0.0
    ) as herd:
        handles = herd.client.submit_many(requests)
        herd.client.wait(handles, timeout_s=STUCK_S + len(jobs))
        results = herd.store.results([handle.id for handle in handles])
        return {job.place: Answer.of(results[handle.id]) for job, handle in zip(jobs, handles, strict=True)}


def processes_with(mark: bytes) -> list[int]:
    """Return the processes whose environment holds this variable with this value."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if mark in variables:
            found.append(int(path.parent.name))
    return found


def _is_expected(key: str) -> bool:
    """Whether a key may be in a Redis where nothing waits: kombu's bindings."""
    return key in (
        # Of the queue of jobs, of commands to workers, of their answers, and when an unused one goes.
        f"_kombu.binding.{queue_name(MODEL)}",
        f"_kombu.binding_permanent.{queue_name(MODEL)}",
        "_kombu.binding.celery.pidbox",
        "_kombu.binding.reply.celery.pidbox",
        "_kombu.binding.celeryev",
        "_kombu.binding_deadlines",
    )


def _spoiled(message: bytes, rng: random.Random) -> bytes:
    if not message:
        # Garbage of an earlier time, which nobody has taken.
        return b"\0"
    place = rng.randrange(len(message))
    if rng.random() < 0.5:
        return message[:place]
    return message[:place] + bytes([message[place] ^ (1 << rng.randrange(8))]) + message[place + 1 :]
