"""Turn a run's accepted texts into edited files.

Owns: which texts go into which bytes, proven file by file before anybody sees a patch. Does not write
(`writing`), commit (`commits`) or print patches (`patches`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from codeherd_producer.backfill.docstrings import Unwritable, rendered
from codeherd_producer.backfill.editor import Insertion, UnsafeEdit, edited
from codeherd_producer.backfill.options import Options
from codeherd_producer.backfill.scanner import Scan, Symbol
from codeherd_producer.backfill.sources import read_planned, read_source
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
    """One file whose bytes are no longer those that were planned."""

    file: File
    #: It has the docstrings already: they were put in, and nobody came to say so.
    has_docstrings: bool


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
    insertions = [_insertion(source.scan.symbols[t.place], t.text or "", options) for t in accepted]
    after = edited(source.scan, insertions)
    return EditedFile(file, source.raw, after, tuple(target.name for target in accepted))


def unsafe(scan: Scan, symbol: Symbol, text: str, options: Options) -> str | None:
    """Return why a text must not be put into this file at this symbol; None if it may be."""
    try:
        edited(scan, [_insertion(symbol, text, options)])
    except (UnsafeEdit, Unwritable) as err:
        return str(err)
    return None


def _has_docstrings(root: Path, file: File, accepted: Sequence[Target], options: Options) -> bool:
    source = read_source(root, file.path, options)
    if source is None:
        return False
    documented = {(symbol.name, symbol.twin) for symbol in source.scan.symbols if symbol.is_documented}
    return {(target.name, target.twin) for target in accepted} <= documented


def _insertion(symbol: Symbol, text: str, options: Options) -> Insertion:
    return Insertion(symbol, rendered(text, indent=symbol.indent, width=options.width))
