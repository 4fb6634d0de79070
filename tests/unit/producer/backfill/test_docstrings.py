from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeherd_producer.backfill.docstrings import (
    Convention,
    Item,
    Sections,
    Unwritable,
    before_sections,
    composed,
    is_section_head,
    rendered,
)
from codeherd_producer.backfill.editor import Insertion, edited
from codeherd_producer.backfill.scanner import scan

TEXTS = [
    "return the sum",
    "Return the sum of both numbers, rounded. It never fails.",
    "Return the sum.\n\nMore about it,\nin two lines.\n\n\n\nAnd more.\n\n",
    "    Return the sum\n    of both numbers.\n\n      Indented.\n    ",
    "Return a path such as C:\\new, e.g. for Windows.",
    'Say "hello" to everybody.',
    "Wait for it...",
    "Stop!",
    "iPhone-like `name` for things",
    "Do this:",
    "Return x. " + "It is a very long explanation that fills more than one line. " * 4,
    "Check.\n\n- one item that is " + "long " * 30 + "\n- another",
]
#: What ruff says of a docstring's form.
RULES = (
    *("D200", "D201", "D202", "D204", "D205", "D206", "D207", "D208", "D209", "D210", "D211", "D300", "D301"),
    *("D400", "D403", "D410", "D411", "D412", "D414", "D415", "W505", "E501"),
)
SECTIONS = Sections(
    parameters=(Item("a", "The first number.", "int"), Item("*more", "Others. " + "Really many. " * 12)),
    returns=Item("", "The sum.", "int"),
    raises=(Item("ValueError", "There is none."),),
)


def literal(text: str, indent: str = "    ", width: int = 88) -> tuple[str, ...]:
    return rendered(text, indent=indent, width=width)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("return the sum", ('"""Return the sum."""',)),
        ("Return it.\r\nMore.", ('"""Return it.', "", "More.", '"""')),
        ("Return the sum,\nof all.", ('"""Return the sum, of all."""',)),
        ("Use \\d here", ('r"""Use \\d here."""',)),
        ("don't do it", ('"""Don\'t do it."""',)),
        ("Return e.g. All or none. Or it.", ('"""Return e.g. All or none.', "", "Or it.", '"""')),
        ("Do it.\n\n\n\n  x\n    y", ('"""Do it.', "", "x", "  y", '"""')),
    ],
)
def test_a_text_gets_its_form(text: str, lines: tuple[str, ...]) -> None:
    assert literal(text) == lines


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        (" \n\t\n", "empty"),
        (":", "empty"),
        ('One """ two.', "three quotes"),
        ("Is it there?", "question"),
        ("One.\n\nEnds with \\\nhere.", "backslash"),
        ("A bell \x07.", "cannot be printed"),
        ("A NUL \0.", "cannot be printed"),
        ("Right to left \u202e.", "cannot be printed"),
        ("word " * 40, "does not fit"),
        ("One.\n\n" + "x" * 100, "longer than a line"),
        ('"Quoted."', "quote"),
        ("iPhones ring.", "not capitalized"),
        ("Show " + "\U0001f600" * 40, "does not fit"),
        ("One.\n\n" + "\U0001f600" * 45, "longer than a line"),
    ],
)
def test_what_no_docstring_can_hold_is_refused(text: str, why: str) -> None:
    with pytest.raises(Unwritable, match=why):
        literal(text)


def test_width_counts_the_indentation_and_the_quotes() -> None:
    text = "x" * 30 + "."

    assert literal(text, indent=" " * 4, width=41) == (f'"""X{text[1:]}"""',)
    with pytest.raises(Unwritable):
        literal(text, indent=" " * 4, width=40)
    with pytest.raises(Unwritable):
        literal(text, indent="\t", width=44)


@pytest.mark.parametrize("convention", Convention)
def test_sections_follow_their_convention(convention: Convention) -> None:
    text = composed("Add numbers.", SECTIONS, convention)

    expected = {
        Convention.PEP257: ["Add numbers."],
        Convention.GOOGLE: ["Args:\n    a: The first number.", "Returns:\n    The sum.", "Error: There"],
        Convention.NUMPY: ["Parameters\n----------\na : int\n    The", "\nint\n    The sum.", "Error\n"],
        Convention.SPHINX: [":param a: The first number.", ":return: The sum.", ":raises ValueError: There"],
    }  # fmt: skip
    assert all(part in text for part in expected[convention])


def test_a_generator_yields_in_every_convention() -> None:
    sections = Sections(yields=Item("", "The numbers."))

    assert ":yields: The numbers." in composed("Count.", sections, Convention.SPHINX)
    assert "Yields:\n    The numbers." in composed("Count.", sections, Convention.GOOGLE)
    assert "Yields\n------\nobject\n    The numbers." in composed("Count.", sections, Convention.NUMPY)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Do it.\n\nAnd more.", "Do it.\n\nAnd more."),
        ("Do it.\n\nArgs:\n    a: One.", "Do it.\n"),
        ("Do it.\n\n    See also\n    --------\n    b", "Do it.\n"),
        ("Do it.\n:param a: One.\nMore.", "Do it."),
        ("Do it.\n\n  :rtype: int", "Do it.\n"),
        ("Returns:\n  One.", ""),
        ("Do it.\n\nReturns one thing.\n:note: that", "Do it.\n\nReturns one thing.\n:note: that"),
    ],
)
def test_a_text_is_cut_before_its_first_section(text: str, kept: str) -> None:
    assert before_sections(text) == kept


def test_each_convention_has_heads_of_its_own() -> None:
    assert [is_section_head("  args :", one) for one in Convention] == [True, True, False, True]
    assert [is_section_head("Parameters", one) for one in Convention] == [True, False, True, True]
    assert not any(is_section_head("Returns: it", one) for one in Convention)


def test_ruff_finds_no_fault_with_the_form(tmp_path: Path) -> None:
    for convention in Convention:
        texts = [*TEXTS, composed("Add numbers.", SECTIONS, convention)]
        source = '"""Module."""\n' + "".join(
            f"\n\ndef f{n}(a, *more):\n    return a\n\n\n"
            f"class A{n}:\n    x = 1\n\n    def f(self, a, *more):\n        return a\n"
            for n in range(len(texts))
        )
        found = scan(source.encode())
        named = [s for s in found.symbols if s.name]
        insertions = [
            Insertion(symbol, rendered(texts[n // 3], indent=symbol.indent, width=88))
            for n, symbol in enumerate(sorted(named, key=lambda s: s.line))
        ]
        (tmp_path / "a.py").write_bytes(edited(found, insertions))
        rules = ",".join(RULES)
        settings = [f"--select={rules}", "--line-length=88", "--isolated"]
        if convention is not Convention.SPHINX:
            settings.append(f"--config=lint.pydocstyle.convention='{convention}'")

        answer = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--no-cache", *settings, str(tmp_path / "a.py")],
            capture_output=True,
            text=True,
            check=False,
        )

        assert answer.returncode == 0, answer.stdout + answer.stderr


@given(
    st.text(st.characters(codec="utf-8"), max_size=300) | st.text("ab.\"\\' \n\t`#:-A", max_size=200),
    st.sampled_from(["", "    ", "\t", "  "]),
)
def test_whatever_is_written_reads_as_what_was_meant(text: str, indent: str) -> None:
    try:
        lines = rendered(text, indent=indent, width=100)
    except Unwritable:
        return

    tree = ast.parse("\n".join((indent and "if 1:", *(indent + line if line else "" for line in lines))))
    [node] = tree.body[0].body if isinstance(tree.body[0], ast.If) else tree.body
    assert isinstance(node, ast.Expr)
    assert isinstance(node.value, ast.Constant)
    said = inspect.cleandoc(str(node.value.value))
    assert said.split("\n")[0].endswith(".")
    # Nothing was lost but white space and what ended the summary.
    assert _letters(text) == _letters(said)
    assert all(len((indent + line).expandtabs(8)) <= 100 for line in lines)


def _letters(text: str) -> str:
    return "".join(text.split()).translate(str.maketrans("", "", ".,;:-!")).casefold()
