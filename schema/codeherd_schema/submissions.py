"""Turn requests into committed rows, all of them or none.

Owns: what a new row holds, moments counted from the database's clock, idempotency keys. Does not
know models or brokers: whether a model can serve a request is judged before, hints are sent after.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, delete, select

from codeherd_schema.database import Database, clock, insert_many, insert_or_leave, translated
from codeherd_schema.errors import IdempotencyConflict, InvalidRequest
from codeherd_schema.job_ids import JobIds
from codeherd_schema.lanes import lane_of
from codeherd_schema.requests import Moment, Request
from codeherd_schema.states import JobState
from codeherd_schema.tables import jobs

#: Attempts that a job gets unless told otherwise.
MAX_ATTEMPTS: Final = 5
#: Values in one IN list; SQLite allows 32,766 parameters in a statement.
IN_LIST: Final = 1_000
#: The last moment that a datetime can hold, seconds since 1970.
_LAST_MOMENT: Final = datetime.max.replace(tzinfo=UTC).timestamp() - 86_400


@dataclass(frozen=True, slots=True)
class Submitted:
    """The answer to one request."""

    job_id: str
    #: The job was there before, under the same idempotency key.
    deduplicated: bool


def queue_of_model(request: Request) -> str:
    """Return the queue of a request when nobody says otherwise: one queue per model."""
    return request.model


class Submissions:
    """Inserts jobs."""

    def __init__(self, database: Database, *, max_attempts: int = MAX_ATTEMPTS) -> None:
        """Insert into `database`; a job that needs more than `max_attempts` is dead."""
        self._database = database
        self._max_attempts = max_attempts
        self._ids = JobIds()

    def submit(
        self,
        requests: Sequence[Request],
        *,
        tenant: str = "default",
        queue_of: Callable[[Request], str] = queue_of_model,
        connection: Connection | None = None,
        custom_ids: Sequence[str] | None = None,
        batch_id: str | None = None,
        run_id: str | None = None,
    ) -> list[Submitted]:
        """Insert one job per request in one transaction: all or nothing, answers in order.

        Args:
            requests: what to run; equal idempotency keys among them give one job.
            tenant: who owns the jobs and the idempotency keys.
            queue_of: names the queue of a request.
            connection: insert in this open transaction, to be committed with the caller's own rows;
                nobody sees the jobs before. Left out: committed on return.
            custom_ids: the caller's own name of each request.
            batch_id: what was submitted together, to be told apart from the rest and given its fair share.
            run_id: the backfill or review that the jobs belong to; its fair share too if there is no batch.

        Raises:
            InvalidRequest: `expires_at` or `deadline` of a new job is past by the database's clock, or
                not after `run_at`; nothing was inserted.
            IdempotencyConflict: a key was used before with other content; nothing was inserted.
            DatabaseUnavailable: try again, with an idempotency key if a second job would be a harm.
        """
        if custom_ids is not None and len(custom_ids) != len(requests):
            raise ValueError(f"{len(requests)} requests, but {len(custom_ids)} custom ids")

        def work(connection: Connection) -> list[Submitted]:
            now_s = clock(connection)
            ids = self._ids.take(len(requests), now_s=now_s)
            shared = {
                "tenant": tenant,
                "batch_id": batch_id,
                "run_id": run_id,
                "lane": lane_of(tenant, batch_id or run_id),
                "max_attempts": self._max_attempts,
            }
            names = custom_ids if custom_ids is not None else (None,) * len(requests)
            rows = [
                {
                    **new_row(request, now_s),
                    **shared,
                    "id": job_id,
                    "queue": queue_of(request),
                    "custom_id": custom_id,
                }
                for job_id, request, custom_id in zip(ids, requests, names, strict=True)
            ]
            return _insert(connection, rows, tenant, now_s)

        if connection is None:
            return self._database.write(work)
        with translated(connection.engine):
            return work(connection)


def new_row(request: Request, now_s: float) -> dict[str, Any]:
    """Return what the row of a new job takes from its request, at this moment of the database's clock.

    Raises:
        InvalidRequest: a moment is too late to be stored.
    """
    run_at = max(now_s, _resolve("run_at", request.run_at, now_s) or now_s)
    limits = {
        name: _resolve(name, moment, now_s)
        for name, moment in (("expires_at", request.expires_at), ("deadline", request.deadline))
    }
    return {
        "kind": request.kind.value,
        "model": request.model,
        "state": JobState.QUEUED.value,
        "priority": request.priority,
        "schema_version": request.schema_version,
        "payload": request.model_dump_json(ensure_ascii=True),
        # What is compared when the key comes again; a fifth of the work of a submit.
        "content_sha256": None if request.idempotency_key is None else request.content_sha256(),
        "run_at": run_at,
        **limits,
        "idempotency_key": request.idempotency_key,
        "labels": json_of_labels(request.labels),
        "created_at": now_s,
    }


def json_of_labels(labels: Mapping[str, str]) -> str:
    """Return labels as the column keeps them: the same labels are the same text."""
    return json.dumps(dict(labels), sort_keys=True, separators=(",", ":")) if labels else "{}"


def _resolve(name: str, moment: Moment | None, now_s: float) -> float | None:
    if moment is None:
        return None
    seconds = now_s + moment.total_seconds() if isinstance(moment, timedelta) else moment.timestamp()
    if seconds > _LAST_MOMENT:
        raise InvalidRequest(f"`{name}` is after the year 9999")
    return seconds


def _insert(
    connection: Connection, rows: Sequence[Mapping[str, Any]], tenant: str, now_s: float
) -> list[Submitted]:
    known = _insert_or_find(connection, rows, tenant)
    # A job without a key is its own.
    holders = [known.get(row["idempotency_key"], (row["id"], row["content_sha256"])) for row in rows]
    for row, (owner, content_sha256) in zip(rows, holders, strict=True):
        # A repeated submit is told of its job even if that could not be submitted any more.
        error = _lateness(row, now_s) if owner == row["id"] else _conflict(row, content_sha256)
        if error is not None:
            # The caller's transaction may go on: leave nothing of ours in it.
            _delete(connection, [row["id"] for row in rows])
            raise error
    return [
        Submitted(job_id=owner, deduplicated=owner != row["id"])
        for row, (owner, _) in zip(rows, holders, strict=True)
    ]


def _insert_or_find(
    connection: Connection, rows: Sequence[Mapping[str, Any]], tenant: str
) -> dict[str, tuple[str, str | None]]:
    """Insert the rows whose keys are free; return id and content hash of the job that holds each key."""
    known: dict[str, tuple[str, str | None]] = {}
    free = [row for row in rows if row["idempotency_key"] is None]
    if free:
        insert_many(connection, jobs, free)
        rows = [row for row in rows if row["idempotency_key"] is not None]
    # Racing submitters take the same keys in the same order, so that none waits in a circle.
    missing = sorted(rows, key=lambda row: str(row["idempotency_key"]))
    while missing:
        statement = insert_or_leave(connection, jobs, [jobs.c.tenant, jobs.c.idempotency_key])
        connection.execute(statement, missing)
        known |= _jobs_of_keys(connection, tenant, sorted({row["idempotency_key"] for row in missing}))
        # On PostgreSQL the job in whose favour a row was left out may be pruned before it is found.
        missing = [row for row in missing if row["idempotency_key"] not in known]
    return known


def _lateness(row: Mapping[str, Any], now_s: float) -> InvalidRequest | None:
    """Say why the job could never run in the time that it allows."""
    for name in ("expires_at", "deadline"):
        limit = row[name]
        if limit is not None and limit <= now_s:
            return InvalidRequest(f"`{name}` is {now_s - limit:.3f} s in the past by the database's clock")
        if limit is not None and limit <= row["run_at"]:
            return InvalidRequest(f"`{name}` is not after `run_at`")
    return None


def _conflict(row: Mapping[str, Any], content_sha256: str | None) -> IdempotencyConflict | None:
    if content_sha256 == row["content_sha256"]:
        return None
    return IdempotencyConflict(
        f"idempotency key `{row['idempotency_key']}` was used before with a different request"
    )


def _jobs_of_keys(
    connection: Connection, tenant: str, keys: Sequence[str]
) -> dict[str, tuple[str, str | None]]:
    """Return id and content hash of the job that holds each key."""
    found: dict[str, tuple[str, str | None]] = {}
    for start in range(0, len(keys), IN_LIST):
        statement = select(jobs.c.idempotency_key, jobs.c.id, jobs.c.content_sha256).where(
            jobs.c.tenant == tenant, jobs.c.idempotency_key.in_(keys[start : start + IN_LIST])
        )
        found.update(
            {row.idempotency_key: (row.id, row.content_sha256) for row in connection.execute(statement)}
        )
    return found


def _delete(connection: Connection, ids: Sequence[str]) -> None:
    for start in range(0, len(ids), IN_LIST):
        connection.execute(delete(jobs).where(jobs.c.id.in_(ids[start : start + IN_LIST])))
