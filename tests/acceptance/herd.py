"""A whole herd for a test: real launchers, real worker processes, a real dispatcher.

Owns: starting them against given servers, telling when they are ready, finding their processes,
stopping them. Does not start servers (`tests.services`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Self

from codeherd_schema.broker import Broker
from codeherd_schema.errors import BrokerUnavailable
from codeherd_schema.settings import SharedSettings, load
from tests.services import wait_until

#: Seconds for a worker to load torch and its model on a busy machine.
READY_TIMEOUT_S = 180.0
#: Seconds for any test's jobs.
JOBS_TIMEOUT_S = 240.0
#: Short leases, so that a killed worker's jobs come back soon; still three beats each.
QUICK = {
    "CODEHERD_LEASE_S": "6",
    "CODEHERD_HEARTBEAT_S": "1",
    "CODEHERD_REAP_INTERVAL_S": "0.5",
    "CODEHERD_DISPATCH_INTERVAL_S": "0.1",
    "CODEHERD_REPUBLISH_AFTER_S": "5",
}


class Herd:
    """Launchers and a dispatcher over one database and one broker."""

    def __init__(
        self,
        *,
        database_url: str,
        broker_url: str,
        folder: Path,
        launchers: Mapping[str, str],
        slots: int = 4,
        variables: Mapping[str, str] = QUICK,
        beside: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        """Describe a herd.

        Args:
            database_url: migrated.
            broker_url: any Redis.
            folder: where logs go.
            launchers: `--gpus` of each launcher, by name.
            slots: per worker process.
            variables: further settings, `CODEHERD_*`.
            beside: arguments of further `codeherd` processes, by name.
        """
        clean = {k: v for k, v in os.environ.items() if not k.startswith("CODEHERD_")}
        mine = {"CODEHERD_DATABASE_URL": database_url, "CODEHERD_BROKER_URL": broker_url, **variables}
        self.environment = {**clean, **mine}
        self.settings = load(SharedSettings, environment=mine).settings
        self._folder = folder
        self._launchers = dict(launchers)
        self._slots = slots
        self._beside = {"dispatcher": ("dispatcher",), **beside}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for name, gpus in self._launchers.items():
            options = ["--gpus", gpus, "--slots", str(self._slots), "--threads", "1", "--name", name]
            self._start(name, [sys.executable, "-m", "codeherd_worker", *options])
        for name, arguments in self._beside.items():
            self._start(name, [sys.executable, "-m", "codeherd_producer.cli", *arguments])
        self.broker = Broker(self.settings)
        self._stack.callback(self.broker.close)
        expected = sum(gpus.count(",") + 1 for gpus in self._launchers.values())
        try:
            wait_until(lambda: len(self.worker_names()) == expected, "all workers", timeout_s=READY_TIMEOUT_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for name, process in self._processes.items():
            assert process.wait(60) in (0, -signal.SIGKILL), f"{name}: {self.log(name)}"
        self._stack.close()

    def worker_names(self) -> set[str]:
        """Return the nodes that answer."""
        for name, process in self._processes.items():
            assert process.poll() in (None, -signal.SIGKILL), f"{name} died: {self.log(name)}"
        try:
            return set(self.broker.workers(1.0))
        except BrokerUnavailable:
            return set()

    def kill(self, name: str) -> None:
        """Kill a launcher's workers and the launcher, as a power cut would."""
        launcher = self._processes[name]
        launcher.send_signal(signal.SIGSTOP)
        for pid in children(launcher.pid):
            os.kill(pid, signal.SIGKILL)
        launcher.kill()
        launcher.wait(30)

    def log(self, name: str) -> str:
        """Return what a process has said."""
        return (self._folder / f"{name}.log").read_text(errors="replace")[-4000:]

    def cli(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run the command line in this herd's environment."""
        return subprocess.run(
            [sys.executable, "-m", "codeherd_producer.cli", *arguments],
            input=stdin,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=JOBS_TIMEOUT_S,
            check=False,
        )

    def _start(self, name: str, command: Sequence[str]) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )


def children(pid: int) -> list[int]:
    """Return the process ids of a process's children."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]
