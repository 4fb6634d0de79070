"""More than can be done at once (F18, F21, F22): a hundred thousand jobs, and everybody with the same key."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import func, select, text

from codeherd_schema.database import Database
from codeherd_schema.errors import BrokerUnavailable
from codeherd_schema.migrations import upgrade
from codeherd_schema.queues import queue_name
from codeherd_schema.requests import GenerateRequest
from codeherd_schema.states import JobState, PauseScope
from codeherd_schema.tables import jobs
from tests.chaos.null_herd import NullHerd, held
from tests.services import PostgresServer, RedisServer, wait_until

WORKERS = ("one", "two")
SLOTS = 3
RUNNING = len(WORKERS) * SLOTS
WINDOW = 40
BACKLOG = 100_000
QUEUE = queue_name("tiny")
#: Whose backlog it is.
TENANT = "backfill"


@dataclass(frozen=True, slots=True)
class Site:
    """A herd with a backlog whose jobs get no token while the file `hold` exists."""

    herd: NullHerd
    database: Database
    hold: Path


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp(request.param)
    url = f"sqlite:///{folder / 'codeherd.db'}"
    if request.param == "postgresql":
        url = postgres_server.url_of(postgres_server.create_database())
    upgrade(url)
    with (
        RedisServer(aof=False) as redis_server,
        NullHerd(
            database_url=url,
            broker_url=redis_server.url,
            folder=folder,
            workers=WORKERS,
            slots=SLOTS,
            variables={"CODEHERD_PUBLISH_WINDOW": str(WINDOW), "CODEHERD_LEASE_S": "60"},
        ) as herd,
    ):
        hold = herd.hold()
        herd.client.pause(PauseScope.TENANT, TENANT)
        database = Database.open(url)
        fill(herd, database, hold)
        yield Site(herd, database, hold)
        database.close()


def fill(herd: NullHerd, database: Database, hold: Path) -> None:
    """Submit one job, and copy its row in SQL: a hundred thousand submits would take a minute."""
    request = GenerateRequest(prompt=held(hold), priority=7)
    [first] = herd.store.submit([request], tenant=TENANT, queue_of=lambda _: QUEUE)
    others = ", ".join(column.name for column in jobs.c if column.name != "id")
    copy = f"""
        WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {BACKLOG - 1})
        INSERT INTO jobs (id, {others})
        SELECT substr(id, 1, 24) || CAST(100000000000 + n AS TEXT), {others}
        FROM jobs CROSS JOIN numbers WHERE id = '{first.job_id}'
    """
    with database.begin() as connection:
        connection.execute(text(copy))
        assert connection.scalar(select(func.count()).where(jobs.c.tenant == TENANT)) == BACKLOG


@contextmanager
def backlog(site: Site) -> Iterator[None]:
    """Let the backlog run: it holds every slot and fills the window; at the end it has stopped."""
    herd = site.herd
    site.hold.touch()
    herd.client.resume(PauseScope.TENANT, TENANT)
    wait_until(lambda: herd.broker.waiting(QUEUE) >= WINDOW and running(site) == RUNNING, "a full herd")
    yield
    herd.client.pause(PauseScope.TENANT, TENANT)
    site.hold.unlink(missing_ok=True)
    wait_until(lambda: herd.broker.waiting(QUEUE) == 0 and not running(site), "an idle herd")


def running(site: Site) -> int:
    with site.database.read() as connection:
        return int(connection.scalar(select(func.count()).where(jobs.c.state == "running")) or 0)


def started_between(site: Site, since: float, job_ids: list[str]) -> int:
    """Return how many jobs of the backlog started after `since` and before these.

    Before all of these but as many as one worker may hold, running or taken from Redis: while the machine
    leaves that one aside, the other goes on with the backlog.
    """
    with site.database.read() as connection:
        starts = select(jobs.c.started_at).where(jobs.c.id.in_(job_ids)).order_by(jobs.c.started_at.desc())
        last = starts.offset(2 * SLOTS).limit(1).scalar_subquery()
        statement = select(func.count()).where(
            jobs.c.tenant == TENANT, jobs.c.started_at > since, jobs.c.started_at < last
        )
        return int(connection.scalar(statement) or 0)


def started(site: Site) -> list[str]:
    with site.database.read() as connection:
        statement = select(jobs.c.id).where(jobs.c.tenant == TENANT, jobs.c.attempt > 0)
        return list(connection.scalars(statement))


class Gauge:
    """Looks all the time how many messages wait in Redis."""

    def __init__(self, herd: NullHerd) -> None:
        self._herd = herd
        self.most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Gauge:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.is_set():
            try:
                self.most = max(self.most, self._herd.broker.waiting(QUEUE))
            except BrokerUnavailable:
                continue


def test_f21_interactive_jobs_start_before_a_backlog_of_a_hundred_thousand(site: Site) -> None:
    herd = site.herd
    with Gauge(herd) as gauge, backlog(site):
        assert gauge.most <= WINDOW
        interactive = [
            job.id
            for job in herd.client.submit_many(GenerateRequest(prompt=f"{n}", priority=2) for n in range(20))
        ]
        released_at = herd.store.clock()
        site.hold.unlink()
        herd.wait_state(interactive, JobState.SUCCEEDED)
        overtaken_by = started_between(site, released_at, interactive)

    # What was in Redis or about to be started goes first at most; the other 99,900 wait.
    assert overtaken_by <= WINDOW + RUNNING
    assert gauge.most <= WINDOW + len(interactive)
    herd.check([*interactive, *started(site)])


def test_f21_a_small_tenant_gets_its_share_beside_a_backlog_of_the_same_priority(site: Site) -> None:
    herd = site.herd
    with Gauge(herd) as gauge, backlog(site):
        requests = [GenerateRequest(prompt=f"small {n}", priority=7) for n in range(30)]
        small = [s.job_id for s in herd.store.submit(requests, tenant="small", queue_of=lambda _: QUEUE)]
        released_at = herd.store.clock()
        site.hold.unlink()
        herd.wait_state(small, JobState.SUCCEEDED)
        overtaken_by = started_between(site, released_at, small)

    # What was hinted at before, and from then on a share: places go by what each tenant holds at the moment,
    # so one whose jobs end sooner may get some more. 46 to 95 were seen; three for one is generous, and far
    # from the hundred thousand of an order by submission. What is exact of the shares is in `test_lanes`.
    assert overtaken_by <= WINDOW + RUNNING + 3 * len(small)
    assert gauge.most <= WINDOW
    herd.check([*small, *started(site)])


def test_f22_fifty_clients_that_submit_with_one_key_make_one_row(site: Site) -> None:
    herd = site.herd
    start = site.herd.hold("start")
    stormers = [
        subprocess.Popen(
            [sys.executable, "-c", STORM, str(start)],
            env=herd.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for stormer in stormers:
        assert stormer.stdout is not None
        assert stormer.stdout.readline() == "ready\n"
    start.unlink()
    answers = [json.loads(stormer.communicate(timeout=100)[0]) for stormer in stormers]

    said = [tuple(answer) for part in answers for answer in part]
    [job_id] = {job_id for job_id, _ in said}
    assert len(said) == 50
    assert sum(not deduplicated for _, deduplicated in said) == 1
    herd.wait_state([job_id], JobState.SUCCEEDED)
    with site.database.read() as connection:
        assert connection.scalars(select(jobs.c.id).where(jobs.c.idempotency_key == "storm")).all() == [
            job_id
        ]
    assert [a.outcome for a in herd.store.attempts(job_id)] == ["succeed"]
    herd.check([job_id])


#: Twenty-five threads submit at the same moment; prints what each was told.
STORM = """
import json, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from codeherd_producer.client import Client
from codeherd_schema.requests import GenerateRequest
from codeherd_schema.settings import SharedSettings, load

shared = {k: v for k, v in os.environ.items() if not k.startswith("CODEHERD_WORKER_")}
settings = load(SharedSettings, environment=shared).settings
together = threading.Barrier(25)

def submit(_):
    with Client(settings) as client:
        request = GenerateRequest(prompt="the same", idempotency_key="storm")
        client.faults([request])
        together.wait()
        while os.path.exists(sys.argv[1]):
            time.sleep(0.001)
        job = client.submit(request)
        return job.id, job.deduplicated

print("ready", flush=True)
with ThreadPoolExecutor(25) as threads:
    print(json.dumps(list(threads.map(submit, range(25)))))
"""
