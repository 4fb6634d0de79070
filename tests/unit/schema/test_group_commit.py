"""Work of threads that meet is done together, and nobody answers for another's fault."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from codeherd_schema.group_commit import MOST, GroupCommit
from tests.services import wait_until


class Work:
    """Doubles numbers; 13 is more than it can stand, and a first 0 waits until it is let go."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.may_go = threading.Event()
        self.error: BaseException = ValueError("thirteen")

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.calls.append(list(items))
        if items[0] == 0:
            assert self.may_go.wait(60)
        if 13 in items:
            raise self.error
        return [2 * item for item in items]


def meet(work: Work, items: Sequence[int]) -> list[Future[int]]:
    """Have `items` arrive one by one while the work for 0 is done; 0 is the first of the answers."""
    group = GroupCommit(work)
    with ThreadPoolExecutor(len(items) + 1) as pool:
        futures = [pool.submit(group.do, 0)]
        wait_until(lambda: bool(work.calls), "the first to be at work")
        for number, item in enumerate(items, start=1):
            futures.append(pool.submit(group.do, item))
            wait_until(lambda number=number: len(group._waiting) == number, "the next one to wait")  # type: ignore[misc]
        work.may_go.set()
    assert group.do(7) == 14
    return futures


def test_who_comes_alone_works_alone() -> None:
    work = Work()
    group = GroupCommit(work)

    assert [group.do(1), group.do(2)] == [2, 4]
    assert work.calls == [[1], [2]]


def test_those_who_wait_are_served_together_in_their_order() -> None:
    work = Work()

    futures = meet(work, [5, 3, 4])

    assert [future.result() for future in futures] == [0, 10, 6, 8]
    assert work.calls == [[0], [5, 3, 4], [7]]


def test_more_than_fit_together_take_turns() -> None:
    work = Work()

    futures = meet(work, range(100, 100 + MOST + 3))

    assert [future.result() for future in futures] == [0, *range(200, 200 + 2 * (MOST + 3), 2)]
    assert [len(call) for call in work.calls] == [1, MOST, 3, 1]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_who_breaks_the_common_work_fails_alone(place: int) -> None:
    work = Work()
    items = [1, 2]
    items.insert(place, 13)

    futures = meet(work, items)

    for item, future in zip(items, futures[1:], strict=True):
        if item == 13:
            with pytest.raises(ValueError, match="thirteen"):
                future.result()
        else:
            assert future.result() == 2 * item
    assert work.calls[1] == items
    assert sorted(work.calls[2:-1]) == [[1], [2], [13]]


def test_what_breaks_the_leader_itself_leaves_the_others_served() -> None:
    work = Work()
    work.error = SystemExit("thirteen")

    futures = meet(work, [13, 1, 2])

    with pytest.raises(SystemExit):
        futures[1].result()
    assert [future.result() for future in futures[2:]] == [2, 4]


def test_each_of_many_threads_gets_its_own_answers() -> None:
    group = GroupCommit(Work())

    def ask(first: int) -> bool:
        return all(group.do(item) == 2 * item for item in range(first, first + 500))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(1000, 9000, 1000)))
