"""Tell what a docstring with sections must list, and show a model one item of it at a time.

Owns: which parameters, results and errors of a function are listed (its header and body say so, no model
does), and the hole of one description. How sections are written down is `docstrings`' business, so what a
model is shown is what the file will hold; who asks and judges is `dialog`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from codeherd_producer.backfill.context import Hole, deeper
from codeherd_producer.backfill.docstrings import Convention, Item, Sections, composed
from codeherd_producer.backfill.scanner import Symbol

#: Stands for the description until there is one; no name or annotation holds it.
_GAP = "\0"
#: Columns that a line with a name and an annotation needs beside both.
_AROUND_NAME = 8


class Section(StrEnum):
    """Where an item is listed."""

    PARAMETERS = "parameters"
    RETURNS = "returns"
    YIELDS = "yields"
    RAISES = "raises"


@dataclass(frozen=True, slots=True)
class Slot:
    """One item whose description is to be written."""

    section: Section
    #: As listed, with stars; empty for a result.
    name: str
    #: As listed; None without.
    annotation: str | None = None


def slots(symbol: Symbol, convention: Convention, *, room: int) -> tuple[Slot, ...]:
    """Return what the docstring of a symbol lists, in its order; empty for a plain text.

    Args:
        symbol: functions and methods list something, others do not.
        convention: PEP 257 alone has no sections.
        room: columns of a line without its indentation; a longer annotation is left out.
    """
    if convention is Convention.PEP257 or symbol.kind not in ("function", "method"):
        return ()
    return tuple(
        Slot(slot.section, slot.name, _shown(slot, room) if convention is Convention.NUMPY else None)
        for slot in _slots(symbol)
    )


def hole_of(hole: Hole, slot: Slot, summary: Sequence[str], convention: Convention) -> Hole:
    """Return the hole of one description: header, summary, its section's head and its own name.

    Args:
        hole: of the whole docstring.
        slot: what is to be described.
        summary: first lines of the docstring, with the opening and without the closing quotes.
        convention: not PEP 257.
    """
    text = composed("", sections_of({slot: _GAP}), convention)
    *lines, last = text.partition(_GAP)[0].split("\n")
    # A space before a hole is a token of its own, after which nothing usual follows; indentation is not.
    return deeper(hole, [*summary, *lines[1:], last.rstrip() or last])


def sections_of(descriptions: Mapping[Slot, str]) -> Sections:
    """Return the sections that these descriptions make, in the order given."""

    def items(section: Section) -> list[Item]:
        return [
            Item(slot.name, description, slot.annotation)
            for slot, description in descriptions.items()
            if slot.section is section
        ]

    return Sections(
        parameters=items(Section.PARAMETERS),
        returns=next(iter(items(Section.RETURNS)), None),
        yields=next(iter(items(Section.YIELDS)), None),
        raises=items(Section.RAISES),
    )


def _slots(symbol: Symbol) -> Iterator[Slot]:
    decorators = {one.partition("(")[0].rpartition(".")[2] for one in symbol.decorators}
    parameters = list(symbol.parameters)
    is_bound = symbol.kind == "method" and "staticmethod" not in decorators
    if is_bound and parameters and not parameters[0].stars:
        # `self`, `cls`, however it is called.
        del parameters[0]
    for one in parameters:
        # Of what nobody is to use there is nothing to say, and ruff does not ask for it.
        if not one.name.startswith("_"):
            yield Slot(Section.PARAMETERS, one.stars + one.name, one.annotation)
    if symbol.yields:
        yield Slot(Section.YIELDS, "", symbol.returns)
    # A property reads as what it returns.
    elif symbol.gives_value and not any("property" in one.casefold() for one in decorators):
        yield Slot(Section.RETURNS, "", symbol.returns)
    for error in symbol.raises:
        # Says that there is a subclass to write, nothing to a caller.
        if error != "NotImplementedError":
            yield Slot(Section.RAISES, error)


def _shown(slot: Slot, room: int) -> str | None:
    """Return an annotation as it is listed; None if it cannot be."""
    annotation = slot.annotation or ""
    if annotation[:1] == "'" and annotation.count("'") == 2:
        # A forward reference; the quotes are the interpreter's business.
        annotation = annotation.replace("'", "")
    is_plain = annotation.isprintable() and not set(annotation) & {'"', "\\"}
    fits = len(slot.name) + len(annotation) + _AROUND_NAME <= room
    return annotation if annotation and is_plain and fits else None
