"""Jobs that harm the process they run in: killed, thrown into disorder, hung, broken (F13, F15, F19).

One herd of one worker for all tests on a database; each test gets it whole.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from codeherd_producer.client import Job
from codeherd_schema.states import FINAL_STATES, JobState
from codeherd_schema.store import Job as Row
from tests.chaos.null_herd import NullHerd, held, ids, submit
from tests.services import RedisServer, wait_until

#: For what happens inside a worker, whatever database it speaks to.
one_database = pytest.mark.parametrize("module_database_url", ["sqlite"], indirect=True, scope="module")
SLOTS = 3
MAX_ATTEMPTS = MAX_CRASHES = 2


@pytest.fixture(scope="module")
def shared_herd(
    module_database_url: str, module_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NullHerd]:
    herd = NullHerd(
        database_url=module_database_url,
        broker_url=module_redis.url,
        folder=tmp_path_factory.mktemp("herd"),
        slots=SLOTS,
        step_s=0.005,
        variables={
            # Twice the usual: a job that lost its worker once would be buried by a mere pause of the machine.
            "CODEHERD_LEASE_S": "6",
            "CODEHERD_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
            "CODEHERD_MAX_CRASHES": str(MAX_CRASHES),
            "CODEHERD_REPUBLISH_AFTER_S": "1",
            "CODEHERD_WORKER_STEP_TIMEOUT_S": "4",
            "CODEHERD_WORKER_DRAIN_TIMEOUT_S": "0.5",
        },
    )
    with herd:
        yield herd
    assert herd.strays() == []


def row(herd: NullHerd, job: Job) -> Row:
    found = herd.store.get(job.id)
    assert found is not None
    return found


def ends(herd: NullHerd, job: Job) -> list[str]:
    """Return how the attempts ended, without those that were given back unfinished."""
    return [outcome for outcome in herd.outcomes(job.id) if outcome != "release"]


# F13: a job that kills its process.


def test_f13_a_poison_job_is_buried_and_takes_no_neighbour_along(herd: NullHerd) -> None:
    poison_bottle = herd.hold()
    # Two seconds each: enough that the poison always finds them at work.
    innocents = submit(herd, *["#! steps 100\n"] * (SLOTS - 1))
    herd.wait_state(ids(innocents), JobState.RUNNING)
    [poison] = submit(herd, f"#! kill {poison_bottle}\n")
    later = submit(herd, *["x"] * SLOTS)

    herd.wait_state([poison.id, *ids(innocents), *ids(later)], *FINAL_STATES)

    herd.check([poison.id, *ids(innocents), *ids(later)])
    dead = row(herd, poison)
    assert (dead.state, dead.error_code, dead.crash_count) == (JobState.DEAD, "worker_lost", MAX_CRASHES)
    assert dead.error_message
    assert ends(herd, poison) == ["reap", "bury"]
    assert {row(herd, job).state for job in (*innocents, *later)} == {JobState.SUCCEEDED}
    assert sum(row(herd, job).crash_count for job in innocents) > 0, "the poison found nobody at work"

    # Once its cause is mended, a person may send it again.
    poison_bottle.unlink()
    herd.mend()
    command = [sys.executable, "-m", "codeherd_producer.cli", "retry", poison.id]
    subprocess.run(command, env=herd.environment, check=True, capture_output=True, timeout=120)
    herd.wait_state([poison.id], JobState.SUCCEEDED)

    herd.check([poison.id])
    assert ends(herd, poison) == ["reap", "bury", "succeed"]


# F15: every kind of exception, from the engine and from the store.

#: What the prompt has the engine raise; the state and code the job ends with.
ZOO = {
    "MemoryError": (JobState.DEAD, "engine_failed"),
    "SystemExit": (JobState.DEAD, "engine_failed"),
    "KeyboardInterrupt": (JobState.DEAD, "engine_failed"),
    "GeneratorExit": (JobState.DEAD, "engine_failed"),
    "CancelledError": (JobState.DEAD, "engine_failed"),
    "RecursionError": (JobState.DEAD, "engine_failed"),
    "RuntimeError": (JobState.DEAD, "engine_failed"),
    "Unspeakable": (JobState.DEAD, "engine_failed"),
    "OutOfMemory": (JobState.DEAD, "out_of_memory"),
    "EngineFailed": (JobState.DEAD, "engine_failed"),
    "PromptTooLong": (JobState.FAILED, "context_length_exceeded"),
}


def test_f15_no_exception_of_the_engine_costs_a_slot(herd: NullHerd) -> None:
    [pid] = herd.pids("one")
    names = [name for name in ZOO for _ in range(SLOTS + 1)]
    jobs = submit(herd, *(f"#! raise {name}\n" for name in names))
    herd.wait_state(ids(jobs), *FINAL_STATES)

    herd.check(ids(jobs))
    for name, job in zip(names, jobs, strict=True):
        ended = row(herd, job)
        assert (ended.state, ended.error_code) == ZOO[name], name
        assert herd.outcomes(job.id) == (["fail"] if ended.state is JobState.FAILED else ["retry", "bury"])
    later = herd.prove_each_consumes(["one"])
    herd.check(later)
    assert herd.pids("one") == [pid]


@one_database
@pytest.mark.parametrize("moment", ["before-claim", "after-claim", "before-succeed", "after-succeed"])
def test_f15_no_exception_of_the_store_costs_a_slot(herd: NullHerd, moment: str) -> None:
    [pid] = herd.pids("one")
    jobs: list[Job] = []
    for name in ("MemoryError", "SystemExit", "KeyboardInterrupt", "GeneratorExit"):
        herd.failpoint(f"raise-{moment}", name)
        jobs += submit(herd, "x")
        herd.wait_state(ids(jobs), JobState.SUCCEEDED)
        # After a commit everybody sees its job before the worker comes to the failpoint.
        wait_until(lambda: not any(herd.failpoints.iterdir()), f"somebody to raise {name}")

    later = herd.prove_each_consumes(["one"])
    herd.check([*ids(jobs), *later])
    assert herd.pids("one") == [pid]
    # A claim that nobody looks after runs out; before it and after the commit nothing is lost.
    expected = ["succeed"] if moment in ("before-claim", "after-succeed") else ["reap", "succeed"]
    assert [ends(herd, job) for job in jobs] == [expected] * len(jobs)


# F19: an engine whose step never ends, and one that breaks.


@one_database
def test_f19_a_job_that_hangs_the_engine_is_buried_and_its_neighbours_finish(herd: NullHerd) -> None:
    hold = herd.hold()
    neighbours = submit(herd, *[held(hold)] * (SLOTS - 1))
    herd.wait_state(ids(neighbours), JobState.RUNNING)
    [hanging] = submit(herd, "#! hang\n")
    died = "worker_died name=one status=70"
    wait_until(lambda: died in herd.log("one"), "the watchdog to end the process", timeout_s=120)

    hold.unlink()
    herd.start_worker("two")
    herd.wait_state([hanging.id, *ids(neighbours)], *FINAL_STATES)

    herd.check([hanging.id, *ids(neighbours)])
    buried = row(herd, hanging)
    assert (buried.state, buried.error_code) == (JobState.DEAD, "worker_lost")
    assert ends(herd, hanging) == ["reap", "bury"]
    assert [ends(herd, job) for job in neighbours] == [["reap", "succeed"]] * len(neighbours)
    assert "engine_hung" in herd.log("one")
    herd.kill("two")


@one_database
def test_f19_an_engine_that_breaks_gives_its_neighbours_back_and_starts_anew(herd: NullHerd) -> None:
    hold = herd.hold()
    [pid] = herd.pids("one")
    deaths = herd.log("one").count("status=70")
    neighbours = submit(herd, *[held(hold)] * (SLOTS - 1))
    herd.wait_state(ids(neighbours), JobState.RUNNING)
    [breaking] = submit(herd, "#! break\n")
    wait_until(lambda: herd.log("one").count("status=70") > deaths, "the process to end", timeout_s=120)

    hold.unlink()
    herd.wait_state([breaking.id, *ids(neighbours)], *FINAL_STATES)

    herd.check([breaking.id, *ids(neighbours)])
    ended = row(herd, breaking)
    assert (ended.state, ended.error_code, ended.crash_count) == (JobState.DEAD, "engine_failed", 0)
    assert herd.outcomes(breaking.id) == ["retry", "bury"]
    for job in neighbours:
        assert row(herd, job).crash_count == 0
        # Given back by the stop, or failed by the engine when that broke for the second time.
        assert herd.outcomes(job.id)[-1] == "succeed"
        assert {"release"} <= {*herd.outcomes(job.id)} <= {"release", "retry", "succeed"}
    assert herd.pids("one") != [pid]
