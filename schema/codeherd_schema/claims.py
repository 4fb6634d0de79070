"""The statements that start attempts: of one job, or of several at once where a database can.

Owns: which jobs may be claimed, and what a claim changes. Does not know who claims or what becomes of the
lease (`codeherd_schema.leases`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Double,
    String,
    and_,
    bindparam,
    column,
    false,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.sql.dml import ReturningUpdate

from codeherd_schema.database import now
from codeherd_schema.requests import SCHEMA_VERSION, JobKind
from codeherd_schema.states import Move, target
from codeherd_schema.tables import is_due_by_id, jobs


# Built once: to build one for each job costs as much again as to run it.
@functools.lru_cache(maxsize=16)
def claim_one(queues: tuple[str, ...] | None) -> ReturningUpdate[Any]:
    """Return the statement that claims `this_job` under `new_lease`, and returns its row.

    Further values are those of every claim: `lease_s` and `this_worker`.
    """
    is_it = jobs.c.id == bindparam("this_job")
    return _claim(and_(is_it, _is_claimable(queues)), bindparam("new_lease", type_=String))


@functools.lru_cache(maxsize=16)
def claim_many(queues: tuple[str, ...] | None) -> ReturningUpdate[Any]:
    """Return the statement that claims all that are to be had of `claim_values`; for PostgreSQL."""
    # As in `at_once`, whose plan is kept for the same reason.
    lists = (select(bindparam(name, type_=ARRAY(String))).scalar_subquery() for name in _LISTS)
    wanted = (
        func.unnest(*lists)
        .table_valued(column("job_id", String), column("new_lease", String))
        .render_derived(name="wanted")
    )
    held = (
        select(wanted)
        .join_from(wanted, jobs, jobs.c.id == wanted.c.job_id)
        .where(_is_claimable(queues))
        # As `row_locks` has it.
        .order_by(wanted.c.job_id)
        .with_for_update(of=jobs, key_share=True)
        .cte("held")
    )
    return _claim(jobs.c.id == held.c.job_id, held.c.new_lease)


_LISTS: Final = ("all_jobs", "all_leases")


def claim_values(wanted: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the values of `claim_many`: jobs, and a new lease for each."""
    return {name: [pair[place] for pair in wanted] for place, name in enumerate(_LISTS)}


def _claim(is_meant: ColumnElement[bool], lease: ColumnElement[str]) -> ReturningUpdate[Any]:
    return (
        update(jobs)
        .where(is_meant)
        .values(
            state=target(Move.CLAIM).value,
            attempt=jobs.c.attempt + 1,
            lease_id=lease,
            lease_until=now() + bindparam("lease_s", type_=Double),
            worker_id=bindparam("this_worker"),
            started_at=now(),
        )
        .returning(*jobs.c)
    )


def _is_claimable(queues: tuple[str, ...] | None) -> ColumnElement[bool]:
    # What a newer version submitted waits for a newer worker. Each kind and queue by itself: the values of a
    # list are put into the text of the statement anew at each execution.
    return and_(
        jobs.c.schema_version <= SCHEMA_VERSION,
        or_(*(jobs.c.kind == kind.value for kind in JobKind)),
        is_due_by_id(),
        *([] if queues is None else [or_(false(), *(jobs.c.queue == queue for queue in queues))]),
    )
