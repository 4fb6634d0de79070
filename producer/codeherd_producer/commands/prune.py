"""`codeherd prune`: delete what ended long ago.

Owns: the command. Does not know what is old: `codeherd_schema.janitor` does.
"""

from __future__ import annotations

from datetime import timedelta

import click

from codeherd_producer.commands.clients import open_client
from codeherd_producer.commands.configuration import settings_of
from codeherd_producer.commands.durations import Duration
from codeherd_producer.commands.help_text import Verb
from codeherd_producer.commands.output import print_json


@click.command(cls=Verb)
@click.option(
    "--older-than",
    type=Duration(),
    required=True,
    metavar="TIME",
    help="Jobs that ended before, such as 30d.",
)
@click.option("--dry-run", is_flag=True, help="Only count them.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_context
def prune(ctx: click.Context, older_than: timedelta, *, dry_run: bool, as_json: bool) -> None:
    """Delete ended jobs of all tenants, with their results and history; prints how many.

    codeherd prune --older-than 30d --dry-run

    The dispatcher does it by itself where CODEHERD_RETENTION_DAYS is set.
    """
    keep_s = older_than.total_seconds()
    with open_client(settings_of(ctx), publish=False) as client:
        count = client.count_old(keep_s=keep_s) if dry_run else client.prune(keep_s=keep_s)
    if as_json:
        print_json({"jobs": count, "deleted": not dry_run})
    else:
        click.echo(count)
