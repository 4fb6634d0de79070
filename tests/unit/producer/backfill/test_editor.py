from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeherd_producer.backfill.editor import Edit, Insertion, UnsafeEdit, check, edited, spliced
from codeherd_producer.backfill.scanner import scan
from tests.corpora.proofs import faults

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
        ('""" """',),
    ],
)
def test_what_is_no_docstring_is_refused(lines: tuple[str, ...]) -> None:
    with pytest.raises(UnsafeEdit):
        filled(b"def f():\n    return 1\n", lines)


def test_a_docstring_cannot_be_put_where_one_is() -> None:
    found = scan(b'def f():\n    """Old."""\n    return 1\n')

    with pytest.raises(UnsafeEdit, match="there is a docstring"):
        edited(found, [Insertion(found.symbols[1], ONE)])


def test_two_docstrings_for_one_symbol_are_refused() -> None:
    found = scan(b"def f():\n    return 1\n")

    # The second would become a statement of its own.
    with pytest.raises(UnsafeEdit, match="one place"):
        edited(found, [Insertion(found.symbols[1], ONE), Insertion(found.symbols[1], MANY)])


@pytest.mark.parametrize(
    ("raw", "after"),
    [
        (
            b'def f():\n    ""  # c\n    return 1\n',
            b'def f():\n    """Say one thing."""  # c\n    return 1\n',
        ),
        (b"def f():\r\n\t' \\\r\n'; return 1", b'def f():\r\n\t"""Say one thing."""; return 1'),
        (
            b'class A:\n    ("  "\n     "")\n\n    x = 1\n',
            b'class A:\n    """Say one thing."""\n\n    x = 1\n',
        ),
        (b'# c\n"""\n"""\nimport a\n', b'# c\n"""Say one thing."""\nimport a\n'),
    ],
)
def test_a_docstring_of_white_space_is_replaced(raw: bytes, after: bytes) -> None:
    found = scan(raw)
    (blank,) = [symbol for symbol in found.symbols if symbol.docstring is not None]

    assert edited(found, [Insertion(blank, ONE)]) == after


@pytest.mark.parametrize(
    ("raw", "after"),
    [
        (b"", b'"""Say one thing."""\n'),
        (b"# why", b'# why\n"""Say one thing."""\n'),
        (b"# a\r\n# why", b'# a\r\n# why\r\n"""Say one thing."""\r\n'),
        (b"#!/bin/sh\n# why\n\nimport a\n", b'#!/bin/sh\n# why\n\n"""Say one thing."""\n\nimport a\n'),
    ],
)
def test_a_modules_docstring_stands_below_its_first_comments(raw: bytes, after: bytes) -> None:
    found = scan(raw)

    assert edited(found, [Insertion(found.symbols[0], ONE)]) == after


def test_code_that_nests_deeper_than_the_stack_is_compared_too() -> None:
    # `ast.dump` gives up at the first, and at printing a number of so many digits.
    raw = f"def f():\n    return {' + '.join(['1'] * 900)}\nx = 0x{'f' * 6000}\n".encode()

    assert list(faults(raw, filled(raw), ["Say one thing."])) == []


@pytest.mark.parametrize(
    ("before", "old", "new"),
    [
        ("def f(): return 1  # noqa\n", "  # noqa", ""),
        ("def f(): return 1  # a\n", "# a", "# b"),
        ("def f(): return 1;\n", ";", ""),
        ("def f(): return (1)\n", "(1)", "1"),
        ("def f(): return 0x1\n", "0x1", "1"),
    ],
)
def test_what_is_replaced_must_keep_its_tokens_and_comments(before: str, old: str, new: str) -> None:
    found = scan(before.encode())
    start = before.index(old)
    opening = Edit(8, 9, '\n    """Say one thing."""\n    ')
    edits = [opening, Edit(start, start + len(old), new)]

    with pytest.raises(UnsafeEdit, match="tokens or comments"):
        check(found, edits, spliced(before, edits).encode(), [found.symbols[1]])


@pytest.mark.parametrize("new", ["return 2", "return True", "return 1.0", "return f() or 1", "return +1"])
def test_what_is_replaced_must_keep_its_meaning(new: str) -> None:
    found = scan(b"def f():\n    return 1\n")
    edits = [Edit(13, 21, new)]

    with pytest.raises(UnsafeEdit, match="something else"):
        check(found, edits, spliced(found.text, edits).encode(), [])


_CHARACTERS = st.sampled_from("'\"\\#;\n\r\f\0 ()rfbé")


@given(
    st.sampled_from(
        [
            b"def f():\n    return 1\n",
            b"def f(): return 1  # c",
            b"class A:\r\n\tx = '''\r\n'''\r\n",
            b"def f():\n  ''\n",
            b"@d\ndef f(\n): # c\n\n # d\n x\ny",
        ]
    ),
    st.lists(st.text(_CHARACTERS), max_size=3),
    st.booleans(),
)
def test_whatever_is_put_in_the_result_is_right_or_refused(
    raw: bytes, lines: list[str], is_quoted: bool
) -> None:
    found = scan(raw)
    text = "\n".join(lines)
    put_in = tuple(f'"""{text}"""'.split("\n")) if is_quoted else tuple(lines)
    try:
        after = edited(found, [Insertion(found.symbols[1], put_in)])
    except UnsafeEdit:
        return

    said = scan(after).symbols[1].docstring
    assert said is not None
    assert list(faults(raw, after, [said])) == []


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
