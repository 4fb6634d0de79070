"""`codeherd db`: bring the database to this version's schema, or say which it has.

Owns: the two commands. Does not know any table: `codeherd_schema.migrations` does.
"""

from __future__ import annotations

import click

from codeherd_producer.commands.configuration import settings_of
from codeherd_producer.commands.help_text import Noun
from codeherd_producer.commands.output import print_json
from codeherd_producer.commands.talk import note
from codeherd_schema.migrations import current as current_revision
from codeherd_schema.migrations import upgrade as upgrade_database
from codeherd_schema.settings import SharedSettings

_AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document.")


@click.group(cls=Noun)
def db() -> None:
    """Create or upgrade the database schema (CODEHERD_DATABASE_URL, else SQLite in the data folder)."""


@db.command()
@_AS_JSON
@click.pass_context
def upgrade(ctx: click.Context, as_json: bool) -> None:
    """Bring the schema to this version; safe to run again, and from several places at once."""
    settings = settings_of(ctx)
    _make_folder(settings)
    _print(settings, upgrade_database(settings.database), as_json=as_json)


@db.command()
@_AS_JSON
@click.pass_context
def current(ctx: click.Context, as_json: bool) -> None:
    """Print the schema that the database has; nothing if it has none."""
    settings = settings_of(ctx)
    _print(settings, current_revision(settings.database), as_json=as_json)


def _print(settings: SharedSettings, revision: str | None, *, as_json: bool) -> None:
    if as_json:
        print_json({"database": settings.database.masked(), "revision": revision})
        return
    note(f"database {settings.database.masked()}")
    if revision is not None:
        click.echo(revision)


def _make_folder(settings: SharedSettings) -> None:
    if settings.database_url is None:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
