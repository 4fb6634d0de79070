"""`codeherd health`: one line and an exit status, for whoever restarts services or sends work to them.

Owns: the options and how an answer is shown. Does not know what is well: `codeherd_producer.liveness` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from codeherd_producer.commands.configuration import settings_of
from codeherd_producer.commands.failures import ExitCode
from codeherd_producer.commands.help_text import Noun
from codeherd_producer.commands.output import print_json
from codeherd_producer.commands.request_options import options
from codeherd_producer.liveness import Aspect, Health, check_dispatcher, check_flower, check_worker
from codeherd_producer.local_processes import processes_of
from codeherd_schema.errors import CodeherdError
from codeherd_schema.settings import SharedSettings

check_options = options(
    click.option(
        "--live",
        "aspect",
        flag_value=Aspect.LIVE.value,
        help="Whether a restart would not help: away services, a start or a drain are no faults.",
    ),
    click.option(
        "--ready",
        "aspect",
        flag_value=Aspect.READY.value,
        default=Aspect.READY.value,
        help="Whether it can do its work now, with what it needs [this].",
    ),
    click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=1.0),
        default=10.0,
        metavar="S",
        help="Seconds until an answer, whatever is frozen [10].",
    ),
    click.option("--json", "as_json", is_flag=True, help="One JSON document."),
)


@click.group(cls=Noun)
def health() -> None:
    """Tell whether a service on this machine is alive or ready: one line, exit status 0 or 1.

        codeherd health worker --live          a restart would not help it
        codeherd health worker --ready         it takes jobs
        codeherd health dispatcher --live

    For probes of Kubernetes, systemd or Compose: run it where the service runs, as the same user and with the
    same settings. Each command looks at all processes of its kind that serve this database and broker.
    """


@health.command()
@click.argument("name", required=False)
@check_options
@click.pass_context
def worker(ctx: click.Context, /, name: str | None, **asked: Any) -> None:
    """Look at the worker processes of this machine, or at the one that NAME names.

    Live: each process loads its model, answers for an engine that steps while it has work, or drains.
    Ready: each has loaded its model and takes jobs, the schema is right, the database takes writes, the
    broker answers.
    """
    _show(
        ctx,
        "worker",
        lambda settings, aspect, timeout_s: check_worker(
            settings, aspect, processes=processes_of(settings), name=name, timeout_s=timeout_s
        ),
        **asked,
    )


@health.command()
@check_options
@click.pass_context
def dispatcher(ctx: click.Context, /, **asked: Any) -> None:
    """Look at the dispatchers of this machine.

    Live: the loop turns, or waits for a database or broker that is away. Ready: the loop turns, the schema is
    right, the database takes writes, the broker answers.
    """
    _show(
        ctx,
        "dispatcher",
        lambda settings, aspect, timeout_s: check_dispatcher(
            settings, aspect, processes=processes_of(settings), timeout_s=timeout_s
        ),
        **asked,
    )


@health.command()
@click.option(
    "--port", type=click.IntRange(1, 65_535), metavar="N", help="Flower's port (CODEHERD_FLOWER_PORT)."
)
@check_options
@click.pass_context
def flower(ctx: click.Context, /, port: int | None, **asked: Any) -> None:
    """Look at Flower.

    Live: it serves its page. Ready: the broker answers too.
    """

    def check(settings: SharedSettings, aspect: Aspect, timeout_s: float) -> Health:
        if port is not None:
            settings = settings.model_copy(update={"flower_port": port})
        return check_flower(settings, aspect, timeout_s=timeout_s)

    _show(ctx, "flower", check, **asked)


def _show(
    ctx: click.Context,
    service: str,
    check: Callable[[SharedSettings, Aspect, float], Health],
    *,
    aspect: str,
    timeout_s: float,
    as_json: bool,
) -> None:
    wanted = Aspect(aspect)
    try:
        found = check(settings_of(ctx), wanted, timeout_s)
    except CodeherdError as err:
        # A service with these settings could not have started; other statuses mean other things to a probe.
        found = Health(wanted, (err.message,))
    if as_json:
        shown = {"service": service, "aspect": wanted, "ok": not found.faults}
        print_json(shown | {"faults": found.faults, "facts": found.facts})
    else:
        says = "; ".join(found.faults or found.facts)
        click.echo(f"{service} is {'not ' if found.faults else ''}{wanted}: {says}".replace("\n", " "))
    if found.faults:
        ctx.exit(ExitCode.SERVICE)
