"""Find all that a backfill is to do: file by file, which symbols get a docstring, and why not the rest.

Owns: the way from a folder to `PlannedFile`s, in order of their paths, one in memory at a time, and from one
path to the same again. Decides nothing itself: `files` and `selection` do. Knows nothing of models, runs or
SQL.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from codeherd_producer.backfill.files import MOST_BYTES, FileReason, SourceFile, find, is_dirty, look
from codeherd_producer.backfill.git import Git
from codeherd_producer.backfill.inheritance import Inheritance
from codeherd_producer.backfill.interpreters import Interpreter, scanned
from codeherd_producer.backfill.scanner import Scan, Symbol, Unreadable
from codeherd_producer.backfill.selection import Selection, decided, is_generated, is_skipped
from codeherd_schema.errors import InvalidRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which files and symbols a backfill is for."""

    selection: Selection = field(default_factory=Selection)
    #: Patterns of paths, from the folder that was asked for; see `files.find`.
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    #: Only files that were changed after this commit branched off.
    changed_since: str | None = None
    #: Take files too that have changes which are not committed.
    allow_dirty: bool = False
    #: An interpreter for syntax that this one does not know.
    python: Path | None = None


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One Python file, and what is to be done in it."""

    #: From the folder that was asked for, with `/`.
    path: str
    #: Of its bytes, in hexadecimal; empty if they were not read.
    sha256: str
    #: Why the whole file is left alone; None if it is not.
    reason: str | None
    #: None if it was not read, or cannot be.
    scan: Scan | None
    #: In source order.
    targets: tuple[Symbol, ...]
    #: How many symbols get nothing, by `selection.Reason`; "documented" is one.
    passed_over: Mapping[str, int]


def plan(root: Path, wanted: Wanted) -> Iterator[PlannedFile]:
    """Return every Python file below a folder, each read when its turn comes.

    A file that cannot be read has a reason, and the next one follows.

    Args:
        root: a folder, in a repository or not.
        wanted: what to look for.

    Raises:
        InvalidRequest: there is no such folder.
        GitFailed: there is no commit `wanted.changed_since`.
        InterpreterFailed: `wanted.python` cannot run the scanner.
    """
    if not root.is_dir():
        raise InvalidRequest(f"{root} is no folder")
    root = root.resolve()
    sources = find(
        root,
        include=wanted.include,
        exclude=wanted.exclude,
        changed_since=wanted.changed_since,
        allow_dirty=wanted.allow_dirty,
    )
    other = None if wanted.python is None else Interpreter(wanted.python)
    if other is not None:
        other.check()
    return _planned(root, sources, wanted.selection, other)


def plan_again(root: Path, path: str, wanted: Wanted) -> PlannedFile:
    """Plan one file of an earlier plan as it is now.

    Whether it was changed since `wanted.changed_since` is not asked again: it is a part of the plan.

    Args:
        root: the folder of that plan.
        path: from there.
        wanted: as it was then.

    Raises:
        GitFailed: the repository cannot be asked.
    """
    root = root.resolve()
    git = Git.of(root)
    with Interpreter(wanted.python) if wanted.python is not None else contextlib.nullcontext() as other:
        inheritance = Inheritance(
            root if git is None else git.top.resolve(),
            _everything(root),
            functools.partial(_loaded, other=other),
        )
        planned = _planned_file(root, look(root, path), wanted.selection, inheritance, other)
    # Asked last, so that what was read is what was committed.
    if planned.reason is None and not wanted.allow_dirty and is_dirty(root, path):
        return replace(planned, reason=str(FileReason.DIRTY), targets=())
    return planned


def read(root: Path, path: str, python: Path | None) -> tuple[bytes, Scan]:
    """Return one file's bytes and what is in them, as `plan` did.

    Raises:
        OSError: it cannot be read.
        Unreadable: it is no Python that this interpreter knows, nor `python`.
        InterpreterFailed: `python` cannot run the scanner.
    """
    raw = (root / path).read_bytes()
    with Interpreter(python) if python is not None else contextlib.nullcontext() as other:
        return raw, scanned(raw, other)


def _everything(root: Path) -> Iterator[Path]:
    """Yield the files that modules may be looked for in; looks for them when the first one is asked for."""
    yield from (root / one.path for one in find(root, allow_dirty=True))


def _planned(
    root: Path, sources: Sequence[SourceFile], selection: Selection, other: Interpreter | None
) -> Iterator[PlannedFile]:
    git = Git.of(root)
    with other or contextlib.nullcontext():
        inheritance = Inheritance(
            root if git is None else git.top.resolve(),
            (root / source.path for source in sources),
            functools.partial(_loaded, other=other),
        )
        for source in sources:
            yield _planned_file(root, source, selection, inheritance, other)


def _planned_file(
    root: Path,
    source: SourceFile,
    selection: Selection,
    inheritance: Inheritance,
    other: Interpreter | None,
) -> PlannedFile:
    if source.reason is not None:
        return _left_alone(source, source.reason)
    file = root / source.path
    try:
        raw = file.read_bytes()
    except OSError:
        return _left_alone(source, FileReason.GONE)
    sha256 = hashlib.sha256(raw).hexdigest()
    try:
        scan = scanned(raw, other)
        reason = _reason(scan)
        if reason is not None:
            return _left_alone(source, reason, sha256, scan)
        inheritance.add(file, scan)
        passed_over: collections.Counter[str] = collections.Counter()
        targets: list[Symbol] = []
        for symbol, why in decided(
            scan,
            selection,
            is_test_file=source.is_test,
            is_described=functools.partial(inheritance.describes, file),
        ):
            if why is None:
                targets.append(symbol)
            else:
                passed_over[why.value] += 1
    except Unreadable as err:
        return _left_alone(source, str(err), sha256)
    except Exception as err:
        # A file that shows a fault of ours must not keep the others from their docstrings.
        logger.exception("file_not_planned path=%s", source.path)
        return _left_alone(source, f"unexpected {type(err).__name__}", sha256)
    return PlannedFile(source.path, sha256, None, scan, tuple(targets), dict(passed_over))


def _reason(scan: Scan) -> FileReason | None:
    if is_generated(scan):
        return FileReason.GENERATED
    return FileReason.MARKED if is_skipped(scan) else None


def _left_alone(source: SourceFile, reason: str, sha256: str = "", scan: Scan | None = None) -> PlannedFile:
    # Bytes of a name that are no UTF-8 could not be stored.
    path = source.path.encode("utf-8", "backslashreplace").decode("utf-8")
    return PlannedFile(path, sha256, str(reason), scan, (), {})


def _loaded(file: Path, other: Interpreter | None) -> Scan | None:
    """Read a file for what it says of base classes."""
    try:
        if file.stat().st_size > MOST_BYTES:
            return None
        return scanned(file.read_bytes(), other)
    except (OSError, Unreadable):
        return None
