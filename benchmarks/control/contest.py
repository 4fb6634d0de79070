"""Let systems take turns, each with workers and a Redis of its own.

Owns: whose turn it is, the shared PostgreSQL server, and an empty database for each turn. Between its turns a
system does not run at all. Does not know what is measured (`benchmarks.control.turn`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.control.protocol import Scale
from benchmarks.control.systems import POSTGRESQL, Entry
from benchmarks.control.turn import TurnRecord
from tests.services import PostgresServer

#: Seconds that one turn may take.
TURN_TIMEOUT_S = 900.0

_ROOT = Path(__file__).parent.parent.parent


@dataclass(slots=True)
class Outcome:
    """What one system did."""

    entry: Entry
    turns: list[TurnRecord] = field(default_factory=list)
    #: Why there are none: not installed, or what went wrong.
    missing: str | None = None


class Databases:
    """Empty databases; PostgreSQL is started when it is needed first."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._server: PostgresServer | None = None

    def __enter__(self) -> Databases:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def new(self, entry: Entry) -> Iterator[tuple[str, int]]:
        """Give the URL of a database for this entry, and the process id of its server or 0."""
        if entry.results != POSTGRESQL:
            with tempfile.TemporaryDirectory() as folder:
                yield f"sqlite:///{folder}/results.db", 0
            return
        if self._server is None:
            self._server = self._stack.enter_context(PostgresServer())
        pid_file = self._server.folder / "data" / "postmaster.pid"
        with self._server.database() as url:
            yield url, int(pid_file.read_text(encoding="ascii").split()[0])


def hold(
    entries: Iterable[Entry], scale: Scale, *, rounds: int, tell: Callable[[str], None]
) -> tuple[list[Outcome], float]:
    """Give every system `rounds` turns; return what they did, and the load average before the first one.

    A system that is not installed, or fails, has no turns; its outcome's `missing` says why.
    """
    outcomes = [Outcome(entry, missing=None if entry.version else "not installed") for entry in entries]
    load_average = os.getloadavg()[0]
    with Databases() as databases:
        for number in range(1, rounds + 1):
            # Once is enough for memory, and it takes long.
            part = scale if number == 1 else replace(scale, backlog=0)
            for outcome in outcomes:
                if outcome.missing is None:
                    _take_turn(outcome, part, databases)
                    tell(f"round {number}: {_says(outcome)}")
    return outcomes, load_average


def _take_turn(outcome: Outcome, scale: Scale, databases: Databases) -> None:
    entry = outcome.entry
    with databases.new(entry) as (url, server_pid):
        words = [entry.name, url, str(server_pid), json.dumps(scale.to_json())]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.control.turn", *words],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=TURN_TIMEOUT_S,
            check=False,
        )
    if done.returncode:
        sys.stderr.write(done.stderr[-6000:])
        outcome.missing = f"failed: {(done.stderr.strip() or 'without a word').splitlines()[-1][:200]}"
        # A figure of a system that failed later on is no figure.
        outcome.turns.clear()
    else:
        outcome.turns.append(TurnRecord.from_json(json.loads(done.stdout)))


def _says(outcome: Outcome) -> str:
    name = outcome.entry.name
    if outcome.missing is not None:
        return f"{name} {outcome.missing}"
    return f"{name} {outcome.turns[-1].many_jobs_per_s:.0f} jobs/s"
