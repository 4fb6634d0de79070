from __future__ import annotations

import ast

import pytest

from codeherd_producer.backfill.context import QUOTES, FileContext, HeaderTooLong, Hole, deeper
from codeherd_producer.backfill.scanner import scan

CODE = '''import os
from typing import (
    Any,
)

LIMIT = 3


def first(a):
    """Say the first thing."""
    return a


def second(a):
    return a


class Shop(Base):
    """Sells things.

    All day long.
    """

    def __init__(self, stock):
        self.stock = stock

    def sell(self, name):
        """Sell one thing."""
        return self.stock.pop(name)

    @property
    def size(self):
        # How many there are.
        return len(self.stock)


def last():
    return None
'''


def hole(name: str, code: str = CODE, *, budget: int = 4000) -> Hole:
    found = scan(code.encode())
    return FileContext(found, budget=budget).hole(next(s for s in found.symbols if s.name == name))


def test_a_function_is_shown_with_imports_and_documented_neighbours() -> None:
    found = hole("second")

    assert found.prefix == (
        "import os\nfrom typing import (\n    Any,\n)\n\n\n"
        'def first(a):\n    """Say the first thing."""\n    ...\n\n'
        '    def sell(self, name):\n        """Sell one thing."""\n        ...\n\n'
        'def second(a):\n    """'
    )
    assert found.suffix.startswith('"""\n    return a\n')
    assert found.examples == ("Say the first thing.", "Sell one thing.")
    assert found.cut == ()


def test_a_method_is_shown_below_the_head_of_its_class() -> None:
    found = hole("Shop.size")

    head = 'class Shop(Base):\n    """Sells things."""\n\n    def __init__(self, stock):\n        ...\n\n'
    assert found.prefix.endswith(head + '    @property\n    def size(self):\n        """')
    assert found.suffix.startswith('"""\n        # How many there are.\n        return len(self.stock)\n')


def test_holes_of_one_file_begin_alike() -> None:
    prefixes = [hole(name).prefix for name in ("second", "last")]

    assert prefixes[0].split("def second")[0] == prefixes[1].split("def last")[0]


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
def test_the_model_sees_unix_line_ends(newline: str) -> None:
    assert hole("Shop.size", CODE.replace("\n", newline)) == hole("Shop.size")


def test_a_long_body_loses_whole_statements_from_its_middle() -> None:
    lines = "".join(f"    if a > {n}:\n        print({n!r}, '''\nx\n''')\n" for n in range(200))
    code = f"def f(a):\n    begin = 1\n{lines}    return begin\n"

    found = hole("f", code, budget=1500)

    assert found.cut == ("statements of the body",)
    assert len(found.prefix) + len(found.suffix) <= 1500
    body = found.suffix.removeprefix(QUOTES + "\n")
    assert body.startswith("    begin = 1\n    if a > 0:")
    assert body.endswith("    return begin\n")
    ast.parse(f"def f(a):\n{body}")


def test_nothing_is_larger_than_the_budget() -> None:
    for budget in (300, 500, 900, 2000):
        for name in ("first", "second", "Shop", "Shop.size", "last"):
            found = hole(name, CODE + "\n\n" + "x = 1\n" * 500, budget=budget)
            assert len(found.prefix) + len(found.suffix) <= budget


def test_a_hole_may_begin_inside_the_docstring() -> None:
    whole = hole("Shop.size")

    found = deeper(whole, ['r"""One.', "", "Args:", "    a:"])

    assert whole.indent == "        "
    assert found.prefix == whole.prefix[:-3] + 'r"""One.\n\n        Args:\n            a:'
    assert found.suffix == "\n        " + whole.suffix
    assert deeper(whole, [QUOTES, ""]).prefix == whole.prefix + "\n        "


def test_a_header_that_leaves_no_room_is_left_to_people() -> None:
    code = "def f(" + ", ".join(f"argument_{n}" for n in range(200)) + "):\n    return 1\n"

    with pytest.raises(HeaderTooLong):
        hole("f", code, budget=1000)


def test_a_body_on_the_headers_line_has_no_hole() -> None:
    with pytest.raises(ValueError, match="no hole"):
        hole("f", "def f(): return 1\n")
