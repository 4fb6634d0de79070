"""How data leaves the command line: JSON documents, tables, and generated text byte for byte.

Owns: the shape of every JSON document (version 1, described in `docs/cli.md`), and that a table is
drawn on a terminal and tab-separated elsewhere. Does not know where the data comes from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import click

from codeherd_producer.commands.talk import has_color
from codeherd_schema.jobs import Attempt, Job
from codeherd_schema.requests import ChatRequest, GenerateRequest, InfillRequest, Request
from codeherd_schema.results import Candidate, Result

#: Version of every JSON document; a field may be added without a new one, never renamed or removed.
JSON_SCHEMA = 1


def print_json(document: Mapping[str, Any]) -> None:
    """Write one JSON document and a newline to stdout."""
    click.echo(json.dumps({"schema": JSON_SCHEMA, **document}))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write rows to stdout: with a header on a terminal, else tab-separated and without."""
    if not sys.stdout.isatty():
        for row in rows:
            click.echo("\t".join(row))
        return
    # rich is for terminals: a script that reads our output must not pay for it.
    from codeherd_producer.commands.terminal import draw_table

    draw_table(header, rows, in_color=has_color())


def print_text(text: str) -> None:
    """Write generated text to stdout as it is; a newline is added on a terminal only."""
    stream = sys.stdout.buffer
    stream.write(text.encode())
    if sys.stdout.isatty() and not text.endswith("\n"):
        stream.write(b"\n")
    stream.flush()


def print_candidates(candidates: Sequence[Candidate], request: Request | None) -> None:
    """Write one text as it is; several with a line `==> candidate 0 <==` before each.

    Args:
        candidates: the texts.
        request: what was asked for, to be written around each text; None writes the text alone.
    """
    for candidate in candidates:
        if len(candidates) > 1:
            print_text(f"==> candidate {candidate.index} <==\n")
        print_text(_in_place(candidate.text, request))
        if len(candidates) > 1 and not sys.stdout.isatty():
            print_text("\n")


def job_document(job: Job) -> dict[str, Any]:
    """Return what the command line tells of a job: never its text."""
    return {
        "id": job.id,
        "kind": job.kind,
        "model": job.model,
        "state": job.state,
        "priority": job.priority,
        "attempt": job.attempt,
        "max_attempts": job.max_attempts,
        "crash_count": job.crash_count,
        "worker": job.worker_id,
        "run_at": _written(job.run_at),
        "expires_at": _written(job.expires_at),
        "deadline": _written(job.deadline),
        "created_at": _written(job.created_at),
        "started_at": _written(job.started_at),
        "finished_at": _written(job.finished_at),
        "batch_id": job.batch_id,
        "idempotency_key": job.idempotency_key,
        "labels": job.labels,
        "error": {"code": job.error_code, "message": job.error_message} if job.error_code else None,
    }


def attempt_document(attempt: Attempt) -> dict[str, Any]:
    """Return one ended attempt."""
    error = {"code": attempt.error_code, "message": attempt.error_message}
    return {
        "attempt": attempt.attempt,
        "worker": attempt.worker_id,
        "started_at": _written(attempt.started_at),
        "ended_at": _written(attempt.ended_at),
        "outcome": attempt.outcome,
        "error": error if attempt.error_code else None,
    }


def result_document(result: Result) -> dict[str, Any]:
    """Return a whole result: texts, seeds, token counts, timings, and what it can be repeated with."""
    return result.model_dump(mode="json")


def print_jobs(jobs: Sequence[Job], *, now: datetime) -> None:
    """Write a table of jobs: one line each."""
    print_table(
        ("id", "kind", "model", "state", "attempt", "age", "worker", "error"),
        [
            (
                job.id,
                job.kind,
                job.model,
                job.state,
                f"{job.attempt}/{job.max_attempts}",
                age((now - job.created_at).total_seconds()),
                job.worker_id or "",
                job.error_code or "",
            )
            for job in jobs
        ],
    )


def age(seconds: float) -> str:
    """Say a length of time in its two largest units: `42s`, `3m10s`, `5h2m`, `9d4h`."""
    whole = max(0, int(seconds))
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h}h"
    if hours:
        return f"{hours}h{m}m"
    return f"{m}m{s}s" if minutes else f"{s}s"


def _in_place(text: str, request: Request | None) -> str:
    match request:
        case GenerateRequest():
            return request.prompt + text
        case InfillRequest():
            return request.prefix + text + request.suffix
        case ChatRequest() | None:
            return text


def _written(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="milliseconds")
