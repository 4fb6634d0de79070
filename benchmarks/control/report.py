"""Show a run as tables for readers and as rows for machines.

Owns: the words, columns and fields, the targets, and the medians over the turns. Does not know how anything
was measured (`benchmarks.control.turn`).
"""

from __future__ import annotations

import importlib.metadata
import platform
import sqlite3
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from benchmarks.control.contest import Outcome
from benchmarks.control.faults import BOX_S, FLUSH, JOBS, KILL, PAUSE_S, FaultRecord
from benchmarks.control.polling import LONG_PAUSE_S
from benchmarks.control.protocol import CONCURRENCY, Scale
from benchmarks.control.systems import OURS, PLAIN_CELERY, POSTGRESQL, REDIS, Entry
from benchmarks.control.turn import Backlog, TurnRecord
from benchmarks.control.work import PROMPT_CHARS
from benchmarks.report import machine
from tests.services import find_postgres_folder, find_redis_server

#: Jobs per second, submitted together.
BULK_TARGET = 10_000.0
#: How many times plain Celery's end-to-end jobs per second ours must be, with results in the same database.
END_TO_END_TARGET = 1.0
#: Median seconds from submission to start, when nothing else is to be done.
START_TARGET_S = 0.050

#: A column with a ratio to ours: its head, how a figure is taken from a turn, how it is written.
_COLUMNS: tuple[tuple[str, Callable[[TurnRecord], float], str], ...] = (
    ("submit, single, jobs/s", lambda t: t.single_jobs_per_s, "{:.0f}"),
    ("submit, bulk, jobs/s", lambda t: t.bulk_jobs_per_s, "{:.0f}"),
    ("end to end, jobs/s", lambda t: t.many_jobs_per_s, "{:.1f}"),
    ("read back, jobs/s", lambda t: t.read_jobs_per_s, "{:.0f}"),
    ("start p50, ms", lambda t: 1000 * t.start_p50_s, "{:.1f}"),
    ("start p99, ms", lambda t: 1000 * t.start_p99_s, "{:.1f}"),
    ("CPU ms/job: workers", lambda t: t.worker_cpu_ms, "{:.2f}"),
    ("servers", lambda t: t.server_cpu_ms, "{:.2f}"),
    ("client", lambda t: t.client_cpu_ms, "{:.2f}"),
)

_VERSIONS = (
    "codeherd", "celery", "kombu", "billiard", "redis", "sqlalchemy", "psycopg",
    "rq", "dramatiq", "procrastinate",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that one call measured."""

    day: date
    scale: Scale
    rounds: int
    #: Of the last minute, before the first turn.
    load_average: float
    outcomes: tuple[Outcome, ...]
    #: By system and fault.
    faults: Mapping[tuple[str, str], FaultRecord]


def document(run: Run) -> str:
    """Return the whole run as Markdown."""
    parts = [
        f"# codeherd's queue and its peers, jobs that compute nothing, {run.day.isoformat()}",
        _facts(run),
        "## Speed and cost",
        _speeds(run),
        f"## {run.scale.backlog} queued",
        _backlogs(run),
        "## What is promised",
        _promises(run),
    ]
    if run.faults:
        parts += ["## What two faults left", _faults(run)]
    return "\n\n".join([*parts, "## Targets", targets(run), "## How to read this", _notes(run.scale)]) + "\n"


def rows(run: Run) -> list[dict[str, Any]]:
    """Return one row per system that was measured."""
    return [_row(run, outcome) for outcome in run.outcomes if outcome.turns]


def targets(run: Run) -> str:
    """Return what was aimed at and what was measured, as a Markdown table."""
    turns = {outcome.entry.name: outcome.turns for outcome in run.outcomes if outcome.turns}
    lines = ["| codeherd | target | measured | |", "|---|---|---|---|"]
    for entry in OURS:
        if entry.name not in turns:
            continue
        mine = turns[entry.name]
        bulk = _median(mine, lambda t: t.bulk_jobs_per_s)
        start_s = _median(mine, lambda t: t.start_p50_s)
        lines += [
            _target(
                entry, "bulk submit", f"at least {BULK_TARGET:.0f} jobs/s", f"{bulk:.0f}", bulk >= BULK_TARGET
            ),
            _target(
                entry,
                "idle start p50",
                f"under {1000 * START_TARGET_S:.0f} ms",
                f"{1000 * start_s:.1f} ms",
                start_s < START_TARGET_S,
            ),
        ]
        for peer in PLAIN_CELERY:
            if peer.results == entry.results and peer.name in turns:
                ratio = _median(mine, _end_to_end) / _median(turns[peer.name], _end_to_end)
                is_met = ratio >= END_TO_END_TARGET
                what = f"end to end against {peer.name}"
                lines.append(
                    _target(entry, what, f"at least {END_TO_END_TARGET:g}x", f"{ratio:.2f}x", is_met)
                )
    return "\n".join(lines)


def reference_of(entry: Entry) -> Entry:
    """Return which of ours an entry is compared with: results in the same database, if it has one."""
    wanted = POSTGRESQL if entry.results == REDIS else entry.results
    return next(ours for ours in OURS if ours.results == wanted)


def versions() -> dict[str, str]:
    """Return the versions of everything that takes part; `-` is not installed."""
    found = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    for name in _VERSIONS:
        try:
            found[name if name != "redis" else "redis-py"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    found["redis-server"] = _said_by(str(find_redis_server())).split("v=")[1].split()[0]
    found["postgresql"] = _said_by(str(find_postgres_folder() / "postgres")).split()[2]
    return found


def _said_by(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout


def _speeds(run: Run) -> str:
    heads = [
        "system",
        "version",
        *(head for head, _, _ in _COLUMNS),
        "lowest to highest end to end",
        "promise",
    ]
    by_name = {outcome.entry.name: outcome for outcome in run.outcomes}
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for outcome in run.outcomes:
        entry = outcome.entry
        if not outcome.turns:
            lines.append(
                _line([entry.name, entry.version or "-", outcome.missing or "-", *["-"] * (len(heads) - 3)])
            )
            continue
        reference = by_name.get(reference_of(entry).name)
        cells = [_name(entry, run.scale), str(entry.version)]
        for _, take, form in _COLUMNS:
            value = _median(outcome.turns, take)
            ours = _median(reference.turns, take) if reference is not None and reference.turns else 0.0
            cells.append(form.format(value) + (f" ({value / ours:.2f}x)" if ours else ""))
        rates = [_end_to_end(turn) for turn in outcome.turns]
        lines.append(_line([*cells, f"{min(rates):.1f} to {max(rates):.1f}", entry.promise.short]))
    return "\n".join(lines)


def _backlogs(run: Run) -> str:
    heads = [
        "system",
        "submit, jobs/s",
        "Redis, MB",
        "database, MB",
        "workers, MB",
        "urgent job starts after, s",
    ]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for outcome, backlog in _with_backlog(run):
        rest = backlog.jobs - run.scale.bulk
        cells = [
            f"{rest / backlog.submit_s:.0f}",
            f"{backlog.broker_mb:.1f}",
            f"{backlog.database_mb:.1f}",
            f"{backlog.worker_mb:.0f}",
            f"{backlog.urgent_start_s:.3f}",
        ]
        lines.append(_line([outcome.entry.name, *cells]))
    return "\n".join(lines)


def _promises(run: Run) -> str:
    heads = ["system", "result", "worker killed (-9)", "Redis flushed", "results of a job that ran twice"]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for outcome in run.outcomes:
        promise = outcome.entry.promise
        lines.append(_line([outcome.entry.name, promise.result, promise.kill, promise.flush, promise.once]))
    return "\n".join(lines)


def _faults(run: Run) -> str:
    heads = ["system", "workers killed: results", "started again", "last result after, s"]
    heads += ["Redis flushed: results", "last result after, s"]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for outcome in run.outcomes:
        kill, flush = (run.faults.get((outcome.entry.name, fault)) for fault in (KILL, FLUSH))
        if kill is None and flush is None:
            continue
        killed = ["-"] * 3 if kill is None else [_share(kill), str(kill.ran_again), _after(kill)]
        flushed = ["-"] * 2 if flush is None else [_share(flush), _after(flush)]
        lines.append(_line([outcome.entry.name, *killed, *flushed]))
    return "\n".join(lines)


def _row(run: Run, outcome: Outcome) -> dict[str, Any]:
    turns, entry = outcome.turns, outcome.entry
    backlog = next((turn.backlog for turn in turns if turn.backlog is not None), None)
    faults = {fault: run.faults.get((entry.name, fault)) for fault in (KILL, FLUSH)}
    return {
        "system": entry.name,
        "version": entry.version,
        "results": entry.results,
        "concurrency": CONCURRENCY,
        "jobs": max(1, run.scale.many // entry.share),
        "bulk_jobs": run.scale.bulk,
        "single_jobs_per_s": round(_median(turns, lambda t: t.single_jobs_per_s), 1),
        "bulk_jobs_per_s": round(_median(turns, lambda t: t.bulk_jobs_per_s), 1),
        "end_to_end_jobs_per_s": round(_median(turns, _end_to_end), 2),
        "end_to_end_range": [round(pick(map(_end_to_end, turns)), 2) for pick in (min, max)],
        "read_jobs_per_s": round(_median(turns, lambda t: t.read_jobs_per_s), 1),
        "start_p50_s": round(_median(turns, lambda t: t.start_p50_s), 5),
        "start_p99_s": round(_median(turns, lambda t: t.start_p99_s), 5),
        "worker_cpu_ms": round(_median(turns, lambda t: t.worker_cpu_ms), 3),
        "server_cpu_ms": round(_median(turns, lambda t: t.server_cpu_ms), 3),
        "client_cpu_ms": round(_median(turns, lambda t: t.client_cpu_ms), 3),
        "backlog_jobs": None if backlog is None else backlog.jobs,
        "backlog_broker_mb": None if backlog is None else round(backlog.broker_mb, 1),
        "backlog_database_mb": None if backlog is None else round(backlog.database_mb, 1),
        "backlog_worker_mb": None if backlog is None else round(backlog.worker_mb, 1),
        "backlog_urgent_start_s": None if backlog is None else round(backlog.urgent_start_s, 4),
        **{f"{name}_done": None if fault is None else fault.done for name, fault in faults.items()},
        **{f"{name}_jobs": None if fault is None else fault.jobs for name, fault in faults.items()},
        "checked": sum(turn.checked for turn in turns),
        "versions": versions(),
        "machine": machine(),
        "date": run.day.isoformat(),
        "rounds": len(turns),
        "load_average": round(run.load_average, 2),
    }


def _facts(run: Run) -> str:
    facts = {
        "machine": machine(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "jobs at the same time": f"{CONCURRENCY} in every system",
        "rounds": str(run.rounds),
        "load average before the first round": f"{run.load_average:.1f}",
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _notes(scale: Scale) -> str:
    return f"""\
- Figures are medians of the rounds; in brackets the ratio to codeherd's with the same database, for results
  in Redis to codeherd's with PostgreSQL. Every system has a turn in every round, with workers, a Redis and an
  empty database of its own; between its turns it does not run.
- The job: {PROMPT_CHARS} characters in, about 300 bytes of result out, nothing computed. codeherd's worker is
  the real one around a null engine: it also checks and tokenizes the request, leases the job, and writes down
  the attempt; its result has about 600 bytes.
- Submit, single: {scale.single} jobs by one client, one after the other, while the worker takes them. Submit,
  bulk: {scale.bulk} jobs while no worker runs, with the best call that the system has: `submit_many`; kombu's
  `Producer.batch` for Celery; `enqueue_many` for rq; `batch_defer` for procrastinate; none for dramatiq.
- End to end: {scale.many} jobs submitted together to an idle worker, until every result can be read; codeherd
  is told so, the others are asked every {1000 * LONG_PAUSE_S:.0f} ms. Read back: a sample of the results, one
  after the other. What is read must answer its request.
- Start: from before the submission until the job runs, {scale.idle} jobs, each after the result of the one
  before and a pause. `time.time()` on one machine.
- CPU: user and system time per job of end to end. Workers: all of the system's own processes, codeherd's
  dispatcher among them. Servers: redis-server and PostgreSQL; SQLite runs in workers and client.
- {scale.backlog} queued: measured once. The database's size is its growth. The workers' memory counts shared
  pages once. The urgent job is submitted while the workers are busy with the others: codeherd, Celery and
  procrastinate know it by priority; for rq it goes `at_front`, for dramatiq on a queue of its own.
- Faults: {JOBS} jobs of {PAUSE_S:g} s, {CONCURRENCY} at a time, and {BOX_S:.0f} s to come back. What comes
  back after a longer timeout counts as missing here: see what is promised.
- redis-server runs with `appendfsync everysec`. One PostgreSQL server serves every system; it runs with fsync
  off, so that nobody waits for a disk there. With SQLite everybody does: codeherd opens it with a write-ahead
  log and one fsync per commit, Celery with SQLite's defaults, a rollback journal and its fsyncs. Celery opens
  a connection for every result that threads store or a client reads: that is its default.
- codeherd runs one worker process per device, with as many slots as jobs run at the same time. "2 processes"
  is a herd of two devices, half the slots each: Python runs on two cores there, as in Celery's prefork pool.
- Leases, acknowledgements and heartbeats have each system's default length. rq and dramatiq keep results for
  a day here, so that none expires within a run."""


def _with_backlog(run: Run) -> Iterable[tuple[Outcome, Backlog]]:
    for outcome in run.outcomes:
        for turn in outcome.turns:
            if turn.backlog is not None:
                yield outcome, turn.backlog


def _median(turns: Sequence[TurnRecord], take: Callable[[TurnRecord], float]) -> float:
    return statistics.median(map(take, turns))


def _end_to_end(turn: TurnRecord) -> float:
    return turn.many_jobs_per_s


def _target(entry: Entry, what: str, target: str, measured: str, is_met: bool) -> str:
    return _line([f"{entry.name}: {what}", target, measured, "met" if is_met else "not met"])


def _name(entry: Entry, scale: Scale) -> str:
    return (
        entry.name if entry.share == 1 else f"{entry.name} ({scale.many // entry.share} of {scale.many} jobs)"
    )


def _share(record: FaultRecord) -> str:
    return f"{record.done} of {record.jobs}"


def _after(record: FaultRecord) -> str:
    return f"{record.took_s:.1f}" if record.took_s else "-"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
