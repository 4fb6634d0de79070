"""Put docstrings into a file, and prove that nothing else changed.

Owns: the edits, and the two checks before anything may be written: bytes outside the inserted spans are
the file's own, and the code means the same. Does not know where texts come from (`docstrings` renders
them) or who writes files.
"""

from __future__ import annotations

import ast
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from codeherd_producer.backfill.scanner import DEFINITIONS, Scan, Symbol, Unreadable, scan


class UnsafeEdit(Exception):
    """The edited file would not be the old one with docstrings; nothing may be written."""


@dataclass(frozen=True, slots=True)
class Insertion:
    """One docstring, as the lines that the file will hold."""

    symbol: Symbol
    #: The literal's lines without indentation and line ends; inner lines may be empty.
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Edit:
    """Characters of the old text, and what stands in their place; mostly nothing is replaced."""

    start: int
    end: int
    text: str


def edited(original: Scan, insertions: Sequence[Insertion]) -> bytes:
    """Return the file with all docstrings in it.

    Raises:
        UnsafeEdit: a check failed, two edits overlap, or the encoding lacks a character.
    """
    edits = sorted((edit_of(one) for one in insertions), key=lambda edit: edit.start)
    if any(after.start < before.end for before, after in itertools.pairwise(edits)):
        raise UnsafeEdit("two docstrings for one place")
    text = spliced(original.text, edits)
    try:
        raw = original.encoded(text)
    except UnicodeEncodeError as err:
        raise UnsafeEdit(f"{original.encoding} has no character {err.object[err.start]!r}") from err
    check(original, edits, raw, {(one.symbol.name, one.symbol.twin) for one in insertions})
    return raw


def edit_of(insertion: Insertion) -> Edit:
    """Return the edit that puts a docstring into its place."""
    symbol = insertion.symbol
    if symbol.insert_at is not None:
        # D204: one blank line after the docstring of a class.
        more = ("",) if symbol.kind in ("class", "module") and not symbol.is_blank_after else ()
        lines = (*insertion.lines, *more)
        text = "".join((symbol.indent + line if line else "") + symbol.newline for line in lines)
        return Edit(symbol.insert_at, symbol.insert_at, text)
    raise UnsafeEdit("the body is on the header's line")


def spliced(text: str, edits: Sequence[Edit]) -> str:
    """Return `text` with all edits made, which are in order."""
    parts, at = [], 0
    for edit in edits:
        parts += [text[at : edit.start], edit.text]
        at = edit.end
    return "".join((*parts, text[at:]))


def check(original: Scan, edits: Sequence[Edit], raw: bytes, names: set[tuple[str, int]]) -> None:
    """Make sure that `raw` is the original with docstrings at the symbols `names`, and nothing else.

    Raises:
        UnsafeEdit: it is not.
    """
    try:
        after = scan(raw)
    except Unreadable as err:
        raise UnsafeEdit(f"the result does not parse: {err}") from err
    outside, at = [], 0
    for edit in edits:
        # Where this edit's text lies in the new text.
        start = edit.start + at
        outside.append((start, start + len(edit.text)))
        at += len(edit.text) - (edit.end - edit.start)
    if _without(after.text, outside) != _without(original.text, [(e.start, e.end) for e in edits]):
        raise UnsafeEdit("bytes outside the docstrings changed")
    if not names <= {(symbol.name, symbol.twin) for symbol in after.symbols if symbol.docstring is not None}:
        raise UnsafeEdit("what was put in is no docstring")
    if _shape(original, set()) != _shape(after, names):
        raise UnsafeEdit("the code would mean something else")
    # What parses need not compile; a file that never did is no worse for a docstring.
    if not _compiles(after.text) and _compiles(original.text):
        raise UnsafeEdit("the result does not compile")


def _without(text: str, spans: Sequence[tuple[int, int]]) -> str:
    return spliced(text, [Edit(start, end, "") for start, end in spans])


def _shape(of: Scan, without: set[tuple[str, int]]) -> str:
    """Return the syntax tree as text, without the docstrings of these symbols."""
    lines = {symbol.line for symbol in of.symbols if (symbol.name, symbol.twin) in without and symbol.name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(of.text)
    if ("", 0) in without:
        del tree.body[0]
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS) and node.lineno in lines:
            del node.body[0]
    return ast.dump(tree)


def _compiles(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, "<edited>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return True
