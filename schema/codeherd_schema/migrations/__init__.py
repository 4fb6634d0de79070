"""Bring a database to the schema of this version; needs no files beside the installed package.

Owns: running the numbered steps in `versions/`. Does not know what is in them. A step is never
changed once released; `codeherd_schema.tables` describes where all of them together lead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text

from codeherd_schema.database import Database

#: Any number: PostgreSQL's advisory lock that lets one process upgrade at a time.
_UPGRADE_LOCK: Final = 0x636F6465


def upgrade(url: str) -> str:
    """Apply every step that the database lacks, in one transaction; safe to call from many processes.

    Returns:
        The revision that it has now.

    Raises:
        DatabaseUnavailable: nothing was changed.
    """
    database = Database.open(url, pool_size=1, pooled=True)
    try:
        with database.begin() as connection:
            if database.dialect == "postgresql":
                connection.execute(text("SET LOCAL statement_timeout = 0"))
                connection.execute(text("SET LOCAL lock_timeout = 0"))
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _UPGRADE_LOCK})
            config = Config()
            config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
            # env.py runs the steps on this connection.
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            return _revision(connection) or ""
    finally:
        database.close()


def current(url: str) -> str | None:
    """Return the database's revision; None when it never was upgraded."""
    database = Database.open(url, pool_size=1, pooled=True)
    try:
        with database.read() as connection:
            return _revision(connection)
    finally:
        database.close()


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()
