from __future__ import annotations

import pytest

from codeherd_schema.errors import InvalidSetting
from codeherd_worker.engine.slot_classes import SlotClass, length_class, place

CLASSES = (SlotClass(10, 2), SlotClass(20, 1), SlotClass(40, 1))


@pytest.mark.parametrize(
    ("need", "number"), [(1, 0), (10, 0), (11, 1), (20, 1), (21, 2), (40, 2), (41, None)]
)
def test_a_sequence_belongs_to_the_shortest_class_that_holds_it(need: int, number: int | None) -> None:
    assert length_class(need, CLASSES) == number


@pytest.mark.parametrize(
    ("need", "free", "number"),
    [
        (5, {0: [0, 1], 1: [2], 2: [3]}, 0),
        (5, {0: [], 1: [2], 2: [3]}, 1),
        (5, {2: [3]}, 2),
        (5, {0: [], 1: [], 2: []}, None),
        (15, {0: [0], 1: [2]}, 1),
        (15, {0: [0, 1]}, None),
        (41, {0: [0], 1: [2], 2: [3]}, None),
    ],
)
def test_the_shortest_free_slot_that_holds_a_sequence_is_its_place(
    need: int, free: dict[int, list[int]], number: int | None
) -> None:
    assert place(need, CLASSES, free) == number


@pytest.mark.parametrize(("length", "slots", "name"), [(0, 1, "length"), (10, 0, "slots"), (-5, 1, "length")])
def test_a_class_without_room_is_refused(length: int, slots: int, name: str) -> None:
    with pytest.raises(InvalidSetting, match=f"{name} of a slot class"):
        SlotClass(length, slots)


def test_classes_sort_by_length() -> None:
    assert sorted([SlotClass(40, 1), SlotClass(10, 9)]) == [SlotClass(10, 9), SlotClass(40, 1)]
