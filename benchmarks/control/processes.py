"""Start a system's processes, and read from the kernel what processes have cost.

Owns: sessions of processes and their end, `/proc`. Linux only. Does not know what the processes do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from benchmarks.control.protocol import Command

_ROOT = Path(__file__).parent.parent.parent
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
#: Seconds for killed processes to disappear.
_KILL_TIMEOUT_S = 30.0


class Herd:
    """Processes that start together and die together."""

    def __init__(self, commands: Iterable[Command], folder: Path) -> None:
        """Describe them; their output goes to `folder`."""
        self._commands = tuple(commands)
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CODEHERD_")}
        for command in self._commands:
            with self._log(command.name).open("ab") as log:
                self._processes[command.name] = subprocess.Popen(
                    list(command.arguments),
                    cwd=_ROOT,
                    env={**clean, **command.variables},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    # A session of its own finds children that change their group or lose their parent.
                    start_new_session=True,
                )
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pids(self) -> list[int]:
        """The processes that were started, without their children."""
        return [process.pid for process in self._processes.values()]

    def check(self) -> None:
        """Make sure that all run.

        Raises:
            RuntimeError: one ended by itself; the message holds its last lines.
        """
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with {process.returncode}:\n{self.tail(name)}")

    def tail(self, name: str) -> str:
        """Return the last lines that a process wrote."""
        path = self._log(name)
        return path.read_text(errors="replace")[-3000:] if path.exists() else ""

    def tails(self) -> str:
        """Return the last lines of every process."""
        return "\n".join(f"--- {name}\n{self.tail(name)}" for name in self._processes)

    def kill(self) -> None:
        """End every process and every child, as a power cut would."""
        sessions = set(self.pids)
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        while alive := [pid for pid, fields in _all() if fields.session in sessions and not fields.is_dead]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes that cannot be killed: {alive}")
            for pid in alive:
                _kill(pid)
            time.sleep(0.01)
        for process in self._processes.values():
            process.wait()
        self._processes.clear()

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"


def cpu_s(roots: Iterable[int]) -> float:
    """Return the seconds on all cores of these processes and their children, ended ones included."""
    return sum(fields.cpu_s for _, fields in _trees(roots))


def memory_mb(roots: Iterable[int]) -> float:
    """Return the memory of these processes and their children, pages that several share counted once."""
    total_kb = 0
    for pid, _ in _trees(roots):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        except (FileNotFoundError, ProcessLookupError):
            continue
        total_kb += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total_kb / 1024


class _Stat:
    """The fields of `/proc/PID/stat` that matter here (proc(5))."""

    def __init__(self, text: str) -> None:
        # The name, in brackets, may hold anything.
        words = text.rpartition(")")[2].split()
        self.is_dead = words[0] in "ZX"
        self.parent, self.session = int(words[1]), int(words[3])
        # utime, stime, and the same of children that were waited for.
        self.cpu_s = sum(int(word) for word in words[11:15]) / _TICKS_PER_S


def _all() -> list[tuple[int, _Stat]]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found.append((int(path.parent.name), _Stat(path.read_text(errors="replace"))))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _trees(roots: Iterable[int]) -> list[tuple[int, _Stat]]:
    everything = dict(_all())
    children: dict[int, list[int]] = {}
    for pid, fields in everything.items():
        children.setdefault(fields.parent, []).append(pid)
    found, waiting = [], list(roots)
    while waiting:
        pid = waiting.pop()
        if pid in everything:
            found.append((pid, everything[pid]))
            waiting += children.get(pid, ())
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
