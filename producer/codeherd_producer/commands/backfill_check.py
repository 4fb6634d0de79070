"""`codeherd backfill check`: fail when too little is documented.

Owns: the flags, which are interrogate's, and the exit status. Does not count (`backfill.coverage`) or
remember (`backfill.ratchet`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import click

from codeherd_producer.backfill import project_settings, ratchet
from codeherd_producer.backfill.coverage import Coverage, Ignored, measure, meets
from codeherd_producer.backfill.interpreters import borrowed
from codeherd_producer.backfill.project_settings import ProjectSettings
from codeherd_producer.commands.failures import ExitCode
from codeherd_producer.commands.help_text import Verb
from codeherd_producer.commands.output import print_json, print_table
from codeherd_producer.commands.request_options import options
from codeherd_producer.commands.talk import note, say
from codeherd_schema.errors import InvalidRequest

#: Interrogate's short and long flag, the field of `Ignored`, the kind of the project's settings, and what
#: does not count then.
_FLAGS: Final = (
    ("-m", "magic", "magic", "Not magic methods; `__init__` counts."),
    ("-i", "init_method", "init", "Not `__init__`."),
    ("-I", "init_module", None, "Not the files `__init__.py`."),
    ("-M", "module", "modules", "Not modules."),
    ("-n", "nested_functions", "nested", "Not functions in functions."),
    ("-C", "nested_classes", "nested", "Not classes in classes or functions, with their methods."),
    ("-p", "private", "private", "Not names that begin with two underscores."),
    ("-s", "semiprivate", "semiprivate", "Not names that begin with one."),
    ("-P", "property_decorators", "properties", "Not getters, setters and deleters of properties."),
    ("-S", "setters", "setters", "Not setters of properties."),
    ("-O", "overloaded_functions", None, "Not functions with `@overload`."),
)


@click.command(cls=Verb)
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--min",
    "--fail-under",
    "least",
    type=click.FloatRange(0, 100),
    help="Share that must be documented, per cent.",
)
@click.option(
    "--ratchet",
    "ratchet_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Fail if it falls below this file.",
)
@options(
    *(
        click.option(
            short,
            f"--ignore-{name.replace('_', '-')}",
            f"ignore_{name}",
            is_flag=True,
            default=None,
            help=text,
        )
        for short, name, _, text in _FLAGS
    )
)
@click.option("-r", "--ignore-regex", multiple=True, metavar="REGEX", help="Not such names.")
@click.option("-w", "--whitelist-regex", multiple=True, metavar="REGEX", help="Only such names.")
@click.option("-e", "--exclude", multiple=True, metavar="PATH", help="Not these paths.")
@click.option(
    "--style",
    type=click.Choice(["sphinx", "google"]),
    default="sphinx",
    help="google: `__init__` is its class.",
)
@click.option("--python", metavar="PATH", help="An interpreter that reads syntax newer than this one's.")
@click.option("-v", "--verbose", is_flag=True, help="Every file that lacks something.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_context
def check(ctx: click.Context, /, path: Path, **given: Any) -> None:
    """Count how much below PATH is documented: interrogate's numbers, flags and [tool.interrogate].

        codeherd backfill check src --min 80
        codeherd backfill check src --ratchet docstrings.json

    Files that cannot be read are listed and left out. The exit status is 8 if there is too little.
    """
    project = project_settings.read(path if path.is_dir() else path.parent)
    ignoring = _ignored(project, given)
    with borrowed(given.get("python")) as other:
        found = measure(path, ignoring, other)
    least = given.get("least") if given.get("least") is not None else project.fail_under
    is_enough = least is None or meets(found, least)
    turn = None
    if given.get("ratchet_file") is not None:
        try:
            turn = ratchet.hold(given["ratchet_file"], found, ignoring)
        except OSError as err:
            raise InvalidRequest(f"{given['ratchet_file']}: {err.strerror}") from err
        _note_file(given["ratchet_file"], turn)
        is_enough = is_enough and turn.verdict is not ratchet.Verdict.FELL
    if given["as_json"]:
        print_json(_document(found, least, turn, is_enough=is_enough))
    else:
        _print(found, least, turn, is_verbose=bool(given.get("verbose")))
    if not is_enough:
        ctx.exit(ExitCode.GATE)


def _ignored(project: ProjectSettings, given: dict[str, Any]) -> Ignored:
    values: dict[str, Any] = {}
    for _, name, kind, _ in _FLAGS:
        said = given.get(f"ignore_{name}")
        if said is None and kind is not None and f"selection.{kind}" in project.origins:
            said = not getattr(project.selection, kind)
        values[name] = bool(said)
    patterns = {
        "regex": given.get("ignore_regex") or project.selection.exclude,
        "whitelist_regex": given.get("whitelist_regex") or project.selection.include,
    }
    for name, found in patterns.items():
        values[name] = tuple(_compiled(one) if isinstance(one, str) else one for one in found)
    return Ignored(
        **values,
        style=given.get("style") or "sphinx",
        exclude=(*(given.get("exclude") or ()), *project.exclude),
    )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as err:
        raise InvalidRequest(f"`{pattern}` is no regular expression: {err}") from err


def _document(
    found: Coverage, least: float | None, turn: ratchet.Turn | None, *, is_enough: bool
) -> dict[str, Any]:
    return {
        "total": found.total,
        "covered": found.covered,
        "percent": found.percent,
        "min": least,
        "ratchet": None if turn is None else turn.verdict,
        "met": is_enough,
        "files": [{"path": one.path, "total": one.total, "covered": one.covered} for one in found.files],
        "skipped": [{"path": one.path, "reason": one.reason} for one in found.skipped],
    }


def _note_file(path: Path, turn: ratchet.Turn) -> None:
    """Say what was written to the ratchet's file, which is to be committed."""
    now = f"{turn.now.covered} of {turn.now.total} documented"
    if turn.verdict is ratchet.Verdict.STARTED:
        note(f"there was no {path}; it is made now: {now}")
    elif turn.verdict is ratchet.Verdict.BETTER and turn.before is not None:
        note(f"{path} is written anew: {now}, {turn.before.covered} of {turn.before.total} before")


def _print(found: Coverage, least: float | None, turn: ratchet.Turn | None, *, is_verbose: bool) -> None:
    lacking = [one for one in found.files if one.missing] if is_verbose else []
    rows = [(one.path, str(one.total), str(one.missing), f"{one.percent:.1f} %") for one in lacking]
    rows.append(("total", str(found.total), str(found.missing), f"{found.percent:.1f} %"))
    print_table(("file", "symbols", "missing", "documented"), rows)
    for skipped in found.skipped:
        say(f"left out: {skipped.path}: {skipped.reason}")
    if least is not None and not meets(found, least):
        say(f"{found.percent:.1f} % is documented, {least:g} % is wanted")
    if turn is not None and turn.verdict is ratchet.Verdict.FELL:
        for change in turn.worse:
            before = 0 if change.before is None else change.before.missing
            say(f"{change.path}: {change.now.missing} missing, {before} before")
