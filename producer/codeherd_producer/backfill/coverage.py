"""Count which modules, classes and functions have a docstring; the numbers are interrogate's (1.7.0).

Owns: what counts under each of interrogate's flags, its oddities too, and which files are counted. Takes
symbols from `scanner`, which another interpreter runs on files that this one cannot parse, if one is lent; a
file that cannot be read is listed with the reason and ends nothing. Does not know what a backfill would write
(`selection`): the two rules differ on purpose. Only `.py` files are counted.
"""

from __future__ import annotations

import ast
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatch
from pathlib import Path
from re import Pattern
from typing import Literal

from codeherd_producer.backfill.interpreters import Interpreter, scanned
from codeherd_producer.backfill.scanner import Scan, Symbol, Unreadable

#: Left out right below the folder that is measured, and everything there whose name begins so.
COMMON_EXCLUDE = (".tox", ".venv", "venv", ".git", ".hg")


@dataclass(frozen=True, slots=True)
class Ignored:
    """What does not count; each field is the flag of the same name, without any everything counts."""

    magic: bool = False
    init_method: bool = False
    init_module: bool = False
    module: bool = False
    nested_functions: bool = False
    nested_classes: bool = False
    private: bool = False
    semiprivate: bool = False
    property_decorators: bool = False
    setters: bool = False
    overloaded_functions: bool = False
    #: Matched at the beginning of a symbol's own name.
    regex: Sequence[Pattern[str]] = ()
    #: Only symbols whose own names match one of these count, and no modules.
    whitelist_regex: Sequence[Pattern[str]] = ()
    #: `google`: a docstring of a class is one of its `__init__` too, and the other way round.
    style: Literal["sphinx", "google"] = "sphinx"
    #: Paths, relative ones from the folder that is measured; whatever begins so is left out, and `*`, `?`
    #: and `[]` are patterns (`fnmatch`) that match `/` too.
    exclude: Sequence[str] = ()

    def flags(self) -> list[str]:
        """Return the flags that say what counts within a file, as interrogate spells them, in one order."""
        names = (
            *("magic", "init_method", "init_module", "module", "nested_functions", "nested_classes"),
            *("private", "semiprivate", "property_decorators", "setters", "overloaded_functions"),
        )
        found = [f"--ignore-{name.replace('_', '-')}" for name in names if getattr(self, name)]
        found += [f"--ignore-regex={pattern}" for pattern in sorted(one.pattern for one in self.regex)]
        found += [
            f"--whitelist-regex={pattern}" for pattern in sorted(one.pattern for one in self.whitelist_regex)
        ]
        return found + ([f"--style={self.style}"] if self.style != "sphinx" else [])


@dataclass(frozen=True, slots=True)
class Count:
    """How many symbols count, and how many of them have a docstring."""

    total: int
    covered: int

    @property
    def missing(self) -> int:
        """Symbols without a docstring."""
        return self.total - self.covered

    @property
    def percent(self) -> float:
        """Share of covered symbols, [0, 100]; 100 where nothing counts."""
        return self.covered / self.total * 100 if self.total else 100.0


@dataclass(frozen=True, slots=True)
class FileCount(Count):
    """One file's numbers."""

    #: From the folder that is measured, with `/`.
    path: str


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file, or a folder, that could not be counted."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Coverage(Count):
    """The numbers of all files together, of each, and what is in none of them."""

    files: tuple[FileCount, ...]
    skipped: tuple[SkippedFile, ...]


def measure(root: Path, ignoring: Ignored, other: Interpreter | None = None) -> Coverage:
    """Count the docstrings below a folder, or in one file, which no rule then leaves out.

    One file is in memory at a time; what stays is three numbers and a path for each.

    Args:
        root: the folder, or the file.
        ignoring: what does not count.
        other: reads what this interpreter cannot parse; the numbers are those of interrogate there.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    files, skipped = [], []
    for one in measured(root, ignoring, other):
        if isinstance(one, SkippedFile):
            skipped.append(one)
        else:
            files.append(one)
    return Coverage(
        sum(file.total for file in files), sum(file.covered for file in files), tuple(files), tuple(skipped)
    )


def measured(
    root: Path, ignoring: Ignored, other: Interpreter | None = None
) -> Iterator[FileCount | SkippedFile]:
    """Yield the files below a folder one by one, in the order of a sorted walk.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    top = root.resolve(strict=True)
    for path in _walked(top, ignoring):
        if isinstance(path, SkippedFile):
            yield path
            continue
        inner = path.name if path == top else path.relative_to(top).as_posix()
        try:
            counted = of_file(_read(path, other), ignoring)
        except Unreadable as err:
            yield SkippedFile(inner, str(err))
        except OSError as err:
            yield SkippedFile(inner, f"cannot be read: {err.strerror}")
        else:
            if counted is not None:
                yield FileCount(counted.total, counted.covered, inner)


def of_file(found: Scan, ignoring: Ignored) -> Count | None:
    """Count one file's symbols; None if not even its module is looked at."""
    verdicts = counted(found.symbols, ignoring)
    return None if verdicts is None else Count(len(verdicts), sum(is_covered for _, is_covered in verdicts))


def counted(symbols: Sequence[Symbol], ignoring: Ignored) -> list[tuple[Symbol, bool]] | None:
    """Return the symbols of a file that count, in its order, each with whether it is covered.

    Args:
        symbols: of one scan, all of them, in order.
        ignoring: what does not count.

    Returns:
        None where interrogate drops the file before it counts, and does not list it.
    """
    nodes = _named(list(_visited(symbols, ignoring)), ignoring)
    if not nodes:
        return None
    if ignoring.nested_functions:
        nodes = [node for node in nodes if not node.is_nested_function]
    if ignoring.nested_classes:
        # What is in a nested class goes with it, but not what is in that: interrogate looks one floor down.
        gone = {node for node in nodes if node.is_nested_class}
        nodes = [node for node in nodes if node not in gone and node.parent not in gone]
    if ignoring.style == "google":
        _share_docstrings(nodes)
    is_module_counted = not (ignoring.module or ignoring.whitelist_regex)
    return [(node.symbol, node.is_covered) for node in nodes if node.parent is not None or is_module_counted]


def meets(count: Count, fail_under: float) -> bool:
    """Whether a share reaches a percentage, as interrogate decides it: rounded to as many decimals.

    `80.0` has one decimal, so 79.96 % reaches it.
    """
    exponent = Decimal(str(fail_under)).as_tuple().exponent
    return fail_under <= round(count.percent, -exponent if isinstance(exponent, int) else 0)


def _walked(top: Path, ignoring: Ignored) -> Iterator[Path | SkippedFile]:
    if not top.is_dir():
        yield top
        return
    prefixes = [str(top / name) for name in COMMON_EXCLUDE]
    prefixes += [os.path.realpath(top / name) for name in ignoring.exclude]

    def is_excluded(path: Path) -> bool:
        return any(fnmatch(str(path), f"{prefix}*") for prefix in prefixes)

    unread: list[OSError] = []
    for folder, folders, names in os.walk(top, onerror=unread.append):
        here = Path(folder)
        # All that is below such a folder begins with the same prefix.
        folders[:] = sorted(name for name in folders if not is_excluded(here / name))
        for name in sorted(names):
            if not name.endswith(".py") or (ignoring.init_module and name == "__init__.py"):
                continue
            if not is_excluded(here / name):
                yield here / name
    for err in unread:
        yield SkippedFile(Path(err.filename).relative_to(top).as_posix(), f"cannot be read: {err.strerror}")


def _read(path: Path, other: Interpreter | None) -> Scan:
    # A pipe of that name would be waited on for ever.
    if not stat.S_ISREG(path.stat().st_mode):
        raise Unreadable("no ordinary file")
    return scanned(path.read_bytes(), other)


@dataclass(eq=False, slots=True)
class _Node:
    """A symbol that was visited."""

    symbol: Symbol
    #: The definition around it; None is the module.
    parent: _Node | None
    is_covered: bool
    #: Only `def` in `def`: interrogate's word for nested knows no `async def` and no class between.
    is_nested_function: bool
    #: A class in a class or in a `def`.
    is_nested_class: bool


def _visited(symbols: Sequence[Symbol], ignoring: Ignored) -> Iterator[_Node]:
    """Yield what interrogate's visitor looks at: nothing below a symbol that is ignored."""
    around: list[_Node] = []
    hidden_until = 0
    for symbol in symbols:
        if symbol.kind == "module":
            around = [_Node(symbol, None, symbol.is_documented, False, False)]
            yield around[0]
            continue
        if symbol.line <= hidden_until:
            continue
        if _is_ignored(symbol, ignoring):
            hidden_until = symbol.end_line
            continue
        # A definition begins on a line of its own, so lines alone tell what is inside of what.
        while len(around) > 1 and around[-1].symbol.end_line < symbol.line:
            around.pop()
        parent = around[-1]
        node = _Node(
            symbol,
            parent,
            symbol.is_documented,
            _is_def(parent.symbol) and _is_def(symbol),
            symbol.kind == "class" and (parent.symbol.kind == "class" or _is_def(parent.symbol)),
        )
        around.append(node)
        yield node


def _is_def(symbol: Symbol) -> bool:
    return symbol.kind in ("function", "method") and not symbol.is_async


def _own_name(symbol: Symbol) -> str:
    return symbol.name.rpartition(".")[2]


def _is_ignored(symbol: Symbol, ignoring: Ignored) -> bool:
    name = _own_name(symbol)
    is_dunder_end = name.endswith("__")
    return (
        (symbol.kind != "class" and _is_function_ignored(name, symbol.decorators, ignoring))
        or (ignoring.private and name.startswith("__") and not is_dunder_end)
        or (ignoring.semiprivate and name.startswith("_") and not name.startswith("__") and not is_dunder_end)
        or any(pattern.match(name) for pattern in ignoring.regex)
    )


def _is_function_ignored(name: str, decorators: Sequence[str], ignoring: Ignored) -> bool:
    is_init = name == "__init__"
    if is_init and ignoring.init_method:
        return True
    if not is_init and ignoring.magic and name.startswith("__") and name.endswith("__"):
        return True
    if ignoring.overloaded_functions and ("overload" in decorators or "typing.overload" in decorators):
        return True
    if ignoring.setters and any(_attribute(one) == "setter" for one in decorators):
        return True
    return ignoring.property_decorators and any(
        one == "property" or _attribute(one) in ("setter", "deleter") for one in decorators
    )


def _attribute(decorator: str) -> str | None:
    """Return `b` of `a.b`, whatever `a` is; None for other expressions, such as `a or c.b`."""
    if not decorator.endswith((".setter", ".deleter")):
        return None
    try:
        expression = ast.parse(decorator, mode="eval").body
    except SyntaxError:
        # Of the other interpreter's syntax. What it has more of goes into brackets and strings: no operator.
        return decorator.rpartition(".")[2]
    return expression.attr if isinstance(expression, ast.Attribute) else None


def _named(nodes: list[_Node], ignoring: Ignored) -> list[_Node]:
    """Drop a lone module where modules are ignored, and what a whitelist does not name."""
    if len(nodes) == 1 and (ignoring.module or ignoring.whitelist_regex):
        return []
    if not ignoring.whitelist_regex:
        return nodes
    # A name that two patterns match counts twice, in interrogate too.
    found = [
        node
        for node in nodes[1:]
        for pattern in ignoring.whitelist_regex
        if pattern.match(_own_name(node.symbol))
    ]
    return nodes[:1] + found if found else []


def _share_docstrings(nodes: Sequence[_Node]) -> None:
    for node in nodes:
        # Whatever is around a `def __init__` counts as its class, the module too.
        if _is_def(node.symbol) and _own_name(node.symbol) == "__init__" and node.parent is not None:
            node.is_covered = node.parent.is_covered = node.is_covered or node.parent.is_covered
