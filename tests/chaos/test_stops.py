"""Workers that are asked to stop, in every way and at every moment (F16).

One herd of two workers for all tests on a database; `one` is stopped, `two` stays. Drains have no end
unless a test says so: what ends in time, ends because something else happened.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from celery.app.control import Control
from sqlalchemy import text

from codeherd_producer.client import Job
from codeherd_schema.broker import make_app
from codeherd_schema.database import Database
from codeherd_schema.queues import queue_name
from codeherd_schema.states import JobState
from codeherd_schema.transport import hint_id
from tests.chaos.null_herd import NullHerd, held, ids, submit
from tests.services import RedisServer, wait_until

#: For what the database has no part in.
one_database = pytest.mark.parametrize("module_database_url", ["sqlite"], indirect=True, scope="module")
QUEUE = queue_name("tiny")
SLOTS = 2
#: Seconds in which a worker must have ended whatever does not answer it; it takes a quarter of this.
BOUND_S = 120.0
BRIEF = {"CODEHERD_WORKER_DRAIN_TIMEOUT_S": "0.2"}


@pytest.fixture(scope="module")
def shared_herd(
    module_database_url: str, module_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NullHerd]:
    herd = NullHerd(
        database_url=module_database_url,
        broker_url=module_redis.url,
        folder=tmp_path_factory.mktemp("herd"),
        workers=("one", "two"),
        slots=SLOTS,
        variables={"CODEHERD_WORKER_DRAIN_TIMEOUT_S": "600"},
    )
    with herd:
        yield herd
    assert herd.strays() == []


def flood(herd: NullHerd) -> tuple[list[Job], list[Job], list[Job]]:
    """Fill both workers and the queue with held jobs; return those of `one`, of `two`, and the waiting."""
    hold = herd.hold()
    jobs = submit(herd, *(held(hold, f"{n}") for n in range(5 * SLOTS)))
    running, waiting = jobs[: 2 * SLOTS], jobs[2 * SLOTS :]
    herd.wait_state(ids(running), JobState.RUNNING)
    mine = [job for job in running if herd.worker_of(job.id) == "one"]
    assert len(mine) == SLOTS
    return mine, [job for job in running if job not in mine], waiting


def assert_given_back(herd: NullHerd, jobs: Sequence[Job], *, worker: str = "two") -> None:
    """Assert that these cost no attempt, and ended elsewhere."""
    for job in jobs:
        ended = herd.store.get(job.id)
        assert ended is not None
        assert herd.outcomes(job.id) == ["release", "succeed"]
        assert (ended.attempt, ended.crash_count) == (1, 0)
        assert herd.worker_of(job.id) == worker


def assert_ran_once(herd: NullHerd, jobs: Sequence[Job]) -> None:
    for job in jobs:
        assert herd.outcomes(job.id) == ["succeed"]


# With jobs running and hints waiting.


@pytest.mark.parametrize("how", ["SIGQUIT", "SIGTERM SIGTERM", "SIGINT SIGTERM"])
def test_f16_a_hasty_stop_gives_running_jobs_back_at_once(herd: NullHerd, how: str) -> None:
    mine, others, waiting = flood(herd)

    first, *second = how.split()
    herd.signal("one", signal.Signals[first])
    for again in second:
        wait_until(lambda: "draining running=" in herd.last_log("one"), "the drain to begin")
        herd.signal("one", signal.Signals[again])
    status = herd.wait_exit("one")
    # Nobody has to wait for a lease to run out.
    given_back = [herd.outcomes(job.id) for job in mine]
    herd.hold().unlink()
    herd.wait_state(ids([*mine, *others, *waiting]), JobState.SUCCEEDED)

    assert status == 0
    assert given_back == [["release"]] * SLOTS
    herd.check(ids([*mine, *others, *waiting]))
    assert_given_back(herd, mine)
    assert_ran_once(herd, [*others, *waiting])


@one_database
@pytest.mark.parametrize("whom", ["launcher", "worker", "remote", "killed launcher"])
def test_f16_a_stop_lets_running_jobs_finish_and_takes_no_more(herd: NullHerd, whom: str) -> None:
    mine, others, waiting = flood(herd)
    [pid] = herd.pids("one")

    match whom:
        case "launcher":
            herd.signal("one", signal.SIGTERM)
        case "worker":
            os.kill(pid, signal.SIGTERM)
        case "killed launcher":
            os.kill(herd.launcher_pid("one"), signal.SIGKILL)
        case _:
            [name] = [name for name in herd.figures() if name.startswith("one@")]
            remote_control(herd).shutdown(destination=[name])
    wait_until(lambda: "draining running=" in herd.last_log("one"), "the drain to begin", timeout_s=BOUND_S)
    herd.hold().unlink()
    herd.wait_state(ids([*mine, *others, *waiting]), JobState.SUCCEEDED)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the worker to end", timeout_s=BOUND_S)

    herd.check(ids([*mine, *others, *waiting]))
    assert_ran_once(herd, [*mine, *others, *waiting])
    assert {herd.worker_of(job.id) for job in mine} == {"one"}
    assert {herd.worker_of(job.id) for job in waiting} == {"two"}
    assert herd.wait_exit("one") == (-signal.SIGKILL if whom == "killed launcher" else 0)
    said = herd.last_log("one")
    # Nobody starts it anew, and nobody is alarmed.
    assert ("worker_stopped name=one" in said) is (whom != "killed launcher")
    assert "worker_died" not in said


# At other moments.


@one_database
def test_f16_a_stop_while_it_loads_or_idles_ends_it_at_once(herd: NullHerd) -> None:
    herd.signal("one", signal.SIGTERM)
    assert herd.wait_exit("one", timeout_s=BOUND_S) == 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        herd.start_worker("one")
        wait_until(lambda: "worker_spawned" in herd.last_log("one"), "the worker to load", timeout_s=BOUND_S)
        herd.signal("one", number)
        assert herd.wait_exit("one", timeout_s=BOUND_S) == 0

    later = herd.prove_each_consumes(["two"])
    herd.check(later)


# While something does not answer.


@one_database
@pytest.mark.parametrize("when", ["at once", "late"])
def test_f16_a_stop_while_redis_is_frozen_gives_running_jobs_back(
    herd: NullHerd, module_redis: RedisServer, when: str
) -> None:
    restart(herd, "one")
    mine, others, waiting = flood(herd)

    module_redis.pause()
    try:
        if when == "late":
            # Its main thread waits for Redis already, which has not taken its heartbeat.
            [pid] = herd.pids("one")
            wait_until(lambda: module_redis.has_unread(pid), "a heartbeat to be sent")
        herd.signal("one", signal.SIGTERM)
        assert herd.wait_exit("one", timeout_s=BOUND_S) == 0
        given_back = [herd.outcomes(job.id) for job in mine]
    finally:
        module_redis.resume()
    herd.hold().unlink()
    herd.wait_state(ids([*mine, *others, *waiting]), JobState.SUCCEEDED)

    assert given_back == [["release"]] * SLOTS
    herd.check(ids([*mine, *others, *waiting]))
    assert_given_back(herd, mine)
    assert_ran_once(herd, [*others, *waiting])


def test_f16_a_stop_while_the_database_is_frozen_ends_and_loses_nothing(
    herd: NullHerd, module_database_url: str
) -> None:
    restart(herd, "one")
    mine, others, waiting = flood(herd)

    with frozen(module_database_url):
        herd.signal("one", signal.SIGTERM)
        assert herd.wait_exit("one", timeout_s=BOUND_S) == 0
    herd.hold().unlink()
    herd.wait_state(ids([*mine, *others, *waiting]), JobState.SUCCEEDED)

    herd.check(ids([*mine, *others, *waiting]))


# Single jobs.


@pytest.mark.parametrize("how", ["terminate", "cancel"])
def test_f16_stopping_one_job_frees_its_slot_and_keeps_the_worker(herd: NullHerd, how: str) -> None:
    hold = herd.hold()
    pids = {name: herd.pids(name) for name in ("one", "two")}
    jobs = submit(herd, *[held(hold)] * (2 * SLOTS))
    herd.wait_state(ids(jobs), JobState.RUNNING)
    stopped, *others = jobs

    if how == "cancel":
        herd.client.cancel(stopped.id)
    else:
        # As Flower's button does.
        row = herd.store.get(stopped.id)
        assert row is not None
        remote_control(herd).revoke(hint_id(row.id, row.publish_no), terminate=True, signal="SIGTERM")
    herd.wait_state([stopped.id], JobState.CANCELLED)
    [next_one] = submit(herd, held(hold, "next"))
    herd.wait_state([next_one.id], JobState.RUNNING)
    hold.unlink()
    herd.wait_state(ids([next_one, *others]), JobState.SUCCEEDED)

    herd.check(ids([*jobs, next_one]))
    assert herd.outcomes(stopped.id) == ["cancel"]
    assert_ran_once(herd, [next_one, *others])
    assert {name: herd.pids(name) for name in ("one", "two")} == pids


def restart(herd: NullHerd, name: str) -> None:
    """Start a worker anew that lets go of its jobs soon after a stop."""
    herd.kill(name)
    herd.start_worker(name, **BRIEF)
    herd.wait_ready([name])


def remote_control(herd: NullHerd) -> Control:
    """Return Celery's own remote control."""
    control: Control = make_app(herd.settings, [QUEUE]).control
    return control


@contextmanager
def frozen(database_url: str) -> Iterator[None]:
    """Let no statement that writes come to an end."""
    if database_url.startswith("sqlite"):
        database = Database.open(database_url)
        with database.begin() as connection:
            connection.execute(text("SELECT 1"))
            yield
        database.close()
        return
    with psycopg.connect(database_url, autocommit=True) as connection:
        backends = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        pids = [pid for (pid,) in backends.fetchall()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
