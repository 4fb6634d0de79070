"""One worker process: `python -m codeherd_worker.serve --name gpu0 --device cuda`.

Owns: the order of a start: settings, logging, model, then Celery. The launcher (`codeherd_worker`)
has pinned the process to its device by environment before this file is read.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from codeherd_schema.errors import CodeherdError, ConfigurationError, InvalidRequest
from codeherd_schema.settings import load, user_file
from codeherd_worker.app import run_worker
from codeherd_worker.device import Device
from codeherd_worker.process import WorkerProcess
from codeherd_worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

#: Exit status when another start would fail in the same way (EX_CONFIG of sysexits.h).
CONFIGURATION_STATUS = 78
#: Exit status when another start may succeed.
FAILURE_STATUS = 1
#: prctl option: a signal to this process when its parent dies (linux/prctl.h).
PR_SET_PDEATHSIG = 1


def main(load_process: Callable[[WorkerSettings, str, Device], WorkerProcess] | None = None) -> int:
    """Serve until stopped; return the exit status.

    Args:
        load_process: makes the process of these settings, with this name on this device; by default one
            that generates with a model.
    """
    parser = argparse.ArgumentParser(prog="codeherd_worker.serve", description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--device", required=True, choices=get_args(Device))
    parser.add_argument("--parent", type=int, required=True, help="process id of the launcher")
    options = parser.parse_args()
    if not follow_parent(options.parent):
        return FAILURE_STATUS
    try:
        settings = load(
            WorkerSettings,
            environment=os.environ,
            project_file=Path("pyproject.toml"),
            user_file=user_file(),
        ).settings
        configure_logging(settings.log_level)
        return serve((load_process or with_model)(settings, options.name, options.device))
    except CodeherdError as err:
        print_error(err)
        lasting = isinstance(err, ConfigurationError | InvalidRequest)
        return CONFIGURATION_STATUS if lasting else FAILURE_STATUS


def with_model(settings: WorkerSettings, name: str, device: Device) -> WorkerProcess:
    """Return a process that will hold a model."""
    # Weights and prompts stay on this machine: nothing may look for files on a hub while it serves.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # After the pinning and the variables above, which torch and transformers read when imported.
    from codeherd_worker.preparation import prepare

    return WorkerProcess(settings, name=name, device=device, prepare=prepare)


def serve(process: WorkerProcess) -> int:
    """Open a process, take jobs until stopped, close it."""
    try:
        process.open()
        status = run_worker(process)
    finally:
        process.close()
    if process.exit_status:
        # The engine broke, and its device may be lost: what CUDA does at the end of a process can wait for
        # it for ever, and then the launcher would never start another.
        logging.shutdown()
        os._exit(status)
    return status


def follow_parent(parent: int) -> bool:
    """Have this process told to stop when its launcher dies; False if it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    return os.getppid() == parent


def configure_logging(level: str) -> None:
    """Log to standard error, one event a line."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    if level != "debug":
        # Celery's own INFO lines repeat ours with arguments and results.
        for name in ("celery", "kombu", "amqp", "transformers"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # They miss optional packages and kernels of other devices at every start, and do well without.
        for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)


def print_error(err: CodeherdError) -> None:
    """Say what is wrong in one line, and what to do in another."""
    lines = [f"error: {err.message} [{err.code}]"] + ([f"hint: {err.hint}"] if err.hint else [])
    sys.stderr.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
