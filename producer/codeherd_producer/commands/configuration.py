"""`codeherd config`: the settings of this command line and where each came from.

Owns: which sources a command line has (the flag `--data-dir`, `CODEHERD_*`, the current folder's
`pyproject.toml`, the user's file) and the log format. Does not know what any setting means.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import click

from codeherd_producer.commands.help_text import Noun
from codeherd_producer.commands.output import print_json, print_table
from codeherd_schema.settings import Loaded, Secret, SharedSettings, Url, load, user_file


def load_settings(ctx: click.Context) -> Loaded[SharedSettings]:
    """Build the settings of this command line.

    Raises:
        InvalidSetting: names the source of the wrong one.
    """
    loaded = load(
        SharedSettings,
        flags={"data_dir": ctx.find_root().obj["data_dir"]},
        environment=os.environ,
        project_file=Path("pyproject.toml"),
        user_file=user_file(),
    )
    # Other processes and URLs get it, which know no current folder.
    data_dir = loaded.settings.data_dir.expanduser().absolute()
    return replace(loaded, settings=loaded.settings.model_copy(update={"data_dir": data_dir}))


def settings_of(ctx: click.Context) -> SharedSettings:
    """Return the settings for a short command.

    It logs nothing unless asked for everything: what a user must know it says itself, and that the
    broker is away harms no job.
    """
    settings = load_settings(ctx).settings
    _log_to_stderr("DEBUG" if settings.log_level == "debug" else "ERROR")
    return settings


def service_settings(ctx: click.Context) -> SharedSettings:
    """Return the settings for a command that stays, which logs at the level that is set."""
    settings = load_settings(ctx).settings
    _log_to_stderr(settings.log_level.upper())
    return settings


@click.group(cls=Noun)
def config() -> None:
    """Show the settings in force.

    codeherd config show
    codeherd config show --json
    """


@config.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_context
def show(ctx: click.Context, as_json: bool) -> None:
    """Print every setting, its value and where the value came from.

    A flag wins over the environment, that over `[tool.codeherd]` in the current folder's
    `pyproject.toml`, that over the user's file, and that over the default. Passwords show as `***`.
    """
    loaded = load_settings(ctx)
    rows = [
        (name, _shown(getattr(loaded.settings, name)), loaded.origins[name])
        for name in SharedSettings.model_fields
    ]
    if as_json:
        print_json({"settings": {name: {"value": value, "origin": origin} for name, value, origin in rows}})
        return
    print_table(("setting", "value", "from"), [(name, "" if v is None else str(v), o) for name, v, o in rows])


def _shown(value: object) -> str | int | float | None:
    match value:
        case Url():
            return value.masked()
        case Secret():
            return "***"
        case Path():
            return str(value)
        case str() | int() | float() | None:
            return value
        case _:
            return repr(value)


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_no_interrupt)
    if level == "INFO":
        # Theirs tell of connections and steps that went well.
        for name in ("alembic", "celery", "kombu"):
            logging.getLogger(name).setLevel(logging.WARNING)


def _is_no_interrupt(record: logging.LogRecord) -> bool:
    # Ctrl-C is no error; a pool that it interrupts while a connection goes back logs it as one.
    return not (record.exc_info and isinstance(record.exc_info[1], KeyboardInterrupt))
