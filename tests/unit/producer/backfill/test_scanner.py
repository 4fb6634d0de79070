from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from codeherd_producer.backfill import scanner
from codeherd_producer.backfill.scanner import Import, Parameter, Symbol, Unreadable, from_json, scan


def only(raw: bytes) -> Symbol:
    [_, symbol] = scan(raw).symbols
    return symbol


def test_names_are_those_that_python_gives() -> None:
    text = b"""
class A:
    class B:
        def f(self):
            def g(): return lambda: 1
            class C:
                async def h(self):
                    pass
    if True:
        def f(self):
            pass
    else:
        def f(self):
            pass
"""

    found = [(s.name, s.twin, s.kind, s.is_async, s.is_nested) for s in scan(text).symbols[1:]]

    assert found == [
        ("A", 0, "class", False, False),
        ("A.B", 0, "class", False, False),
        ("A.B.f", 0, "method", False, False),
        ("A.B.f.<locals>.g", 0, "function", False, True),
        ("A.B.f.<locals>.C", 0, "class", False, True),
        ("A.B.f.<locals>.C.h", 0, "method", True, True),
        ("A.f", 0, "method", False, False),
        ("A.f", 1, "method", False, False),
    ]


def test_facts_are_the_functions_own() -> None:
    symbol = scan(b"""
@cache
@app.route("/x")
def f(a, b: int = 1, /, *args: str, c=lambda: (yield), **more) -> list[int]:
    def inner():
        yield 1
        raise KeyError
    if a:
        raise ValueError("x") from None
    raise errors.Odd
    raise err
    raise ValueError
    return None
""").symbols[1]

    assert symbol.decorators == ("cache", "app.route('/x')")
    assert symbol.parameters == (
        Parameter("a", None, ""),
        Parameter("b", "int", ""),
        Parameter("args", "str", "*"),
        Parameter("c", None, ""),
        Parameter("more", None, "**"),
    )
    assert symbol.returns == "list[int]"
    assert (symbol.gives_value, symbol.yields) == (False, False)
    assert symbol.raises == ("ValueError", "errors.Odd")
    assert scan(b"").text[symbol.start : symbol.start + 1] == ""


@pytest.mark.parametrize(
    ("body", "docstring"),
    [
        (b'"""x"""', "x"),
        (b"'x'", "x"),
        (b"'a' 'b'", "ab"),
        (b"('x')", "x"),
        (b"r'x'", "x"),
        (b"' '", " "),
        (b"b'x'", None),
        (b"f'{x}'", None),
        (b"'a %s' % x", None),
        (b"x = 'x'", None),
        (b"...", None),
    ],
)
def test_a_docstring_is_a_string_literal_that_comes_first(body: bytes, docstring: str | None) -> None:
    raw = b"def f():\n    " + body + b"\n    return 1\n"

    symbol = only(raw)

    assert symbol.docstring == docstring
    if docstring is not None:
        assert symbol.docstring_span is not None
        start, end = symbol.docstring_span
        assert raw[start:end] == body


def test_white_space_documents_nothing() -> None:
    assert not only(b'def f():\n    """ \n """\n').is_documented


@pytest.mark.parametrize(
    ("raw", "indent", "newline", "before"),
    [
        (b"def f():\n    return 1\n", "    ", "\n", "def f():\n"),
        (b"class A:\n\tx = 1\n", "\t", "\n", "class A:\n"),
        (b"def f():\r\n  return 1\r\n", "  ", "\r\n", "def f():\r\n"),
        (b"def f():\r    return 1\r", "    ", "\r", "def f():\r"),
        (b"\xef\xbb\xbfdef f():\n    return 1\n", "    ", "\n", "def f():\n"),
        (b"\x0cdef f():\n\x0c    return 1\n", "    ", "\n", "\x0cdef f():\n"),
        (b"def f(a, \\\n  b):\n    return a\n", "    ", "\n", "def f(a, \\\n  b):\n"),
        (b"def f( # x\n a # y\n): # z\n    # c\n    pass\n", "    ", "\n", "def f( # x\n a # y\n): # z\n"),
        (b"def f() -> lambda: 0:\n    return 1\n", "    ", "\n", "def f() -> lambda: 0:\n"),
        (b"def f(a: d[1:2] = {1: 2}):\n    return a\n", "    ", "\n", "def f(a: d[1:2] = {1: 2}):\n"),
        (b'def f(a: "x:y") -> "z:w":\n    return a\n', "    ", "\n", 'def f(a: "x:y") -> "z:w":\n'),
        ("def π(é='ñ'): # ü\n    return π\n".encode(), "    ", "\n", "def π(é='ñ'): # ü\n"),
        (b"x = '''\r\n'''\r\ndef f():\n    return 1", "    ", "\n", "x = '''\r\n'''\r\ndef f():\n"),
    ],
)  # fmt: skip
def test_the_place_is_right_after_the_header(raw: bytes, indent: str, newline: str, before: str) -> None:
    found = scan(raw)
    symbol = found.symbols[1]

    assert symbol.insert_at == len(before)
    assert found.text[: symbol.insert_at] == before
    assert (symbol.indent, symbol.newline) == (indent, newline)


def test_other_separators_end_no_line() -> None:
    found = scan('x = "\u2028b\x0b\x0c\x1c\x85"\ndef f():\n    pass\n'.encode())

    assert (found.symbols[1].line, found.symbols[1].insert_at) == (2, found.text.index("    pass"))


@pytest.mark.parametrize(
    ("raw", "space"),
    [
        (b"def f(): return 1", " "),
        (b"class A(B):\tpass # x\n", "\t"),
        (b"if 1: x = 1\nelse:\n    def f(x=lambda: 1): \\\n        pass\n", " \\\n        "),
    ],
)
def test_a_body_on_the_headers_line_is_told_apart(raw: bytes, space: str) -> None:
    symbol = only(raw)

    assert symbol.insert_at is None
    assert symbol.one_line is not None
    assert raw.decode()[slice(*symbol.one_line)] == space


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"def f(:\n", "syntax: "),
        (b"x = '\xe9'\n", "encoding: "),
        (b"# coding: nonsense\n", "encoding: "),
        (b"x = 1\0\n", "syntax: "),
        (b"print 1\n", "syntax: "),
        (b"x = " + b"(" * 5000 + b")" * 5000, ""),
        (b"# coding: utf-7\nx = '+AOk-'\n", "encoding: "),
        (b"def f():\n\tx\n        y\n", "syntax: "),
    ],
)
def test_what_cannot_be_read_says_why(raw: bytes, why: str) -> None:
    with pytest.raises(Unreadable) as caught:
        scan(raw)

    assert str(caught.value).startswith(why)
    assert 0 < len(str(caught.value)) < 120


def test_deep_nesting_of_blocks_is_no_trouble() -> None:
    raw = b"".join(b" " * n + b"class A:\n" for n in range(90)) + b" " * 90 + b"pass\n"

    assert len(scan(raw).symbols) == 91


def test_another_interpreter_finds_the_same() -> None:
    raw = Path(scanner.__file__).read_bytes()

    answer = subprocess.run(
        [sys.executable, "-I", "-S", scanner.__file__], input=raw, capture_output=True, check=True
    )

    found = from_json(json.loads(answer.stdout))
    assert found.shape
    assert dataclasses.replace(found, shape=None) == scan(raw)
    assert json.loads(answer.stdout)["symbols"][0] == json.loads(
        json.dumps(dataclasses.asdict(scan(raw).symbols[0]))
    )


def test_another_interpreter_reads_many_files_one_after_another() -> None:
    files = [b"import a\ndef f(): pass\n", b"", b"def f(:\n", b"x = 'a\\\nb'\n# \r\n"]

    answer = subprocess.run(
        [sys.executable, "-I", "-S", scanner.__file__, "--many"],
        input=b"".join(b"%d\n%s" % (len(raw), raw) for raw in files),
        capture_output=True,
        check=True,
    )

    documents = [json.loads(line) for line in answer.stdout.splitlines()]
    assert documents[2]["error"].startswith("syntax: ")
    found = [dataclasses.replace(from_json(documents[n]), shape=None) for n in (0, 1, 3)]
    assert found == [scan(files[n]) for n in (0, 1, 3)]


def test_imports_are_those_outside_of_functions() -> None:
    found = scan(b"""
import a, b.c, d.e as f
if x:
    from .g import h, i as j
from .. import k
class A:
    from l import *
    def m(self):
        import n
""")

    assert found.imports == (
        Import("a", "a", None),
        Import("b", "b", None),
        Import("f", "d.e", None),
        Import("h", ".g", "h"),
        Import("j", ".g", "i"),
        Import("k", "..", "k"),
        Import("*", "l", "*"),
    )


@pytest.mark.parametrize(
    ("code", "whose"),
    [
        ("print(__doc__)", {""}),
        ("__doc__ = 'x'", {""}),
        ("def main():\n    return f(__doc__ % 1)", {""}),
        ("class A:\n    def f(self):\n        return __doc__", {""}),
        ("import sys, __main__\nsys.modules[__name__].__doc__\n__main__.__doc__", {""}),
        ("class A:\n    __doc__ = 'x'", {"A"}),
        ("class A:\n    if x:\n        __doc__ += 'x'", {"A"}),
        ("class A:\n    class B:\n        x = __doc__", {"A.B"}),
        ("class A: pass\nA.__doc__ = 'x'", {"A"}),
        ("class A:\n    def f(self):\n        return self.__doc__", {"A"}),
        ("class A:\n    def f(self):\n        return type(self).__doc__ or self.__class__.__doc__", {"A"}),
        ("class A:\n    def f(self):\n        return self.f.__doc__", {"A.f"}),
        ("class A:\n    def f(cls): pass\n    f.__doc__ = 'x'", {"A.f"}),
        ("def f():\n    def g(): pass\n    g.__doc__ = 'x'\n    return g", {"f.<locals>.g"}),
        ("import inspect\ndef f(): pass\ninspect.getdoc(f)", {"f"}),
        ("def f(): pass\nother.__doc__\nf().__doc__\nother.f.__doc__\nx = '__doc__'", set()),
    ],
)
def test_docstrings_that_the_file_itself_names_are_told(code: str, whose: set[str]) -> None:
    assert {symbol.name for symbol in scan(code.encode()).symbols if symbol.is_doc_used} == whose


def test_another_interpreter_tells_what_it_cannot_read() -> None:
    answer = subprocess.run(
        [sys.executable, scanner.__file__], input=b"def f(:", capture_output=True, check=True
    )

    assert json.loads(answer.stdout)["error"].startswith("syntax: ")
