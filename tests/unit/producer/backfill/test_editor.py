from __future__ import annotations

import pytest

from codeherd_producer.backfill.editor import Insertion, UnsafeEdit, edited
from codeherd_producer.backfill.scanner import scan

ONE = ('"""Say one thing."""',)
MANY = ('"""Say one thing.', "", "And another.", '"""')


def filled(raw: bytes, lines: tuple[str, ...] = ONE) -> bytes:
    """Document all that can be documented."""
    found = scan(raw)
    missing = [s for s in found.symbols if s.name and s.docstring is None and s.insert_at is not None]
    return edited(found, [Insertion(symbol, lines) for symbol in missing])


def test_a_docstring_takes_the_files_own_indentation_and_line_ends() -> None:
    raw = b"class A:\r\n\tdef f(self):  # why\r\n\t\t# how\r\n\t\treturn 1"

    assert filled(raw, MANY) == (
        b'class A:\r\n\t"""Say one thing.\r\n\r\n\tAnd another.\r\n\t"""\r\n\r\n\tdef f(self):  # why\r\n'
        b'\t\t"""Say one thing.\r\n\r\n\t\tAnd another.\r\n\t\t"""\r\n\t\t# how\r\n\t\treturn 1'
    )


@pytest.mark.parametrize(
    ("raw", "after"),
    [
        (b"class A:\n    x = 1\n", b'class A:\n    """Say one thing."""\n\n    x = 1\n'),
        (b"class A:\n\n    x = 1\n", b'class A:\n    """Say one thing."""\n\n    x = 1\n'),
        (b"def f():\n\n    x = 1\n", b'def f():\n    """Say one thing."""\n\n    x = 1\n'),
    ],
)
def test_one_blank_line_follows_the_docstring_of_a_class(raw: bytes, after: bytes) -> None:
    assert filled(raw) == after


def test_a_byte_order_mark_and_an_old_encoding_stay() -> None:
    assert filled(b"\xef\xbb\xbfdef f():\n    return 1\n").startswith(b'\xef\xbb\xbfdef f():\n    "')
    latin = b"# coding: latin-1\ndef f():\n    return '\xe9'\n"
    assert b"'\xe9'" in filled(latin, ('"""Sagt é."""',))
    assert b"Sagt \xe9" in filled(latin, ('"""Sagt é."""',))


def test_a_character_that_the_encoding_lacks_is_refused() -> None:
    with pytest.raises(UnsafeEdit, match="no character"):
        filled(b"# coding: latin-1\ndef f():\n    return 1\n", ('"""汉."""',))


@pytest.mark.parametrize(
    "lines",
    [
        ('"""Says """ too."""',),
        ('"""',),
        ("return 2",),
        ('"""One."""', "x = 1"),
        ("x = 1",),
        ('f"""One."""',),
        ('b"""One."""',),
        ('"""One.""" + ""',),
        ('"""\\N{no such name}"""',),
        ('"""One."""; x = 1',),
        (),
    ],
)
def test_what_is_no_docstring_is_refused(lines: tuple[str, ...]) -> None:
    with pytest.raises(UnsafeEdit):
        filled(b"def f():\n    return 1\n", lines)


def test_a_docstring_cannot_be_put_where_one_is() -> None:
    found = scan(b'def f():\n    """Old."""\n    return 1\n')

    # The old one would become a statement of its own.
    with pytest.raises(UnsafeEdit, match="something else"):
        edited(found, [Insertion(found.symbols[1], ONE), Insertion(found.symbols[1], ONE)])


def test_twins_are_told_apart() -> None:
    raw = b"if x:\n    def f():\n        return 1\nelse:\n    def f():\n        return 2\n"
    found = scan(raw)

    out = edited(found, [Insertion(found.symbols[2], ONE)])

    assert [s.docstring for s in scan(out).symbols[1:]] == [None, "Say one thing."]


def test_a_second_look_finds_nothing_to_do() -> None:
    raw = b"class A:\n    def f(self): pass\n    def g(self):\n        pass\n"
    once = filled(raw)

    assert filled(once) == once
    assert [s.is_documented for s in scan(once).symbols[1:]] == [True, False, True]
