"""Turn a run's accepted texts into edited files.

Owns: which texts go into which bytes, proven file by file before anybody sees a patch; also into bytes that
nobody planned for, where a symbol still has the code that its text was written for. Does not write
(`writing`), commit (`commits`) or print patches (`patches`).
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from codeherd_producer.backfill import planner
from codeherd_producer.backfill.docstrings import Unwritable, rendered
from codeherd_producer.backfill.editor import Insertion, Reader, UnsafeEdit, edited, opened
from codeherd_producer.backfill.options import Options
from codeherd_producer.backfill.own_code import OwnCode
from codeherd_producer.backfill.scanner import Scan, Symbol
from codeherd_producer.backfill.sources import read_planned, reader
from codeherd_schema.backfills import Backfills, File, FileState, Run, Target, TargetState


class Loss(StrEnum):
    """Why a text is not carried over into a file that was changed since it was planned."""

    GONE = "gone"
    DOCUMENTED = "documented meanwhile"
    CHANGED = "changed"
    UNWANTED = "no longer wanted"
    UNSAFE = "refused"


@dataclass(frozen=True, slots=True)
class EditedFile:
    """One file with its new docstrings."""

    file: File
    before: bytes
    after: bytes
    #: Qualified names of what was documented, in source order.
    names: tuple[str, ...]
    #: `before` is not what was planned: accepted texts were carried over, but for so many.
    is_carried: bool = False
    lost: Mapping[Loss, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """One file that gets nothing."""

    file: File
    #: It has the docstrings already: they were put in before.
    has_docstrings: bool = False
    #: The bytes are the planned ones, but the texts cannot all be put into them: why not.
    fault: str | None = None
    #: The bytes are other ones: why no text can be carried over, from the file or from each symbol.
    reason: str | None = None
    lost: Mapping[Loss, int] = field(default_factory=dict)


def edited_files(
    rows: Backfills, run: Run, *, states: Sequence[FileState] = (FileState.DONE,)
) -> Iterator[EditedFile | LeftAlone]:
    """Yield the files of a run that get docstrings, in order of their paths.

    Args:
        rows: where the run is kept.
        run: in any state.
        states: of the files.

    Raises:
        GitFailed: the repository cannot be asked about a file that was changed.
    """
    after = ""
    while part := rows.files(run.id, states=states, after=after):
        for file in part:
            if file.accepted:
                yield edited_file(rows, run, file)
        after = part[-1].path


def edited_file(rows: Backfills, run: Run, file: File) -> EditedFile | LeftAlone:
    """Return a file with the docstrings that were accepted for it.

    If it was changed since it was planned it is planned again: a text goes to the symbol of its target's
    name and number, if that has the same code, still lacks a docstring, and is still wanted.

    Raises:
        GitFailed: the repository cannot be asked about a file that was changed.
    """
    options = Options.model_validate(run.options)
    accepted = [t for t in rows.targets(file.id) if t.state is TargetState.ACCEPTED and t.text is not None]
    source = read_planned(Path(run.root), file, options)
    if source is None:
        return _carried_over(Path(run.root), file, accepted, options)
    try:
        pairs = [(source.scan.symbols[target.place], target.text or "") for target in accepted]
        after = _edited(source.scan, pairs, options)
    except (UnsafeEdit, Unwritable) as err:
        # Each was safe by itself; the other files must not wait for this one.
        return LeftAlone(file, fault=str(err))
    return EditedFile(file, source.raw, after, tuple(target.name for target in accepted))


def _carried_over(
    root: Path, file: File, accepted: Sequence[Target], options: Options
) -> EditedFile | LeftAlone:
    planned = planner.plan_again(root, file.path, options.wanted())
    scan = planned.scan
    if scan is None:
        return LeftAlone(file, reason=planned.reason)
    symbols = {(symbol.name, symbol.twin): symbol for symbol in scan.symbols}
    losses = _losses(accepted, symbols, planned.targets, OwnCode(scan))
    if list(losses.values()) == [Loss.DOCUMENTED] * len(accepted):
        # Whatever else is true of the file by now: nothing is left to do.
        return LeftAlone(file, has_docstrings=True)
    if planned.reason is not None:
        return LeftAlone(file, reason=planned.reason)
    # In source order, which may be another one by now.
    pairs = sorted(
        ((target, symbols[target.name, target.twin]) for target in accepted if target.id not in losses),
        key=lambda pair: pair[1].start,
    )
    refused = unsafe(scan, [(symbol, target.text or "") for target, symbol in pairs], options)
    losses |= {pairs[place][0].id: Loss.UNSAFE for place in refused}
    pairs = [pair for place, pair in enumerate(pairs) if place not in refused]
    lost = dict(collections.Counter(losses.values()))
    if not pairs:
        return LeftAlone(file, reason="none of its symbols can take a text", lost=lost)
    try:
        after = _edited(scan, [(symbol, target.text or "") for target, symbol in pairs], options)
    except (UnsafeEdit, Unwritable) as err:
        return LeftAlone(file, reason=str(err))
    names = tuple(target.name for target, _ in pairs)
    return EditedFile(file, scan.encoded(scan.text), after, names, is_carried=True, lost=lost)


def _losses(
    accepted: Sequence[Target],
    symbols: Mapping[tuple[str, int], Symbol],
    wanted: Sequence[Symbol],
    code: OwnCode,
) -> dict[int, Loss]:
    """Return which targets' texts no symbol gets, by id, and why not."""
    keys = {(symbol.name, symbol.twin) for symbol in wanted}
    losses = {}
    for target in accepted:
        key = (target.name, target.twin)
        if key not in symbols:
            losses[target.id] = Loss.GONE
        elif symbols[key].is_documented:
            losses[target.id] = Loss.DOCUMENTED
        elif code.sha256(symbols[key]) != target.code_sha256:
            losses[target.id] = Loss.CHANGED
        elif key not in keys:
            losses[target.id] = Loss.UNWANTED
    return losses


def _edited(scan: Scan, texts: Sequence[tuple[Symbol, str]], options: Options) -> bytes:
    insertions = [_insertion(symbol, text, options) for symbol, text in texts]
    with reader(scan, options) as read:
        return edited(scan, insertions, read=read)


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
        if len(texts) < 2:
            return {place: str(err) for place, _ in texts}
        middle = len(texts) // 2
        parts = (texts[:middle], texts[middle:])
        return {place: why for part in parts for place, why in _unsafe(scan, part, options, read).items()}
    return {}


def _insertion(symbol: Symbol, text: str, options: Options) -> Insertion:
    return Insertion(symbol, rendered(text, indent=symbol.indent, width=options.width))
