"""dramatiq: everything in Redis, results too, where they expire. It has no call for many jobs at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import dramatiq
from dramatiq import Message
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from benchmarks.control.polling import Polled
from benchmarks.control.protocol import CONCURRENCY, Answer, Command, Place
from benchmarks.control.work import null_job

#: Environment variable of a worker: its command line has no place for it.
REDIS_VARIABLE = "CONTROL_BENCHMARK_REDIS_URL"
#: Milliseconds that Redis keeps a result; longer than any run.
RESULT_TTL_MS = 86_400_000
#: Lower runs first among the messages that a worker has fetched: urgent ones need a queue of their own.
PRIORITY, URGENT = 5, 0


class System(Polled):
    """dramatiq's client and one worker process with threads."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._broker, self._actors = _make_broker(place.redis_url)
        self._results = RedisBackend(url=place.redis_url)

    def prepare(self) -> None:
        self._broker.client.ping()

    def commands(self) -> list[Command]:
        size = ["--processes", "1", "--threads", str(CONCURRENCY)]
        target = f"{__name__}:setup"
        return [
            Command(
                "worker",
                [sys.executable, "-m", "dramatiq", *size, target],
                {REDIS_VARIABLE: self._place.redis_url},
            )
        ]

    def submit(self, prompt: str, *, urgent: bool = False) -> Message[Any]:
        return self._actors[URGENT if urgent else PRIORITY].send(prompt)

    def submit_many(self, prompts: Sequence[str]) -> list[Message[Any]]:
        return [self.submit(prompt) for prompt in prompts]

    def ready(self, handles: Sequence[Message[Any]]) -> list[bool]:
        with self._results.client.pipeline(transaction=False) as pipe:
            for handle in handles:
                pipe.exists(self._results.build_message_key(handle))
            return [bool(found) for found in pipe.execute()]

    def read(self, handle: Message[Any]) -> Answer:
        result = handle.get_result(backend=self._results)
        return Answer(result["started_at"], result["digest"])

    def close(self) -> None:
        self._broker.close()
        self._results.client.close()


def setup() -> None:
    """Set up a worker; called by dramatiq's own command line."""
    _make_broker(os.environ[REDIS_VARIABLE])


def _make_broker(redis_url: str) -> tuple[RedisBroker, dict[int, dramatiq.Actor[..., Any]]]:
    broker = RedisBroker(url=redis_url)
    broker.add_middleware(Results(backend=RedisBackend(url=redis_url)))
    dramatiq.set_broker(broker)
    options: dict[str, Any] = {"store_results": True, "result_ttl": RESULT_TTL_MS}
    actors = {
        priority: dramatiq.actor(actor_name=name, queue_name=name, priority=priority, **options)(null_job)
        for name, priority in (("normal", PRIORITY), ("urgent", URGENT))
    }
    return broker, actors
