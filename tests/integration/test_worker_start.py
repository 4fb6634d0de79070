"""A worker that cannot serve says why in one line and takes no job."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from codeherd_worker.embedded import EMBEDDED_FOLDER
from tests.services import free_port


def start(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CODEHERD_")}
    environment |= {f"CODEHERD_{k.upper()}": v for k, v in variables.items()}
    return subprocess.run(
        [sys.executable, "-m", "codeherd_worker", "--gpus", "cpu", "--slots", "2", *options],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def assert_one_line(done: subprocess.CompletedProcess[str], code: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert f"[{code}]" in lines[0]
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "variables", "code"),
    [
        (("--model", "codelama-7b"), {}, "model_not_found"),
        (("--gpus", "0"), {}, "device_unavailable"),
        (("--gpus", "all"), {}, "device_unavailable"),
        ((), {"worker_slotz": "3"}, "invalid_setting"),
        ((), {"worker_slots": "many"}, "invalid_setting"),
        ((), {"lease_s": "10", "heartbeat_s": "9"}, "invalid_setting"),
    ],
)
def test_what_cannot_work_stops_the_launcher(
    tmp_path: Path, options: tuple[str, ...], variables: dict[str, str], code: str
) -> None:
    assert_one_line(start(tmp_path, *options, **variables), code)


def test_a_database_without_our_tables_stops_the_worker(tmp_path: Path, broker_url: str) -> None:
    done = start(tmp_path, database_url=f"sqlite:///{tmp_path / 'empty.db'}", broker_url=broker_url)

    assert_one_line(done, "schema_outdated")
    assert "codeherd db upgrade" in done.stderr


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: os.truncate(folder / "model.safetensors", 100_000),
        lambda folder: [(folder / name).unlink() for name in ("tokenizer.model", "tokenizer.json")],
    ],
    ids=["cut weights", "no tokenizer"],
)
def test_a_model_folder_that_is_not_one_stops_the_worker(
    tmp_path: Path, sqlite_url: str, broker_url: str, spoil: Callable[[Path], object]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED_FOLDER, folder)
    spoil(folder)
    entry = (
        "parameters = 1\nlayers = 4\nkv_heads = 3\nhead_dim = 64\nvocab_size = 4096\ncontext_window = 512\n"
    )
    (tmp_path / "models.toml").write_text(f'[models.mine]\nsource = "{folder}"\n{entry}')

    done = start(
        tmp_path,
        "--model",
        "mine",
        database_url=sqlite_url,
        broker_url=broker_url,
        models_file=str(tmp_path / "models.toml"),
    )

    assert_one_line(done, "model_files_invalid")


def test_an_unreachable_broker_is_said_before_the_next_try(tmp_path: Path, sqlite_url: str) -> None:
    command = [sys.executable, "-m", "codeherd_worker", "--gpus", "cpu", "--slots", "2"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CODEHERD_")}
    environment |= {
        "CODEHERD_DATABASE_URL": sqlite_url,
        "CODEHERD_BROKER_URL": f"redis://127.0.0.1:{free_port()}/0",
    }

    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stderr is not None
        said = []
        for line in launcher.stderr:
            said.append(line)
            if "worker_died" in line:
                break
        launcher.terminate()
        assert launcher.wait(60) == 0

    assert sum("[broker_unavailable]" in line for line in said) == 1
    assert "Traceback" not in "".join(said)
