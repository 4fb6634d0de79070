"""Lock jobs in one order, so that no two statements on several of them wait for each other in a circle.

Owns: the order, which is by id, and whether a statement waits for a job that another transaction holds. Does
not know which jobs are meant or what is done to them. PostgreSQL locks rows as it comes upon them, which is
in the order of an index for one statement and in that of the table for the next; what waits in a circle it
finds after a second and breaks off (`database.Database.write` tries again). SQLite has one lock for all.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Select, literal_column, select

from codeherd_schema.tables import jobs


def in_turn(*conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    """Return the condition that a job passes `conditions`, for an UPDATE that has to wait for every one."""
    return _is_among(_by_id(conditions).with_for_update(key_share=True))


def if_free(*conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    """Return the condition that a job passes `conditions` and nobody else is changing it at this moment."""
    return _is_among(_by_id(conditions).with_for_update(key_share=True, skip_locked=True))


def _by_id(conditions: Sequence[ColumnElement[bool]]) -> Select[tuple[str]]:
    # In words that no index knows: else a planner may walk through all jobs in the order of their key, to
    # spare itself the sorting of a few.
    return select(jobs.c.id).where(*conditions).order_by(jobs.c.id.concat(literal_column("''")))


def _is_among(chosen: Select[tuple[str]]) -> ColumnElement[bool]:
    # A CTE that locks is run once; a subquery may be run again for each job that is changed.
    held = chosen.cte("held")
    return jobs.c.id.in_(select(held.c.id))
