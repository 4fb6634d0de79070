"""Real workers, asked over Celery: what they tell, when they are ready, and how a broken one ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from codeherd_producer.client import Client
from codeherd_schema.requests import GenerateRequest, Sampling
from codeherd_schema.states import JobState
from codeherd_worker.watchdog import HUNG_STATUS
from tests.acceptance.endless import NAME, endless_model
from tests.acceptance.herd import QUICK, Herd
from tests.services import wait_until

#: Part of the prompt: must never be shown.
SECRET = "zebra_crossing"
#: A worker process whose device is lost at the first decode step.
BROKEN = """
import sys, threading
from codeherd_worker.engine.decode import SlotDecoder

def lost(*_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

SlotDecoder.step = lost
from codeherd_worker import serve
sys.argv = ["serve", "--name", "cpu0", "--device", "cpu", "--parent", sys.argv[1]]
sys.exit(serve.main())
"""


def inspected(herd: Herd, *options: str) -> dict[str, Any]:
    done = herd.cli("inspect", "--json", *options)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_a_worker_tells_its_plan_its_slots_and_the_mask_of_a_running_job(
    tmp_path: Path, sqlite_url: str, broker_url: str
) -> None:
    own = {"CODEHERD_WORKER_SLOT_LENGTHS": "256x2,2048x1", "CODEHERD_LOG_LEVEL": "info"}
    with Herd(
        database_url=sqlite_url,
        broker_url=broker_url,
        folder=tmp_path,
        launchers={"one": "cpu"},
        slots=3,
        variables=QUICK | endless_model(tmp_path) | own,
    ) as herd:
        [worker] = inspected(herd, "one")["workers"]
        assert worker["model"] == NAME
        assert worker["plan"]["classes"] == [{"length": 256, "slots": 2}, {"length": 2048, "slots": 1}]
        assert worker["cache_bytes"] == sum(card["cache_bytes"] for card in worker["plan"]["cards"])
        assert (worker["slots"], worker["active"], worker["tokens"]) == (3, 0, 0)

        with Client(herd.settings) as client:
            sampling = Sampling(max_new_tokens=1900)
            job = client.submit(GenerateRequest(prompt=SECRET, model=NAME, sampling=sampling))
            wait_until(lambda: job.refresh().state is JobState.RUNNING, "the job to run")
            busy: list[dict[str, Any]] = []

            def is_seen() -> bool:
                [worker] = inspected(herd)["workers"]
                busy[:] = [view for view in worker["slot_views"] if view["name"] == job.id]
                return bool(busy) and busy[0]["new_tokens"] > 0

            wait_until(is_seen, "the job in a slot")
            shown = herd.cli("inspect", "--mask", job.id)
            client.cancel(job.id)
        assert busy[0]["length"] == 2048
        assert shown.returncode == 0, shown.stderr
        assert "decode" in shown.stdout
        assert SECRET not in shown.stdout
        row = herd.cli("inspect").stdout.rstrip("\n").split("\t")
        assert row[0].startswith("one@")
        assert row[1] == NAME
        log = (tmp_path / "one.log").read_text()

    events = (
        "memory_plan card=cpu",
        "slot_class length=256 slots=2",
        "engine_warm",
        "model_ready",
        "worker_ready",
    )
    places = [log.find(event) for event in events]
    assert -1 not in places
    assert places == sorted(places), "a worker took jobs before it was warm"
    assert "rows_agree=True" in log
    assert f"fingerprint={worker['fingerprint']}" in log


def test_a_lost_device_ends_the_process_so_that_the_launcher_starts_another(
    tmp_path: Path, sqlite_url: str, broker_url: str
) -> None:
    with (
        Herd(database_url=sqlite_url, broker_url=broker_url, folder=tmp_path, launchers={}) as herd,
        Client(herd.settings) as client,
    ):
        job = client.submit(GenerateRequest(prompt="def f():"))
        with (tmp_path / "broken.log").open("wb") as log:
            ended = subprocess.run(
                [sys.executable, "-c", BROKEN, str(os.getpid())],
                env=herd.environment | {"CODEHERD_WORKER_SLOTS": "2"},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=180,
                check=False,
            )

        said = (tmp_path / "broken.log").read_text()
        assert ended.returncode == HUNG_STATUS, said
        assert "engine_broken" in said
        # The job is not lost: another attempt is due.
        wait_until(lambda: job.refresh().state is JobState.QUEUED, "the job to come back")
        assert [attempt.error_code for attempt in client.attempts(job.id)] == ["engine_failed"]


def test_slots_that_cannot_fit_stop_the_worker_with_figures_and_a_way_out(
    tmp_path: Path, sqlite_url: str, broker_url: str
) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CODEHERD_")}
    # A window and a cache per token as large as no machine has.
    (tmp_path / "models.toml").write_text("")
    environment |= {
        "CODEHERD_DATABASE_URL": sqlite_url,
        "CODEHERD_BROKER_URL": broker_url,
        "CODEHERD_WORKER_SLOT_LENGTHS": "4096x2",
    }

    done = subprocess.run(
        [sys.executable, "-m", "codeherd_worker", "--gpus", "cpu"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )

    assert done.returncode == 1
    assert "a slot of worker_slot_lengths has 4096 tokens" in done.stderr
    assert "[invalid_setting]" in done.stderr
    assert "Traceback" not in done.stderr
