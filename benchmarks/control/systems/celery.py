"""Plain Celery: the whole request in the message, the result in its SQLAlchemy backend."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from celery import Celery
from sqlalchemy import create_engine, text

from benchmarks.control.polling import Polled
from benchmarks.control.protocol import CONCURRENCY, Answer, Command, Place
from benchmarks.control.work import null_job

#: Redis 0 is the first to be taken; the default of Celery puts all jobs there, and none could be urgent.
PRIORITY, URGENT = 5, 0
#: Messages that go to Redis in one round trip.
BATCH = 500


class System(Polled):
    """Celery's client; `python -m benchmarks.control.systems.celery` is its worker."""

    def __init__(self, place: Place, *, pool: str = "threads", acks_late: bool = False) -> None:
        self._pool, self._acks_late = pool, acks_late
        self._place = place
        self._app = make_app(place.redis_url, place.database_url, acks_late=acks_late)
        self._engine = create_engine(_sqlalchemy_url(place.database_url))

    def prepare(self) -> None:
        self._app.backend.ResultSession().close()

    def commands(self) -> list[Command]:
        options = ["--redis", self._place.redis_url, "--database", self._place.database_url]
        options += ["--pool", self._pool, *(["--acks-late"] if self._acks_late else [])]
        return [Command("worker", [sys.executable, "-m", "benchmarks.control.systems.celery", *options])]

    def submit(self, prompt: str, *, urgent: bool = False) -> str:
        return str(self._task.apply_async((prompt,), priority=URGENT if urgent else PRIORITY).id)

    def submit_many(self, prompts: Sequence[str]) -> list[str]:
        with self._app.producer_or_acquire() as producer, producer.batch(max_size=BATCH):
            return [
                self._task.apply_async((prompt,), priority=PRIORITY, producer=producer, retry=False).id
                for prompt in prompts
            ]

    def ready(self, handles: Sequence[str]) -> list[bool]:
        names = {f"id{number}": handle for number, handle in enumerate(handles)}
        places = ", ".join(f":{name}" for name in names)
        question = text(
            f"SELECT task_id FROM celery_taskmeta WHERE status = 'SUCCESS' AND task_id IN ({places})"
        )
        with self._engine.connect() as connection:
            found = set(connection.execute(question, names).scalars())
        return [handle in found for handle in handles]

    def read(self, handle: str) -> Answer:
        result = self._app.AsyncResult(handle).get(timeout=10)
        return Answer(result["started_at"], result["digest"])

    def close(self) -> None:
        self._engine.dispose()
        self._app.close()

    @property
    def _task(self) -> Any:
        return self._app.tasks["null_job"]


def make_app(redis_url: str, database_url: str, *, acks_late: bool) -> Celery:
    """Build the app of client and worker; everything that is not named is Celery's default."""
    app = Celery("control", broker=redis_url, backend=f"db+{_sqlalchemy_url(database_url)}")
    app.conf.update(
        task_acks_late=acks_late,
        broker_connection_retry_on_startup=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
    )
    app.task(null_job, name="null_job")
    return app


def _sqlalchemy_url(database_url: str) -> str:
    return database_url.replace("postgresql://", "postgresql+psycopg://")


def main() -> None:
    """Run a worker until it is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--redis", required=True)
    parser.add_argument("--database", required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--acks-late", action="store_true")
    options = parser.parse_args()
    app = make_app(options.redis, options.database, acks_late=options.acks_late)
    app.worker_main(
        ["worker", "--pool", options.pool, "--concurrency", str(CONCURRENCY), "--loglevel", "WARNING"]
    )


if __name__ == "__main__":
    main()
