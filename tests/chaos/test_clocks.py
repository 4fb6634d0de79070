"""Workers, dispatchers and clients whose clocks are wrong (F17): only the database's clock counts.

On PostgreSQL, since every process on a SQLite file shares its machine's clock.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from codeherd_schema.migrations import upgrade
from codeherd_schema.requests import GenerateRequest
from codeherd_schema.states import JobState
from tests.chaos.null_herd import NullHerd, held
from tests.services import PostgresServer, RedisServer, wait_until

HOUR_S = 3600
WRONG_CLOCK = Path(__file__).with_name("wrong_clock")
#: What each process's clock is wrong by, seconds.
OFFSETS = {"early": -HOUR_S, "late": HOUR_S, "dispatcher": HOUR_S}


@pytest.fixture(scope="module")
def herd(tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer) -> Iterator[NullHerd]:
    """Two workers and a dispatcher with wrong clocks, each in a file of its own."""
    url = postgres_server.url_of(postgres_server.create_database())
    upgrade(url)
    with (
        RedisServer(aof=False) as redis_server,
        NullHerd(
            database_url=url,
            broker_url=redis_server.url,
            folder=tmp_path_factory.mktemp("clocks"),
            workers=(),
            dispatchers=(),
        ) as herd,
    ):
        for name, offset_s in OFFSETS.items():
            set_clock(herd, name, offset_s)
            herd.environment |= with_clock(herd, name)
            if name == "dispatcher":
                herd.start_dispatcher(name)
            else:
                herd.start_worker(name)
        herd.wait_ready(["early", "late"])
        yield herd


def set_clock(herd: NullHerd, name: str, offset_s: int) -> None:
    path = herd.folder / f"{name}.clock"
    # In one step: it may be read at any moment.
    new = path.with_suffix(".new")
    new.write_text(str(offset_s))
    new.rename(path)


def with_clock(herd: NullHerd, name: str) -> dict[str, str]:
    folders = [str(WRONG_CLOCK), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(folders),
        "CODEHERD_TEST_CLOCK": str(herd.folder / f"{name}.clock"),
    }


def wrong_by(herd: NullHerd, name: str) -> float:
    """Return how many seconds the newest line of a log is from the right time."""
    said = re.findall(r"^(\d{4}-\S+ \d\S+),\d+ ", herd.log(name), re.MULTILINE)[-1]
    moment = datetime.strptime(said, "%Y-%m-%d %H:%M:%S").astimezone()
    return (moment - datetime.now(UTC)).total_seconds()


def lease_until(herd: NullHerd, job_ids: list[str]) -> float:
    """Return the first moment at which a lease of these ends, seconds since 1970."""
    return min(
        row.lease_until.timestamp() for row in herd.store.get_many(job_ids).values() if row.lease_until
    )


def wait_renewed(herd: NullHerd, job_ids: list[str], *, beyond: float) -> None:
    wait_until(lambda: lease_until(herd, job_ids) > beyond, "every lease to be renewed")


def test_f17_leases_and_limits_hold_though_clocks_are_wrong_and_jump(herd: NullHerd) -> None:
    began = herd.store.clock()
    for name, offset_s in OFFSETS.items():
        assert abs(wrong_by(herd, name) - offset_s) < HOUR_S / 2, "the clock is right: the test shows nothing"
    hold = herd.hold()
    half = timedelta(minutes=30)
    jobs = herd.client.submit_many(
        GenerateRequest(prompt=held(hold, f"{n}"), deadline=half, expires_at=half) for n in range(7)
    )
    short = herd.client.submit(GenerateRequest(prompt=held(hold), deadline=timedelta(seconds=2)))
    ids = [job.id for job in jobs]
    herd.wait_state(ids, JobState.RUNNING)

    for offset_s in (2 * HOUR_S, -2 * HOUR_S, 0):
        # Every lease is renewed, again and again, whatever the clocks say.
        first = lease_until(herd, ids)
        for name, wrong_s in OFFSETS.items():
            set_clock(herd, name, wrong_s + offset_s)
        wait_renewed(herd, ids, beyond=first + 2)
    herd.wait_state([short.id], JobState.EXPIRED)
    later = herd.client.submit(GenerateRequest(prompt="later", run_at=timedelta(seconds=1)))
    hold.unlink()
    herd.wait_state([*ids, later.id], JobState.SUCCEEDED)

    ended = herd.store.clock()
    for job_id in [*ids, later.id]:
        [attempt] = herd.store.attempts(job_id)
        row = herd.store.get(job_id)
        assert row is not None
        assert row.started_at is not None
        assert row.finished_at is not None
        moments = [row.created_at, row.started_at, row.finished_at, attempt.started_at, attempt.ended_at]
        seconds = [moment.timestamp() for moment in moments]
        assert began <= seconds[0] <= seconds[1] <= seconds[2] <= ended
        assert (attempt.outcome, seconds[3:]) == ("succeed", seconds[1:3])
        assert row.run_at.timestamp() <= seconds[1]
    herd.check([*ids, short.id, later.id])


@pytest.mark.parametrize("offset_s", [HOUR_S, -HOUR_S])
def test_f17_a_client_with_a_wrong_clock_submits_for_the_databases_time(
    herd: NullHerd, offset_s: int
) -> None:
    set_clock(herd, "client", offset_s)
    began = herd.store.clock()
    submitted = subprocess.run(
        [
            *(sys.executable, "-m", "codeherd_producer.cli", "submit", "generate", "x"),
            *("--run-at", "1s", "--expires", "10m", "--deadline", "10m"),
        ],
        env=herd.environment | with_clock(herd, "client"),
        capture_output=True,
        text=True,
        check=True,
    )
    job_id = submitted.stdout.strip()
    herd.wait_state([job_id], JobState.SUCCEEDED)

    row = herd.store.get(job_id)
    assert row is not None
    assert row.started_at is not None
    assert began <= row.created_at.timestamp() < row.run_at.timestamp() <= row.started_at.timestamp()
    herd.check([job_id])
