"""Turn a run's accepted texts into edited files.

Owns: which texts go into which bytes, proven file by file before anybody sees a patch. Does not write
(`writing`), commit (`commits`) or print patches (`patches`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from codeherd_producer.backfill.docstrings import Unwritable, rendered
from codeherd_producer.backfill.editor import Insertion, Reader, UnsafeEdit, edited, opened
from codeherd_producer.backfill.options import Options
from codeherd_producer.backfill.scanner import Scan, Symbol
from codeherd_producer.backfill.sources import read_planned, read_source, reader
from codeherd_schema.backfills import Backfills, File, FileState, Run, Target, TargetState


@dataclass(frozen=True, slots=True)
class EditedFile:
    """One file with its new docstrings."""

    file: File
    before: bytes
    after: bytes
    #: Qualified names of what was documented, in source order.
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """One file that gets nothing: mostly its bytes are no longer those that were planned."""

    file: File
    #: It has the docstrings already: they were put in before.
    has_docstrings: bool
    #: The bytes are the planned ones, but the texts cannot all be put into them: why not.
    fault: str | None = None


def edited_files(
    rows: Backfills, run: Run, *, states: Sequence[FileState] = (FileState.DONE,)
) -> Iterator[EditedFile | LeftAlone]:
    """Yield the files of a run that get docstrings, in order of their paths.

    Args:
        rows: where the run is kept.
        run: in any state.
        states: of the files.
    """
    after = ""
    while part := rows.files(run.id, states=states, after=after):
        for file in part:
            if file.accepted:
                yield edited_file(rows, run, file)
        after = part[-1].path


def edited_file(rows: Backfills, run: Run, file: File) -> EditedFile | LeftAlone:
    """Return a file with the docstrings that were accepted for it."""
    options = Options.model_validate(run.options)
    accepted = [t for t in rows.targets(file.id) if t.state is TargetState.ACCEPTED and t.text is not None]
    source = read_planned(Path(run.root), file, options)
    if source is None:
        return LeftAlone(file, _has_docstrings(Path(run.root), file, accepted, options))
    try:
        insertions = [_insertion(source.scan.symbols[t.place], t.text or "", options) for t in accepted]
        with reader(source.scan, options) as read:
            after = edited(source.scan, insertions, read=read)
    except (UnsafeEdit, Unwritable) as err:
        # Each was safe by itself; the other files must not wait for this one.
        return LeftAlone(file, has_docstrings=False, fault=str(err))
    return EditedFile(file, source.raw, after, tuple(target.name for target in accepted))


def unwritable(scan: Scan, options: Options) -> str | None:
    """Return why nothing can be proven of this file, so that no text may be put into it; None if it can."""
    try:
        with reader(scan, options) as read:
            edited(scan, [], read=read)
    except UnsafeEdit as err:
        return str(err)
    return None


def opened_view(scan: Scan, symbols: Sequence[Symbol], options: Options) -> Scan:
    """Return a file as a model is shown it: these symbols' bodies have lines of their own.

    Symbols have the same places in both. Where that cannot be proven the file is shown as it is.
    """
    try:
        with reader(scan, options) as read:
            return opened(scan, symbols, read=read)
    except UnsafeEdit:
        return scan


def unsafe(scan: Scan, texts: Sequence[tuple[Symbol, str]], options: Options) -> dict[int, str]:
    """Return which of these texts must not be put into a file, by place, and why; mostly none.

    Args:
        scan: of the file.
        texts: accepted ones, and their symbols.
        options: of the run.
    """
    with reader(scan, options) as read:
        return _unsafe(scan, list(enumerate(texts)), options, read)


def _unsafe(
    scan: Scan, texts: Sequence[tuple[int, tuple[Symbol, str]]], options: Options, read: Reader
) -> dict[int, str]:
    try:
        edited(scan, [_insertion(symbol, text, options) for _, (symbol, text) in texts], read=read)
    except (UnsafeEdit, Unwritable) as err:
        if len(texts) == 1:
            return {texts[0][0]: str(err)}
        middle = len(texts) // 2
        parts = (texts[:middle], texts[middle:])
        return {place: why for part in parts for place, why in _unsafe(scan, part, options, read).items()}
    return {}


def _has_docstrings(root: Path, file: File, accepted: Sequence[Target], options: Options) -> bool:
    source = read_source(root, file.path, options)
    if source is None:
        return False
    documented = {(symbol.name, symbol.twin) for symbol in source.scan.symbols if symbol.is_documented}
    return {(target.name, target.twin) for target in accepted} <= documented


def _insertion(symbol: Symbol, text: str, options: Options) -> Insertion:
    return Insertion(symbol, rendered(text, indent=symbol.indent, width=options.width))
