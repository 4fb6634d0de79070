"""A real worker with a null engine, whose calls to SQL may be made to go wrong: for tests and benchmarks.

    python -m tests.null_worker [--gpus cpu,cpu] [--slots N] [--name NAME]     the launcher
    python -m tests.null_worker --name NAME --device cpu --parent PID          one process

Owns: the failpoints. Launcher, Celery, pool, leases and heartbeats are the worker's own.
Environment, beside the worker's settings:

    CODEHERD_TEST_STEP_S       pause of the null engine after each step, seconds; 0 without
    CODEHERD_TEST_FAILPOINTS   a folder: a file in it makes a call to the store go wrong
    CODEHERD_TEST_SENTENCES    1 lets the null engine say sentences

A failpoint is a file named ACTION-WHEN-METHOD, such as `kill-after-succeed`. ACTION is one of

    kill    the process is killed; once
    stop    the process is stopped (SIGSTOP) and goes on when it is continued; once
    lost    DatabaseUnavailable; once. With `after`: the call took effect, its answer got lost
    raise   the built-in exception that the file names; once
    away    DatabaseUnavailable as long as the file exists

WHEN is `before` or `after`, METHOD one of the methods of `FaultyStore`. What is to happen once removes its
file first, so of several processes one is hit.
"""

from __future__ import annotations

import builtins
import functools
import os
import signal
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from codeherd_schema.errors import DatabaseUnavailable
from codeherd_schema.results import Result
from codeherd_schema.store import Beat, Claim, Commit, Store
from codeherd_worker.__main__ import main as launch
from codeherd_worker.device import Device
from codeherd_worker.process import WorkerProcess
from codeherd_worker.serve import main as serve
from codeherd_worker.settings import WorkerSettings
from tests.null_engine import prepare_null

T = TypeVar("T")

#: Where failpoints lie.
FAILPOINTS = "CODEHERD_TEST_FAILPOINTS"
#: The null engine's pause.
STEP_S = "CODEHERD_TEST_STEP_S"
#: Whether it says sentences.
SENTENCES = "CODEHERD_TEST_SENTENCES"


class FaultyStore(Store):
    """A store whose calls go wrong when a file says so."""

    def claim(
        self, job_id: str, *, worker_id: str, lease_s: float, queues: Collection[str] | None = None
    ) -> Claim | None:
        call = super().claim
        return _through("claim", lambda: call(job_id, worker_id=worker_id, lease_s=lease_s, queues=queues))

    def heartbeat(self, claims: Collection[Claim], *, lease_s: float) -> dict[str, Beat]:
        call = super().heartbeat
        return _through("heartbeat", lambda: call(claims, lease_s=lease_s))

    def succeed(self, claim: Claim, result: Result) -> Commit:
        call = super().succeed
        return _through("succeed", lambda: call(claim, result))

    def fail(self, claim: Claim, *, code: str, message: str) -> Commit:
        call = super().fail
        return _through("fail", lambda: call(claim, code=code, message=message))

    def retry(self, claim: Claim, *, code: str, message: str, delay_s: float) -> Commit:
        call = super().retry
        return _through("retry", lambda: call(claim, code=code, message=message, delay_s=delay_s))

    def release(self, claim: Claim) -> Commit:
        call = super().release
        return _through("release", lambda: call(claim))

    def cancel_running(self, claim: Claim) -> Commit:
        call = super().cancel_running
        return _through("cancel_running", lambda: call(claim))


def load_process(settings: WorkerSettings, name: str, device: Device) -> WorkerProcess:
    """Return a process with a null engine."""
    return WorkerProcess(
        settings,
        name=name,
        device=device,
        prepare=functools.partial(
            prepare_null,
            step_s=float(os.environ.get(STEP_S, "0")),
            in_sentences=os.environ.get(SENTENCES) == "1",
        ),
        open_store=FaultyStore.open if FAILPOINTS in os.environ else Store.open,
    )


def _through(method: str, call: Callable[[], T]) -> T:
    _fail("before", method)
    answer = call()
    _fail("after", method)
    return answer


def _fail(when: str, method: str) -> None:
    folder = Path(os.environ[FAILPOINTS])
    if (folder / f"away-{when}-{method}").exists():
        raise DatabaseUnavailable(f"away {when} {method}")
    for action in ("kill", "stop", "lost", "raise"):
        path = folder / f"{action}-{when}-{method}"
        try:
            text = path.read_text()
            path.unlink()
        except FileNotFoundError:
            continue
        if action == "raise":
            raise getattr(builtins, text)
        if action == "lost":
            raise DatabaseUnavailable(f"lost {when} {method}")
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)


if __name__ == "__main__":
    sys.exit(serve(load_process) if "--parent" in sys.argv else launch(module="tests.null_worker"))
