"""What a launcher makes of the ways in which a worker process can end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

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
def test_a_worker_whose_engine_broke_is_started_again(status: int) -> None:
    assert reaped(status) == (0, True)


def test_a_worker_that_can_never_start_ends_the_launcher() -> None:
    assert reaped(CONFIGURATION_STATUS) == (CONFIGURATION_STATUS, False)
