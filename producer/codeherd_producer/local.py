"""`codeherd up`: a whole stack in one terminal, for one machine.

Owns: which processes a stack has, their order at start and stop, and when it counts as ready. Does
not know how a process is kept alive (`codeherd_producer.processes`) or what any of them does.

    redis ──> database schema ──> dispatcher, flower, workers ──> ready
    stop: workers drain ──> flower ──> dispatcher ──> redis
"""

from __future__ import annotations

import fcntl
import os
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from codeherd_producer.embedded import answers, find_redis_server, server_command, socket_path
from codeherd_producer.processes import Child, Command
from codeherd_schema.broker import Broker
from codeherd_schema.errors import BrokerUnavailable, ConfigurationError, ServiceUnavailable
from codeherd_schema.settings import SharedSettings

#: Seconds for the embedded Redis to answer; a large append-only file takes a while to read.
REDIS_START_S: Final = 60.0
#: First word of the workers' names.
WORKER: Final = "worker"
#: Seconds for a process to end; a worker bounds its own drain.
GRACE_S: Final = 10.0
#: Statuses of our own commands that come from a wrong setting or option.
WRONG_USE: Final = frozenset({2})
#: The worker's launcher restarts its processes itself: it fails only when that is hopeless. One that was told
#: to stop from outside ends well, and is started again.
WORKER_HOPELESS: Final = frozenset({1, 2})


@dataclass(frozen=True, slots=True)
class Plan:
    """What one `codeherd up` runs."""

    workers: int
    #: Options of `codeherd worker`, as they were given.
    worker_arguments: tuple[str, ...]
    flower: bool


class Stack:
    """The processes of one stack, from the first to the last."""

    def __init__(
        self,
        settings: SharedSettings,
        plan: Plan,
        environment: Mapping[str, str],
        say: Callable[[str], None],
    ) -> None:
        """Plan the processes; `run` starts them."""
        self._settings = settings
        self._say = say
        self._plan = plan
        self._environment = {**environment, "CODEHERD_DATA_DIR": str(settings.data_dir.absolute())}
        self._redis = self._embedded_redis()
        #: In the order of starting; stopped the other way round.
        self._children: list[Child] = []
        self._signals = 0

    def run(self, upgrade: Callable[[], object]) -> None:
        """Start everything, keep it alive until SIGINT or SIGTERM, then stop it in order.

        Args:
            upgrade: brings the database schema up to date.

        Raises:
            ServiceUnavailable: the embedded Redis does not come up.
        """
        with self._heeding_signals() as wait:
            try:
                self._start(wait, upgrade)
                self._watch(wait)
            finally:
                self._stop()

    def commands(self) -> list[Command]:
        """Return everything that runs beside Redis, in the order of starting; says where Flower is."""
        # `-P` keeps the current folder off the path: it may hold anybody's modules.
        python = (sys.executable, "-P", "-m")
        own = (*python, "codeherd_producer.cli")
        commands = [Command("dispatcher", (*own, "dispatcher"), self._environment, GRACE_S, WRONG_USE)]
        if self._plan.flower:
            environment = self._flower_environment()
            commands.append(Command("flower", (*own, "flower"), environment, GRACE_S, WRONG_USE))
        for number in range(self._plan.workers):
            arguments = (*python, "codeherd_worker", *self._plan.worker_arguments)
            if self._plan.workers > 1:
                arguments += ("--name", f"up{number}")
            commands.append(
                Command(f"{WORKER} {number}", arguments, self._environment, None, WORKER_HOPELESS)
            )
        return commands

    def _start(self, wait: Callable[[float], None], upgrade: Callable[[], object]) -> None:
        if self._redis is not None:
            self._add(self._redis)
            self._await_redis(wait)
        upgrade()
        for command in self.commands():
            if not self._signals:
                self._add(command)

    def _await_redis(self, wait: Callable[[float], None]) -> None:
        path = socket_path(self._settings.data_dir)
        ends_at = time.monotonic() + REDIS_START_S
        while not self._signals and not answers(path):
            if time.monotonic() > ends_at:
                raise ServiceUnavailable(
                    f"the embedded Redis does not answer after {REDIS_START_S:g} s",
                    hint=f"`{self._settings.data_dir / 'redis.log'}` may say why",
                )
            wait(0.05)
            self._children[0].watch(time.monotonic())

    def _watch(self, wait: Callable[[float], None]) -> None:
        ready = False
        with _broker(self._settings) as broker:
            while not self._signals:
                now = time.monotonic()
                for child in self._children:
                    child.watch(now)
                if ready:
                    wait(1.0)
                elif self._workers_answer(broker):
                    ready = True
                    self._say("ready: `codeherd submit` in another terminal; Ctrl-C here stops everything")
                else:
                    wait(0.2)

    def _workers_answer(self, broker: Broker) -> bool:
        # A worker answers from the moment it takes jobs, which is after its model is loaded.
        with suppress(BrokerUnavailable):
            return len(broker.workers(timeout_s=0.5)) >= self._plan.workers
        return False

    def _stop(self) -> None:
        if self._children:
            self._say("stopping: running jobs may finish; Ctrl-C again stops at once")
        asked = max(self._signals, 1)
        # All workers drain at the same time, and everything they need is still there.
        for child in self._children:
            if child.command.name.startswith(WORKER):
                child.ask_to_stop()
        for child in reversed(self._children):
            child.stop(in_a_hurry=lambda: self._signals > asked)
        self._say("stopped")

    def _add(self, command: Command) -> None:
        child = Child(command, self._say)
        child.start()
        self._children.append(child)

    @contextmanager
    def _heeding_signals(self) -> Iterator[Callable[[float], None]]:
        """Count SIGINT and SIGTERM; give a sleep that any signal ends, a child's death included."""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        heeded = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)

        # A plain count: a lock could be held by the very code that the signal interrupts.
        def count(number: int, _frame: object) -> None:
            self._signals += number != signal.SIGCHLD

        def wait(timeout_s: float) -> None:
            if select.select([reader], [], [], timeout_s)[0]:
                with suppress(BlockingIOError):
                    os.read(reader, 4096)

        before = {number: signal.signal(number, count) for number in heeded}
        old_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            yield wait
        finally:
            signal.set_wakeup_fd(old_writer)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(reader)
            os.close(writer)

    def _embedded_redis(self) -> Command | None:
        if self._settings.broker_url is not None:
            return None
        arguments = server_command(find_redis_server(), self._settings.data_dir)
        return Command("redis", arguments, self._environment, GRACE_S)

    def _flower_environment(self) -> Mapping[str, str]:
        settings = self._settings
        # Chosen here, so that a restarted Flower is found where the first one was.
        port = _free_port(settings.flower_address, settings.flower_port)
        password = settings.flower_password or secrets.token_urlsafe(12)
        shown = "as it is set" if settings.flower_password else f"`{password}`"
        url = f"http://{settings.flower_address}:{port}"
        self._say(f"flower: {url}, user `{settings.flower_user}`, password {shown}")
        # By the environment: the arguments of a process are for all to see.
        own = {"CODEHERD_FLOWER_PORT": str(port), "CODEHERD_FLOWER_PASSWORD": str(password)}
        return {**self._environment, **own}


@contextmanager
def only_stack(data_dir: Path) -> Iterator[None]:
    """Hold the one lock on a data folder.

    Raises:
        ConfigurationError: another stack holds it.
    """
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (data_dir / "up.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigurationError(
                f"`codeherd up` runs on `{data_dir}` already (process {lock.read().strip() or 'unknown'})",
                hint="stop it first, or choose another folder with --data-dir",
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


@contextmanager
def _broker(settings: SharedSettings) -> Iterator[Broker]:
    broker = Broker(settings)
    try:
        yield broker
    finally:
        broker.close()


def _free_port(address: str, port: int) -> int:
    """Return `port` if nothing listens on it, or any free one for 0.

    Raises:
        ConfigurationError: something does.
    """
    try:
        with socket.create_server((address, port)) as server:
            return int(server.getsockname()[1])
    except OSError as err:
        raise ConfigurationError(
            f"Flower cannot listen on {address}:{port}: {err.strerror or err}",
            hint="--flower-port 0 takes any free port, --no-flower leaves Flower out",
        ) from err
