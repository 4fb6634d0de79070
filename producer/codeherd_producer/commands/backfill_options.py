"""The options that say what a backfill is to do, and the `Options` that they make.

Owns: their names, and that the command line goes before the project's own settings
(`backfill.project_settings`), which go before the defaults. Does not know what an option does.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from codeherd_producer.backfill import project_settings
from codeherd_producer.backfill.docstrings import Convention
from codeherd_producer.backfill.options import Options, context_chars_of
from codeherd_producer.commands.request_options import options
from codeherd_schema.errors import InvalidRequest, UnsupportedByModel
from codeherd_schema.models import ModelTable
from codeherd_schema.requests import JobKind, first_fault

#: Kinds of symbols: the option's name, the field of `Selection`, and what it says.
_KINDS = (
    ("module", "modules", "Modules."),
    ("init-method", "init", "`__init__` and `__call__` [yes]."),
    ("magic", "magic", "Other magic methods."),
    ("private", "private", "Names that begin with two underscores."),
    ("semiprivate", "semiprivate", "Names that begin with one."),
    ("nested", "nested", "What is defined in functions."),
    ("setters", "setters", "Setters and deleters of properties."),
    ("property-decorators", "properties", "Getters of properties [yes]."),
    ("tests", "tests", "Tests: test runners print a docstring in place of the name."),
    ("trivial", "trivial", "Functions whose body is `pass` or `...`."),
    ("visible", "visible", "What users see at run time: commands, routes, tools."),
    ("overrides", "overrides", "Methods that a base class documents."),
    ("blank", "blank", "Docstrings of white space, which are replaced."),
    ("one-liners", "one_liners", "Bodies on the header's line, which become lines of their own."),
)

kind_options = options(
    *(
        click.option(f"--{name}/--no-{name}", f"kind_{field}", default=None, help=text)
        for name, field, text in _KINDS
    ),
    click.option("--everything", is_flag=True, help="All of these kinds."),
    click.option("--min-lines", type=click.IntRange(0), default=0, help="Leave shorter functions alone [0]."),
    click.option(
        "--name", "include_names", multiple=True, metavar="REGEX", help="Only such names; repeatable."
    ),
    click.option("--no-name", "exclude_names", multiple=True, metavar="REGEX", help="Not such names."),
)
file_options = options(
    click.option("--include", multiple=True, metavar="PATTERN", help="Only such paths; repeatable."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Not such paths; repeatable."),
    click.option("--changed-since", metavar="COMMIT", help="Only files that were changed after this commit."),
    click.option("--allow-dirty", is_flag=True, help="Files too that have changes which are not committed."),
    click.option("--python", metavar="PATH", help="An interpreter that reads syntax newer than this one's."),
)
text_options = options(
    click.option("--model", "-m", default="tiny", help="Who writes [tiny]."),
    click.option(
        "--convention",
        type=click.Choice([convention.value for convention in Convention]),
        help="Sections of parameters, results and errors [the project's own, else pep257: none].",
    ),
    click.option("--width", type=click.IntRange(40, 400), help="Columns [the project's own, else 88]."),
    click.option("--candidates", type=click.IntRange(1, 8), default=1, help="Texts to choose from [1]."),
    click.option("--allow-doctest", is_flag=True, help="Take texts with `>>>`, which doctest runs."),
    click.option("--priority", type=click.IntRange(0, 9), default=9, help="0 runs first, 9 last [9]."),
    click.option("--no-cache", is_flag=True, help="Ask anew instead of taking texts of earlier runs."),
)


def make_options(root: Path, models: ModelTable, given: Mapping[str, Any]) -> Options:
    """Return what the command line and the project ask for.

    Args:
        root: the folder that is backfilled.
        models: what can be served.
        given: the values of this module's options, by the names of their parameters; a verb may leave
            those out that say which symbols and files.

    Raises:
        UnsupportedByModel: the model cannot fill holes.
        BadProjectFile: a setting of the project is wrong.
        InvalidRequest: a value is out of its range.
    """
    project = project_settings.read(root)
    model = models.find(given["model"])
    if not model.can(JobKind.INFILL):
        able = ", ".join(one.name for one in models if one.can(JobKind.INFILL))
        raise UnsupportedByModel(f"`{model.name}` cannot fill holes", hint=f"these can: {able}")
    kinds: dict[str, Any] = {
        field: _first(
            given.get(f"kind_{field}"),
            True if given.get("everything") else None,
            getattr(project.selection, field),
        )
        for _, field, _ in _KINDS
    }
    names = {
        "include": given.get("include_names") or tuple(one.pattern for one in project.selection.include),
        "exclude": given.get("exclude_names") or tuple(one.pattern for one in project.selection.exclude),
    }
    values = {
        "model": model.name,
        "kinds": {**kinds, **names, "min_lines": given.get("min_lines", 0)},
        "include": given["include"],
        "exclude": (*given["exclude"], *project.exclude),
        "changed_since": given.get("changed_since"),
        "allow_dirty": given.get("allow_dirty", False),
        "python": given.get("python"),
        "convention": _first(given["convention"], project.convention, Convention.PEP257),
        "width": _first(given["width"], project.width, 88),
        "candidates": given["candidates"],
        "allow_doctest": given["allow_doctest"],
        "priority": given["priority"],
        "salt": str(uuid.uuid4()) if given["no_cache"] else "",
        "context_chars": context_chars_of(model),
    }
    try:
        return Options.model_validate(values)
    except ValidationError as err:
        raise InvalidRequest(first_fault(err)) from err


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
