"""procrastinate: the queue is a table in PostgreSQL. It keeps no results: the task writes a row itself."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

import procrastinate
import psycopg

from benchmarks.control.polling import Polled
from benchmarks.control.protocol import CONCURRENCY, Answer, Command, Place
from benchmarks.control.work import answer_to, null_job, pause_s

#: Higher runs first.
URGENT = 10
#: Jobs that are deferred in one statement.
BATCH = 1_000
_TABLE = "CREATE TABLE answers (job_id bigint PRIMARY KEY, payload text NOT NULL)"
# The first answer stays, should the job run twice.
_INSERT = "INSERT INTO answers (job_id, payload) VALUES (%(job_id)s, %(payload)s) ON CONFLICT DO NOTHING"


class System(Polled):
    """procrastinate's client; `python -m benchmarks.control.systems.procrastinate` is its worker."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._app = procrastinate.App(
            connector=procrastinate.SyncPsycopgConnector(conninfo=place.database_url)
        )
        self._task: Any = self._app.task(name="null_job")(null_job)
        self._app.open()
        self._connection = psycopg.connect(place.database_url, autocommit=True)

    def prepare(self) -> None:
        self._app.schema_manager.apply_schema()
        self._connection.execute(_TABLE)

    def commands(self) -> list[Command]:
        module = "benchmarks.control.systems.procrastinate"
        return [Command("worker", [sys.executable, "-m", module, "--database", self._place.database_url])]

    def submit(self, prompt: str, *, urgent: bool = False) -> int:
        task = self._task.configure(priority=URGENT) if urgent else self._task
        return int(task.defer(prompt=prompt))

    def submit_many(self, prompts: Sequence[str]) -> list[int]:
        handles: list[int] = []
        for start in range(0, len(prompts), BATCH):
            handles += self._task.batch_defer(*({"prompt": p} for p in prompts[start : start + BATCH]))
        return handles

    def ready(self, handles: Sequence[int]) -> list[bool]:
        rows = self._connection.execute("SELECT job_id FROM answers WHERE job_id = ANY(%s)", [list(handles)])
        found = {row[0] for row in rows}
        return [handle in found for handle in handles]

    def read(self, handle: int) -> Answer:
        row = self._connection.execute("SELECT payload FROM answers WHERE job_id = %s", [handle]).fetchone()
        if row is None:
            raise LookupError(f"job {handle} has no answer")
        result = json.loads(row[0])
        return Answer(result["started_at"], result["digest"])

    def close(self) -> None:
        self._connection.close()
        self._app.close()


def main() -> None:
    """Run a worker until it is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--database", required=True)
    options = parser.parse_args()
    # One connection per running job, and those of the worker itself.
    connector = procrastinate.PsycopgConnector(conninfo=options.database, max_size=CONCURRENCY + 4)
    app = procrastinate.App(connector=connector)

    @app.task(name="null_job", pass_context=True)
    async def answer(context: procrastinate.JobContext, prompt: str) -> None:
        payload = json.dumps(answer_to(prompt))
        await asyncio.sleep(pause_s())
        await connector.execute_query_async(_INSERT, job_id=context.job.id, payload=payload)

    app.run_worker(concurrency=CONCURRENCY)


if __name__ == "__main__":
    main()
