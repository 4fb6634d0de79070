"""Keep jobs from being started: what is paused waits until somebody resumes it.

Owns: which queues, batches, runs and tenants are paused. That a paused job is not due is said once, in
`tables.is_due`: no claim and no hint passes it. Running jobs go on. Does not know who may pause what.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, and_, delete, select, update

from codeherd_schema.database import Database, insert_or_leave, now
from codeherd_schema.jobs import instant, storable
from codeherd_schema.row_locks import in_turn
from codeherd_schema.states import JobState, PauseScope
from codeherd_schema.tables import jobs, paused_column, pauses, state_is

#: Characters of a reason and of a name that are kept.
MAX_REASON, MAX_NAME = 500, 128


@dataclass(frozen=True, slots=True)
class Pause:
    """Something whose jobs do not start."""

    scope: PauseScope
    name: str
    #: For people; may be empty.
    reason: str
    #: By the database's clock.
    since: datetime


class Pauses:
    """Pauses and resumes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def pause(self, scope: PauseScope, name: str, *, reason: str = "") -> bool:
        """Start none of these jobs from now on, also those that are yet to come.

        Args:
            scope: what `name` names.
            name: a queue, batch, run or tenant, whether it has jobs or not.
            reason: shown to whoever wonders.

        Returns:
            Whether it was not paused before; else its pause stays as it was.
        """
        values = {
            "scope": scope.value,
            "name": storable(name, most=MAX_NAME),
            "reason": storable(reason, most=MAX_REASON),
            "since": now(),
        }

        def work(connection: Connection) -> bool:
            statement = insert_or_leave(connection, pauses, [pauses.c.scope, pauses.c.name])
            made = statement.values(**values).returning(pauses.c.name)
            return connection.execute(made).first() is not None

        return self._database.write(work)

    def resume(self, scope: PauseScope, name: str) -> bool:
        """Let these jobs start again, and owe each waiting one a hint; return whether it was paused."""
        kept = storable(name, most=MAX_NAME)

        def work(connection: Connection) -> bool:
            is_it = and_(pauses.c.scope == scope.value, pauses.c.name == kept)
            if connection.execute(delete(pauses).where(is_it)).rowcount == 0:
                return False
            # Workers dropped the hints that came during the pause.
            were_hinted = in_turn(
                state_is(JobState.QUEUED), paused_column(scope) == kept, jobs.c.published_at.is_not(None)
            )
            connection.execute(update(jobs).where(were_hinted).values(published_at=None))
            return True

        return self._database.write(work)

    def pauses(self) -> list[Pause]:
        """Return everything that is paused, the longest first."""
        statement = select(pauses).order_by(pauses.c.since, pauses.c.scope, pauses.c.name)
        with self._database.read() as connection:
            return [
                Pause(PauseScope(row.scope), row.name, row.reason, instant(row.since))
                for row in connection.execute(statement)
            ]
