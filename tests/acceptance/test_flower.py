"""What an operator sees in Flower of live jobs, and what its Terminate button does."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from codeherd_producer.client import Client
from codeherd_schema.errors import JobFailed
from codeherd_schema.requests import GenerateRequest, Sampling
from codeherd_schema.states import JobState
from tests.acceptance.endless import LONG, NAME, endless_model
from tests.acceptance.herd import JOBS_TIMEOUT_S, QUICK, Herd
from tests.services import free_port, wait_until

#: In every prompt; must be seen nowhere.
SECRET = "hush_hush"


class Flower:
    """Flower's API."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._headers = {"Authorization": f"Basic {b64encode(b'codeherd:look').decode()}"}

    def call(self, path: str, method: str = "GET") -> Any:
        with urlopen(Request(self._url + path, headers=self._headers, method=method), timeout=30) as reply:
            return json.load(reply)

    def hears_workers(self) -> bool:
        """Whether it has heard a worker's events; from then on it is told of every task."""
        try:
            return any(self.call("/api/workers?status=true").values())
        except OSError:
            return False

    def state(self, job_id: str) -> str | None:
        task = self.call("/api/tasks").get(f"{job_id}.1")
        return None if task is None else str(task["state"])


def test_flower_shows_figures_without_text_and_terminates_cleanly(
    tmp_path: Path, sqlite_url: str, broker_url: str
) -> None:
    port = free_port()
    variables = endless_model(tmp_path) | {
        "CODEHERD_FLOWER_PORT": str(port),
        "CODEHERD_FLOWER_PASSWORD": "look",
        # Less than the model's window: a job that fits the model can be too long for this worker.
        "CODEHERD_WORKER_MAX_LEN": "16200",
    }
    herd = Herd(
        database_url=sqlite_url,
        broker_url=broker_url,
        folder=tmp_path,
        launchers={"one": "cpu"},
        variables=QUICK | variables,
        beside={"flower": ("flower",)},
    )
    flower = Flower(port)

    with herd, Client(herd.settings) as client:
        wait_until(flower.hears_workers, "Flower")
        short = client.submit(GenerateRequest(model=NAME, prompt=SECRET, sampling=Sampling(max_new_tokens=5)))
        result = short.result(JOBS_TIMEOUT_S)
        too_long = client.submit(
            GenerateRequest(model=NAME, prompt=SECRET, sampling=Sampling(max_new_tokens=16300))
        )
        with pytest.raises(JobFailed, match="context_length_exceeded"):
            too_long.result(JOBS_TIMEOUT_S)
        running = client.submit(
            GenerateRequest(model=NAME, prompt=SECRET, sampling=Sampling(max_new_tokens=LONG))
        )
        wait_until(lambda: flower.state(running.id) == "STARTED", "Flower to see the job run")
        flower.call(f"/api/task/revoke/{running.id}.1?terminate=true", method="POST")
        running.wait(JOBS_TIMEOUT_S)
        wait_until(lambda: flower.state(running.id) == "REVOKED", "Flower to see it revoked")
        after = client.submit(GenerateRequest(model=NAME, prompt=SECRET, sampling=Sampling(max_new_tokens=5)))
        assert after.result(JOBS_TIMEOUT_S).text == result.text
        wait_until(lambda: flower.state(after.id) == "SUCCESS", "Flower to see the last job")

        assert running.refresh().state is JobState.CANCELLED
        assert flower.state(running.id) == "REVOKED"
        tasks = flower.call("/api/tasks")
        task = tasks[f"{short.id}.1"]
        assert task["name"] == "codeherd.generate"
        assert f"'out': {result.completion_tokens}" in task["result"]
        assert f"'in': {result.prompt_tokens}" in task["result"]
        assert "'finish': 'length'" in task["result"]
        assert "'tps': " in task["result"]
        assert flower.state(too_long.id) == "FAILURE"
        shown = json.dumps(tasks) + json.dumps(flower.call("/api/workers"))
        assert SECRET not in shown
        assert result.text not in shown or not result.text.strip()
        workers = flower.call("/api/workers?refresh=true")
        assert [name.partition("@")[0] for name in workers] == ["one"]
