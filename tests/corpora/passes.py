"""Document every symbol of a file twice over, and count what happened.

Owns: the way of one file through the pieces: find, scan, select, render, edit. A symbol is wanted if no
rule that can be turned off speaks against it. Which texts are put in is the source's word; `proofs` says
whether the outcome is right.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

from codeherd_producer.backfill import files
from codeherd_producer.backfill.docstrings import Unwritable, rendered
from codeherd_producer.backfill.editor import Insertion, UnsafeEdit, edited, opened
from codeherd_producer.backfill.scanner import Scan, Symbol, Unreadable, scan
from codeherd_producer.backfill.selection import Selection, decided
from codeherd_producer.backfill.texts import Surroundings, rejection
from tests.corpora.proofs import faults
from tests.corpora.sources import SOURCES

#: Columns of a docstring's lines: ruff's own.
WIDTH: Final = 88
#: Every kind of symbol, whoever may see it.
EVERYTHING: Final = Selection(
    modules=True, magic=True, init=True, private=True, semiprivate=True, nested=True, setters=True,
    tests=True, trivial=True, visible=True, overrides=True, blank=True, one_liners=True,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Passed:
    """What became of one file."""

    path: str
    #: Why nothing was tried; None if it was.
    skipped: str | None = None
    symbols: int = 0
    wanted: int = 0
    inserted: int = 0
    #: Bodies that stood on their header's line.
    opened: int = 0
    #: An error that nobody declared.
    crash: str | None = None
    faults: tuple[str, ...] = ()
    #: The edited file; empty if there is none.
    after: bytes = b""


def over_folder(
    folder: Path,
    source: str,
    *,
    processes: int,
    every: int = 1,
    keep: Callable[[Passed], None] = lambda _: None,
) -> list[Passed]:
    """Try the Python files below a folder.

    Args:
        folder: of code that need not run.
        source: a name of `SOURCES`.
        processes: how many work at a time.
        every: 1 tries all files, 4 a quarter of them.
        keep: gets each file while it still has its bytes.

    Returns:
        What became of each, without the bytes.
    """
    found = files.find(folder)[::every]
    left = [Passed(one.path, skipped=str(one.reason)) for one in found if one.reason is not None]
    paths = [one.path for one in found if one.reason is None]
    tried = partial(over_file, folder, source)
    passed = []
    # Not by a fork: whoever calls may have threads.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for one in pool.map(tried, paths, chunksize=8):
            keep(one)
            passed.append(dataclasses.replace(one, after=b""))
    return left + passed


def over_file(folder: Path, source: str, path: str) -> Passed:
    """Try one file; whatever happens is told, nothing is raised."""
    try:
        return _over_file(path, (folder / path).read_bytes(), SOURCES[source])
    except Exception as err:
        return Passed(path, crash=repr(err)[:300])


def _over_file(path: str, raw: bytes, source: Callable[[Symbol], str]) -> Passed:
    try:
        before = scan(raw)
    except Unreadable as err:
        return Passed(path, skipped=str(err).partition(":")[0])
    wanted = list(_wanted(before))
    accepted = {symbol: source(symbol) for symbol in wanted}
    insertions = list(_insertions(before, accepted))
    passed = Passed(path, symbols=len(before.symbols), wanted=len(wanted), inserted=len(insertions))
    try:
        # Bodies are opened for a model's eyes too.
        opened(before, wanted)
        after = edited(before, insertions)
    except UnsafeEdit as err:
        return dataclasses.replace(passed, faults=(f"refused by the editor: {err}",))
    found = list(faults(raw, after, [accepted[one.symbol] for one in insertions]))
    found += _second_pass(before, after, wanted, {one.symbol for one in insertions}, source)
    is_opened = sum(one.symbol.one_line is not None for one in insertions)
    return dataclasses.replace(passed, opened=is_opened, faults=tuple(found), after=after)


def _wanted(of: Scan) -> Iterator[Symbol]:
    return (symbol for symbol, reason in decided(of, EVERYTHING, is_test_file=False) if reason is None)


def _insertions(of: Scan, texts: dict[Symbol, str]) -> Iterator[Insertion]:
    for symbol, text in texts.items():
        # Its verdict is not asked: what is written must be safe whoever lets it pass.
        rejection(text, symbol, Surroundings(of.text[:2_000]), is_truncated=False)
        try:
            text.encode(of.encoding)
            yield Insertion(symbol, rendered(text, indent=symbol.indent, width=WIDTH))
        except (Unwritable, UnicodeEncodeError):
            continue


def _second_pass(
    before: Scan,
    after: bytes,
    wanted: Iterable[Symbol],
    inserted: Iterable[Symbol],
    source: Callable[[Symbol], str],
) -> Iterator[str]:
    again = scan(after)
    names = {(symbol.name, symbol.twin) for symbol in inserted}
    left = {(symbol.name, symbol.twin) for symbol in wanted} - names
    if {(symbol.name, symbol.twin) for symbol in _wanted(again)} != left:
        yield "a second pass wants other symbols than those that are left"
    insertions = list(_insertions(again, {symbol: source(symbol) for symbol in _wanted(again)}))
    if insertions:
        yield "a second pass finds something to insert"
    if [_identity(one) for one in before.symbols] != [_identity(one) for one in again.symbols]:
        yield "other symbols than before"


def _identity(symbol: Symbol) -> tuple[str, int, str]:
    return symbol.name, symbol.twin, symbol.kind


def table(passed: Iterable[Passed]) -> dict[str, int]:
    """Return the sums over files, by what they count."""
    sums: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for one in passed:
        sums.update(
            files=1, symbols=one.symbols, wanted=one.wanted, inserted=one.inserted, opened=one.opened,
            crashes=one.crash is not None, faults=len(one.faults),
        )  # fmt: skip
        if one.skipped is not None:
            reasons[f"skipped, {one.skipped}"] += 1
    return dict(sums) | dict(sorted(reasons.items()))
