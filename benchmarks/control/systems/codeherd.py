"""codeherd with a null engine: its own client, dispatcher, worker process, store and Celery underneath."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from benchmarks.control.protocol import CONCURRENCY, Answer, Command, Place
from benchmarks.control.work import PAUSE_VARIABLE
from codeherd_producer.client import Client, Job
from codeherd_schema.migrations import upgrade
from codeherd_schema.requests import GenerateRequest, Sampling
from codeherd_schema.settings import SharedSettings, load
from codeherd_schema.states import JobState

#: What urgent jobs have; the others have the default, 5.
URGENT = 0
#: The engine costs something for each token; one makes a result of more than 300 bytes with all its fields.
SAMPLING = Sampling(max_new_tokens=1, seed=1)


class System:
    """codeherd's client; every setting that is not named is the default."""

    def __init__(self, place: Place, *, processes: int = 1) -> None:
        self._processes = processes
        self._variables = {
            "CODEHERD_DATABASE_URL": place.database_url,
            "CODEHERD_BROKER_URL": place.redis_url,
            "CODEHERD_LOG_LEVEL": "warning",
        }
        self._client = Client(load(SharedSettings, environment=self._variables).settings)
        self._database_url = place.database_url

    def prepare(self) -> None:
        upgrade(self._database_url)

    def commands(self) -> list[Command]:
        worker = ["tests.null_worker", "--name", "control"]
        if self._processes == 1:
            worker += ["--device", "cpu", "--parent", str(os.getpid())]
        else:
            # The launcher starts one process for each device.
            worker += ["--gpus", ",".join(["cpu"] * self._processes)]
        variables = {**self._variables, "CODEHERD_WORKER_SLOTS": str(CONCURRENCY // self._processes)}
        if PAUSE_VARIABLE in os.environ:
            variables["CODEHERD_TEST_STEP_S"] = os.environ[PAUSE_VARIABLE]
        return [
            Command("worker", [sys.executable, "-m", *worker], variables),
            Command(
                "dispatcher", [sys.executable, "-m", "codeherd_producer.cli", "dispatcher"], self._variables
            ),
        ]

    def submit(self, prompt: str, *, urgent: bool = False) -> Job:
        request = GenerateRequest(prompt=prompt, sampling=SAMPLING)
        return self._client.submit(request.model_copy(update={"priority": URGENT}) if urgent else request)

    def submit_many(self, prompts: Sequence[str]) -> list[Job]:
        return self._client.submit_many([GenerateRequest(prompt=p, sampling=SAMPLING) for p in prompts])

    def wait(self, handles: Sequence[Job], timeout_s: float) -> None:
        self._client.wait(handles, timeout_s)

    def ready(self, handles: Sequence[Job]) -> list[bool]:
        return [handle.state is JobState.SUCCEEDED for handle in handles]

    def runs(self, handle: Job) -> int:
        return handle.refresh().attempt

    def read(self, handle: Job) -> Answer:
        result = handle.result(timeout_s=0)
        if result.job_id != handle.id or not result.text:
            raise LookupError(f"job {handle.id} has no answer")
        # Written down after the engine was done; its own time is not the queue's.
        engine_s = result.timings.prefill_s + result.timings.decode_s
        return Answer(result.created_at.timestamp() - engine_s, digest=None)

    def close(self) -> None:
        self._client.close()
