"""One transaction for what several threads want to write at the same moment.

Owns: who waits for whom. A thread that comes alone does its work at once; those that come meanwhile wait, and
then the first of them does the work of all. Does not know SQL or what the work is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")

#: Items that are done together at most: what holds one of them up holds up the others.
MOST: Final = 16


def _taken() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(slots=True, eq=False)
class _Turn(Generic[Item, Answer]):
    item: Item
    #: Free when there are `answers`, when `is_alone`, or when it is this turn's to lead.
    woken: threading.Lock = field(default_factory=_taken)
    #: One, once it is there.
    answers: Sequence[Answer] = ()
    #: The work of all failed, and maybe not because of this item.
    is_alone: bool = False


class GroupCommit(Generic[Item, Answer]):
    """Does work for many threads, together for those who meet. Any thread may call `do`."""

    def __init__(self, work: Callable[[Sequence[Item]], Sequence[Answer]]) -> None:
        """Take what does the work.

        Args:
            work: returns one answer per item, in order, or raises. May be asked again for an item that it
                raised for, also when it was done and only the answer got lost.
        """
        self._work = work
        self._lock = threading.Lock()
        self._waiting: list[_Turn[Item, Answer]] = []
        self._is_led = False

    def do(self, item: Item) -> Answer:
        """Have the work done for this item and return the answer; raises what `work` raises for it alone."""
        mine: _Turn[Item, Answer] = _Turn(item)
        with self._lock:
            self._waiting.append(mine)
            leads, self._is_led = not self._is_led, True
        if not leads:
            mine.woken.acquire()
        if not (mine.answers or mine.is_alone):
            self._lead()
        [answer] = self._work([item]) if mine.is_alone else mine.answers
        return answer

    def _lead(self) -> None:
        """Do the work of all who wait, the caller among them."""
        with self._lock:
            turns = self._waiting[:MOST]
            del self._waiting[:MOST]
        answers: Sequence[Answer] = ()
        try:
            answers = self._work([turn.item for turn in turns])
        except Exception:
            if len(turns) == 1:
                raise
        finally:
            self._hand_on(turns, answers)

    def _hand_on(self, turns: Sequence[_Turn[Item, Answer]], answers: Sequence[Answer]) -> None:
        for place, turn in enumerate(turns):
            turn.answers = answers[place : place + 1]
            turn.is_alone = not turn.answers
            turn.woken.release()
        with self._lock:
            self._is_led = bool(self._waiting)
            if self._waiting:
                self._waiting[0].woken.release()
