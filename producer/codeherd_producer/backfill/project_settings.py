"""Read what a project has said to other tools about its docstrings.

Owns: which of their settings mean something here, and where each one was found. Takes only what is written
down, no tool's defaults. Does not know the command line, and decides nothing.

    interrogate   [tool.interrogate] of pyproject.toml: kinds of symbols, names, paths, the share wanted
    ruff          .ruff.toml, ruff.toml or [tool.ruff] of pyproject.toml: convention, width
    pydocstyle    [tool.pydocstyle] of pyproject.toml: convention, if ruff has none
    black         [tool.black] of pyproject.toml: width, if ruff has none

Each is looked for in the folder, then in those above it up to the top of the repository.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from codeherd_producer.backfill.docstrings import Convention
from codeherd_producer.backfill.selection import Selection
from codeherd_schema.errors import ConfigurationError

#: Interrogate's flags that leave something out, by the field of `Selection` that asks for the same. Of two
#: flags either is enough to leave it out.
_FLAGS: Final[Mapping[str, Sequence[str]]] = {
    "modules": ("ignore-module",),
    "magic": ("ignore-magic",),
    "init": ("ignore-init-method",),
    "private": ("ignore-private",),
    "semiprivate": ("ignore-semiprivate",),
    "nested": ("ignore-nested-functions", "ignore-nested-classes"),
    "setters": ("ignore-setters",),
    "properties": ("ignore-property-decorators",),
}


class BadProjectFile(ConfigurationError):
    """A project's file is no TOML, or a setting in it has an impossible value."""

    code = "bad_project_file"


@dataclass(frozen=True, slots=True)
class ProjectSettings:
    """What a project's files say; the defaults where they say nothing."""

    #: Kinds and names of symbols.
    selection: Selection = field(default_factory=Selection)
    #: Patterns of paths to leave alone, from the folder that was asked for; see `files.find`.
    exclude: tuple[str, ...] = ()
    #: Share of documented symbols that is asked for, [0, 100] percent.
    fail_under: float | None = None
    convention: Convention | None = None
    #: Columns of a docstring's lines.
    width: int | None = None
    #: File, table and key of each value that is not a default, by field: `width`, `selection.magic`.
    origins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Table:
    """One tool's settings in one file."""

    folder: Path
    #: As people write it: `pyproject.toml [tool.ruff]`.
    title: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Found:
    value: Any
    origin: str


def read(root: Path) -> ProjectSettings:
    """Return the settings for a folder.

    Raises:
        BadProjectFile: correct the file that the message names.
    """
    root = root.resolve()
    tables = list(_tables(root))
    interrogate, ruff, pydocstyle, black = (
        next((table for tool, table in tables if tool == name), None)
        for name in ("interrogate", "ruff", "pydocstyle", "black")
    )
    kinds = {name: found for name in _FLAGS if (found := _kind(interrogate, name)) is not None}
    names = {
        "exclude": _value(interrogate, "ignore-regex", _patterns),
        "include": _value(interrogate, "whitelist-regex", _patterns),
    }
    kinds |= {name: found for name, found in names.items() if found is not None}
    others = {
        "exclude": _value(interrogate, "exclude", lambda given: _paths(given, interrogate, root)),
        "fail_under": _value(interrogate, "fail-under", _share),
        # Ruff had it at its top before `lint` came.
        "convention": _value(ruff, "lint.pydocstyle.convention", _convention)
        or _value(ruff, "pydocstyle.convention", _convention)
        or _value(pydocstyle, "convention", _convention),
        "width": _value(ruff, "lint.pycodestyle.max-doc-length", _columns)
        or _value(ruff, "line-length", _columns)
        or _value(black, "line-length", _columns),
    }
    settings = {name: found for name, found in others.items() if found is not None}
    return ProjectSettings(
        selection=replace(Selection(), **{name: found.value for name, found in kinds.items()}),
        origins={f"selection.{name}": found.origin for name, found in kinds.items()}
        | {name: found.origin for name, found in settings.items()},
        **{name: found.value for name, found in settings.items()},
    )


def _tables(root: Path) -> Iterator[tuple[str, _Table]]:
    """Yield every tool's tables with its name, those that count first."""
    for folder in _folders(root):
        for name in (".ruff.toml", "ruff.toml"):
            if (folder / name).is_file():
                yield "ruff", _Table(folder, name, _document(folder / name))
        if (folder / "pyproject.toml").is_file():
            tools = _document(folder / "pyproject.toml").get("tool", {})
            for tool, values in tools.items() if isinstance(tools, dict) else ():
                if isinstance(values, dict):
                    yield tool, _Table(folder, f"pyproject.toml [tool.{tool}]", values)


def _folders(root: Path) -> Sequence[Path]:
    """Return a folder and those above it, up to the repository's top; without one it is alone."""
    above = [root, *root.parents]
    top = next((place for place, folder in enumerate(above) if (folder / ".git").exists()), 0)
    return above[: top + 1]


def _document(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise BadProjectFile(f"{path}: {err}") from err


def _kind(table: _Table | None, name: str) -> _Found | None:
    """Return whether a kind of symbol is wanted, if a flag says so."""
    flags = [found for flag in _FLAGS[name] if (found := _value(table, flag, _flag)) is not None]
    leaving_out = next((found for found in flags if found.value), None)
    if leaving_out is not None:
        return _Found(False, leaving_out.origin)
    return _Found(True, flags[0].origin) if flags else None


def _value(table: _Table | None, key: str, convert: Callable[[Any], Any]) -> _Found | None:
    """Return what a table has at a dotted key; None without it, or if it means nothing here."""
    if table is None:
        return None
    value: Any = table.values
    for word in key.split("."):
        # Interrogate and black take both spellings.
        inner = value.items() if isinstance(value, Mapping) else ()
        value = {name.replace("_", "-"): one for name, one in inner}.get(word)
    if value is None:
        return None
    origin = f"{table.title} {key}"
    try:
        converted = convert(value)
    except (ValueError, re.error) as err:
        raise BadProjectFile(f"{table.folder / origin}: {err}") from err
    return None if converted is None else _Found(converted, origin)


def _flag(given: Any) -> bool:
    if given is not True and given is not False:
        raise ValueError(f"{given!r} is neither true nor false")
    return given


def _share(given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given <= 100:
        raise ValueError(f"{given!r} is no number from 0 to 100")
    return float(given)


def _columns(given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"{given!r} is no number of columns")
    return given


def _convention(given: Any) -> Convention | None:
    # Pydocstyle has `none` and more, which say nothing about sections.
    return next((one for one in Convention if one == given), None)


def _strings(given: Any) -> list[str]:
    several = [given] if isinstance(given, str) else given
    if not isinstance(several, list) or not all(isinstance(one, str) for one in several):
        raise ValueError(f"{given!r} is no list of strings")
    return several


def _patterns(given: Any) -> tuple[re.Pattern[str], ...]:
    """Return expressions that find what interrogate matches: names of symbols from their beginning."""
    patterns = []
    for text in _strings(given):
        re.compile(text)
        # Flags such as `(?i)` stay in front.
        flags, rest = re.match(r"((?:\(\?[aiLmsux]+\))*)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        patterns.append(re.compile(rf"{flags}\A(?:{rest})"))
    return tuple(patterns)


def _paths(given: Any, table: _Table | None, root: Path) -> tuple[str, ...]:
    """Return interrogate's paths, which begin at its file's folder, as patterns that begin at `root`."""
    inside = "" if table is None or table.folder == root else f"{root.relative_to(table.folder).as_posix()}/"
    patterns = []
    for text in _strings(given):
        path = text.removeprefix("./").rstrip("/")
        if path.startswith(inside) and path != inside:
            inner = path.removeprefix(inside)
            patterns += [inner, f"{inner}/*"]
    return tuple(patterns)
