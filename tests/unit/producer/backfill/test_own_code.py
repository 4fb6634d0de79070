from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeherd_producer.backfill.editor import Insertion, edited
from codeherd_producer.backfill.interpreters import Interpreter, scanned
from codeherd_producer.backfill.own_code import OwnCode
from codeherd_producer.backfill.scanner import Scan, scan

CODE = '''\
"""Of the module."""
import functools


@functools.cache
def first(a):  # why

    x = """
    inner
    """
    return a + x


class Second:
    """Of the class."""

    def third(self):
        """Of the method."""
        return 3

    def fourth(self):
        def fifth():
            return 5

        return fifth
'''
#: Those of `CODE` that lack a docstring.
MISSING = ("first", "Second.fourth", "Second.fourth.<locals>.fifth")


def codes(raw: str | bytes) -> dict[tuple[str, int], str]:
    """What each symbol is known by."""
    return codes_of(scan(raw.encode() if isinstance(raw, str) else raw))


def codes_of(found: Scan) -> dict[tuple[str, int], str]:
    code = OwnCode(found)
    return {(symbol.name, symbol.twin): code.sha256(symbol) for symbol in found.symbols}


def other_than(raw: str | bytes) -> set[str]:
    """Names of the symbols that are another than in `CODE`."""
    before, after = codes(CODE), codes(raw)
    return {
        name
        for name, twin in before.keys() | after.keys()
        if before.get((name, twin)) != after.get((name, twin))
    }


def test_every_symbol_has_a_code_of_its_own() -> None:
    assert len(set(codes(CODE).values())) == len(codes(CODE)) == 6


def test_what_is_moved_by_other_code_is_the_same() -> None:
    moved = CODE.replace("@functools", "def zeroth():\n    return 0\n\n\n@functools")

    assert other_than(moved) == {"", "zeroth"}


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("a + x", "a - x", {"", "first"}),
        ("@functools.cache", "@functools.lru_cache", {"", "first"}),
        ("# why", "# why not", {"", "first"}),
        ("    inner\n", "inner\n", {"", "first"}),
        ("return 3", "return 4", {"", "Second", "Second.third"}),
        ("return 5", "return  5", {"", "Second", "Second.fourth", "Second.fourth.<locals>.fifth"}),
        ("return fifth", "return fifth()", {"", "Second", "Second.fourth"}),
        ("import functools", "import functools, os", {""}),
    ],
)
def test_another_code_is_another_for_all_around_it(old: str, new: str, names: set[str]) -> None:
    assert other_than(CODE.replace(old, new)) == names


@pytest.mark.parametrize(
    "raw",
    [
        CODE.replace("\n", "\r\n").encode(),
        CODE.replace("\n", "\r").encode(),
        b"\xef\xbb\xbf" + CODE.encode(),
        CODE.replace("\n\n", "\n\n\n").encode(),
        CODE.replace(":\n", ": \t\n").encode(),
        CODE.rstrip("\n").encode(),
        CODE.replace('"""Of the class."""\n\n    ', "").encode(),
        CODE.replace("Of the method.", "Something\n\n        else.").encode(),
        CODE.replace('"""Of the module."""', "'Other ' 'words.'").encode(),
    ],
    ids=[
        "crlf",
        "cr",
        "bom",
        "blank lines",
        "trailing",
        "no end",
        "no docstring",
        "other docstring",
        "quotes",
    ],
)
def test_layout_and_docstrings_make_no_other_code(raw: bytes) -> None:
    assert other_than(raw) == set()


@given(st.sets(st.sampled_from(MISSING)), st.sampled_from(["\n", "\r\n"]))
def test_docstrings_that_are_put_in_make_no_other_code(names: set[str], newline: str) -> None:
    found = scan(CODE.replace("\n", newline).encode())
    lines = ('"""Say something.', "", "And more.", '"""')
    chosen = [Insertion(symbol, lines) for symbol in found.symbols if symbol.name in names]

    assert other_than(edited(found, chosen)) == set()


@given(st.integers(0, len(CODE) - 1).filter(lambda at: not CODE[at].isspace()))
def test_any_other_character_is_another_code_exactly_for_those_that_hold_it(at: int) -> None:
    found = scan(CODE.encode())
    changed = dataclasses.replace(found, text=f"{CODE[:at]}¬{CODE[at + 1 :]}")
    row = CODE.count("\n", 0, at) + 1
    spans = [symbol.docstring_span for symbol in found.symbols if symbol.docstring_span is not None]
    is_code = not any(start <= at < end for start, end in spans)

    before, after = codes_of(found), codes_of(changed)
    others = {name for (name, _), one in before.items() if one != after[name, 0]}

    holding = {
        symbol.name
        for symbol in found.symbols
        if CODE.count("\n", 0, symbol.start) + 1 <= row <= symbol.end_line
    }
    assert others == (holding if is_code else set())


def test_it_does_not_matter_who_scanned_the_file(newer_python: Path) -> None:
    newer = "newtype X = int\n" + CODE
    with Interpreter(newer_python) as other:
        found = codes_of(scanned(newer.encode(), other))

    here = codes(CODE)
    assert {key: one for key, one in found.items() if key[0]} == {k: one for k, one in here.items() if k[0]}
