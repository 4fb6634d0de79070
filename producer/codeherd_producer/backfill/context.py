"""Choose what the model sees around a hole.

Owns: the order and the budget of imports, examples, class head, header and body. Its unit is the
character: the worker counts tokens, and cuts what is still too long farthest from the hole. Files of a
repository are read elsewhere.

    prefix: imports, documented neighbours, head of the class, decorators and header, indentation, quotes
    suffix: quotes, body, a few lines after it

What all holes of a file share comes first, so that a worker computes it once (prefix reuse).
"""

from __future__ import annotations

import ast
import bisect
import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from codeherd_producer.backfill.scanner import Scan, Symbol

QUOTES = '"""'
#: Shares of the budget, of the whole: imports, examples, class head, and lines after the symbol.
_IMPORTS, _EXAMPLES, _HEAD, _AFTER = 0.12, 0.22, 0.1, 0.06
#: Documented neighbours that are shown.
_MOST_EXAMPLES = 2
#: Characters of an example's docstring.
_EXAMPLE_LENGTH = 600


class HeaderTooLong(Exception):
    """The header alone fills the budget; nothing useful can be asked."""


@dataclass(frozen=True, slots=True)
class Hole:
    """What stands before and after a docstring that is to be written; lines end as on Unix."""

    prefix: str
    suffix: str
    #: White space before each line of the docstring.
    indent: str
    #: What did not fit, in words.
    cut: tuple[str, ...] = ()
    #: Docstrings that the prefix shows.
    examples: tuple[str, ...] = ()


def deeper(hole: Hole, lines: Sequence[str]) -> Hole:
    """Return the hole that is left when the docstring's first lines are there.

    Args:
        hole: of the whole docstring.
        lines: two or more, with the opening quotes, without indentation. The last one is left open, and the
            closing quotes will stand on a line of their own.
    """
    first, *more, last = lines
    shown = [first, *(hole.indent + line if line else "" for line in more), hole.indent + last]
    prefix = hole.prefix.removesuffix(QUOTES) + "\n".join(shown)
    return dataclasses.replace(hole, prefix=prefix, suffix=f"\n{hole.indent}{hole.suffix}")


class FileContext:
    """One file's holes."""

    def __init__(self, scan: Scan, *, budget: int) -> None:
        """Prepare.

        Args:
            scan: of the file.
            budget: most characters of prefix and suffix together.
        """
        self._budget = budget
        self._scan = scan
        self._text = scan.text
        self._starts = [0, *(found.end() for found in re.finditer(r"\r\n|\r|\n", scan.text))]
        self._classes = {s.name: s for s in scan.symbols if s.kind == "class"}
        self._imports = self._shortened(self._find_imports(), _IMPORTS)
        self._documented = [s for s in scan.symbols if s.name and s.is_documented and s.insert_at is not None]

    def hole(self, symbol: Symbol) -> Hole:
        """Return what to show for one symbol.

        Raises:
            HeaderTooLong: leave this symbol to a human.
        """
        if symbol.insert_at is None:
            raise ValueError("a body on the header's line has no hole")
        header = _unix(self._lines_before(symbol)) + symbol.indent + QUOTES
        room = self._budget - len(header) - len(self._imports)
        if room < self._budget // 4:
            raise HeaderTooLong(f"the header has {len(header)} characters")
        examples = self._examples(symbol)
        head = self._class_head(symbol)
        shown = "".join(text for text, _ in examples)
        room -= len(shown) + len(head)
        body, was_cut = self._body(symbol, room - int(_AFTER * self._budget))
        after = self._after(symbol, min(int(_AFTER * self._budget), room - len(body)))
        closing = QUOTES + "\n"
        return Hole(
            prefix=self._imports + shown + head + header,
            suffix=closing + body + after,
            indent=symbol.indent,
            cut=("statements of the body",) if was_cut else (),
            examples=tuple(docstring for _, docstring in examples),
        )

    def _lines_before(self, symbol: Symbol) -> str:
        """Return decorators and header, from the beginning of their line."""
        start = self._starts[bisect.bisect_right(self._starts, symbol.start) - 1]
        return self._text[start : symbol.insert_at]

    def _end(self, symbol: Symbol) -> int:
        """Return where the symbol's last line ends."""
        return self._starts[symbol.end_line] if symbol.end_line < len(self._starts) else len(self._text)

    def _find_imports(self) -> str:
        found = [
            self._text[self._starts[first - 1] : self._starts_of(last)]
            for first, last in self._scan.import_lines
        ]
        return "".join(_ended(_unix(lines)) for lines in found) + ("\n\n" if found else "")

    def _starts_of(self, line: int) -> int:
        return self._starts[line] if line < len(self._starts) else len(self._text)

    def _examples(self, symbol: Symbol) -> list[tuple[str, str]]:
        """Return the nearest documented symbols of the same kind, as they are shown, with what they say."""
        room = int(_EXAMPLES * self._budget)
        chosen: list[tuple[str, str]] = []
        for other in sorted(self._documented, key=lambda one: self._distance(one, symbol)):
            if other.docstring is None or other.docstring_span is None or other.name == symbol.name:
                continue
            text = _unix(self._lines_before(other) + self._text[other.insert_at : other.docstring_span[1]])
            text = f"{text}\n{other.indent}...\n\n"
            if len(other.docstring) > _EXAMPLE_LENGTH or len(text) > room:
                continue
            room -= len(text)
            chosen.append((text, other.docstring))
            if len(chosen) == _MOST_EXAMPLES:
                break
        # In the order of the file: neighbours get the same ones in the same order.
        return sorted(chosen, key=lambda one: self._text.find(one[1]))

    @staticmethod
    def _distance(other: Symbol, symbol: Symbol) -> tuple[bool, bool, int]:
        is_same_kind = (other.kind == "class") == (symbol.kind == "class")
        is_same_place = other.name.rpartition(".")[0] == symbol.name.rpartition(".")[0]
        return not is_same_kind, not is_same_place, abs(other.line - symbol.line)

    def _class_head(self, symbol: Symbol) -> str:
        """Return the header of the class around, the first line of its docstring, and its `__init__`."""
        outer = self._classes.get(symbol.name.rpartition(".")[0])
        if outer is None or outer.insert_at is None or symbol.kind != "method":
            return ""
        lines = [_unix(self._lines_before(outer)).rstrip("\n")]
        if outer.is_documented and outer.docstring is not None:
            lines.append(f"{outer.indent}{QUOTES}{outer.docstring.strip().splitlines()[0]}{QUOTES}")
        init = next((s for s in self._scan.symbols if s.name == f"{outer.name}.__init__"), None)
        if init is not None and init is not symbol and init.insert_at is not None:
            lines += ["", _unix(self._lines_before(init)).rstrip("\n"), f"{init.indent}..."]
        return self._shortened("\n".join([*lines, "", ""]), _HEAD)

    def _body(self, symbol: Symbol, room: int) -> tuple[str, bool]:
        """Return the body's lines; of a long one its beginning and its end, cut between statements."""
        text = _ended(_unix(self._text[symbol.insert_at : self._end(symbol)]))
        if len(text) <= room:
            return text, False
        parts = _statements(text, symbol.indent)
        mark = f"{symbol.indent}...\n"
        kept, front, back = len(mark), 0, len(parts)
        # Two from the beginning, then one from the end.
        while front < back:
            takes_front = (front + len(parts) - back) % 3 < 2
            part = parts[front] if takes_front else parts[back - 1]
            if kept + len(part) > room:
                break
            kept += len(part)
            front, back = (front + 1, back) if takes_front else (front, back - 1)
        return "".join([*parts[:front], mark, *parts[back:]]), True

    def _after(self, symbol: Symbol, room: int) -> str:
        lines: list[str] = []
        for line in _unix(self._text[self._end(symbol) :][: max(0, 2 * room)]).split("\n")[:-1]:
            room -= len(line) + 1
            if room < 0:
                break
            lines.append(line + "\n")
        return "".join(lines)

    def _shortened(self, text: str, share: float) -> str:
        room = int(share * self._budget)
        if len(text) <= room:
            return text
        return text[:room].rpartition("\n")[0] + "\n\n" if room > 0 else ""


def _statements(text: str, indent: str) -> Sequence[str]:
    """Split a body before each line that begins a statement of its own level."""
    return list(_grouped(text, indent))


def _grouped(text: str, indent: str) -> Iterator[str]:
    try:
        tree = ast.parse("if 1:\n" + text)
    except (SyntaxError, ValueError, RecursionError):
        yield text
        return
    outer = tree.body[0]
    lines = text.splitlines(keepends=True) if "\x0c" not in text else re.findall(r"[^\n]*\n", text)
    firsts = []
    if isinstance(outer, ast.If):
        for node in outer.body:
            decorators = getattr(node, "decorator_list", [])
            firsts.append(min([node.lineno, *(one.lineno for one in decorators)]) - 2)
    ends = [*sorted(set(firsts))[1:], len(lines)]
    start = 0
    for end in ends:
        yield "".join(lines[start:end])
        start = end


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _ended(text: str) -> str:
    return text if text.endswith("\n") or not text else text + "\n"
