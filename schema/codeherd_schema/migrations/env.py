"""Run the steps on the connection that `codeherd_schema.migrations.upgrade` brings.

Alembic executes this file; nothing imports it.
"""

from __future__ import annotations

from alembic import context

from codeherd_schema.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
