"""How long slots are: a few lengths, each with a number of slots.

Owns: which class holds a sequence. Does not know which slot is free or who waits (`admission.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from codeherd_schema.errors import InvalidSetting


@dataclass(frozen=True, slots=True, order=True)
class SlotClass:
    """Slots of one length; sorted, classes are in the order that the line counts them in."""

    #: Tokens per slot, prompt and new ones.
    length: int
    #: How many there are.
    slots: int

    def __post_init__(self) -> None:
        for name in ("length", "slots"):
            if getattr(self, name) < 1:
                raise InvalidSetting(f"{name} of a slot class is {getattr(self, name)}, must be at least 1")


def length_class(need: int, classes: Sequence[SlotClass]) -> int | None:
    """Return the shortest class that holds `need` tokens; None if none does. `classes` are sorted."""
    return next((index for index, slot_class in enumerate(classes) if need <= slot_class.length), None)


def place(need: int, classes: Sequence[SlotClass], free: Mapping[int, Collection[int]]) -> int | None:
    """Return the shortest class that holds `need` tokens and has a free slot; None if none does.

    Args:
        need: tokens of the prompt and all that may be generated.
        classes: sorted.
        free: class -> its free slots; a class that is missing has none.
    """
    return next(
        (index for index, slot_class in enumerate(classes) if need <= slot_class.length and free.get(index)),
        None,
    )
