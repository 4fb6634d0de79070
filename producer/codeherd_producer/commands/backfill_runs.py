"""Open what the verbs of `codeherd backfill` work on, and find the run that is meant.

Owns: that. Does not know what is done with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import click

from codeherd_producer.client import Client
from codeherd_producer.commands.clients import open_client
from codeherd_producer.commands.configuration import settings_of
from codeherd_schema.backfills import Backfills, Run
from codeherd_schema.errors import RunNotFound
from codeherd_schema.settings import SharedSettings

#: Characters of a whole id.
_WHOLE: Final = 36
#: Newest runs that the beginning of an id is looked for in.
_KNOWN: Final = 1_000


@dataclass(frozen=True, slots=True)
class Site:
    """What a verb works on."""

    settings: SharedSettings
    client: Client
    rows: Backfills


@contextlib.contextmanager
def opened(ctx: click.Context, *, publish: bool) -> Iterator[Site]:
    """Open the client and the runs of this command line."""
    settings = settings_of(ctx)
    with (
        open_client(settings, publish=publish) as client,
        contextlib.closing(Backfills.open(settings.database, **settings.database_options)) as rows,
    ):
        yield Site(settings, client, rows)


def meant(rows: Backfills, run_id: str | None) -> Run:
    """Return the run of an id, of its beginning, or the newest.

    Raises:
        RunNotFound: there is none, or more than one begins so.
    """
    if run_id is not None and len(run_id) == _WHOLE:
        return rows.get(run_id)
    known = rows.list(1 if run_id is None else _KNOWN)
    found = [run for run in known if run_id is None or run.id.startswith(run_id)]
    if not found or (run_id is not None and len(found) > 1):
        raise RunNotFound(
            "there is no run yet" if not known else f"{len(found)} runs have an id like `{run_id}`",
            hint="`codeherd backfill runs` lists them",
        )
    return found[0]
