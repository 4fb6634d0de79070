"""Give a body that stands on its header's line lines of its own, so that a docstring finds room above it.

Owns: what comes between the colon and such a body, which is all that changes, and the sequence of tokens
and comments by which `editor` proves it. Comments, semicolons and continued lines stay with the body as
they are: a `# noqa` at its end goes down with it, which is why nobody's body is opened unasked. How deep
the lines go is the scanner's word (`Symbol.indent`).
"""

from __future__ import annotations

import io
import tokenize

from codeherd_producer.backfill.scanner import Symbol

#: Tokens that say how code is laid out, and nothing else.
_LAYOUT = frozenset(
    {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}
)


def opening(symbol: Symbol, docstring: str = "") -> str:
    """Return what takes the place of the characters `symbol.one_line`.

    Args:
        symbol: with its body on the header's line.
        docstring: a literal, its lines after the first indented; empty to give the body lines and no more.
    """
    newline = symbol.newline
    if not docstring:
        return newline + symbol.indent
    # D204: one blank line after the docstring of a class.
    gap = newline if symbol.kind == "class" else ""
    return f"{newline}{symbol.indent}{docstring}{newline}{gap}{symbol.indent}"


def words(text: str) -> list[tuple[int, str]]:
    """Return the tokens and comments of code, each with its type, and nothing of where they stand.

    Raises:
        SyntaxError, tokenize.TokenError: the text has no tokens.
    """
    unix = text.replace("\r\n", "\n").replace("\r", "\n")
    tokens = tokenize.generate_tokens(io.StringIO(unix, newline="").readline)
    return [(token.type, token.string) for token in tokens if token.type not in _LAYOUT]
