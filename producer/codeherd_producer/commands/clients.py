"""Open a client for one command.

Owns: the words for a machine that has no database yet. Does not know what the client is used for.
"""

from __future__ import annotations

from codeherd_producer.client import Client
from codeherd_schema.errors import SchemaOutdated
from codeherd_schema.settings import SharedSettings


def open_client(settings: SharedSettings, *, publish: bool) -> Client:
    """Return a client, to be closed by the caller.

    Args:
        settings: which database and broker.
        publish: whether Celery may be imported, to publish at once and to hear of endings.

    Raises:
        SchemaOutdated: the embedded database was never made.
    """
    if settings.database_url is None and not settings.data_dir.is_dir():
        raise SchemaOutdated(
            f"there is no database in `{settings.data_dir}`",
            hint="`codeherd up` makes one, or `codeherd db upgrade`",
        )
    return Client(settings, publish=publish)
