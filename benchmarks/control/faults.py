"""Show what is left of the jobs when every worker is killed, or Redis loses its data.

    python -m benchmarks.control.faults NAME DATABASE_URL FAULT

Owns: the two faults, and how long the jobs get to come back. All systems are shown at the same time: nothing
here is a matter of milliseconds. Prints a `FaultRecord` as JSON on standard output.

    kill:   jobs run, more wait; all of the system's processes get SIGKILL; it is started again
    flush:  jobs wait; Redis is told FLUSHALL; the system is started
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import redis

from benchmarks.control.contest import Databases
from benchmarks.control.processes import Herd
from benchmarks.control.protocol import CONCURRENCY, Place, System
from benchmarks.control.systems import SYSTEMS, Entry
from benchmarks.control.turn import PATIENCE_S, open_system
from benchmarks.control.work import JOURNAL_VARIABLE, PAUSE_VARIABLE, digest_of, prompts
from tests.services import RedisServer, wait_until

KILL, FLUSH = "kill", "flush"
#: Jobs of a demonstration: three times what runs at once.
JOBS = 3 * CONCURRENCY
#: Seconds that a job lasts, so that it can be caught in the act.
PAUSE_S = 1.0
#: Seconds that the jobs get to come back: twice codeherd's lease.
BOX_S = 60.0

_ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """What one fault left."""

    jobs: int
    #: Results that could be read in the end.
    done: int
    #: Jobs that were started more than once.
    ran_again: int
    #: Seconds from the fault until the last result that came.
    took_s: float


def main() -> None:
    """Show the fault that the command line names."""
    name, database_url, fault = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answers.write(json.dumps(asdict(demonstrate(SYSTEMS[name], database_url, fault))))
    answers.close()


def show(entries: Iterable[Entry], tell: Callable[[str], None]) -> dict[tuple[str, str], FaultRecord]:
    """Return what each fault left of each entry's jobs, by name and fault; failures are left out."""
    cases = [(e, fault) for e in entries if e.shows_faults and e.version for fault in (KILL, FLUSH)]
    found = {}
    with Databases() as databases, contextlib.ExitStack() as stack, ThreadPoolExecutor(len(cases)) as pool:
        urls = [stack.enter_context(databases.new(entry))[0] for entry, _ in cases]
        for case, done in zip(cases, pool.map(_run, cases, urls), strict=True):
            entry, fault = case
            if done.returncode:
                sys.stderr.write(done.stderr[-4000:])
                tell(f"{fault}: {entry.name} failed")
                continue
            record = found[entry.name, fault] = FaultRecord(**json.loads(done.stdout))
            tell(f"{fault}: {entry.name} {record.done} of {record.jobs}")
    return found


def _run(case: tuple[Entry, str], database_url: str) -> subprocess.CompletedProcess[str]:
    entry, fault = case
    words = [entry.name, database_url, fault]
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.control.faults", *words],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=BOX_S + 2 * PATIENCE_S,
        check=False,
    )


def demonstrate(entry: Entry, database_url: str, fault: str) -> FaultRecord:
    """Return what a fault left; changes this process's environment."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        journal = folder / "journal"
        journal.touch()
        os.environ |= {PAUSE_VARIABLE: str(PAUSE_S), JOURNAL_VARIABLE: str(journal)}
        server = stack.enter_context(RedisServer())
        place = Place(server.url, database_url, folder)
        system = open_system(entry, place)
        stack.callback(system.close)
        requests = prompts(fault, JOBS)
        handles = _kill(system, place, requests) if fault == KILL else _flush(system, place, requests)
        struck_at = time.monotonic()
        with Herd(system.commands(), folder):
            last_at, done = struck_at, sum(system.ready(handles))
            while done < JOBS and time.monotonic() < struck_at + BOX_S:
                time.sleep(0.1)
                before, done = done, sum(system.ready(handles))
                if done > before:
                    last_at = time.monotonic()
        counts = _runs(system, journal, dict(zip(requests, handles, strict=True)))
        return FaultRecord(JOBS, done, sum(count > 1 for count in counts), last_at - struck_at)


def _kill(system: System, place: Place, requests: list[str]) -> list[Any]:
    with Herd(system.commands(), place.folder):
        warm = system.submit_many(prompts("warm", CONCURRENCY))
        system.wait(warm, PATIENCE_S)
        handles = system.submit_many(requests)
        # The first ones have ended, so the next ones have begun or are about to.
        wait_until(lambda: any(system.ready(handles)), "the first result", timeout_s=PATIENCE_S)
        time.sleep(PAUSE_S / 2)
    return handles


def _flush(system: System, place: Place, requests: list[str]) -> list[Any]:
    handles = system.submit_many(requests)
    redis.Redis.from_url(place.redis_url).flushall()
    return handles


def _runs(system: System, journal: Path, handles: Mapping[str, Any]) -> list[int]:
    written = journal.read_text(encoding="ascii").split()
    counted = [(prompt, system.runs(handle)) for prompt, handle in handles.items()]
    return [written.count(digest_of(prompt)) if count is None else count for prompt, count in counted]


if __name__ == "__main__":
    main()
