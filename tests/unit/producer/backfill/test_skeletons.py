from __future__ import annotations

import pytest

from codeherd_producer.backfill.context import FileContext, Hole
from codeherd_producer.backfill.docstrings import Convention, Sections, composed
from codeherd_producer.backfill.scanner import Symbol, scan
from codeherd_producer.backfill.skeletons import Section, Slot, hole_of, sections_of, slots

CODE = """\
class Shop:
    def sell(self, name: str, *more: "Thing", _unused=None, key: int = 3, **rest):
        if not name:
            raise errors.Empty("no name")
        if key:
            raise NotImplementedError
        return name


def each(of: list[int]) -> Iterator[int]:
    yield from of
"""
CONVENTIONS = [Convention.GOOGLE, Convention.NUMPY, Convention.SPHINX]


def symbol(code: str = CODE, name: str = "") -> Symbol:
    symbols = scan(code.encode()).symbols
    return next(s for s in symbols[1:] if not name or s.name == name)


def hole(name: str) -> Hole:
    return FileContext(scan(CODE.encode()), budget=4000).hole(symbol(name=name))


def names(found: tuple[Slot, ...], section: Section) -> list[str]:
    return [slot.name for slot in found if slot.section is section]


def test_what_is_listed_follows_from_the_code() -> None:
    found = slots(symbol(name="Shop.sell"), Convention.GOOGLE, room=80)

    assert names(found, Section.PARAMETERS) == ["name", "*more", "key", "**rest"]
    assert names(found, Section.RETURNS) == [""]
    assert names(found, Section.YIELDS) == []
    assert names(found, Section.RAISES) == ["errors.Empty"]


def test_a_generator_yields_and_returns_nothing() -> None:
    found = slots(symbol(name="each"), Convention.GOOGLE, room=80)

    assert [slot.section for slot in found] == [Section.PARAMETERS, Section.YIELDS]


@pytest.mark.parametrize(
    ("code", "listed"),
    [
        ("class A:\n    def f(this, a): pass\n", ["a"]),
        ("class A:\n    @staticmethod\n    def f(a, b): pass\n", ["a", "b"]),
        ("class A:\n    @classmethod\n    def f(kind, a): pass\n", ["a"]),
        ("class A:\n    def f(*a): pass\n", ["*a"]),
        ("class A:\n    def f(): pass\n", []),
        ("def f(self): pass\n", ["self"]),
    ],
)
def test_what_python_itself_hands_over_is_no_parameter(code: str, listed: list[str]) -> None:
    found = slots(scan(code.encode()).symbols[-1], Convention.NUMPY, room=80)

    assert names(found, Section.PARAMETERS) == listed


@pytest.mark.parametrize("decorator", ["property", "functools.cached_property", "hybrid_property(x)"])
def test_a_property_reads_as_its_value_and_lists_nothing(decorator: str) -> None:
    code = f"class A:\n    @{decorator}\n    def f(self):\n        return 1\n"

    assert slots(scan(code.encode()).symbols[-1], Convention.GOOGLE, room=80) == ()


def test_pep257_and_classes_list_nothing() -> None:
    assert slots(symbol(name="Shop.sell"), Convention.PEP257, room=80) == ()
    assert slots(symbol(name="Shop"), Convention.GOOGLE, room=80) == ()
    assert slots(scan(b"x = 1\n").symbols[0], Convention.GOOGLE, room=80) == ()


@pytest.mark.parametrize(
    ("annotation", "listed"),
    [
        ("int", "int"),
        ("'Thing'", "Thing"),
        ('"Thing"', "Thing"),
        ("Literal['a', 'b']", "Literal['a', 'b']"),
        ("""Literal['"']""", None),
        ("Literal['\\\\']", None),
        ("Callable[[" + "int, " * 20 + "], str]", None),
    ],
)
def test_numpy_lists_the_annotations_that_a_line_can_hold(annotation: str, listed: str | None) -> None:
    found = symbol(f"def f(a: {annotation}): pass\n")

    assert slots(found, Convention.NUMPY, room=60) == (Slot(Section.PARAMETERS, "a", listed),)
    assert slots(found, Convention.GOOGLE, room=60) == (Slot(Section.PARAMETERS, "a", None),)


@pytest.mark.parametrize(
    ("convention", "section", "shown"),
    [
        (Convention.GOOGLE, Section.PARAMETERS, "        Args:\n            name:"),
        (Convention.GOOGLE, Section.RETURNS, "        Returns:\n            "),
        (Convention.GOOGLE, Section.RAISES, "        Raises:\n            errors.Empty:"),
        (
            Convention.NUMPY,
            Section.PARAMETERS,
            "        Parameters\n        ----------\n        name : str\n            ",
        ),
        (Convention.SPHINX, Section.PARAMETERS, "        :param name:"),
        (Convention.SPHINX, Section.RAISES, "        :raises errors.Empty:"),
    ],
)
def test_a_model_sees_the_docstring_up_to_one_item(
    convention: Convention, section: Section, shown: str
) -> None:
    whole = hole("Shop.sell")
    slot = next(s for s in slots(symbol(name="Shop.sell"), convention, room=80) if s.section is section)

    found = hole_of(whole, slot, ['"""Sell it.', "", "And more."], convention)

    assert found.prefix == f"{whole.prefix}Sell it.\n\n        And more.\n\n{shown}"
    assert found.suffix == f"\n        {whole.suffix}"
    assert found.suffix.startswith('\n        """\n        if not name:\n')


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_what_is_shown_is_what_is_written(convention: Convention) -> None:
    found = slots(symbol(name="Shop.sell"), convention, room=80)
    text = composed("Sell it.", sections_of(dict.fromkeys(found, "The thing.")), convention)
    lines = "".join(f"        {line}\n" if line else "\n" for line in text.split("\n"))

    for slot in found:
        prefix = hole_of(hole("Shop.sell"), slot, ['"""Sell it.'], convention).prefix
        last = prefix.rpartition("\n")[2]
        assert any(line.startswith(last) and "The thing." in line for line in lines.splitlines())


def test_descriptions_become_sections_in_the_order_of_the_header() -> None:
    found = slots(symbol(name="each"), Convention.NUMPY, room=80)

    sections = sections_of({slot: f"{slot.section}!" for slot in found})

    assert isinstance(sections, Sections)
    assert [item.name for item in sections.parameters] == ["of"]
    assert sections.returns is None
    assert sections.yields is not None
    assert (sections.yields.description, sections.yields.annotation) == ("yields!", "Iterator[int]")
    assert sections.raises == []
