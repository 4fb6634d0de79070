"""Where the text of a request comes from: the command line, a pipe, a file, a place in a file.

Owns: `-`, `@file`, `--prefix-file`, `--suffix-file`, `--at FILE:LINE[:COL]` and the rule that text is
UTF-8 and stays as it is, newlines included. Does not know what a request does with its text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from codeherd_schema.errors import InvalidRequest

_PLACE = re.compile(r"(?P<file>.+?):(?P<line>\d+)(?::(?P<column>\d+))?")


@dataclass(frozen=True, slots=True)
class Hole:
    """The text on both sides of a hole."""

    prefix: str
    suffix: str


def read_text(argument: str, stdin: BinaryIO) -> str:
    """Return the text that `argument` stands for.

    Args:
        argument: `-` is stdin, `@FILE` is a file, `@@text` is text that begins with `@`, and anything
            else is the text itself.
        stdin: where piped text comes from.

    Raises:
        InvalidRequest: a file cannot be read, or the text is not UTF-8.
    """
    if argument == "-":
        return _decoded(stdin.read(), "stdin")
    if argument.startswith("@@"):
        argument = argument[1:]
    elif argument.startswith("@"):
        return read_file(Path(argument[1:]))
    # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
    return _decoded(argument.encode(errors="surrogateescape"), "the argument")


def read_file(path: Path) -> str:
    """Return a file's text.

    Raises:
        InvalidRequest: it cannot be read, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as err:
        raise InvalidRequest(f"`{path}` cannot be read: {err.strerror or type(err).__name__}") from err
    return _decoded(data, f"`{path}`")


def hole_at(place: str) -> Hole:
    """Split a file at a cursor.

    Args:
        place: `FILE:LINE` or `FILE:LINE:COL`. Lines and columns count from 1, columns in characters;
            column 1 is before the first character. Without a column the hole is at the line's end.

    Raises:
        InvalidRequest: the place is not in the file.
    """
    found = _PLACE.fullmatch(place)
    if found is None:
        raise InvalidRequest(f"`{place}` is no place in a file", hint="write FILE:LINE or FILE:LINE:COL")
    text = read_file(Path(found["file"]))
    lines = text.split("\n")
    number = int(found["line"])
    if not 1 <= number <= len(lines):
        raise InvalidRequest(f"`{found['file']}` has {len(lines)} lines, there is no line {number}")
    line = lines[number - 1].removesuffix("\r")
    column = int(found["column"]) if found["column"] else len(line) + 1
    if not 1 <= column <= len(line) + 1:
        raise InvalidRequest(
            f"line {number} of `{found['file']}` has {len(line)} characters, there is no column {column}",
            hint=f"the last column is {len(line) + 1}, after the last character",
        )
    offset = sum(len(before) + 1 for before in lines[: number - 1]) + column - 1
    return Hole(text[:offset], text[offset:])


def _decoded(data: bytes, origin: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as err:
        raise InvalidRequest(
            f"{origin} is not UTF-8: byte {err.start} is 0x{data[err.start]:02x}",
            hint="convert it first, for example with `iconv -f latin1 -t utf-8`",
        ) from err
