"""End many jobs in one statement, where the database can change several tables in one: PostgreSQL.

Owns: that statement. It does what `codeherd_schema.leases` does elsewhere in a transaction of three, in one
instead of five round trips. Does not know what it means that a lease is missing among the answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    CTE,
    ColumnElement,
    Insert,
    Select,
    String,
    Table,
    and_,
    bindparam,
    column,
    func,
    insert,
    literal,
    select,
    update,
)

from codeherd_schema.database import now
from codeherd_schema.states import Move, target
from codeherd_schema.tables import attempts, jobs, results

#: What the end of a job brings along beside its result.
_LEASE: Final = column("lease_id", String)
#: Columns of a result that whoever ends the job says.
_TOLD: Final = tuple(c for c in results.columns if c is not results.c.created_at)


def success_values(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of `SUCCEED` for these rows of `results`, by lease."""
    told = {f"all_{c.name}": [row[c.name] for row in rows.values()] for c in _TOLD}
    return {"all_lease_id": [*rows], **told}


def _succeed() -> Select[tuple[str]]:
    names = (_LEASE, *_TOLD)
    # In a SELECT of its own a list has no length that PostgreSQL could plan for: it finds one plan as good as
    # another for the next values, and keeps it. To plan this statement takes longer than to run it.
    lists = (select(bindparam(f"all_{c.name}", type_=ARRAY(c.type))).scalar_subquery() for c in names)
    ends = (
        func.unnest(*lists).table_valued(*(column(c.name, c.type) for c in names)).render_derived(name="ends")
    )
    held = (
        select(ends, jobs.c.worker_id, jobs.c.started_at)
        .join_from(
            ends,
            jobs,
            and_(
                jobs.c.id == ends.c.job_id,
                # Only a running job has a lease.
                jobs.c.lease_id == ends.c.lease_id,
                jobs.c.attempt == ends.c.attempt,
            ),
        )
        # As `row_locks` has it.
        .order_by(ends.c.job_id)
        .with_for_update(of=jobs, key_share=True)
        .cte("held")
    )
    ended = (
        update(jobs)
        .where(jobs.c.id == held.c.job_id)
        .values(state=target(Move.SUCCEED).value, lease_id=None, lease_until=None, finished_at=now())
        .cte("ended")
    )
    history: dict[str, ColumnElement[Any]] = {"ended_at": now(), "outcome": literal(Move.SUCCEED.value)}
    return select(held.c.lease_id).add_cte(
        ended,
        _filled(attempts, held, history).cte("history"),
        _filled(results, held, {"created_at": now()}).cte("kept"),
    )


def _filled(table: Table, held: CTE, others: Mapping[str, ColumnElement[Any]]) -> Insert:
    """Insert a row for each job that is held: `others`, and what is held under a column's own name."""
    named = {c.name: held.c[c.name] for c in table.columns if c.name in held.c} | dict(others)
    return insert(table).from_select(list(named), select(*named.values()), include_defaults=False)


#: Ends running jobs as succeeded, with result and history; returns the leases that were the jobs' own.
SUCCEED: Final = _succeed()
