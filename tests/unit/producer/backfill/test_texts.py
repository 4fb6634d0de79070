from __future__ import annotations

import inspect
import json
import statistics

import pytest

from codeherd_producer.backfill.scanner import Symbol, scan
from codeherd_producer.backfill.texts import (
    LONGEST,
    Rejection,
    Surroundings,
    is_like,
    looks_like_code,
    loops,
    rejection,
    restates,
    transliterated,
)

SUFFIX = """\
    if not values:
        raise ValueError('no values were given')
    return sum(values) / len(values)
"""
GOOGLE = """Return the mean.

Args:
    values: The numbers.
    *more: Others.
    key (str): Why not.

Returns:
    float: The mean.

Raises:
    ValueError: If there are none.
"""
NUMPY = """Return the mean.

Parameters
----------
values : list
    The numbers.

Raises
------
ValueError
    If there are none.
"""
SPHINX = """Return the mean.

:param values: The numbers.
:param list more: Others.
:raises ValueError: If there are none.
"""


def symbol(code: str = f"def mean_of(values, *more, key=None):\n{SUFFIX}") -> Symbol:
    return scan(code.encode()).symbols[1]


def judged(text: str, *, truncated: bool = False, around: Surroundings | None = None) -> Rejection | None:
    return rejection(text, symbol(), around or Surroundings(SUFFIX), is_truncated=truncated)


@pytest.mark.parametrize(
    "text",
    [
        "Return the mean of all values.",
        GOOGLE,
        NUMPY,
        SPHINX,
        "Compute `sum(values) / len(values)` and nothing else.",
        "Gibt den Mittelwert zurück, naïve façon.",
        "Return a mean; returns nothing special.",
        "Return a mean.\n\nOr call mean_of(values) twice.",
        "Say so, then do. " * 2 + "And this. " * 2 + "y" * (LONGEST - 54),
    ],
)
def test_a_fair_description_passes(text: str) -> None:
    assert judged(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", Rejection.EMPTY),
        (" \n\t", Rejection.EMPTY),
        ("Mean.", Rejection.TOO_SHORT),
        ("1 2 3 4.", Rejection.TOO_SHORT),
        ("The mean of function.", Rejection.NAME_RESTATED),
        ("mean_of", Rejection.NAME_RESTATED),
        ("```python\nmean_of(x)\n```", Rejection.MARKUP),
        ("Return it. <EOT>", Rejection.MARKUP),
        ("[INST] Say it [/INST]", Rejection.MARKUP),
        ("Return <FILL_ME> of it.", Rejection.MARKUP),
        ("TODO: write this docstring.", Rejection.PLACEHOLDER),
        ("_summary_ of the values", Rejection.PLACEHOLDER),
        ("return sum(values) / len(values)", Rejection.CODE),
        ("Return it.\n\nif values:\n    pass", Rejection.CODE),
        ("x = [(a, b) for (a, b) in c if {a: b}]", Rejection.CODE),
        ("A bell \x07 rings.", Rejection.CONTROL),
        ("A NUL \0 is.", Rejection.CONTROL),
        ("Right \u202eto left.", Rejection.CONTROL),
        ("Zero\u200bwidth space.", Rejection.CONTROL),
        ("Return the the the mean.", Rejection.LOOP),
        ("Return a b, return a b, return a b, so on.", Rejection.LOOP),
        ("Do this.\nAgain so.\nAgain so.\nAgain so.", Rejection.LOOP),
        ("Return the mean.\n        raise ValueError('no values were given')", Rejection.ECHO),
        ("See https://example.com for more.", Rejection.MEMORIZED),
        ("Written by me@example.com today.", Rejection.MEMORIZED),
        ("Return the mean.\n\nAuthor: Somebody", Rejection.MEMORIZED),
        ("Copyright by somebody else.", Rejection.MEMORIZED),
        ("Made on 2011-04-05 for you.", Rejection.MEMORIZED),
        ("Возвращает среднее значение.", Rejection.LANGUAGE),
        ("返回 the mean value.", Rejection.LANGUAGE),
        ("Return the mean.\n\n>>> mean_of([1])\n1", Rejection.DOCTEST),
        ("Return it.\n\nArgs:\n    valves: The numbers.", Rejection.UNKNOWN_PARAMETER),
        ("Return it.\n\n:param int wrong: The numbers.", Rejection.UNKNOWN_PARAMETER),
        ("Return it.\n\nParameters\n----------\nvalue : int\n    One.", Rejection.UNKNOWN_PARAMETER),
        ("Return it.\n\nRaises:\n    KeyError: Never.", Rejection.UNKNOWN_ERROR),
        ("Return it.\n\n:raises KeyError: Never.", Rejection.UNKNOWN_ERROR),
        ("Give it.\n\nYields:\n    One by one.", Rejection.NO_RESULT),
        ("Call it\nas mean_of(values).", Rejection.SIGNATURE),
        ("Say so. " * (LONGEST // 8 + 1), Rejection.TOO_LONG),
    ],
)
def test_what_a_reader_would_not_want_is_rejected_with_its_reason(text: str, reason: Rejection) -> None:
    assert judged(text) is reason


def test_a_text_that_was_cut_off_is_rejected_however_good() -> None:
    assert judged("Return the mean of all values.", truncated=True) is Rejection.TRUNCATED


@pytest.mark.parametrize(
    ("text", "encoding", "written"),
    [
        ("\u201cIt\u2019s\u201d \u2013 so\u2026", "ascii", '"It\'s" - so...'),
        ("\u201cIt\u2019s\u201d \u2013 so\u2026", "utf-8", "\u201cIt\u2019s\u201d \u2013 so\u2026"),
        ("\u201c\xe9\u201d", "latin-1", '"\xe9"'),
        ("\u201c\u6c49\ud800", "ascii", '"\u6c49\ud800'),
    ],
)
def test_typographic_characters_are_replaced_where_the_encoding_lacks_them(
    text: str, encoding: str, written: str
) -> None:
    assert transliterated(text, encoding) == written


def test_a_character_that_the_encoding_lacks_is_rejected() -> None:
    text = "Return the na\xefve mean."

    assert judged(text, around=Surroundings("", encoding="ascii")) is Rejection.ENCODING
    assert judged(text, around=Surroundings("", encoding="latin-1")) is None


def test_a_copy_of_another_docstring_is_rejected() -> None:
    around = Surroundings(SUFFIX, others=["Return the median of all the values."])

    assert judged("Return the median of all  the values", around=around) is Rejection.COPIED
    assert judged("Tell how far apart the numbers lie.", around=around) is None


def test_a_result_is_told_by_what_gives_one() -> None:
    nothing, generator = symbol("def f(a):\n    a()\n    return None\n"), symbol("def f(a):\n    yield a\n")
    returns, yields = "Do it.\n\nReturns:\n    The thing.", "Do it.\n\nYields:\n    The things."
    around = Surroundings("")

    assert rejection(returns, nothing, around, is_truncated=False) is Rejection.NO_RESULT
    assert rejection(returns, generator, around, is_truncated=False) is Rejection.NO_RESULT
    assert rejection(yields, generator, around, is_truncated=False) is None


def test_a_doctest_is_allowed_where_somebody_runs_it() -> None:
    around = Surroundings("", allow_doctest=True)

    assert judged("Return the mean value.\n\n>>> mean_of(x)\n1", around=around) is None


@pytest.mark.parametrize("name", ["getValue", "get_value", "A.B.get_value", "HTTPGetValue"])
def test_names_are_told_apart_into_words(name: str) -> None:
    assert restates("Get the value.", name)
    assert not restates("Get the value from the cache.", name)


def test_loops_are_runs_and_lines() -> None:
    assert not loops("a b c a b c d a b c")
    assert loops("x y z x y z x y z")


def test_likeness_is_that_of_characters_whatever_the_case_and_spaces() -> None:
    assert is_like("Return  THE mean.", "return the mean")
    assert not is_like("", "")
    assert is_like("a" * 8, "a" * 12)
    assert not is_like("a" * 8, "a" * 13)


def test_people_who_write_docstrings_are_mostly_let_through() -> None:
    around = Surroundings("", allow_doctest=True)
    judgements = [
        rejection(inspect.cleandoc(one.docstring), one, around, is_truncated=False) is None
        for module in (json, json.decoder, statistics, inspect)
        for one in scan(inspect.getsource(module).encode()).symbols
        if one.name and one.docstring is not None and one.is_documented
    ]

    assert len(judgements) > 100
    assert statistics.mean(judgements) > 0.9


@pytest.mark.parametrize(
    ("text", "is_code"),
    [
        ('self.dict.pop("keyencoding", "__len__").', True),
        ("# We have a newly reading.", True),
        ("close()", True),
        ("Call close() and return what it gave.", False),
        ("Return the value (or None).", False),
        ("close() is called by the owner.", False),
    ],
)
def test_a_call_alone_and_a_comment_are_code(text: str, is_code: bool) -> None:
    assert looks_like_code(text) is is_code
