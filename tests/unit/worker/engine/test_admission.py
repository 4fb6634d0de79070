from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeherd_schema.errors import InvalidSetting
from codeherd_worker.engine.admission import WaitingLine
from codeherd_worker.engine.slot_classes import SlotClass, length_class, place

CLASSES = (SlotClass(length=10, slots=2), SlotClass(length=20, slots=1), SlotClass(length=40, slots=1))
WINDOW = 3


def make_line(*items: str, window: int = 2, priority: int = 5) -> WaitingLine[str]:
    line = WaitingLine[str](window)
    for item in items:
        line.push(item, priority=priority)
    return line


def take_all(line: WaitingLine[str]) -> list[str]:
    return [item for _ in range(len(line)) if (item := line.take(lambda _: 0)) is not None]


@dataclass(frozen=True)
class Item:
    arrival: int
    priority: int
    need: int


class Simulation:
    """A line in front of slots of three lengths, driven at random, beside a plain model of the rule.

    `passed` is counted here from the outside: whom a later item passed into a slot it could have used.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.line = WaitingLine[Item](WINDOW)
        self.waiting: list[Item] = []
        self.free = {index: set(range(slot_class.slots)) for index, slot_class in enumerate(CLASSES)}
        self.busy: list[tuple[int, int]] = []
        self.passed: Counter[Item] = Counter()
        self.scores: dict[Item, int | None] = {}
        self.arrivals = 0

    def room(self, item: Item) -> int | None:
        return place(item.need, CLASSES, self.free)

    def push(self) -> None:
        # Mostly one priority: its items have to pass each other for somebody to become overdue.
        item = Item(self.arrivals, self.random.choice((0, 1, 1, 1, 1, 2)), self.random.randint(1, 40))
        own = length_class(item.need, CLASSES)
        assert own is not None
        self.line.push(item, priority=item.priority, length_class=own)
        self.waiting.append(item)
        self.arrivals += 1

    def remove(self) -> None:
        gone = [item for item in self.waiting if self.random.random() < 0.1]
        self.line.remove(gone)
        self.waiting = [item for item in self.waiting if item not in gone]

    def end(self) -> None:
        if self.busy:
            index, slot = self.busy.pop(self.random.randrange(len(self.busy)))
            self.free[index].add(slot)

    def take(self) -> None:
        self.scores = {item: self.random.choice((None, 0, 1, 2)) for item in self.waiting}
        expected = self.expected()

        assert self.line.take(self.scores.__getitem__, room=self.room) == expected
        if expected is None:
            return
        index = self.room(expected)
        assert index is not None
        for other in self.earlier(expected):
            if self.is_looked_at(other) and other.need <= CLASSES[index].length:
                self.passed[other] += 1
        self.waiting.remove(expected)
        self.busy.append((index, self.free[index].pop()))

    def expected(self) -> Item | None:
        """By the rule: the priority, then who is overdue, then the score, then the arrival."""
        ranks = [
            (item.priority, -math.inf if self.passed[item] >= WINDOW else -score, item.arrival, item)
            for item in self.waiting
            if self.is_looked_at(item) and not self.is_held_back(item)
            if (score := self.scores[item]) is not None
        ]
        return min(ranks)[-1] if ranks else None

    def is_looked_at(self, item: Item) -> bool:
        lane = [
            other
            for other in self.waiting
            if other.priority == item.priority
            and length_class(other.need, CLASSES) == length_class(item.need, CLASSES)
        ]
        return item in lane[:WINDOW]

    def is_held_back(self, item: Item) -> bool:
        """Whether an item has no slot, or only one that an earlier overdue item could use."""
        index = self.room(item)
        return index is None or any(
            self.passed[other] >= WINDOW and other.need <= CLASSES[index].length
            for other in self.earlier(item)
        )

    def earlier(self, item: Item) -> list[Item]:
        order = self.in_order()
        return order[: order.index(item)]

    def in_order(self) -> list[Item]:
        return sorted(self.waiting, key=lambda item: (item.priority, item.arrival))


@given(seed=st.integers(0, 2**32 - 1))
def test_nobody_is_passed_over_more_often_than_the_window(seed: int) -> None:
    simulation = Simulation(seed)
    steps = (simulation.push, simulation.take, simulation.end, simulation.remove)

    for step in simulation.random.choices(steps, weights=(9, 9, 6, 1), k=100):
        step()

        assert max(simulation.passed.values(), default=0) <= WINDOW
        assert list(simulation.line) == simulation.in_order()
        assert len(simulation.line) == len(simulation.waiting)


@given(
    priorities=st.lists(st.integers(0, 3), max_size=30),
    scores=st.lists(st.integers(0, 5), min_size=30, max_size=30),
    window=st.integers(1, 8),
)
def test_every_item_comes_out_once_and_no_later_than_its_rank_and_the_window(
    priorities: list[int], scores: list[int], window: int
) -> None:
    line = WaitingLine[int](window)
    for item, priority in enumerate(priorities):
        line.push(item, priority=priority)
    order = list(line)

    taken = [line.take(lambda item: scores[item]) for _ in order]

    assert sorted(order) == sorted(item for item in taken if item is not None)
    assert [priorities[item] for item in taken if item is not None] == sorted(priorities)
    assert all(taken.index(item) <= rank + window for rank, item in enumerate(order))
    assert line.take(lambda item: scores[item]) is None


def test_equal_scores_are_served_in_order_of_arrival() -> None:
    line = make_line("first", "second", "third")

    assert take_all(line) == ["first", "second", "third"]


def test_sequences_that_share_a_prefix_follow_each_other() -> None:
    line = make_line("a1", "b1", "a2", "b2", window=4)
    taken: list[str] = []

    def score(item: str) -> int:
        return 64 if taken and taken[-1][0] == item[0] else 0

    while (item := line.take(score)) is not None:
        taken.append(item)

    assert taken == ["a1", "a2", "b1", "b2"]


def test_an_endless_stream_of_better_scores_passes_the_oldest_window_times() -> None:
    line = make_line("oldest", window=3)
    taken = []

    for number in range(5):
        line.push(f"newer {number}", priority=5)
        taken.append(line.take(lambda item: 0 if item == "oldest" else 64))

    assert taken == ["newer 0", "newer 1", "newer 2", "oldest", "newer 3"]


def test_an_item_beyond_the_window_is_not_looked_at() -> None:
    line = make_line("first", "second", "third", window=2)

    assert line.take(lambda item: 64 if item == "third" else 0) == "first"


def test_a_lower_priority_gets_what_no_better_one_can_use() -> None:
    line = make_line("low", priority=9)
    line.push("high", priority=1)

    assert line.take(lambda item: None if item == "high" else 0) == "low"
    assert list(line) == ["high"]


def test_long_items_without_a_slot_do_not_hide_short_ones_behind_them() -> None:
    line = WaitingLine[str](1)
    for number in range(5):
        line.push(f"long {number}", priority=5, length_class=1)
    line.push("short", priority=5, length_class=0)

    taken = line.take(lambda _: 0, room=lambda item: 0 if item == "short" else None)

    assert taken == "short"


def test_a_full_length_class_never_holds_back_the_slots_of_shorter_ones() -> None:
    line = WaitingLine[str](1)
    line.push("long", priority=5, length_class=1)

    for number in range(10):
        line.push(f"short {number}", priority=5, length_class=0)
        taken = line.take(lambda _: 0, room=lambda item: None if item == "long" else 0)
        assert taken == f"short {number}"

    # Nor was it passed over: a better score still goes first.
    line.push("better", priority=5, length_class=0)
    assert line.take(lambda item: 64 if item == "better" else 0, room=lambda _: 1) == "better"
    assert line.take(lambda _: 0, room=lambda _: 1) == "long"


def test_short_items_take_a_long_slot_from_a_long_item_at_most_window_times() -> None:
    line = WaitingLine[str](2)
    line.push("long", priority=5, length_class=1)
    taken = []

    for number in range(4):
        line.push(f"short {number}", priority=5, length_class=0)
        taken.append(line.take(lambda item: 0 if item == "long" else 64, room=lambda _: 1))

    assert taken == ["short 0", "short 1", "long", "short 2"]


def test_slots_are_kept_for_an_overdue_item_that_waits_for_a_prefix() -> None:
    line = WaitingLine[str](1)
    line.push("waits", priority=5, length_class=1)
    line.push("passes", priority=5)
    line.push("next", priority=5)
    line.push("lower", priority=9)

    def score(item: str) -> int | None:
        return None if item == "waits" else 0

    assert line.take(score, room=lambda _: 1) == "passes"
    assert line.take(score, room=lambda _: 1) is None
    assert line.take(score, room=lambda _: 0) == "next"
    line.push("better", priority=0)
    assert line.take(score, room=lambda _: 1) == "better"
    assert line.take(lambda _: 0, room=lambda _: 1) == "waits"


def test_slots_are_kept_from_lower_priorities_too() -> None:
    line = make_line("high", window=2, priority=1)
    for item in ("a", "b", "c"):
        line.push(item, priority=9)

    taken = [line.take(lambda item: None if item == "high" else 0) for _ in range(3)]

    assert taken == ["a", "b", None]


def test_of_two_overdue_items_each_keeps_the_slots_that_it_could_use() -> None:
    line = WaitingLine[str](1)
    line.push("short waits", priority=5, length_class=0)
    line.push("long waits", priority=5, length_class=1)
    line.push("passes", priority=9, length_class=0)
    line.push("next", priority=9, length_class=0)

    def score(item: str) -> int | None:
        return None if item.endswith("waits") else 0

    assert line.take(score, room=lambda _: 1) == "passes"
    assert line.take(score, room=lambda _: 0) is None


def test_an_earlier_item_passes_over_nobody() -> None:
    line = make_line("first", "second", window=2)
    assert line.take(lambda _: 0) == "first"

    taken = []
    for item in ("newer", "newest"):
        line.push(item, priority=5)
        taken.append(line.take(lambda item: 0 if item == "second" else 64))

    assert taken == ["newer", "newest"]


def test_a_score_that_raises_changes_nothing() -> None:
    line = make_line("first", "second", window=1)

    with pytest.raises(ZeroDivisionError):
        line.take(lambda _: 1 // 0)

    assert take_all(line) == ["first", "second"]


def test_removed_items_never_come_out_and_strangers_are_ignored() -> None:
    line = make_line("first", "second", "third")

    line.remove(["second", "stranger"])

    assert take_all(line) == ["first", "third"]


def test_a_cleared_line_is_empty_and_usable() -> None:
    line = make_line("first", "second")

    line.clear()
    line.push("first", priority=5)

    assert (len(line), take_all(line)) == (1, ["first"])


def test_an_item_cannot_be_in_line_twice() -> None:
    line = make_line("first")

    with pytest.raises(ValueError, match="in line already"):
        line.push("first", priority=1)

    assert list(line) == ["first"]


def test_take_looks_at_the_window_alone_however_long_the_line_is() -> None:
    line = WaitingLine[int](16)
    for item in range(5000):
        line.push(item, priority=5)
    asked = []

    def score(item: int) -> int:
        asked.append(item)
        return 0

    line.take(score)

    assert asked == list(range(16))


def test_a_sequence_is_placed_in_the_shortest_class_with_a_free_slot() -> None:
    assert place(10, CLASSES, {0: {1}, 1: {0}, 2: {0}}) == 0
    assert place(10, CLASSES, {0: set(), 2: {0}}) == 2
    assert place(11, CLASSES, {0: {1}, 2: {0}}) == 2
    assert place(40, CLASSES, {0: {1}, 1: {0}}) is None
    assert place(41, CLASSES, {0: {1}, 1: {0}, 2: {0}}) is None


def test_the_length_class_is_the_shortest_that_holds_the_sequence() -> None:
    assert [length_class(need, CLASSES) for need in (1, 10, 11, 40, 41)] == [0, 0, 1, 2, None]


def test_sorted_classes_go_from_short_to_long() -> None:
    assert sorted([CLASSES[2], CLASSES[0], CLASSES[1]]) == list(CLASSES)


@pytest.mark.parametrize(("length", "slots"), [(0, 1), (1, 0)])
def test_a_class_without_tokens_or_slots_is_refused(length: int, slots: int) -> None:
    with pytest.raises(InvalidSetting, match="slot class"):
        SlotClass(length, slots)


def test_a_line_that_looks_at_nothing_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="window"):
        WaitingLine[str](0)
