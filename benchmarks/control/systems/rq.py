"""rq: everything in Redis, results too, where they expire."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from redis import Redis
from rq import Queue
from rq.job import Job, JobStatus

from benchmarks.control.polling import Polled
from benchmarks.control.protocol import CONCURRENCY, Answer, Command, Place

_TASK = "benchmarks.control.work.null_job"
#: Jobs that are enqueued in one pipeline.
BATCH = 500
#: Seconds that Redis keeps a result; longer than any run.
RESULT_TTL_S = 86_400
#: The default is the call with its arguments, the whole prompt a second time.
DESCRIPTION = "null_job"


class System(Polled):
    """rq's client and its pool of worker processes."""

    def __init__(self, place: Place, *, worker_class: str = "rq.Worker") -> None:
        self._place = place
        self._worker_class = worker_class
        self._redis = Redis.from_url(place.redis_url)
        self._queue = Queue(connection=self._redis)

    def prepare(self) -> None:
        self._redis.ping()

    def commands(self) -> list[Command]:
        options = ["-u", self._place.redis_url, "-w", self._worker_class, "-n", str(CONCURRENCY), "-q"]
        return [Command("worker", [sys.executable, "-m", "rq.cli", "worker-pool", *options, "default"])]

    def submit(self, prompt: str, *, urgent: bool = False) -> str:
        job = self._queue.enqueue(
            _TASK, prompt, at_front=urgent, result_ttl=RESULT_TTL_S, description=DESCRIPTION
        )
        return str(job.id)

    def submit_many(self, prompts: Sequence[str]) -> list[str]:
        handles: list[str] = []
        for start in range(0, len(prompts), BATCH):
            calls = [
                Queue.prepare_data(_TASK, (prompt,), result_ttl=RESULT_TTL_S, description=DESCRIPTION)
                for prompt in prompts[start : start + BATCH]
            ]
            handles += [job.id for job in self._queue.enqueue_many(calls)]
        return handles

    def ready(self, handles: Sequence[str]) -> list[bool]:
        with self._redis.pipeline(transaction=False) as pipe:
            for handle in handles:
                pipe.hget(Job.key_for(handle), "status")
            return [status == JobStatus.FINISHED.value.encode() for status in pipe.execute()]

    def read(self, handle: str) -> Answer:
        result: Any = Job.fetch(handle, connection=self._redis).return_value()
        return Answer(result["started_at"], result["digest"])

    def close(self) -> None:
        self._redis.close()
