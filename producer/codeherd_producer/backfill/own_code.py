"""Know a symbol again in another version of its file: by its code.

Owns: what of a symbol's text counts. Layout does not: line ends, blank lines and white space at the ends of
lines come and go with checkouts and formatters. Nor do docstrings, which a backfill itself puts in: a class
stays the same when one of its methods gets one. All else does, character by character, with decorators,
comments and indentation: a description was written for exactly that code, and on doubt it is asked for anew.
Looks at text alone, so it does not matter which interpreter scanned the file. Does not know what a symbol is
called, or which version is the newer one.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Iterator
from typing import Final

from codeherd_producer.backfill.scanner import Scan, Symbol

_LINE_END: Final = re.compile(r"\r\n|\r|\n")
_IN_A_LINE: Final = re.compile(r"[^\r\n]+")


class OwnCode:
    """The code of each symbol of one file."""

    def __init__(self, scan: Scan) -> None:
        self._starts = [0, *(end.end() for end in _LINE_END.finditer(scan.text))]
        self._lines = [line.rstrip() for line in _LINE_END.split("".join(_undocumented(scan)))]

    def sha256(self, symbol: Symbol) -> str:
        """Return what a symbol's code is known by, in hexadecimal."""
        first = bisect.bisect(self._starts, symbol.start) - 1
        code = "\n".join(filter(None, self._lines[first : symbol.end_line]))
        return hashlib.sha256(code.encode("utf-8", "surrogatepass")).hexdigest()


def _undocumented(scan: Scan) -> Iterator[str]:
    """Yield a file's text without its docstrings; the ends of their lines stay, so that lines keep places."""
    at = 0
    for start, end in sorted(one.docstring_span for one in scan.symbols if one.docstring_span is not None):
        yield scan.text[at:start]
        yield _IN_A_LINE.sub("", scan.text[start:end])
        at = end
    yield scan.text[at:]
