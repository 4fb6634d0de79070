"""A job and its attempts as they are read back from their rows.

Owns: the decoded values and how a row becomes one. Does not know how rows are found or changed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row

from codeherd_schema.requests import Request, parse_request
from codeherd_schema.states import JobState, Move


@dataclass(frozen=True, slots=True)
class Job:
    """One job at the moment it was read; every time is by the database's clock, in UTC."""

    id: str
    tenant: str
    #: A `JobKind`, or one of a newer version.
    kind: str
    model: str
    queue: str
    state: JobState
    #: 0 runs first, 9 last.
    priority: int
    schema_version: int
    #: The request as JSON; see `request`.
    payload: str = field(repr=False)
    #: Of jobs with an idempotency key.
    content_sha256: str | None
    #: Number of the current or last attempt; 0 before the first.
    attempt: int
    #: Attempts that ended because their worker was lost.
    crash_count: int
    max_attempts: int
    lease_id: str | None
    lease_until: datetime | None
    worker_id: str | None
    #: Due from here on.
    run_at: datetime
    expires_at: datetime | None
    deadline: datetime | None
    cancel_requested_at: datetime | None
    published_at: datetime | None
    publish_no: int
    idempotency_key: str | None
    batch_id: str | None
    run_id: str | None
    custom_id: str | None
    generation: int
    labels: dict[str, str]
    #: Of the last attempt that ended with an error, even if a later one succeeded.
    error_code: str | None
    error_message: str | None
    created_at: datetime
    #: When the current or last attempt was claimed.
    started_at: datetime | None
    #: When the job came to a final state.
    finished_at: datetime | None

    @property
    def request(self) -> Request:
        """The request, parsed anew at each call.

        Raises:
            InvalidRequest: a newer version of codeherd wrote it.
        """
        return parse_request(json.loads(self.payload))


@dataclass(frozen=True, slots=True)
class Attempt:
    """One ended attempt; kept for ever."""

    job_id: str
    attempt: int
    worker_id: str
    started_at: datetime
    ended_at: datetime
    #: The move that ended it.
    outcome: Move
    error_code: str | None
    error_message: str | None


def job_of(row: Row[Any]) -> Job:
    """Decode a row that holds every column of `tables.jobs`."""
    return Job(
        id=row.id,
        tenant=row.tenant,
        kind=row.kind,
        model=row.model,
        queue=row.queue,
        state=JobState(row.state),
        priority=row.priority,
        schema_version=row.schema_version,
        payload=row.payload,
        content_sha256=row.content_sha256,
        attempt=row.attempt,
        crash_count=row.crash_count,
        max_attempts=row.max_attempts,
        lease_id=row.lease_id,
        lease_until=moment(row.lease_until),
        worker_id=row.worker_id,
        run_at=instant(row.run_at),
        expires_at=moment(row.expires_at),
        deadline=moment(row.deadline),
        cancel_requested_at=moment(row.cancel_requested_at),
        published_at=moment(row.published_at),
        publish_no=row.publish_no,
        idempotency_key=row.idempotency_key,
        batch_id=row.batch_id,
        run_id=row.run_id,
        custom_id=row.custom_id,
        generation=row.generation,
        labels=json.loads(row.labels),
        error_code=row.error_code,
        error_message=row.error_message,
        created_at=instant(row.created_at),
        started_at=moment(row.started_at),
        finished_at=moment(row.finished_at),
    )


def attempt_of(row: Row[Any]) -> Attempt:
    """Decode a row of `tables.attempts`."""
    return Attempt(
        job_id=row.job_id,
        attempt=row.attempt,
        worker_id=row.worker_id,
        started_at=instant(row.started_at),
        ended_at=instant(row.ended_at),
        outcome=Move(row.outcome),
        error_code=row.error_code,
        error_message=row.error_message,
    )


def instant(seconds: float) -> datetime:
    """Decode a time column that is never empty."""
    return datetime.fromtimestamp(seconds, UTC)


def moment(seconds: float | None) -> datetime | None:
    """Decode a time column that may be empty."""
    return None if seconds is None else instant(seconds)


def storable(words: str, *, most: int) -> str:
    """Return `words` as both databases keep them: no NUL, valid UTF-8, at most `most` characters."""
    return words.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode("utf-8")[:most]
