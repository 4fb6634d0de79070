"""Choose which waiting sequence gets the next free slot.

Owns: the waiting line (priority, then arrival, then what can be reused). Does not know prompts, prefixes
or the cache: scores and free slots are given. Not safe for several threads.

Slots have one of a few lengths, the length classes, numbered from the shortest; an item may use a slot of
its own class or of any longer one. The rule of the line:
    1. Priorities in order; a lower one only gets what no item of a better one can use now.
    2. Of a priority, the `window` oldest items of each length class are looked at. The one with the best
       score goes first, of equals the oldest: sequences that share a prefix follow each other.
    3. An item is passed over when a later one gets a slot that it could have used. After `window` times
       it is overdue: it goes first as soon as it can run, and until then no later item gets such a slot.
So no item that is looked at is passed over more than `window` times, whatever the scores are, and since
the oldest are looked at first, each item's turn comes. Only better priorities can keep it waiting.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import Generic, TypeVar

from codeherd_schema.errors import InvalidSetting

T = TypeVar("T", bound=Hashable)


@dataclass(slots=True, eq=False)
class _Entry(Generic[T]):
    item: T
    priority: int
    length_class: int
    arrival: int
    #: Times that it was looked at and passed over.
    passed: int = 0


@dataclass(frozen=True, slots=True)
class _Candidate(Generic[T]):
    """An item that can run now."""

    entry: _Entry[T]
    score: int
    slot_class: int


class WaitingLine(Generic[T]):
    """Items that wait for a slot; hash and equality tell them apart, so no two may be equal."""

    def __init__(self, window: int) -> None:
        """Start empty.

        Args:
            window: how many of the oldest items are looked at, and how often one may be passed over.

        Raises:
            InvalidSetting: `window` is below 1.
        """
        if window < 1:
            raise InvalidSetting(f"the window of the waiting line is {window}, must be at least 1")
        self._window = window
        self._arrivals = 0
        self._entries: dict[T, _Entry[T]] = {}
        # Priority -> length class -> entries by arrival. Linked lists, since a plain dict that loses its
        # first keys is slow to find the next one. None is ever empty.
        self._lanes: dict[int, dict[int, OrderedDict[T, _Entry[T]]]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        """Go through the items by priority, then arrival; the line must not change meanwhile."""
        for priority in sorted(self._lanes):
            lanes = (lane.values() for lane in self._lanes[priority].values())
            yield from (entry.item for entry in heapq.merge(*lanes, key=attrgetter("arrival")))

    def push(self, item: T, *, priority: int, length_class: int = 0) -> None:
        """Put an item in line.

        Args:
            item: not in line yet.
            priority: 0 goes first.
            length_class: the shortest class that holds it.

        Raises:
            ValueError: the item is in line already.
        """
        if item in self._entries:
            raise ValueError("the item is in line already")
        entry = _Entry(item, priority, length_class, self._arrivals)
        self._arrivals += 1
        self._entries[item] = entry
        self._lanes.setdefault(priority, {}).setdefault(length_class, OrderedDict())[item] = entry

    def remove(self, items: Collection[T]) -> None:
        """Take items out of the line; one that is not in it is none of our business."""
        for item in items:
            entry = self._entries.pop(item, None)
            if entry is None:
                continue
            lanes = self._lanes[entry.priority]
            del lanes[entry.length_class][item]
            if not lanes[entry.length_class]:
                del lanes[entry.length_class]
            if not lanes:
                del self._lanes[entry.priority]

    def clear(self) -> None:
        """Take all items out."""
        self._entries.clear()
        self._lanes.clear()

    def take(
        self, score: Callable[[T], int | None], *, room: Callable[[T], int | None] = lambda _: 0
    ) -> T | None:
        """Take out the item that runs next; see the rule at the top.

        Looks at `window` items of each length class of the best priority, and of the next priority only if
        none of them can run. Nothing changes if a callable raises.

        Args:
            score: what running the item now saves, such as tokens that need no prefill; None: it waits, for
                instance for a prefix that is being computed. That must come to an end on its own, not by
                taking another item: an overdue item that waits holds back slots.
            room: the class of the slot that the item would get now, its own or a longer one; None: there is
                no such slot. With a single class the default will do, if a slot is free.

        Returns:
            The item, which is out of the line now; None if no item can run.
        """
        passed: list[_Entry[T]] = []
        held_back: float = math.inf  # this class and longer ones are kept for an overdue item
        for priority in sorted(self._lanes):
            looked = self._oldest(priority)
            best: _Candidate[T] | None = None
            for entry in looked:
                is_overdue = entry.passed >= self._window
                candidate = _candidate(entry, score, room, held_back)
                if candidate is None:
                    if is_overdue:
                        held_back = min(held_back, entry.length_class)
                elif is_overdue:
                    best = candidate
                    break
                elif best is None or candidate.score > best.score:
                    best = candidate
            if best is not None:
                passed += [entry for entry in looked if entry.arrival < best.entry.arrival]
                for entry in passed:
                    entry.passed += entry.length_class <= best.slot_class
                self.remove([best.entry.item])
                return best.entry.item
            passed += looked
        return None

    def _oldest(self, priority: int) -> list[_Entry[T]]:
        lanes = (islice(lane.values(), self._window) for lane in self._lanes[priority].values())
        return list(heapq.merge(*lanes, key=attrgetter("arrival")))


def _candidate(
    entry: _Entry[T], score: Callable[[T], int | None], room: Callable[[T], int | None], held_back: float
) -> _Candidate[T] | None:
    slot_class = room(entry.item)
    if slot_class is None or slot_class >= held_back:
        return None
    value = score(entry.item)
    return None if value is None else _Candidate(entry, value, slot_class)
