import contextlib
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from codeherd_schema.database import Database
from codeherd_schema.requests import GenerateRequest
from codeherd_schema.store import Beat, Claim, Store
from codeherd_worker.engine.stopping import CancelReason
from codeherd_worker.lease import SAFE_SHARE, Heartbeat
from codeherd_worker.running import Held, Run, Running

LEASE_S = 30.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    running.enter()
    yield running
    running.leave()


def claimed(store: Store, running: Running, *, lease_s: float = LEASE_S) -> tuple[Run, Held]:
    [submitted] = store.submit([GenerateRequest(prompt="x")])
    claim = store.claim(submitted.job_id, worker_id="w", lease_s=lease_s)
    assert claim is not None
    run = running.current()
    run.held = Held(claim, Clock().now + LEASE_S * SAFE_SHARE)
    return run, run.held


def heartbeat(store: Store, running: Running, clock: Clock) -> Heartbeat:
    return Heartbeat(store, running, lease_s=LEASE_S, clock=clock)


def test_a_beat_renews_the_lease_and_moves_the_safe_time(store: Store, running: Running) -> None:
    run, held = claimed(store, running, lease_s=1.0)
    before = store.get(held.claim.job.id)
    assert before is not None

    clock = Clock()
    clock.now += 1.0
    heartbeat(store, running, clock).beat()

    after = store.get(held.claim.job.id)
    assert after is not None
    assert before.lease_until is not None
    assert after.lease_until is not None
    assert (after.lease_until - before.lease_until).total_seconds() > LEASE_S / 2
    assert held.safe_until == 1001.0 + LEASE_S * SAFE_SHARE
    assert run.token.reason is None


def test_a_cancel_comes_back_with_the_beat(store: Store, running: Running) -> None:
    run, held = claimed(store, running)
    store.request_cancel(held.claim.job.id)

    heartbeat(store, running, Clock()).beat()

    assert run.token.reason is CancelReason.USER


def test_a_job_that_another_worker_took_is_stopped(store: Store, running: Running) -> None:
    run, held = claimed(store, running, lease_s=-1.0)
    store.reap(max_crashes=3)
    assert store.claim(held.claim.job.id, worker_id="other", lease_s=LEASE_S) is not None

    heartbeat(store, running, Clock()).beat()

    assert run.token.reason is CancelReason.LEASE_LOST


def test_without_the_database_a_job_is_given_up_before_its_lease_ends(
    tmp_path: Path, sqlite_url: str, running: Running
) -> None:
    store = Store.open(sqlite_url)
    clock = Clock()
    run, _ = claimed(store, running)
    beats = heartbeat(store, running, clock)
    store.close()
    (tmp_path / "codeherd.db").rename(tmp_path / "away.db")
    (tmp_path / "codeherd.db").mkdir()

    beats.beat()
    assert run.token.reason is None, "one missed beat is no reason to stop"
    beats.give_up_overdue()
    assert run.token.reason is None
    clock.now += LEASE_S * SAFE_SHARE
    beats.give_up_overdue()

    assert run.token.reason is CancelReason.LEASE_LOST


def test_a_beat_that_waits_for_its_answer_keeps_nobody_from_giving_up(
    store: Store, running: Running, database_url: str
) -> None:
    clock = Clock()
    run, _ = claimed(store, running)
    beats = heartbeat(store, running, clock)
    blocker = Database.open(database_url)
    beat = threading.Thread(target=beats.beat)

    with blocker.begin() as connection:
        connection.execute(text("UPDATE jobs SET priority = priority"))
        beat.start()
        clock.now += LEASE_S * SAFE_SHARE
        beats.give_up_overdue()
        assert run.token.reason is CancelReason.LEASE_LOST
    beat.join()
    blocker.close()

    # The beat did renew it in the end; the attempt stays given up, for somebody may have seen it end.
    assert run.token.reason is CancelReason.LEASE_LOST


def test_a_beat_that_misses_a_lease_given_back_here_does_not_stop_what_the_thread_does_next(
    store: Store, running: Running, database_url: str
) -> None:
    """A job that is set apart goes on in the same thread under another lease, while the beat is under way."""
    run, first = claimed(store, running)

    class GivesBack(Store):
        def heartbeat(self, claims: Collection[Claim], *, lease_s: float) -> dict[str, Beat]:
            first.is_ending = True
            store.release(first.claim)
            answer = super().heartbeat(claims, lease_s=lease_s)
            again = store.claim(first.claim.job.id, worker_id="w", lease_s=LEASE_S)
            assert again is not None
            run.held = Held(again, first.safe_until)
            return answer

    with contextlib.closing(GivesBack.open(database_url)) as gives_back:
        heartbeat(gives_back, running, Clock()).beat()
    second = run.held
    assert second is not None
    assert second is not first
    assert run.token.reason is None

    store.release(second.claim)
    heartbeat(store, running, Clock()).beat()
    assert run.token.reason is CancelReason.LEASE_LOST
