"""What a launcher makes of the ways in which a worker process can end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from codeherd_worker.device import DeviceGroup
from codeherd_worker.process import ENGINE_BROKEN_STATUS
from codeherd_worker.serve import CONFIGURATION_STATUS, FAILURE_STATUS
from codeherd_worker.supervisor import Supervisor
from codeherd_worker.watchdog import HUNG_STATUS


def reaped(status: int) -> tuple[int, bool]:
    """End a child with `status`; return what the launcher would end with, and whether it restarts."""
    supervisor = Supervisor([DeviceGroup("gpu0", "0", "cuda")], environment={})
    [child] = supervisor._children
    end = f"os.kill(os.getpid(), {-status})" if status < 0 else f"os._exit({status})"
    child.process = subprocess.Popen([sys.executable, "-c", f"import os; {end}"])
    child.started_at = time.monotonic()
    child.process.wait(30)
    result = supervisor._reap()
    return result, child.process is None and child.restart_at > time.monotonic()


@pytest.mark.parametrize(
    "status", [ENGINE_BROKEN_STATUS, HUNG_STATUS, FAILURE_STATUS, -signal.SIGKILL, -signal.SIGABRT]
)
def test_a_worker_whose_engine_broke_is_started_again(status: int, caplog: pytest.LogCaptureFixture) -> None:
    assert reaped(status) == (0, True)

    assert [(record.levelname, record.message.split()[0]) for record in caplog.records] == [
        ("ERROR", "worker_died")
    ]


def test_a_worker_that_can_never_start_ends_the_launcher() -> None:
    assert reaped(CONFIGURATION_STATUS) == (CONFIGURATION_STATUS, False)


def test_a_worker_that_was_told_to_stop_stays_down_and_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    assert reaped(0) == (0, False)

    assert [(record.levelname, record.message.split()[0]) for record in caplog.records] == [
        ("INFO", "worker_stopped")
    ]


#: Ends well, but for `cpu1`, which fails the first time.
WORKER = """
import pathlib, sys
name = sys.argv[sys.argv.index("--name") + 1]
failed = pathlib.Path(__file__).with_name("failed")
if name == "cpu1" and not failed.exists():
    failed.touch()
    sys.exit(1)
"""
LAUNCHER = """
import logging, os, sys
from codeherd_worker.device import DeviceGroup
from codeherd_worker.supervisor import Supervisor
logging.basicConfig(level=logging.INFO)
groups = [DeviceGroup(name, "", "cpu") for name in ("cpu0", "cpu1")]
sys.exit(Supervisor(groups, environment=os.environ, module="worker_of_this_test").run())
"""


def test_the_launcher_ends_well_when_the_last_worker_was_told_to_stop(tmp_path: Path) -> None:
    (tmp_path / "worker_of_this_test.py").write_text(WORKER)

    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0
    said = [line.split()[:2] for line in done.stderr.splitlines()]
    events = [words[0].rpartition(":")[2] + " " + words[1].partition("=")[2] for words in said]
    assert sorted(events) == [
        "worker_died cpu1",
        "worker_spawned cpu0",
        "worker_spawned cpu1",
        "worker_spawned cpu1",
        "worker_stopped cpu0",
        "worker_stopped cpu1",
    ]
