"""Child processes that end with their parent, are started again when they die, and stop in order.

Owns: starting, watching, restarting with back-off and stopping. Does not know what the children do
(`codeherd_producer.local` does).
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from codeherd_schema.errors import ServiceUnavailable

#: Seconds before a child that died is started again: doubled each time, up to the second figure.
BACKOFF_S: Final = (0.5, 30.0)
#: Seconds after which a child counts as well, and its next death as the first.
WELL_AFTER_S: Final = 60.0
#: Seconds between the second request to stop and the kill.
HURRY_S: Final = 5.0
#: Linux: the signal that a process gets when its parent dies (prctl(2)).
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True, slots=True)
class Command:
    """What to run."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    #: Seconds that it may take to end after SIGTERM before it is killed; None is as long as it likes.
    grace_s: float | None
    #: Exit statuses after which another start would fail in the same way.
    hopeless: frozenset[int] = frozenset()


class Child:
    """One command that is kept running."""

    def __init__(self, command: Command, say: Callable[[str], None]) -> None:
        """Remember the command; `start` runs it."""
        self.command = command
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._deaths = 0
        self._due_at = 0.0
        self._is_asked = False

    @property
    def pid(self) -> int | None:
        """The running process, if there is one."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Run the command. Call from the main thread: Linux counts a thread's end as the parent's."""
        self._started_at = time.monotonic()
        self._process = subprocess.Popen(  # noqa: S603 -- our own commands, no shell
            list(self.command.arguments),
            env=dict(self.command.environment),
            stdin=subprocess.DEVNULL,
            # Data is the parent's business; whatever a child says is talk.
            stdout=sys.stderr,
            # A terminal sends Ctrl-C to the whole group; the order of stopping is ours to choose.
            process_group=0,
            preexec_fn=_end_with(os.getpid()) if sys.platform == "linux" else None,
        )

    def watch(self, now: float) -> None:
        """Notice a death, and start the command again when its back-off is over.

        Raises:
            ServiceUnavailable: it ended with a status that another start would not mend.
        """
        if self._process is not None:
            status = self._process.poll()
            if status is None:
                return
            self._process = None
            if status in self.command.hopeless:
                raise ServiceUnavailable(f"{self.command.name} cannot start", hint="its own error is above")
            self._deaths = 1 if now - self._started_at > WELL_AFTER_S else self._deaths + 1
            pause_s = backoff_s(self._deaths)
            self._due_at = now + pause_s
            self._say(f"{self.command.name} {ending(status)}; starting it again in {pause_s:g} s")
        elif now >= self._due_at:
            self.start()

    def ask_to_stop(self) -> None:
        """Ask the process to end, once, and do not wait for it."""
        if self._process is not None and not self._is_asked:
            self._is_asked = True
            self._process.terminate()

    def stop(self, *, in_a_hurry: Callable[[], bool]) -> None:
        """Ask the process to end and wait for it; kill it when its grace is over.

        Args:
            in_a_hurry: looked at while waiting; true asks once more and leaves `HURRY_S` seconds.
        """
        if self._process is None:
            return
        self.ask_to_stop()
        grace_s = self.command.grace_s
        ends_at = math.inf if grace_s is None else time.monotonic() + grace_s
        hurried = False
        while not _ended_within(self._process, 0.1):
            if in_a_hurry() and not hurried:
                hurried = True
                self._process.terminate()
                ends_at = min(ends_at, time.monotonic() + HURRY_S)
            if time.monotonic() > ends_at:
                self._say(f"{self.command.name} does not stop; killing it")
                self._process.kill()
                ends_at = math.inf
        self._process = None


def backoff_s(deaths: int) -> float:
    """Return the seconds to wait before the next start, after so many deaths in a row."""
    first, most = BACKOFF_S
    return float(min(most, first * 2 ** min(deaths - 1, 16)))


def ending(status: int) -> str:
    """Say in words how a process ended."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _ended_within(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end_with(parent: int) -> Callable[[], None]:
    """Return what a new child must do so that it cannot outlive `parent`, whatever kills that."""
    # Loaded before the fork: the child must do as little as possible.
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return prepare
