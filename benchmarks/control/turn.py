"""One system's turn, in a process of its own: start its workers, measure, kill them.

    python -m benchmarks.control.turn NAME DATABASE_URL POSTGRES_PID SCALE

Owns: what is measured and in which order, the clocks around it, and the check that every job was done. Starts
a Redis for itself. Its own process is the client, so the client's CPU time is its own. Prints a `TurnRecord`
as JSON on standard output.

    1. start the workers; warm up
    2. idle:     one job at a time, each after the result of the one before
    3. single:   submit one after the other while the worker runs
    4. many:     submit together to an idle worker, wait until every result can be read, read a sample
    5. kill the workers
    6. bulk:     submit together while nothing runs, and go on up to the backlog
    7. backlog:  start the workers again; when they are at work, submit one urgent job
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psycopg
import redis

from benchmarks.control.processes import Herd, cpu_s, memory_mb
from benchmarks.control.protocol import Answer, Place, Scale, System
from benchmarks.control.systems import SYSTEMS, Entry
from benchmarks.control.work import digest_of, prompts
from benchmarks.figures import percentile
from tests.services import RedisServer, wait_until

#: Seconds that a system may take for anything.
PATIENCE_S = 180.0
#: Longest pause between two idle jobs, seconds: no system's polling may keep step with us.
IDLE_PAUSE_S = 0.05
#: Jobs of the backlog that are submitted together.
CHUNK = 10_000


@dataclass(frozen=True, slots=True)
class Backlog:
    """How a system stands with very many queued jobs."""

    jobs: int
    #: Seconds to submit those after the bulk.
    submit_s: float
    #: Redis.
    broker_mb: float
    #: The database's growth; 0 without one.
    database_mb: float
    #: All of the system's processes, at work, before any job is urgent.
    worker_mb: float
    #: From the submission of an urgent job until it runs.
    urgent_start_s: float


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """What one turn measured."""

    #: Jobs whose result was read back and found right.
    checked: int
    start_p50_s: float
    start_p99_s: float
    single_jobs_per_s: float
    #: From the first submission until every result could be read.
    many_jobs_per_s: float
    #: Of results, a sample of `many`, one after the other.
    read_jobs_per_s: float
    #: Per job of `many`: the system's own processes, the servers, the client.
    worker_cpu_ms: float
    server_cpu_ms: float
    client_cpu_ms: float
    bulk_jobs_per_s: float
    backlog: Backlog | None

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TurnRecord:
        """Build a record from `to_json`'s fields."""
        backlog = fields["backlog"]
        return cls(**{**fields, "backlog": None if backlog is None else Backlog(**backlog)})


def main() -> None:
    """Measure the system that the command line names."""
    name, database_url, postgres_pid, scale = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Whatever a library prints must not come between.
    os.dup2(2, 1)
    record = take(SYSTEMS[name], database_url, int(postgres_pid), Scale(**json.loads(scale)))
    answers.write(json.dumps(record.to_json()))
    answers.close()


def take(entry: Entry, database_url: str, postgres_pid: int, scale: Scale) -> TurnRecord:
    """Return what a system does at this moment.

    Args:
        entry: who.
        database_url: empty, and ours alone.
        postgres_pid: the server behind it; 0 if there is none.
        scale: how many jobs.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(RedisServer())
        place = Place(server.url, database_url, folder)
        system = open_system(entry, place)
        stack.callback(system.close)
        return _Turn(system, entry, place, postgres_pid, scale).run()


def open_system(entry: Entry, place: Place) -> System:
    """Return an entry's client with its tables created."""
    module = importlib.import_module(f"benchmarks.control.systems.{entry.module}")
    system: System = module.System(place, **entry.options)
    system.prepare()
    return system


class _Turn:
    def __init__(self, system: System, entry: Entry, place: Place, postgres_pid: int, scale: Scale) -> None:
        self._system = system
        self._place = place
        self._scale = scale
        self._has_backlog = entry.has_backlog
        self._many = max(1, scale.many // entry.share)
        self._redis = redis.Redis.from_url(place.redis_url)
        self._servers = [
            int(self._redis.info("server")["process_id"]),
            *([postgres_pid] if postgres_pid else []),
        ]
        self._checked = 0

    def run(self) -> TurnRecord:
        with Herd(self._system.commands(), self._place.folder) as herd:
            try:
                self._warm_up()
                idle = self._idle()
                single = self._single()
                many = self._measure_many(herd)
            except Exception as err:
                err.add_note(herd.tails())
                raise
        empty_mb = self._database_mb()
        bulk, first = self._bulk()
        backlog = self._backlog(first, empty_mb) if self._has_backlog and self._scale.backlog else None
        return TurnRecord(
            checked=self._checked, **idle, **single, **many, bulk_jobs_per_s=bulk, backlog=backlog
        )

    def _warm_up(self) -> None:
        # Twice: the first jobs of all wait for the workers to start.
        for name in ("start", "warm"):
            requests = prompts(name, self._scale.warm)
            self._finish(requests, self._system.submit_many(requests))

    def _idle(self) -> dict[str, float]:
        waits = []
        chance = random.Random("idle")
        for prompt in prompts("idle", self._scale.idle):
            time.sleep(chance.uniform(0.0, IDLE_PAUSE_S))
            submitted_at = time.time()
            handle = self._system.submit(prompt)
            [answer] = self._finish([prompt], [handle])
            waits.append(answer.started_at - submitted_at)
        return {"start_p50_s": statistics.median(waits), "start_p99_s": percentile(waits, 0.99)}

    def _single(self) -> dict[str, float]:
        requests = prompts("single", self._scale.single)
        began = time.perf_counter()
        handles = [self._system.submit(prompt) for prompt in requests]
        took_s = time.perf_counter() - began
        self._finish(requests, handles)
        return {"single_jobs_per_s": len(handles) / took_s}

    def _measure_many(self, herd: Herd) -> dict[str, float]:
        requests = prompts("many", self._many)
        before = (cpu_s(herd.pids), cpu_s(self._servers), time.process_time())
        began = time.perf_counter()
        handles = self._system.submit_many(requests)
        self._system.wait(handles, PATIENCE_S)
        took_s = time.perf_counter() - began
        after = (cpu_s(herd.pids), cpu_s(self._servers), time.process_time())
        herd.check()
        sample = slice(0, None, max(1, self._many // self._scale.read))
        began = time.perf_counter()
        answers = [self._system.read(handle) for handle in handles[sample]]
        read_s = time.perf_counter() - began
        self._check(requests[sample], answers)
        worker, server, client = (1000 * (b - a) / self._many for a, b in zip(before, after, strict=True))
        return {
            "many_jobs_per_s": self._many / took_s,
            "read_jobs_per_s": len(answers) / read_s,
            "worker_cpu_ms": worker,
            "server_cpu_ms": server,
            "client_cpu_ms": client,
        }

    def _bulk(self) -> tuple[float, Any]:
        requests = prompts("bulk", self._scale.bulk)
        began = time.perf_counter()
        handles = self._system.submit_many(requests)
        return len(requests) / (time.perf_counter() - began), handles[0]

    def _backlog(self, first: Any, empty_mb: float) -> Backlog:
        waiting = self._scale.backlog - self._scale.bulk
        began = time.perf_counter()
        for start in range(0, waiting, CHUNK):
            self._system.submit_many(prompts(f"backlog {start}", min(CHUNK, waiting - start)))
        submit_s = time.perf_counter() - began
        broker_mb = self._redis.info("memory")["used_memory"] / 2**20
        database_mb = self._database_mb() - empty_mb
        with Herd(self._system.commands(), self._place.folder) as herd:
            try:
                wait_until(lambda: self._system.ready([first])[0], "the first result", timeout_s=PATIENCE_S)
                worker_mb = memory_mb(herd.pids)
                [prompt] = prompts("urgent", 1)
                submitted_at = time.time()
                handle = self._system.submit(prompt, urgent=True)
                [answer] = self._finish([prompt], [handle])
            except Exception as err:
                err.add_note(herd.tails())
                raise
        return Backlog(
            self._scale.backlog, submit_s, broker_mb, database_mb, worker_mb, answer.started_at - submitted_at
        )

    def _finish(self, requests: Sequence[str], handles: Sequence[Any]) -> list[Answer]:
        self._system.wait(handles, PATIENCE_S)
        answers = [self._system.read(handle) for handle in handles]
        self._check(requests, answers)
        return answers

    def _check(self, requests: Sequence[str], answers: Sequence[Answer]) -> None:
        for prompt, answer in zip(requests, answers, strict=True):
            if answer.digest not in (None, digest_of(prompt)):
                raise ValueError(f"the answer to {prompt[:20]!r} belongs to another request")
        self._checked += len(answers)

    def _database_mb(self) -> float:
        url = self._place.database_url
        if url.startswith("sqlite:///"):
            # With the write-ahead log beside it.
            path = Path(url.removeprefix("sqlite:///"))
            return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 2**20
        with psycopg.connect(url) as connection:
            row = connection.execute("SELECT pg_database_size(current_database())").fetchone()
        return 0.0 if row is None else row[0] / 2**20


if __name__ == "__main__":
    main()
