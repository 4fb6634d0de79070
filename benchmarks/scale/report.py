"""Show what was measured as tables for readers.

Owns: words and columns. Does not measure, and draws no conclusions: those are in `docs/scaling.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

_NOTES = """\
- Everything shares one machine: the database, Redis, the producer, the dispatcher and those who play the
  workers. Where the processor is full, the processor is the wall; *cores* says whose share it was.
- A herd *keeps up* if no heartbeat ends later than half of `heartbeat_s` after its time, 99 of 100 claims are
  made within 1 s of taking the hint, nine of ten jobs that arrive are claimed, and no lease is lost.
- Plans: *reads much* means that the database walks a growing table or an index of it from end to end, or
  expects to read 20,000 rows and more. With a LIMIT it stops early, and only milliseconds tell. Every call of
  `Store` was asked for; those that are not listed read what they need. All plans are in `scale.jsonl`."""


def document(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """Return everything as Markdown.

    Args:
        rows: what was measured, each with its `part`.
        facts: about the machine and the run.
    """
    parts = [f"# How far the service scales, {facts['date']}", _list(facts)]
    for title, part, columns in _SECTIONS:
        # Of the plans, only those worth a look.
        chosen = [row for row in rows if row["part"] == part and row.get("faults", True)]
        if chosen:
            parts += [f"## {title}", table(chosen, columns)]
    return "\n\n".join([*parts, "## How to read this", _NOTES]) + "\n"


def table(rows: Iterable[Row], columns: Mapping[str, str]) -> str:
    """Return rows as a Markdown table; `columns` names fields and their heads."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


_SECTIONS: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    (
        "Calls, one at a time",
        "call",
        {
            "database": "database",
            "call": "call",
            "wall_ms": "ms",
            "client_cpu_ms": "processor of the caller, ms",
            "server_cpu_ms": "of the server, ms",
        },
    ),
    (
        "Bytes of a job",
        "bytes",
        {
            "database": "database",
            "payload_bytes": "request",
            "result_bytes": "result",
            "queued_bytes_per_job": "queued",
            "queued_index_bytes_per_job": "of these indexes",
            "ended_bytes_per_job": "ended, with result and history",
            "ended_index_bytes_per_job": "of these indexes",
            "log_bytes_per_job": "written ahead, from claim to end",
            "updates": "updates of `jobs`",
            "hot": "of these heap-only",
        },
    ),
    (
        "The dispatcher's look",
        "due",
        {
            "database": "database",
            "queued": "queued",
            "delayed": "of these due tomorrow",
            "queues_with_work_ms": "`queues_with_work`, ms",
            "due_wall_ms": "`due`, 64 hints, ms",
            "due_client_cpu_ms": "processor of the caller, ms",
            "due_server_cpu_ms": "of the server, ms",
        },
    ),
    (
        "Calls beside many running jobs",
        "held",
        {
            "database": "database",
            "held": "running elsewhere",
            "statistics": "PostgreSQL's statistics",
            "heartbeat_wall_ms": "heartbeat of 32, ms",
            "heartbeat_server_cpu_ms": "of these the server's processor",
            "succeed_wall_ms": "succeed, ms",
            "succeed_server_cpu_ms": "the server's processor",
            "reap_wall_ms": "reap, ms",
        },
    ),
    (
        "Plans",
        "plan",
        {
            "database": "database",
            "call": "call",
            "statement": "statement",
            "call_ms": "whole call, ms",
            "faults": "reads much",
        },
    ),
    (
        "Idle PostgreSQL connections",
        "connections",
        {
            "idle_connections": "idle",
            "backend_kb": "KiB each",
            "connect_ms": "to connect, ms",
            "job_ms": "claim and succeed meanwhile, ms",
        },
    ),
    (
        "Herds that only keep their leases",
        "leases",
        {
            "database": "database",
            "workers": "workers",
            "slots": "slots each",
            "beat_p50_ms": "heartbeat p50, ms",
            "beat_p99_ms": "p99, ms",
            "late_worst_s": "latest, s",
            "worker_cpu_cores": "cores: workers",
            "server_cpu_cores": "database",
            "behind": "behind in",
        },
    ),
    (
        "Herds at work",
        "herd",
        {
            "database": "database",
            "workers": "workers",
            "publish_window": "window",
            "offered_jobs_per_s": "jobs/s offered",
            "claims_per_s": "claimed",
            "claim_p50_ms": "claim p50, ms",
            "claim_p99_ms": "p99, ms",
            "commit_p99_ms": "succeed p99, ms",
            "beat_p99_ms": "heartbeat p99, ms",
            "late_worst_s": "latest, s",
            "worker_cpu_cores": "cores: workers",
            "producer_cpu_cores": "producer, dispatcher",
            "server_cpu_cores": "database",
            "redis_cpu_cores": "Redis",
            "behind": "behind in",
        },
    ),
    (
        "Redis",
        "messages",
        {
            "hint_message_bytes": "bytes of a hint",
            "hint_memory_bytes": "memory of a hint",
            "commands_per_job": "commands per job",
            "event_bytes_per_job": "bytes of events per job",
            "cpu_us_per_job": "processor per job, µs",
            "idle_commands_per_s": "commands/s of an idle worker",
            "idle_cpu_ms_per_s": "processor of an idle worker, ms/s",
            "clients_per_worker": "connections per worker",
            "worker_cpu_ms_per_job": "the worker's own processor per job, ms",
            "jobs_per_s": "jobs/s of one worker, no engine",
            "flood_commands_per_s": "most commands/s, pipelined",
            "flood_jobs_per_cpu_s": "jobs per processor second, pipelined",
        },
    ),
)


def _list(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if name != "date")


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.3g}" if value < 100 else f"{value:.0f}"
        case dict():
            return ", ".join(f"{name} {_cell(part)}" for name, part in value.items())
        case list() | tuple():
            return "; ".join(str(part) for part in value) or "-"
        case _:
            return str(value)
