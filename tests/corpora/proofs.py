"""Tell whether an edited file is the old one with docstrings, without a word of the editor or the scanner.

Owns: a second way to the same answer: the interpreter reads the bytes itself, the definitions of both
files are matched by their order, and what was put in is found again and taken out.
"""

from __future__ import annotations

import ast
import io
import itertools
import re
import sys
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_Documentable = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
#: What ends a line of Python.
_END = re.compile(r"\r\n|\r|\n")
#: Between a colon and a body on the same line, backwards; and before the first token of a line.
_GAP = re.compile(r"(?:[ \t\f]|\\(?:\r\n|\r|\n))*\Z")
_WHITE = re.compile(r"[ \t\f\r\n]*\Z")


def faults(before: bytes, after: bytes, texts: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with an edited file; nothing is wrong with a good one.

    Args:
        before: a file that parses.
        after: the same with docstrings.
        texts: what the new docstrings say.
    """
    old = _File(before)
    try:
        new = _File(after)
    except (SyntaxError, ValueError) as err:
        yield f"does not parse: {err}"
        return
    if [_name(node) for node in old.nodes] != [_name(node) for node in new.nodes]:
        yield "other definitions than before"
        return
    pairs = [(a, b) for a, b in zip(old.nodes, new.nodes, strict=True) if _docstring(a) != _docstring(b)]
    if any((_docstring(a) or "").strip() or _docstring(b) is None for a, b in pairs):
        yield "a docstring that was there has changed"
        return
    told = sorted(_letters(_docstring(b) or "") for _, b in pairs)
    if told != sorted(_letters(text) for text in texts):
        yield "the docstrings say something else than was asked for"
    yield from _bytes_outside(old, new, pairs)
    # From here on the trees are spoiled.
    for a, b in pairs:
        if _docstring(a) is not None:
            del a.body[0]
        del b.body[0]
    if _dumped(old.tree) != _dumped(new.tree):
        yield "another syntax tree"
    if _compiles(before) and not _compiles(after):
        yield "does not compile"


class _File:
    """A file as the interpreter reads it."""

    def __init__(self, raw: bytes) -> None:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        self.encoding = encoding
        # Bytes that have no second spelling: what is equal as text was equal before.
        self.text = raw.decode(encoding)
        self.has_bom = raw.startswith(b"\xef\xbb\xbf")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.tree = ast.parse(raw)
        self.nodes = [node for node in ast.walk(self.tree) if isinstance(node, _Documentable)]
        self._starts = [0, *(found.end() for found in _END.finditer(self.text))]

    def line(self, number: int) -> int:
        """Return where a line starts, or the text ends."""
        return self._starts[number - 1] if number <= len(self._starts) else len(self.text)

    def start(self, node: ast.stmt) -> int:
        return self._place(node.lineno, node.col_offset)

    def end(self, node: ast.stmt) -> int:
        return self._place(node.end_lineno or 0, node.end_col_offset or 0)

    def _place(self, line: int, column: int) -> int:
        start = self.line(line)
        in_line = self.text[start : self.line(line + 1)]
        return start + len(in_line.encode("utf-8")[:column].decode("utf-8"))

    def colon(self, node: ast.stmt, gap: re.Pattern[str]) -> int | None:
        """Return where the gap before a statement begins, if a colon stands before it."""
        start = self.start(node)
        head = self.text[self.line(max(1, node.lineno - 8)) : start]
        found = gap.search(head)
        at = start - len(head) + (found.start() if found else len(head))
        return at if self.text[at - 1 : at] == ":" else None


@dataclass(frozen=True)
class _Cut:
    """Characters that do not count in a comparison."""

    start: int
    end: int
    #: One blank line after them does not count either.
    has_gap: bool = False


def _bytes_outside(
    old: _File, new: _File, pairs: Sequence[tuple[_Documentable, _Documentable]]
) -> Iterator[str]:
    if old.encoding != new.encoding or old.has_bom != new.has_bom:
        yield "another encoding"
    from_old, from_new = [], []
    for a, b in pairs:
        docstring = b.body[0]
        colon = None if isinstance(a, ast.Module) else old.colon(a.body[0], _GAP)
        if colon is not None:
            after = new.colon(docstring, _WHITE)
            if after is None:
                yield f"no header before line {docstring.lineno}"
                return
            is_blank = _docstring(a) is not None
            from_old.append(_Cut(colon, old.end(a.body[0]) if is_blank else old.start(a.body[0])))
            end = new.end(docstring) if is_blank else new.start(b.body[1])
            if new.text[new.end(docstring) : end].strip(" \t\f\r\n"):
                yield f"line {docstring.end_lineno} holds more than a docstring"
            from_new.append(_Cut(after, end))
        elif _docstring(a) is not None:
            from_old.append(_Cut(old.start(a.body[0]), old.end(a.body[0])))
            from_new.append(_Cut(new.start(docstring), new.end(docstring)))
        else:
            start, end = new.line(docstring.lineno), new.line((docstring.end_lineno or 0) + 1)
            around = new.text[start : new.start(docstring)] + new.text[new.end(docstring) : end]
            if around.strip(" \t\f\r\n") or not new.text[start:end].endswith(("\r", "\n")):
                yield f"line {docstring.lineno} holds more than a docstring"
            from_new.append(_Cut(start, end, has_gap=isinstance(b, ast.Module | ast.ClassDef)))
    rest = "".join(piece for piece, _ in _pieces(old.text, from_old))
    if pairs and not old.tree.body and rest and not rest.endswith(("\r", "\n")):
        # A last comment gets a line end, before the docstring of a module that has no code.
        rest += next(iter(_END.findall(new.text)), "")
    at = 0
    for piece, may_skip in _pieces(new.text, from_new):
        shorter = _END.sub("", piece, count=1) if may_skip and _END.match(piece) else piece
        known = next((one for one in (piece, shorter) if rest.startswith(one, at)), None)
        if known is None:
            yield f"bytes changed after character {at}"
            return
        at += len(known)
    if at != len(rest):
        yield "bytes at the end are gone"


def _pieces(text: str, cuts: Sequence[_Cut]) -> Iterator[tuple[str, bool]]:
    """Yield what lies between the cuts, and whether it may begin with a blank line."""
    ordered = sorted(cuts, key=lambda cut: cut.start)
    edges = [_Cut(0, 0), *ordered, _Cut(len(text), len(text))]
    for before, after in itertools.pairwise(edges):
        yield text[before.end : after.start], before.has_gap


def _name(node: _Documentable) -> tuple[type[ast.AST], str]:
    return type(node), "" if isinstance(node, ast.Module) else node.name


def _docstring(node: _Documentable) -> str | None:
    return ast.get_docstring(node, clean=False)


def _letters(text: str) -> str:
    """Return what no rendering changes."""
    return "".join(character for character in text.casefold() if character.isalnum())


def _dumped(tree: ast.AST) -> str:
    usual = sys.getrecursionlimit(), sys.get_int_max_str_digits()
    # Long chains of operators, on frames of Python's own; and long numbers.
    sys.setrecursionlimit(50_000)
    sys.set_int_max_str_digits(0)
    try:
        return ast.dump(tree)
    finally:
        sys.setrecursionlimit(usual[0])
        sys.set_int_max_str_digits(usual[1])


def _compiles(raw: bytes) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(raw, "<file>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
