"""Real workers, asked over Celery: what they tell, when they are ready, and how a broken one ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from codeherd_producer.client import Client
from codeherd_schema.requests import GenerateRequest, Sampling
from codeherd_schema.states import JobState
from codeherd_worker.embedded import EMBEDDED_FOLDER
from codeherd_worker.watchdog import HUNG_STATUS
from tests.acceptance.endless import LONG, NAME, endless_model
from tests.acceptance.herd import QUICK, Herd
from tests.services import wait_until
from tests.unit.producer.json_documents import Documents

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
    """Ask until somebody answers: on a busy machine a worker can take longer than a look waits."""
    answers: list[dict[str, Any]] = []

    def is_answered() -> bool:
        done = herd.cli("inspect", "--json", *options)
        assert SECRET not in done.stdout
        if done.returncode == 0:
            answers.append(json.loads(done.stdout))
        return done.returncode == 0 and answers[-1].get("workers") != []

    wait_until(is_answered, f"an answer to inspect {' '.join(options)}")
    return answers[-1]


def test_a_worker_tells_its_plan_its_slots_and_the_mask_of_a_running_job(
    tmp_path: Path, sqlite_url: str, broker_url: str
) -> None:
    own = {"CODEHERD_WORKER_SLOT_LENGTHS": "512x2,16384x1", "CODEHERD_LOG_LEVEL": "info"}
    with Herd(
        database_url=sqlite_url,
        broker_url=broker_url,
        folder=tmp_path,
        launchers={"one": "cpu"},
        slots=3,
        variables=QUICK | endless_model(tmp_path) | own,
    ) as herd:
        told, answer = Documents(), inspected(herd, "one")
        assert told.faults("inspect", answer) == []
        [worker] = answer["workers"]
        assert worker["model"] == NAME
        assert worker["plan"]["classes"] == [{"length": 512, "slots": 2}, {"length": 16384, "slots": 1}]
        assert worker["cache_bytes"] == sum(card["cache_bytes"] for card in worker["plan"]["cards"])
        assert (worker["slots"], worker["active"], worker["tokens"]) == (3, 0, 0)

        with Client(herd.settings) as client:
            # One slot holds them: there is a running one for as long as all of them take.
            sampling = Sampling(max_new_tokens=LONG)
            jobs = client.submit_many([GenerateRequest(prompt=SECRET, model=NAME, sampling=sampling)] * 20)
            seen: dict[str, Any] = {}

            def is_seen() -> bool:
                [worker] = inspected(herd)["workers"]
                busy = [view for view in worker["slot_views"] if view["name"] is not None]
                if busy and busy[0]["new_tokens"]:
                    seen.update(mask=inspected(herd, "--mask", busy[0]["name"]), view=busy[0])
                return bool(seen) and seen["mask"]["running"]

            wait_until(is_seen, "a running job's mask")
            shown = herd.cli("inspect", "--mask", seen["mask"]["job"])
            for job in jobs:
                client.cancel(job.id)
        assert told.faults("inspect --mask", seen["mask"]) == []
        [facts] = seen["mask"]["slots"]
        assert (facts["slot"], facts["length"]) == (2, seen["view"]["length"]) == (2, 16384)
        assert facts["prompt_tokens"] == facts["prefilled_tokens"] == seen["view"]["prompt_tokens"] > 0
        assert facts["new_tokens"] >= seen["view"]["new_tokens"]
        assert shown.returncode == 0, shown.stderr
        assert "decode" in shown.stdout
        assert SECRET not in shown.stdout
        with subprocess.Popen(
            [sys.executable, "-m", "codeherd_producer.cli", "inspect", "--json", "--watch", "0.2"],
            env=herd.environment,
            stdout=subprocess.PIPE,
        ) as watching:
            assert watching.stdout is not None
            uptimes = [json.loads(watching.stdout.readline())["workers"][0]["uptime_s"] for _ in range(3)]
            watching.send_signal(signal.SIGINT)
            assert watching.wait(30) == 130
        assert uptimes == sorted(set(uptimes))
        row = herd.cli("inspect").stdout.rstrip("\n").split("\t")
        assert row[0].startswith("one@")
        assert row[1] == NAME
        log = (tmp_path / "one.log").read_text()

    events = (
        "memory_plan card=cpu",
        "slot_class length=512 slots=2",
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


def roomy_model(folder: Path) -> dict[str, str]:
    """Write a model of few weights whose cache takes 2 MiB for each token."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=2048,
        max_position_embeddings=16_384,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "roomy")
    shutil.copy(EMBEDDED_FOLDER / "tokenizer.model", folder / "roomy")
    entry = "parameters = 1\nlayers = 4\nkv_heads = 32\nhead_dim = 2048\nvocab_size = 4096\n"
    models_file = folder / "models.toml"
    models_file.write_text(f'[models.roomy]\nsource = "{folder / "roomy"}"\n{entry}context_window = 16384\n')
    return {"CODEHERD_MODELS_FILE": str(models_file), "CODEHERD_WORKER_MODEL": "roomy"}


def test_slots_that_cannot_fit_stop_the_worker_with_figures_and_a_way_out(
    tmp_path: Path, sqlite_url: str, broker_url: str
) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CODEHERD_")}
    environment |= roomy_model(tmp_path) | {
        "CODEHERD_DATABASE_URL": sqlite_url,
        "CODEHERD_BROKER_URL": broker_url,
        "CODEHERD_WORKER_QUANTIZATION": "none",
        # 512 GiB.
        "CODEHERD_WORKER_SLOT_LENGTHS": "16384x16",
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
    said = done.stderr[done.stderr.index("error: ") :]
    assert said.startswith("error: 16384x16 slots do not fit cpu: weights ")
    assert "cache 550.83 GB" in said
    assert "[invalid_setting]" in said
    assert "hint: worker_slot" in said
    assert said.rstrip().endswith("would fit")
    assert "Traceback" not in done.stderr
