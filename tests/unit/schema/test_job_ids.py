from __future__ import annotations

import threading
import uuid

from hypothesis import given
from hypothesis import strategies as st

from codeherd_schema.job_ids import JobIds


@given(st.floats(0, 4e9), st.integers(1, 50))
def test_ids_are_uuids_of_version_7_that_tell_their_time(now_s: float, count: int) -> None:
    ids = [uuid.UUID(text) for text in JobIds().take(count, now_s=now_s)]

    assert {(each.version, each.variant) for each in ids} == {(7, uuid.RFC_4122)}
    assert all(abs((each.int >> 80) - now_s * 1000) <= 1 for each in ids)


@given(st.lists(st.tuples(st.floats(1e9, 2e9), st.integers(0, 200)), min_size=1, max_size=5))
def test_ids_rise_even_if_the_clock_does_not(calls: list[tuple[float, int]]) -> None:
    maker = JobIds()

    ids = [job_id for now_s, count in calls for job_id in maker.take(count, now_s=now_s)]

    assert ids == sorted(set(ids))


def test_threads_share_one_maker() -> None:
    maker = JobIds()
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.extend(maker.take(1, now_s=1.0)[0] for _ in range(500)))
        for _ in range(4)
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len({text[:18] for text in ids}) == 2000


def test_makers_of_two_processes_do_not_collide() -> None:
    assert JobIds().take(1, now_s=1.0) != JobIds().take(1, now_s=1.0)
