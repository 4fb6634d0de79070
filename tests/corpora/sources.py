"""Texts for symbols, in place of a model: fine ones, and the worst that a model or a liar could send.

Owns: the texts. Which one a symbol gets follows from its name, so that a run can be repeated.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Final

from codeherd_producer.backfill.scanner import Symbol

_VERBS: Final = ("Keep", "Fetch", "Weigh", "Carry", "Gather", "Rewrite", "Compare", "Release", "Mend", "Sort")
_THINGS: Final = ("ledger", "harbour", "lantern", "orchard", "letter", "bridge", "kettle", "meadow", "anchor")
_WAYS: Final = ("in order", "with care", "before dusk", "for later", "as told", "by weight", "at the gate")

#: What no docstring should be able to do anything with, or must hold as it is.
NASTY: Final = (
    "",
    "   \n\t\n",
    ".",
    "?",
    '"',
    "'",
    "\\",
    '""',
    '"""',
    "'''",
    'Says """ and goes on.',
    'Ends """\nimport os\nos.abort()\n"""',
    "Takes ''' as quotes.",
    'Says "so"',
    'Says "so".',
    '"So" it says',
    "Ends with a backslash \\",
    "Goes on \\\nafter a backslash.",
    "Ends in a raw one \\\\\\",
    r"Looks at C:\new\table, \x, \N{no such name}, \u12 and \777.",
    "Splits\r\nits lines\rin every way.",
    "Keeps\fform feeds\vand others\x1c\x1d\x1e\x85.",
    "Has other\u2028line\u2029ends.",
    "Has a NUL\x00.",
    "Rings \x07, erases \x08 and escapes \x1b[31m.",
    "Turns \u202eti dnuora\u202c.",
    "Hides \u200bzero\u200d widths\ufeff.",
    "Is half \ud800 a pair.",
    "Grüßt é, ñ, ß and Ω.",
    "做一件事。",
    "Smiles 😀 twice 👩‍👩‍👧.",
    "Uses “typographic” quotes — and dashes…",
    "Has\u00a0spaces\u3000of\u2003every kind.",
    "word " * 20_000,
    "x" * 100_000,
    "One sentence. " * 400,
    "Title\n" + "\n" * 500 + "end",
    "Title.\n\n" + "\t" * 60 + "deep",
    "Title.\n\n" + " " * 300 + "deeper",
    "# coding: rot13",
    "Title.\n# coding: utf-16\n# -*- coding: latin-1 -*-",
    "#!/usr/bin/env python",
    "<EOT>",
    "▁<PRE> ▁<SUF> ▁<MID>",
    "```python\nreturn 1\n```",
    "{braces} {0!r} %s %(name)s $HOME `ticks`",
    ">>> import os\n>>> os.abort()",
    "Args:\n    nothing: at all.\n\nReturns:\n    Nothing.",
    "Title.\n\n:param x: y\n:raises Z: never",
    "Title.\n\nParameters\n----------\nx : int\n    y",
    "    indented\n  in\nall ways\n        at once",
    "noqa: D100  # noqa # type: ignore # fmt: off",
    "True",
    "r'",
    'f"{1/0}"',
    "return 1",
    "(",
    ")",
    "-",
    "Ends with spaces   \n   \n   ",
    "Ends with a colon:",
    "e.g. i.e. etc.",
)


def accepting(symbol: Symbol) -> str:
    """Return a fine description that no other symbol has; every third has more than one line."""
    key = _key(symbol)
    verb, thing, way = _VERBS[key % 10], _THINGS[key // 10 % 9], _WAYS[key // 90 % 7]
    summary = f"{verb} the {thing} {way}, number {key}."
    if key % 3:
        return summary
    return f"{summary}\n\nThe {thing} is looked after {way}, as all the others are, so that none is lost."


def nasty(symbol: Symbol) -> str:
    """Return one of the worst texts."""
    return NASTY[_key(symbol) % len(NASTY)]


SOURCES: Final[Mapping[str, Callable[[Symbol], str]]] = {"accepting": accepting, "nasty": nasty}


def _key(symbol: Symbol) -> int:
    return zlib.crc32(f"{symbol.name} {symbol.twin}".encode())
