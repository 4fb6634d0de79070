"""Find the processes of one herd on this machine, by `/proc`.

Owns: how a process is recognised, and whose it is: a process of the same user whose settings name the same
database and broker. Does not judge them (`codeherd_producer.liveness`). Where there is no `/proc` (macOS) it
finds nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from codeherd_producer.heartbeat import last_beat
from codeherd_schema.errors import InvalidSetting
from codeherd_schema.settings import SharedSettings, load, user_file

PROC: Final = Path("/proc")
#: Module that is one worker process, and module that is the launcher of several.
_SERVE, _LAUNCHER = "codeherd_worker.serve", "codeherd_worker"
_COMMAND_LINE: Final = "codeherd_producer.cli"
#: Options of the command line that stand before the command and take no value.
_SWITCHES: Final = frozenset({"-q", "--quiet", "--no-color"})


@dataclass(frozen=True, slots=True)
class Process:
    """One process as the kernel sees it."""

    pid: int
    #: `worker`, `launcher`, `dispatcher`, …: what it runs.
    service: str
    #: A worker's name before the `@`; else empty.
    name: str
    #: Whether somebody has stopped it (SIGSTOP, a debugger).
    is_stopped: bool
    #: Whether it has handlers for signals that only a worker with a loaded model has.
    is_loaded: bool
    #: Seconds since it was started.
    age_s: float
    #: Seconds since its loop last turned; None if it never did, or keeps no heartbeat.
    silent_s: float | None


def processes_of(settings: SharedSettings, *, proc: Path = PROC) -> list[Process]:
    """Return this user's processes that have the same database and broker, by process id."""
    found = []
    for folder in sorted(proc.glob("[0-9]*"), key=lambda path: int(path.name)):
        # A process may end while it is looked at; another user's tells nothing.
        with contextlib.suppress(OSError, InvalidSetting):
            process = _look_at(folder, settings)
            if process is not None:
                found.append(process)
    return found


def _look_at(folder: Path, settings: SharedSettings) -> Process | None:
    if int(folder.name) == os.getpid() or folder.stat().st_uid != os.geteuid():
        return None
    arguments = [os.fsdecode(word) for word in (folder / "cmdline").read_bytes().split(b"\0")[:-1]]
    role = role_of(arguments)
    if role is None:
        return None
    service, name, data_dir = role
    if not _is_same_herd(_settings_of(folder, data_dir), settings):
        return None
    status = dict(_fields((folder / "status").read_text(errors="replace")))
    beat = last_beat(folder)
    return Process(
        pid=int(folder.name),
        service=service,
        name=name,
        is_stopped=status["State"][0] in "Tt",
        # A worker takes over SIGQUIT when its model is loaded and it begins to take jobs.
        is_loaded=bool(int(status["SigCgt"], 16) >> (signal.SIGQUIT - 1) & 1),
        age_s=_age_s(folder),
        silent_s=None if beat is None else max(0.0, time.monotonic() - beat),
    )


def role_of(arguments: Sequence[str]) -> tuple[str, str, str | None] | None:
    """Return what a command line runs: service, worker's name, `--data-dir`; None for a stranger's."""
    module = _after(arguments, "-m")
    if module == _SERVE:
        return "worker", _after(arguments, "--name") or "", None
    if module == _LAUNCHER:
        return "launcher", "", None
    if module == _COMMAND_LINE:
        return _command_of(arguments[arguments.index(module) + 1 :])
    # The console script, with or without the interpreter before it.
    for place, word in enumerate(arguments[:4]):
        if Path(word).name == "codeherd":
            return _command_of(arguments[place + 1 :])
    return None


def _command_of(words: Sequence[str]) -> tuple[str, str, str | None] | None:
    data_dir: str | None = None
    rest = iter(words)
    for word in rest:
        if word == "--data-dir":
            data_dir = next(rest, None)
        elif word.startswith("--data-dir="):
            data_dir = word.partition("=")[2]
        elif word not in _SWITCHES:
            return word, "", data_dir
    return None


def _after(arguments: Sequence[str], option: str) -> str | None:
    return next((b for a, b in pairwise(arguments) if a == option), None)


def _settings_of(folder: Path, data_dir: str | None) -> SharedSettings:
    words = (os.fsdecode(word).partition("=") for word in (folder / "environ").read_bytes().split(b"\0"))
    loaded = load(
        SharedSettings,
        flags={"data_dir": data_dir},
        environment={name: value for name, _, value in words},
        project_file=folder / "cwd" / "pyproject.toml",
        user_file=user_file(),
    )
    return loaded.settings


def _is_same_herd(one: SharedSettings, other: SharedSettings) -> bool:
    return (one.broker, one.key_prefix, one.database) == (other.broker, other.key_prefix, other.database)


def _fields(status: str) -> Iterator[tuple[str, str]]:
    for line in status.splitlines():
        name, _, value = line.partition(":")
        yield name, value.strip()


def _age_s(folder: Path) -> float:
    # The second field, the name, may hold spaces and brackets; field 22 is the start in ticks since boot.
    fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
