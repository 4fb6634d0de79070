"""`codeherd pause`, `resume`: keep jobs from starting for a while.

Owns: the two commands. Does not know what a pause does to a job: `codeherd_schema.pauses` does.
"""

from __future__ import annotations

import click

from codeherd_producer.client import Client
from codeherd_producer.commands.clients import open_client
from codeherd_producer.commands.configuration import settings_of
from codeherd_producer.commands.help_text import Verb
from codeherd_producer.commands.output import print_json, print_table
from codeherd_producer.commands.talk import note
from codeherd_schema.queues import queue_name
from codeherd_schema.states import PauseScope
from codeherd_schema.store import Pause

_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")
#: A queue is spelled as its model: nobody types the names of queues.
_MODEL = "model"
_SCOPES = click.Choice([_MODEL, *(scope.value for scope in PauseScope if scope is not PauseScope.QUEUE)])


@click.command(cls=Verb)
@click.argument("scope", type=_SCOPES, required=False)
@click.argument("name", metavar="[NAME]", required=False)
@click.option("--reason", default="", metavar="TEXT", help="Shown to whoever wonders.")
@_as_json
@click.pass_context
def pause(ctx: click.Context, scope: str | None, name: str | None, reason: str, as_json: bool) -> None:
    """Start no more jobs of a model, batch, run or tenant until `codeherd resume`; running ones go on.

        codeherd pause model codellama-7b --reason "new driver"
        codeherd pause batch nightly

    Jobs can still be submitted, and wait. Without arguments: everything that is paused.
    """
    if (scope is None) != (name is None):
        raise click.UsageError("give a scope and a name, or neither", ctx)
    with open_client(settings_of(ctx), publish=False) as client:
        if scope is not None and name is not None and not client.pause(*_meant(scope, name), reason=reason):
            note(f"{scope} {name} was paused already")
        _print(client, as_json=as_json)


@click.command(cls=Verb)
@click.argument("scope", type=_SCOPES)
@click.argument("name", metavar="NAME")
@_as_json
@click.pass_context
def resume(ctx: click.Context, scope: str, name: str, as_json: bool) -> None:
    """Let the jobs of something paused start again. Prints what is still paused.

    codeherd resume model codellama-7b
    """
    with open_client(settings_of(ctx), publish=False) as client:
        if not client.resume(*_meant(scope, name)):
            note(f"{scope} {name} was not paused")
        _print(client, as_json=as_json)


def _meant(scope: str, name: str) -> tuple[PauseScope, str]:
    return (PauseScope.QUEUE, queue_name(name)) if scope == _MODEL else (PauseScope(scope), name)


def _print(client: Client, *, as_json: bool) -> None:
    rows = [_row(one) for one in client.pauses()]
    if as_json:
        print_json(
            {"pauses": [dict(zip(("scope", "name", "since", "reason"), row, strict=True)) for row in rows]}
        )
    else:
        print_table(("scope", "name", "since", "reason"), rows)


def _row(one: Pause) -> tuple[str, str, str, str]:
    prefix = queue_name("")
    is_model = one.scope is PauseScope.QUEUE and one.name.startswith(prefix)
    scope, name = (_MODEL, one.name.removeprefix(prefix)) if is_model else (one.scope.value, one.name)
    return scope, name, one.since.isoformat(timespec="seconds"), one.reason
