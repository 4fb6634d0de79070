"""A herd of workers with null engines, to be killed, frozen and cut off: for tests of delivery.

Owns: starting, killing, freezing and restarting each process by name, and what must hold at the end of
every test (`check`). Does not decide what goes wrong: tests do, and the orders and failpoints of
`tests.null_engine` and `tests.null_worker`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from codeherd_producer.client import Client, Job
from codeherd_schema.broker import Broker
from codeherd_schema.database import Database
from codeherd_schema.errors import BrokerUnavailable, DatabaseUnavailable
from codeherd_schema.requests import GenerateRequest, Sampling
from codeherd_schema.settings import SharedSettings, load
from codeherd_schema.states import FINAL_STATES, JobState
from codeherd_schema.store import Store
from tests.null_worker import FAILPOINTS, STEP_S
from tests.services import wait_until

#: Seconds for a process to start, and for any test's jobs, on a busy machine.
READY_TIMEOUT_S, JOBS_TIMEOUT_S = 120.0, 120.0
#: Short leases, so that a lost worker's jobs come back soon; still three beats each.
QUICK = {
    "CODEHERD_LEASE_S": "3",
    "CODEHERD_HEARTBEAT_S": "0.5",
    "CODEHERD_REAP_INTERVAL_S": "0.3",
    "CODEHERD_DISPATCH_INTERVAL_S": "0.1",
    "CODEHERD_REPUBLISH_AFTER_S": "5",
    "CODEHERD_POLL_INTERVAL_S": "0.2",
    "CODEHERD_WORKER_DRAIN_TIMEOUT_S": "5",
}


class NullHerd:
    """Processes over one database and one broker; each has a name."""

    def __init__(
        self,
        *,
        database_url: str,
        broker_url: str,
        folder: Path,
        workers: Collection[str] = ("one",),
        dispatchers: Collection[str] = ("dispatcher",),
        slots: int = 4,
        step_s: float = 0.0,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Describe a herd.

        Args:
            database_url: migrated.
            broker_url: any Redis.
            folder: where logs, failpoints and holds go.
            workers: launchers to start, one worker process each.
            dispatchers: dispatchers to start.
            slots: per worker process.
            step_s: of the null engines.
            variables: further settings, `CODEHERD_*`, beside `QUICK`.
        """
        self.folder = folder
        self.failpoints = folder / "failpoints"
        self.failpoints.mkdir(exist_ok=True)
        mine = {
            **QUICK,
            "CODEHERD_DATABASE_URL": database_url,
            "CODEHERD_BROKER_URL": broker_url,
            "CODEHERD_WORKER_SLOTS": str(slots),
            FAILPOINTS: str(self.failpoints),
            STEP_S: str(step_s),
            **variables,
        }
        clean = {k: v for k, v in os.environ.items() if not k.startswith("CODEHERD_")}
        self.environment = clean | mine
        shared = {k: v for k, v in mine.items() if not k.startswith("CODEHERD_WORKER_")}
        self.settings = load(SharedSettings, environment=shared).settings
        self._slots = slots
        self._workers, self._dispatchers = tuple(workers), tuple(dispatchers)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._starts: dict[str, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.broker = Broker(self.settings)
        self._stack.callback(self.broker.close)
        self.store = Store.open(self.settings.database)
        self._stack.callback(self.store.close)
        self.client = self._stack.enter_context(Client(self.settings))
        try:
            for name in self._dispatchers:
                self.start_dispatcher(name)
            for name in self._workers:
                self.start_worker(name)
            self.wait_ready(self._workers)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # Frozen ones die too, and no child outlives its launcher.
        for name in list(self._processes):
            self.kill(name)
        self._stack.close()

    def start_worker(self, name: str, **variables: str) -> None:
        """Start a launcher with one worker process; does not wait for it.

        Args:
            name: before the `@`.
            variables: further settings of this start alone, `CODEHERD_*`.
        """
        command = [sys.executable, "-m", "tests.null_worker", "--gpus", "cpu", "--name", name]
        self._start(name, command, variables)

    def start_dispatcher(self, name: str) -> None:
        """Start a dispatcher; does not wait for it."""
        self._start(name, [sys.executable, "-m", "codeherd_producer.cli", "dispatcher"])

    def mend(self) -> None:
        """Undo what a test has done: no holds, no failpoints, all workers up and every job ended."""
        for path in (*self.folder.glob("hold*"), *self.failpoints.iterdir()):
            path.unlink()
        for name in self._workers:
            if name in self._processes and self._log(name, self._starts[name] - 1).count("worker_died") > 1:
                self.kill(name)
            if name not in self._processes:
                self.start_worker(name)
            else:
                self.thaw(name)
        self.wait_ready(self._workers)
        running = [
            job.id for state in (JobState.QUEUED, JobState.RUNNING) for job in self.store.list(state=state)
        ]
        for job_id in running:
            self.client.cancel(job_id)
        self.wait_state(running, *FINAL_STATES)

    def wait_ready(self, workers: Iterable[str]) -> None:
        """Return when all of these answer to remote control, which they do once they take jobs."""
        wanted = set(workers)
        wait_until(
            lambda: wanted <= {name.partition("@")[0] for name in self.figures()},
            f"{', '.join(sorted(wanted))} to take jobs",
            timeout_s=READY_TIMEOUT_S,
        )

    def figures(self) -> dict[str, dict[str, Any]]:
        """Return what each worker says of itself, by `NAME@HOST`; silent ones are left out."""
        try:
            return self.broker.workers(1.0)
        except BrokerUnavailable:
            return {}

    def pids(self, name: str) -> list[int]:
        """Return the process ids of a launcher's workers, or of a dispatcher itself."""
        pid = self._processes[name].pid
        return [pid] if name in self._dispatchers else children(pid)

    def launcher_pid(self, name: str) -> int:
        """Return the process id of what was started under this name."""
        return self._processes[name].pid

    def worker_of(self, job_id: str) -> str:
        """Return the name of the worker that holds a job, or held it last."""
        job = self.store.get(job_id)
        assert job is not None
        return (job.worker_id or "").partition("@")[0]

    def outcomes(self, job_id: str) -> list[str]:
        """Return how each attempt at a job has ended, the first first."""
        return [attempt.outcome for attempt in self.store.attempts(job_id)]

    def strays(self) -> list[int]:
        """Return the processes of this herd that are neither started here nor children of those."""
        mine = {process.pid for process in self._processes.values()}
        mine |= {child for pid in mine for child in children(pid)}
        return [pid for pid in _processes_with(f"{FAILPOINTS}={self.failpoints}") if pid not in mine]

    def kill(self, name: str) -> None:
        """Kill all processes of this name, as a power cut would."""
        process = self._processes.pop(name)
        if process.poll() is None:
            # First the launcher stands still, so that it starts no other worker.
            process.send_signal(signal.SIGSTOP)
            for pid in children(process.pid):
                _send(pid, signal.SIGKILL)
            process.kill()
        process.wait(30)

    def kill_workers(self, name: str) -> None:
        """Kill the worker processes of a launcher, which will start others."""
        for pid in children(self._processes[name].pid):
            _send(pid, signal.SIGKILL)

    def freeze(self, name: str) -> None:
        """Stop the workers of a launcher, or a dispatcher, wherever they are but in a write to SQLite."""
        while True:
            for pid in self.pids(name):
                _send(pid, signal.SIGSTOP)
            if self.is_writable():
                return
            self.thaw(name)
            # Stopped again at once, it would still be in the same write.
            wait_until(self.is_writable, f"{name} to end a write")

    def is_writable(self) -> bool:
        """Whether others can write: what stops in the middle of a write to SQLite holds the lock of all."""
        # Well within a lease: nobody else can renew one meanwhile.
        database = Database.open(self.settings.database, timeout_s=0.5)
        try:
            with database.begin():
                return True
        except DatabaseUnavailable:
            return False
        finally:
            database.close()

    def thaw(self, name: str) -> None:
        """Let frozen ones go on."""
        for pid in self.pids(name):
            _send(pid, signal.SIGCONT)

    def signal(self, name: str, number: int) -> None:
        """Send a signal to the launcher or dispatcher."""
        self._processes[name].send_signal(number)

    def wait_exit(self, name: str, *, timeout_s: float = READY_TIMEOUT_S) -> int:
        """Wait until the process of this name has ended by itself; return its exit status."""
        status = self._processes[name].wait(timeout_s)
        # Not before: one that does not end is still to be killed.
        del self._processes[name]
        return status

    def has_ended(self, name: str) -> bool:
        """Return whether what was started under this name has ended by itself."""
        return self._processes[name].poll() is not None

    def log(self, name: str) -> str:
        """Return what the processes of this name have said since they were first started."""
        return "".join(self._log(name, start) for start in range(self._starts.get(name, 0)))

    def last_log(self, name: str) -> str:
        """Return what was said since the last start, or since a worker of that start was last ready."""
        return self._log(name, self._starts[name] - 1).rpartition("worker_ready")[2]

    def hold(self, name: str = "hold") -> Path:
        """Make a file that holds the jobs whose prompts are `held(path)`; delete it to let them go on."""
        path = self.folder / name
        path.touch()
        return path

    def failpoint(self, name: str, text: str = "") -> Path:
        """Make a failpoint; what is to happen once removes it as it happens."""
        path = self.failpoints / name
        path.write_text(text)
        return path

    def wait_state(self, job_ids: Iterable[str], *states: JobState) -> None:
        """Return when every job is in one of `states`."""
        wanted = set(job_ids)
        wait_until(
            lambda: all(job.state in states for job in self.store.get_many(wanted).values()),
            f"{len(wanted)} jobs to be {' or '.join(states)}",
            timeout_s=JOBS_TIMEOUT_S,
        )

    def prove_each_consumes(self, names: Collection[str]) -> list[str]:
        """Fill every slot of these workers, which must be all and idle; return the jobs that did, ended."""
        hold = self.hold("every-slot")
        count = self._slots * len(names)
        jobs = self.client.submit_many(GenerateRequest(prompt=held(hold, f"{n}")) for n in range(count))
        ids = [job.id for job in jobs]
        # No worker has more slots, so as many run on each.
        self.wait_state(ids, JobState.RUNNING)
        hold.unlink()
        self.wait_state(ids, JobState.SUCCEEDED)
        return ids

    def check(self, job_ids: Collection[str]) -> None:
        """Assert what holds of every job, whatever happened to it."""
        rows, results = self.store.get_many(job_ids), self.store.results(job_ids)
        assert len(rows) == len(set(job_ids)), "a job is lost"
        for job_id, row in rows.items():
            assert row.state in FINAL_STATES, f"{job_id} is {row.state}"
            assert (job_id in results) == (row.state is JobState.SUCCEEDED)
            history = self.store.attempts(job_id)
            ended_well = [a for a in history if a.outcome == "succeed"]
            assert len(ended_well) == (row.state is JobState.SUCCEEDED)
            if ended_well:
                assert (results[job_id].attempt, ended_well[0].attempt) == (row.attempt, row.attempt)
                assert history[-1] == ended_well[0], "something ended after the success"

    def _log(self, name: str, start: int) -> str:
        return (self.folder / f"{name}.{start}.log").read_text(errors="replace")

    def _start(
        self, name: str, command: list[str], variables: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        assert name not in self._processes, f"{name} runs already"
        count = self._starts.get(name, 0)
        with (self.folder / f"{name}.{count}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env={**self.environment, **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._starts[name] = count + 1


def submit(herd: NullHerd, *prompts: str) -> list[Job]:
    """Submit a short job for each prompt."""
    sampling = Sampling(max_new_tokens=4)
    return herd.client.submit_many([GenerateRequest(prompt=text, sampling=sampling) for text in prompts])


def ids(jobs: Sequence[Job]) -> list[str]:
    """Return the ids of jobs."""
    return [job.id for job in jobs]


def held(path: Path, text: str = "") -> str:
    """Return a prompt whose job gets no token while `path` exists."""
    return f"#! hold {path}\n{text}"


def is_stopped(pid: int) -> bool:
    """Whether a process stands still (SIGSTOP)."""
    # The name before the state may hold spaces and brackets.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T")


def _send(pid: int, number: int) -> None:
    # It may have died of something else a moment ago.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def children(pid: int) -> list[int]:
    """Return the process ids of a process's children."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(word) for word in text.split()]


def _processes_with(variable: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # Empty for one that has ended and waits to be noticed.
            environment = (folder / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if variable.encode() in environment.split(b"\0"):
            found.append(int(folder.name))
    return found
