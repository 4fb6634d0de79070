"""Put docstrings into a file, and prove that nothing else changed.

Owns: the edits, and the checks before anything may be written: bytes outside the edited spans are the
file's own, and the code means the same; where an edit takes characters away (`one_line`, and docstrings of
white space alone), tokens and comments are the same in the same order. Does not know where texts come
from (`docstrings` renders them) or who writes files.
"""

from __future__ import annotations

import ast
import itertools
import tokenize
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from codeherd_producer.backfill.one_line import opening, words
from codeherd_producer.backfill.scanner import DEFINITIONS, Scan, Symbol, Unreadable, scan

#: Scans the bytes of a file; raises `Unreadable`.
Reader = Callable[[bytes], Scan]


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


def edited(original: Scan, insertions: Sequence[Insertion], *, read: Reader = scan) -> bytes:
    """Return the file with all docstrings in it.

    A symbol with a body on its header's line gets lines of its own; a docstring of white space alone is
    replaced.

    Args:
        original: the file.
        insertions: docstrings for its symbols.
        read: scans the result, as `original` was scanned.

    Raises:
        UnsafeEdit: a check failed, a symbol has a docstring, two edits overlap, or the encoding lacks a
            character.
    """
    edits = _ordered(edit_of(original, one) for one in insertions)
    raw = _encoded(original, edits)
    check(original, edits, raw, [one.symbol for one in insertions], read=read)
    return raw


def opened(original: Scan, symbols: Iterable[Symbol], *, read: Reader = scan) -> Scan:
    """Return the file as if these symbols' bodies had lines of their own, for showing it to a model.

    Names, twins and places of symbols are the same in both. Symbols without `one_line` change nothing.

    Raises:
        UnsafeEdit: as `edited`.
    """
    edits = _ordered(Edit(*one.one_line, opening(one)) for one in symbols if one.one_line is not None)
    return check(original, edits, _encoded(original, edits), (), read=read) if edits else original


def edit_of(original: Scan, insertion: Insertion) -> Edit:
    """Return the edit that puts a docstring into its place.

    Raises:
        UnsafeEdit: there is a docstring, or none to put in.
    """
    symbol = insertion.symbol
    if symbol.is_documented:
        raise UnsafeEdit("there is a docstring")
    if symbol.has_doc_slot:
        raise UnsafeEdit("a class with a slot for `__doc__` can have no docstring")
    if not insertion.lines:
        raise UnsafeEdit("no lines to put in")
    indent, newline = symbol.indent, symbol.newline
    first, *more = insertion.lines
    literal = newline.join([first, *(indent + line if line else "" for line in more)])
    if symbol.docstring_span is not None:
        # What follows on its line stays there.
        start, end = symbol.docstring_span
        if symbol.one_line is None:
            return Edit(start, end, literal)
        return Edit(symbol.one_line[0], end, newline + indent + literal)
    if symbol.one_line is not None:
        return Edit(*symbol.one_line, opening(symbol, literal))
    assert symbol.insert_at is not None  # noqa: S101 -- the scanner gives one or the other
    if symbol.insert_at == len(original.text):
        # A module of nothing, or of comments whose last has no line end.
        is_open = original.text != "" and not original.text.endswith(("\r", "\n"))
        return Edit(symbol.insert_at, symbol.insert_at, newline * is_open + literal + newline)
    # D204: one blank line after the docstring of a class.
    gap = newline if symbol.kind in ("class", "module") and not symbol.is_blank_after else ""
    return Edit(symbol.insert_at, symbol.insert_at, f"{indent}{literal}{newline}{gap}")


def _ordered(edits: Iterable[Edit]) -> list[Edit]:
    ordered = sorted(edits, key=lambda edit: edit.start)
    if any(b.start < a.end or b.start == a.start for a, b in itertools.pairwise(ordered)):
        raise UnsafeEdit("two docstrings for one place")
    return ordered


def _encoded(original: Scan, edits: Sequence[Edit]) -> bytes:
    try:
        return original.encoded(spliced(original.text, edits))
    except UnicodeEncodeError as err:
        raise UnsafeEdit(f"{original.encoding} has no character {err.object[err.start]!r}") from err


def spliced(text: str, edits: Sequence[Edit]) -> str:
    """Return `text` with all edits made, which are in order."""
    parts, at = [], 0
    for edit in edits:
        parts += [text[at : edit.start], edit.text]
        at = edit.end
    return "".join((*parts, text[at:]))


def check(
    original: Scan, edits: Sequence[Edit], raw: bytes, symbols: Sequence[Symbol], *, read: Reader = scan
) -> Scan:
    """Make sure that `raw` is the original with docstrings at `symbols`, and nothing else.

    Returns:
        The scan of `raw`.

    Raises:
        UnsafeEdit: it is not.
    """
    try:
        after = read(raw)
    except Unreadable as err:
        raise UnsafeEdit(f"the result does not parse: {err}") from err
    if _without(after.text, _spans(edits)) != _without(original.text, [(e.start, e.end) for e in edits]):
        raise UnsafeEdit("bytes outside the docstrings changed")
    names = {(symbol.name, symbol.twin) for symbol in symbols}
    new = [symbol for symbol in after.symbols if (symbol.name, symbol.twin) in names]
    if len(new) != len(names) or not all(symbol.is_documented for symbol in new):
        raise UnsafeEdit("what was put in is no docstring")
    old = [symbol for symbol in symbols if symbol.docstring is not None]
    has_replaced = any(e.end > e.start for e in edits)
    if original.shape is not None:
        # The other interpreter's word; tokens of newer syntax are nothing that this one can compare.
        if has_replaced or original.shape != after.shape:
            raise UnsafeEdit("it cannot be shown that the code means the same")
        return after
    try:
        _check_meaning(original, old, after, new, has_replaced=has_replaced)
    except (RecursionError, MemoryError) as err:
        raise UnsafeEdit("nested too deeply for this interpreter") from err
    return after


def _check_meaning(
    original: Scan, old: Sequence[Symbol], after: Scan, new: Sequence[Symbol], *, has_replaced: bool
) -> None:
    """Compare two files, each without these symbols' docstrings."""
    if not _is_same(_tree(original, old), _tree(after, new)):
        raise UnsafeEdit("the code would mean something else")
    if has_replaced and _words(original, old) != _words(after, new):
        raise UnsafeEdit("tokens or comments changed")
    # What parses need not compile; a file that never did is no worse for a docstring.
    if not _compiles(after.text) and _compiles(original.text):
        raise UnsafeEdit("the result does not compile")


def _spans(edits: Sequence[Edit]) -> list[tuple[int, int]]:
    """Return where each edit's text lies in the new text."""
    spans, moved = [], 0
    for edit in edits:
        start = edit.start + moved
        spans.append((start, start + len(edit.text)))
        moved += len(edit.text) - (edit.end - edit.start)
    return spans


def _without(text: str, spans: Iterable[tuple[int, int]]) -> str:
    return spliced(text, [Edit(start, end, "") for start, end in spans])


def _tree(of: Scan, without: Collection[Symbol]) -> ast.Module:
    lines = {symbol.line for symbol in without if symbol.name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(of.text)
    if any(not symbol.name for symbol in without):
        del tree.body[0]
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS) and node.lineno in lines:
            del node.body[0]
    return tree


def _is_same(one: Any, other: Any) -> bool:
    """Whether two syntax trees are equal but for positions; not recursive, as deep as code may be."""
    waiting: list[tuple[Any, Any]] = [(one, other)]
    while waiting:
        a, b = waiting.pop()
        if type(a) is not type(b):
            return False
        if isinstance(a, ast.AST):
            waiting += [(getattr(a, name, None), getattr(b, name, None)) for name in a._fields]
        elif isinstance(a, list):
            if len(a) != len(b):
                return False
            waiting += zip(a, b, strict=True)
        elif a != b:
            return False
    return True


def _words(of: Scan, without: Iterable[Symbol]) -> list[tuple[int, str]]:
    spans = sorted(one.docstring_span for one in without if one.docstring_span is not None)
    try:
        return words(_without(of.text, spans))
    except (SyntaxError, tokenize.TokenError) as err:
        raise UnsafeEdit(f"no tokens without the docstrings: {err}") from err


def _compiles(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, "<edited>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
