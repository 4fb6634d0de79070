"""Many beside each other, or one alone, in any order of coming."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from codeherd_worker.quarantine import Quarantine
from tests.services import wait_until


class Guest:
    """A thread that enters, and stays until it may leave."""

    def __init__(self, door: Callable[[], AbstractContextManager[bool]]) -> None:
        self.may: bool | None = None
        self.free = threading.Event()
        self._door = door
        self.thread = threading.Thread(target=self._visit)
        self.thread.start()

    def _visit(self) -> None:
        with self._door() as may:
            self.may = may
            assert self.free.wait(60)

    def leave(self) -> None:
        self.free.set()
        self.thread.join(60)

    def enters(self) -> None:
        wait_until(lambda: self.may is not None, "the guest to come in")


def test_one_who_waits_to_be_alone_goes_before_those_who_come_later() -> None:
    quarantine = Quarantine()
    first = Guest(quarantine.beside_others)
    first.enters()
    alone = Guest(quarantine.alone)
    wait_until(lambda: quarantine._waiting_to_be_alone == 1, "the lone one to wait")
    later = Guest(quarantine.beside_others)

    assert [alone.may, later.may] == [None, None]
    first.leave()
    alone.enters()
    assert [later.may] == [None]
    alone.leave()
    later.enters()

    assert [first.may, alone.may, later.may] == [True, True, True]
    later.leave()


def test_closing_sends_away_who_waits_and_who_comes() -> None:
    quarantine = Quarantine()
    inside = Guest(quarantine.beside_others)
    inside.enters()
    alone = Guest(quarantine.alone)
    wait_until(lambda: quarantine._waiting_to_be_alone == 1, "the lone one to wait")
    beside = Guest(quarantine.beside_others)

    quarantine.close()
    alone.enters()
    beside.enters()

    assert [inside.may, alone.may, beside.may] == [True, False, False]
    for guest in (inside, alone, beside):
        guest.leave()


def test_nobody_is_ever_beside_one_who_is_alone(rng: random.Random) -> None:
    quarantine, lock = Quarantine(), threading.Lock()
    inside: list[str] = []
    together: list[list[str]] = []

    def visit(kind: str) -> None:
        with quarantine.alone() if kind == "alone" else quarantine.beside_others():
            with lock:
                inside.append(kind)
                together.append(list(inside))
            with lock:
                inside.remove(kind)

    kinds = [rng.choice(["alone", "beside", "beside"]) for _ in range(200)]
    threads = [threading.Thread(target=visit, args=(kind,)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert len(together) == len(kinds)
    assert all(len(group) == 1 for group in together if "alone" in group)
