from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeherd_producer.backfill.editor import Insertion, edited, opened
from codeherd_producer.backfill.one_line import words
from codeherd_producer.backfill.scanner import Scan, Symbol, scan
from tests.corpora.proofs import faults

ONE = ('"""Say one thing."""',)
MANY = ('"""Say one thing.', "", "And another.", '"""')
TEXTS = {ONE: "Say one thing.", MANY: "Say one thing.\n\nAnd another."}


def on_one_line(found: Scan) -> list[Symbol]:
    return [s for s in found.symbols if s.one_line is not None and not s.is_documented]


def filled(raw: bytes, lines: tuple[str, ...] = ONE) -> bytes:
    found = scan(raw)
    return edited(found, [Insertion(symbol, lines) for symbol in on_one_line(found)])


@pytest.mark.parametrize(
    ("raw", "after"),
    [
        (b"def f(): return 1  # noqa\n", b'def f():\n    """Say one thing."""\n    return 1  # noqa\n'),
        (b"class C: x = 1\n", b'class C:\n    """Say one thing."""\n\n    x = 1\n'),
        (b"async def f(a) -> int: ...\n", b'async def f(a) -> int:\n    """Say one thing."""\n    ...\n'),
        (
            b"def f(): a = 1; b = 2;  # two\n",
            b'def f():\n    """Say one thing."""\n    a = 1; b = 2;  # two\n',
        ),
        (b"def f():pass", b'def f():\n    """Say one thing."""\n    pass'),
        (b"def f():\t \f pass\n", b'def f():\n    """Say one thing."""\n    pass\n'),
    ],
)
def test_an_opened_body_keeps_its_comments_and_semicolons(raw: bytes, after: bytes) -> None:
    assert filled(raw) == after


@pytest.mark.parametrize(
    ("raw", "after"),
    [
        (
            b"def f(): \\\n  return 1 + \\\n  2\n",
            b'def f():\n    """Say one thing."""\n    return 1 + \\\n  2\n',
        ),
        (b"def f(a,\n      b): return a\n", b'def f(a,\n      b):\n    """Say one thing."""\n    return a\n'),
        (
            b"def f(a=lambda: 1) -> (lambda: 2): return (a,\n2)\n",
            b'def f(a=lambda: 1) -> (lambda: 2):\n    """Say one thing."""\n    return (a,\n2)\n',
        ),
        (
            b"@d(lambda x: x)\n@(e)\ndef f(): pass\n",
            b'@d(lambda x: x)\n@(e)\ndef f():\n    """Say one thing."""\n    pass\n',
        ),
        (
            b'def f(): return """a\n b: c\n"""\n',
            b'def f():\n    """Say one thing."""\n    return """a\n b: c\n"""\n',
        ),
        (b"\fdef f(): return 1\n", b'\fdef f():\n    """Say one thing."""\n    return 1\n'),
        (
            b"class A:\n \\\n    def f(): pass\n x = 1\n",
            b'class A:\n \\\n    def f():\n  """Say one thing."""\n  pass\n x = 1\n',
        ),
        (
            b"class A:\n\\\n    def f(): pass\n",
            b'class A:\n\\\n    def f():\n        """Say one thing."""\n        pass\n',
        ),
    ],
)
def test_headers_and_bodies_of_several_lines_are_opened_too(raw: bytes, after: bytes) -> None:
    assert filled(raw) == after


@pytest.mark.parametrize(
    ("raw", "indent"),
    [
        (b"if x:\n  a\ndef f(): pass\n", "  "),
        (b"if x:\n\ta\ndef f(): pass\n", "\t"),
        (b"class A:\n        def f(): pass\n", " " * 16),
        (b"class A:\n\tdef f(): pass\n", "\t\t"),
        (b"def f(): pass\n", "    "),
        # As most blocks are, and not as the one before.
        (b"if x:\n   a\nif y:\n  a\nif z:\n  a\ndef f(): pass\n", "  "),
        # Tabs below tabs, although most blocks have blanks.
        (b"if x:\n  a\nif y:\n  a\nclass A:\n\tdef f(): pass\n", "\t\t"),
        (b"if x:\n    if y:\n      a\n    def f(): pass\n", " " * 8),
    ],
)
def test_a_body_gets_the_indentation_of_its_file(raw: bytes, indent: str) -> None:
    (symbol,) = on_one_line(scan(raw))

    assert symbol.indent == indent


def test_the_last_line_of_a_file_takes_the_line_ends_of_the_others() -> None:
    raw = b"x = 1\r\ndef f(): return 1"

    assert filled(raw, MANY) == (
        b'x = 1\r\ndef f():\r\n    """Say one thing.\r\n\r\n    And another.\r\n    """\r\n    return 1'
    )


@pytest.mark.parametrize(
    ("raw", "after"),
    [
        (b'def f(): ""\n', b'def f():\n    """Say one thing."""\n'),
        (b'def f(): " "; return 1  # c\n', b'def f():\n    """Say one thing."""; return 1  # c\n'),
        (b"class C: ''' ''' ''\n", b'class C:\n    """Say one thing."""\n'),
    ],
)
def test_white_space_that_is_a_whole_body_is_replaced(raw: bytes, after: bytes) -> None:
    assert filled(raw) == after


def test_a_body_is_opened_alone_for_a_models_eyes() -> None:
    raw = b"class A:\n  def f(self): return 1  # noqa\n  def g(self): pass\n"
    before = scan(raw)

    after = opened(before, [before.symbols[2]])

    assert after.text == "class A:\n  def f(self):\n    return 1  # noqa\n  def g(self): pass\n"
    assert [(s.name, s.twin, s.indent) for s in after.symbols] == [
        (s.name, s.twin, s.indent) for s in before.symbols
    ]
    assert [s.one_line is None for s in after.symbols] == [True, True, True, False]


def test_a_file_without_such_bodies_is_shown_as_it_is() -> None:
    before = scan(b"def f():\n    return 1\n")

    assert opened(before, before.symbols) is before


def test_words_are_tokens_and_comments_without_layout() -> None:
    assert words("if x:  # a\r\n\ty\r\n") == words("if x:# a\n\n\n    y")
    assert words("x  # a\n") != words("x  # b\n")
    assert words("x;\n") != words("x\n")


_HEADERS = (
    "def f()",
    "async def f(a, *, b=lambda: {1: 2}[1])",
    "def f(a: 'x:y' = {1: 2}[1],\n  b=2) -> dict[str, (lambda: int)]",
    "class C",
    "class C(B, metaclass=M)",
)
_STATEMENTS = (
    *("pass", "...", "x = 1", "x: int = {1: 2}", "y = (1,\n2)", "z = 1 + \\\n 2", "s = '''a\n  b: c'''"),
    *("f'{x}'", "b'x'", "global g", "lambda: 0", "assert x, ':#'", "del x[1:2]", "import a; from b import c"),
    *("é = 'ñ'", "''", "print('''#\n''', end=':')"),
)


@st.composite
def _files(draw: st.DrawFn) -> tuple[bytes, str]:
    """Draw a file with one such symbol, and the indentation that its body should get."""
    step = draw(st.sampled_from(["\t", "  ", "    ", " " * 8]))
    depth = draw(st.integers(0, 2))
    around = "".join(f"{step * n}{draw(st.sampled_from(['class K:', 'if x:']))}\n" for n in range(depth))
    body = ";".join(draw(st.lists(st.sampled_from(_STATEMENTS), min_size=1, max_size=3)))
    gap = draw(st.sampled_from(["", " ", "\t", "  \f ", " \\\n ", "\\\n\\\n"]))
    tail = draw(
        st.sampled_from(["", ";", "  # noqa", "# type: ignore[x]", "; # pragma: no cover", "  # ünï"])
    )
    decorator = f"{step * depth}@d  # why\n" * draw(st.integers(0, 2))
    rest = draw(st.sampled_from(["", "\n", f"\n{step * depth}x = 1\n", "\n\n\n# end", "\nif x:\n     y\n"]))
    code = f"{around}{decorator}{step * depth}{draw(st.sampled_from(_HEADERS))}:{gap}{body}{tail}{rest}"
    code = code.replace("\n", draw(st.sampled_from(["\n", "\r\n", "\r"])))
    encoded = draw(
        st.sampled_from(
            [code.encode(), b"\xef\xbb\xbf" + code.encode(), b"# coding: latin-1\n" + code.encode("latin-1")]
        )
    )
    return encoded, step * depth + (step if depth else "")


@given(_files(), st.sampled_from([ONE, MANY]))
def test_every_body_on_one_line_can_be_opened_and_nothing_else_changes(
    file: tuple[bytes, str], lines: tuple[str, ...]
) -> None:
    raw, indent = file
    before = scan(raw)
    (symbol,) = on_one_line(before)

    after = edited(before, [Insertion(symbol, lines)])

    assert list(faults(raw, after, [TEXTS[lines]])) == []
    again = scan(after)
    (new,) = [s for s in again.symbols if (s.name, s.twin) == (symbol.name, symbol.twin)]
    assert new.one_line is None
    assert new.is_documented
    assert not indent or new.indent == symbol.indent == indent
    shown = opened(before, [symbol])
    assert ast.dump(ast.parse(shown.text)) == ast.dump(ast.parse(before.text))
    assert on_one_line(shown) == []
