from __future__ import annotations

import re

import pytest

from codeherd_producer.backfill.editor import Insertion, UnsafeEdit, edited
from codeherd_producer.backfill.scanner import Symbol, scan
from codeherd_producer.backfill.selection import Reason, Selection, decided, is_generated, is_skipped

CODE = b'''
import typing, functools

def plain(a):
    return a

def documented(a):
    """Say it."""
    return a

def blank(a):
    """ """
    return a

def one_line(a): return a

def empty(a):
    ...

@typing.overload
def plain(a: int):
    return a

class Thing(Base):
    x = 1

    def __init__(self):
        self.x = 2

    def __repr__(self):
        return "x"

    def __private(self):
        return 1

    def _half(self):
        def inner():
            return 1
        return inner

    @property
    def size(self):
        return 1

    @size.setter
    def size(self, value):
        self.x = value

    @typing.override
    def run(self):
        return 1

# backfill: skip
def marked_above(a):
    return a

def marked_inside(a):
    # backfill: skip
    return a

@app.route("/x")
def page():
    return 1

@click.command
def tool():
    return 1

def p_expression(p):
    return p

def test_it():
    return 1

class MyCase(unittest.TestCase):
    x = 1
'''


def reasons(selection: Selection | None = None, *, test_file: bool = False) -> dict[str, Reason | None]:
    found = decided(scan(CODE), selection or Selection(), is_test_file=test_file)
    return {f"{s.name}#{s.twin}" if s.twin else s.name: reason for s, reason in found}


def test_what_readers_see_is_wanted_and_the_rest_says_why_not() -> None:
    assert reasons() == {
        "": Reason.MODULE,
        "plain": None,
        "documented": Reason.DOCUMENTED,
        "blank": Reason.DOCUMENTED,
        "one_line": Reason.ONE_LINE,
        "empty": Reason.TRIVIAL,
        "plain#1": Reason.OVERLOAD,
        "Thing": None,
        "Thing.__init__": None,
        "Thing.__repr__": Reason.MAGIC,
        "Thing.__private": Reason.PRIVATE,
        "Thing._half": Reason.SEMIPRIVATE,
        "Thing._half.<locals>.inner": Reason.NESTED,
        "Thing.size": None,
        "Thing.size#1": Reason.SETTER,
        "Thing.run": Reason.OVERRIDE,
        "marked_above": Reason.MARKED,
        "marked_inside": Reason.MARKED,
        "page": Reason.VISIBLE,
        "tool": Reason.VISIBLE,
        "p_expression": Reason.GRAMMAR,
        "test_it": Reason.TEST,
        "MyCase": Reason.TEST,
    }


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (Selection(modules=True), {""}),
        (Selection(magic=True), {"Thing.__repr__"}),
        (Selection(private=True), {"Thing.__private"}),
        (Selection(semiprivate=True), {"Thing._half"}),
        (Selection(semiprivate=True, nested=True), {"Thing._half", "Thing._half.<locals>.inner"}),
        (Selection(setters=True), {"Thing.size#1"}),
        (Selection(overrides=True), {"Thing.run"}),
        (Selection(visible=True), {"page", "tool", "p_expression"}),
        (Selection(tests=True), {"test_it", "MyCase"}),
        (Selection(trivial=True), {"empty"}),
        (Selection(blank=True), {"blank"}),
        (Selection(one_liners=True), {"one_line"}),
    ],
)
def test_each_kind_can_be_asked_for(selection: Selection, names: set[str]) -> None:
    usual = {name for name, reason in reasons().items() if reason is None}

    assert {name for name, reason in reasons(selection).items() if reason is None} == usual | names


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (Selection(init=False), {"plain", "Thing", "Thing.size"}),
        (Selection(properties=False), {"plain", "Thing", "Thing.__init__"}),
        (Selection(min_lines=3), {"Thing"}),
        (Selection(exclude=[re.compile("^Thing")]), {"plain"}),
        (Selection(include=[re.compile("size$")]), {"Thing.size"}),
        (Selection(include=[re.compile("^si")]), {"Thing.size"}),
    ],
)
def test_what_is_wanted_can_be_narrowed(selection: Selection, names: set[str]) -> None:
    assert {name for name, reason in reasons(selection).items() if reason is None} == names


def test_nothing_in_a_test_file_is_wanted_unless_tests_are() -> None:
    assert set(reasons(test_file=True).values()).isdisjoint({None})
    assert reasons(Selection(tests=True), test_file=True)["plain"] is None


def test_methods_that_a_base_class_describes_are_overrides_unless_these_are_wanted() -> None:
    def found(selection: Selection) -> dict[str, Reason | None]:
        decisions = decided(
            scan(CODE),
            selection,
            is_test_file=False,
            is_described=lambda one: one.name.endswith(("size", "plain")),
        )
        return {symbol.name: reason for symbol, reason in decisions if symbol.twin == 0}

    assert found(Selection())["Thing.size"] is Reason.OVERRIDE
    assert found(Selection())["plain"] is None
    assert found(Selection(overrides=True))["Thing.size"] is None


def test_base_classes_are_asked_of_last() -> None:
    asked: list[str] = []

    def is_described(symbol: Symbol) -> bool:
        asked.append(symbol.name)
        return False

    list(decided(scan(CODE), Selection(), is_test_file=False, is_described=is_described))

    assert asked == ["Thing.__init__", "Thing.size"]


@pytest.mark.parametrize(
    "code",
    [
        "# backfill: skip\n@property\ndef f(a):\n    return a\n",
        "@property  # backfill: skip\ndef f(a):\n    return a\n",
        "@property\ndef f(  # x, backfill: skip, y\n    a\n):\n    return a\n",
        "def f(a,\n    b):  # backfill:skip\n    return a\n",
        "def f(a):\n    # backfill: skip\n    return a\n",
        "x = 1\r\n# backfill: skip\r\ndef f(a):\r\n    return a\r\n",
        "x = 1\r# backfill: skip\rdef f(a):\r    return a\r",
        "def f(a): return a  # backfill: skip\n",
    ],
)
def test_a_mark_belongs_to_the_symbol_around_it(code: str) -> None:
    found = dict(decided(scan(code.encode()), Selection(one_liners=True), is_test_file=False))

    assert {s.name: reason for s, reason in found.items() if s.name} == {"f": Reason.MARKED}


@pytest.mark.parametrize(
    "code",
    [
        "# backfill: skipping\ndef f(a):\n    return a\n",
        "# backfill: skip-file\ndef f(a):\n    return a\n",
        "x = 1  # backfill: skip\ndef f(a):\n    return a\n",
        "def f(a):\n    return a  # backfill: skip\n",
        "# backfill: skip\n\ndef f(a):\n    return a\n",
        "x = 'backfill: skip'\ndef f(a):\n    return a\n",
    ],
)
def test_a_mark_elsewhere_is_not_the_symbols(code: str) -> None:
    found = decided(scan(code.encode()), Selection(), is_test_file=False)

    assert [reason for symbol, reason in found if symbol.name] == [None]


def test_what_the_file_does_with_its_own_docstrings_is_visible() -> None:
    code = b"""
import argparse
class Assigned:
    __doc__ = "x"
class Plain:
    def f(self):
        return argparse.ArgumentParser(description=__doc__)
def main():
    print(main.__doc__)
"""

    def found(selection: Selection) -> dict[str, Reason | None]:
        return {s.name: reason for s, reason in decided(scan(code), selection, is_test_file=False)}

    visible = Reason.VISIBLE
    assert found(Selection(modules=True)) == {
        "": visible, "Assigned": visible, "Plain": None, "Plain.f": None, "main": visible,
    }  # fmt: skip
    assert set(found(Selection(modules=True, visible=True)).values()) == {None}


@pytest.mark.parametrize(
    ("head", "is_it"),
    [
        (b"# backfill: skip-file\n", True),
        (b"#!/bin/x\r\n# us: backfill:skip-file, please\r\n", True),
        (b"x = 1  # backfill: skip-file\n", False),
        (b"# backfill: skip\n", False),
        (b"\n" * 30 + b"# backfill: skip-file\n", False),
    ],
)
def test_files_that_are_left_alone_say_so_in_their_head(head: bytes, is_it: bool) -> None:
    assert is_skipped(scan(head)) is is_it


@pytest.mark.parametrize(
    ("head", "is_it"),
    [
        (b"# @generated by a tool\n", True),
        (b"#!/bin/x\n# Generated by the protocol buffer compiler.  DO NOT EDIT!\n", True),
        (b"x = 'do not edit'\n", False),
        (b"\n" * 30 + b"# do not edit\n", False),
    ],
)
def test_generated_files_say_so_in_their_head(head: bytes, is_it: bool) -> None:
    assert is_generated(scan(head)) is is_it


@pytest.mark.parametrize(
    ("slots", "is_left"),
    [
        ("('name', '__doc__')", True),
        ("[*BASE, '__doc__']", True),
        ("('name',)", False),
        ("'__dict__'", False),
    ],
)
def test_a_class_with_a_slot_for_its_docstring_is_left_alone_whatever_is_wanted(
    slots: str, is_left: bool
) -> None:
    found = scan(f"class A:\n    __slots__ = {slots}\n".encode())

    [(_, reason)] = [
        (symbol, why)
        for symbol, why in decided(found, Selection(visible=True, trivial=True), is_test_file=False)
        if symbol.name == "A"
    ]

    assert reason is (Reason.SLOT if is_left else None)
    if is_left:
        with pytest.raises(UnsafeEdit, match="slot"):
            edited(found, [Insertion(found.symbols[1], ('"""Say it."""',))])
