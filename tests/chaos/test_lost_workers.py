"""Workers that die or freeze at the worst moments (F1 to F4).

One herd of two workers for all tests on a database; each test gets it whole.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from codeherd_producer.client import Job
from codeherd_schema.queues import queue_name
from codeherd_schema.states import JobState
from tests.chaos.null_herd import NullHerd, held, ids, is_stopped, submit
from tests.services import RedisServer, wait_until

#: For what happens between Redis and workers alone.
one_database = pytest.mark.parametrize("module_database_url", ["sqlite"], indirect=True, scope="module")
QUEUE = queue_name("tiny")
SLOTS = 2
WORKERS = ("one", "two")


@pytest.fixture(scope="module")
def shared_herd(
    module_database_url: str, module_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NullHerd]:
    herd = NullHerd(
        database_url=module_database_url,
        broker_url=module_redis.url,
        folder=tmp_path_factory.mktemp("herd"),
        workers=WORKERS,
        slots=SLOTS,
        variables={"CODEHERD_REPUBLISH_AFTER_S": "1"},
    )
    with herd:
        yield herd
    assert herd.strays() == []


def crashes(herd: NullHerd, job_id: str) -> tuple[int, int]:
    job = herd.store.get(job_id)
    assert job is not None
    return job.attempt, job.crash_count


def wait_gone(failpoint: Path) -> None:
    wait_until(lambda: not failpoint.exists(), f"{failpoint.name} to happen", timeout_s=120)


def wait_idle(herd: NullHerd, name: str) -> None:
    def is_idle() -> bool:
        found = [facts for who, facts in herd.figures().items() if who.startswith(f"{name}@")]
        return [facts["active"] for facts in found] == [0]

    wait_until(is_idle, f"{name} to have all slots free", timeout_s=120)


# F1: killed while it holds a job.


def test_f1_a_killed_workers_jobs_run_again_elsewhere_with_one_result_each(herd: NullHerd) -> None:
    hold = herd.hold()
    jobs = submit(herd, *(held(hold, f"{n}") for n in range(2 * SLOTS)))
    herd.wait_state(ids(jobs), JobState.RUNNING)
    lost = [job.id for job in jobs if herd.worker_of(job.id) == "one"]
    assert len(lost) == SLOTS

    herd.kill("one")
    hold.unlink()
    herd.wait_state(ids(jobs), JobState.SUCCEEDED)

    herd.check(ids(jobs))
    for job_id in ids(jobs):
        was_lost = job_id in lost
        assert herd.outcomes(job_id) == (["reap", "succeed"] if was_lost else ["succeed"])
        assert crashes(herd, job_id) == ((2, 1) if was_lost else (1, 0))
        assert herd.worker_of(job_id) == "two"


@pytest.mark.parametrize("failpoint", ["kill-after-claim", "kill-before-succeed"])
def test_f1_a_worker_killed_around_the_engine_leaves_the_result_to_the_other(
    herd: NullHerd, failpoint: str
) -> None:
    point = herd.failpoint(failpoint)
    [job] = submit(herd, "x")
    wait_gone(point)
    lost = herd.worker_of(job.id)
    herd.kill(lost)

    herd.wait_state([job.id], JobState.SUCCEEDED)

    herd.check([job.id])
    assert herd.outcomes(job.id) == ["reap", "succeed"]
    assert crashes(herd, job.id) == (2, 1)
    assert {lost, herd.worker_of(job.id)} == set(WORKERS)


def test_f1_when_all_workers_die_at_once_the_first_that_comes_back_runs_everything(herd: NullHerd) -> None:
    hold = herd.hold()
    jobs = submit(herd, *(held(hold, f"{n}") for n in range(3 * SLOTS)))
    herd.wait_state(ids(jobs)[: 2 * SLOTS], JobState.RUNNING)

    for name in WORKERS:
        herd.freeze(name)
    for name in WORKERS:
        herd.kill(name)
    hold.unlink()
    herd.start_worker("one")
    herd.wait_state(ids(jobs), JobState.SUCCEEDED)

    herd.check(ids(jobs))
    for job_id in ids(jobs)[: 2 * SLOTS]:
        assert herd.outcomes(job_id) == ["reap", "succeed"]
    for job_id in ids(jobs)[2 * SLOTS :]:
        assert herd.outcomes(job_id) == ["succeed"]


# F2: killed with a hint in hand that nobody else knows of.


@one_database
def test_f2_a_worker_killed_just_before_its_claim_costs_the_job_nothing(herd: NullHerd) -> None:
    point = herd.failpoint("kill-before-claim")

    [job] = submit(herd, "x")
    wait_gone(point)
    herd.wait_state([job.id], JobState.SUCCEEDED)

    herd.check([job.id])
    assert herd.outcomes(job.id) == ["succeed"]
    assert crashes(herd, job.id) == (1, 0)


def publications(herd: NullHerd, job_id: str) -> int:
    """Return how often a hint of this job was sent."""
    job = herd.store.get(job_id)
    assert job is not None
    return job.publish_no


def lose_a_hint(herd: NullHerd) -> tuple[Job, list[str]]:
    """Freeze all workers where they wait for Redis, and give one of them a hint that it never sees.

    Returns the job, and the jobs of tries where no worker waited for Redis at that moment.
    """
    missed: list[str] = []
    for _ in range(50):
        for name in WORKERS:
            herd.freeze(name)
        # Redis sends it to a worker that waits, if any does: the frozen one has it and can do nothing.
        # The client sends it itself, before it returns.
        [job] = submit(herd, "lost")
        if herd.broker.waiting(QUEUE) == 0:
            return job, missed
        for name in WORKERS:
            herd.thaw(name)
        missed.append(job.id)
        herd.wait_state([job.id], JobState.SUCCEEDED)
    raise AssertionError("no worker ever waited for Redis")


@one_database
@pytest.mark.parametrize("has_others_waiting", [False, True], ids=["empty queue", "full queue"])
def test_f2_a_hint_that_died_with_its_worker_is_sent_again(herd: NullHerd, has_others_waiting: bool) -> None:
    hold = herd.hold()
    lost, missed = lose_a_hint(herd)
    # Enough that some wait in Redis until the end.
    others = submit(herd, *(held(hold, f"{n}") for n in range(6 * SLOTS))) if has_others_waiting else []

    for name in WORKERS:
        herd.kill(name)
    herd.start_worker("one")
    wait_until(lambda: publications(herd, lost.id) > 1, "the lost hint to be sent again", timeout_s=120)
    assert (herd.broker.waiting(QUEUE) > 0) >= has_others_waiting
    hold.unlink()
    herd.wait_state([lost.id, *ids(others)], JobState.SUCCEEDED)

    herd.check([lost.id, *missed, *ids(others)])
    assert publications(herd, lost.id) > 1
    assert herd.outcomes(lost.id) == ["succeed"]
    assert crashes(herd, lost.id) == (1, 0)


# F3: killed after the commit.


def test_f3_a_worker_killed_after_its_commit_leaves_one_result_and_one_attempt(herd: NullHerd) -> None:
    point = herd.failpoint("kill-after-succeed")

    [job] = submit(herd, "x")
    wait_gone(point)
    herd.wait_state([job.id], JobState.SUCCEEDED)
    first = herd.store.result(job.id)
    # Time for whoever would run it again: leases run out, the dead worker comes back, all of them work.
    herd.mend()
    later = herd.prove_each_consumes(WORKERS)

    herd.check([job.id, *later])
    assert herd.outcomes(job.id) == ["succeed"]
    assert crashes(herd, job.id) == (1, 0)
    assert herd.store.result(job.id) == first


# F4: frozen longer than its lease, and back.


def assert_zombie_changed_nothing(herd: NullHerd, job_id: str, zombie: str) -> None:
    before, result = herd.store.attempts(job_id), herd.store.result(job_id)
    wait_idle(herd, zombie)
    later = herd.prove_each_consumes(WORKERS)

    herd.check([job_id, *later])
    assert herd.store.attempts(job_id) == before
    assert herd.store.result(job_id) == result
    assert [a.outcome for a in before] == ["reap", "succeed"]
    assert [a.worker_id.partition("@")[0] for a in before] == [zombie, *{*WORKERS} - {zombie}]
    assert crashes(herd, job_id) == (2, 1)
    assert zombie in {herd.worker_of(job_id) for job_id in later}


def test_f4_a_worker_frozen_longer_than_its_lease_gives_the_job_up(herd: NullHerd) -> None:
    hold = herd.hold()
    [job] = submit(herd, held(hold))
    herd.wait_state([job.id], JobState.RUNNING)
    zombie = herd.worker_of(job.id)

    herd.freeze(zombie)
    # Its engine is in the middle of the sequence, and will still be when it wakes up.
    wait_until(lambda: herd.outcomes(job.id) == ["reap"], "the lease to run out", timeout_s=120)
    wait_until(lambda: herd.worker_of(job.id) != zombie, "the other worker to claim it", timeout_s=120)
    herd.thaw(zombie)
    wait_until(lambda: f"attempt_dropped job_id={job.id}" in herd.log(zombie), "the zombie to give up")
    hold.unlink()
    herd.wait_state([job.id], JobState.SUCCEEDED)

    assert_zombie_changed_nothing(herd, job.id, zombie)


def frozen_at(herd: NullHerd, failpoint: str) -> tuple[Job, str, int]:
    """Return a job whose worker stands still at a failpoint, the worker's name and its process id."""
    while True:
        point = herd.failpoint(failpoint)
        [job] = submit(herd, "x")
        wait_gone(point)
        zombie = herd.worker_of(job.id)
        [pid] = herd.pids(zombie)
        wait_until(partial(is_stopped, pid), f"{zombie} to stand still")
        if herd.is_writable():
            return job, zombie, pid
        # Another of its threads was in the middle of a write.
        os.kill(pid, signal.SIGCONT)
        herd.wait_state([job.id], JobState.SUCCEEDED)


@pytest.mark.parametrize("failpoint", ["stop-after-claim", "stop-before-succeed"])
def test_f4_a_zombie_that_wakes_up_at_the_worst_moment_commits_nothing(
    herd: NullHerd, failpoint: str
) -> None:
    job, zombie, pid = frozen_at(herd, failpoint)
    herd.wait_state([job.id], JobState.SUCCEEDED)

    os.kill(pid, signal.SIGCONT)
    refusals = (
        f"attempt_dropped job_id={job.id}",
        f"job_stored job_id={job.id} attempt=1 outcome=succeeded commit=lost",
    )
    wait_until(lambda: any(line in herd.log(zombie) for line in refusals), "the zombie to be refused")

    assert_zombie_changed_nothing(herd, job.id, zombie)
