"""The database dies, freezes, hangs up, is locked or full, and answers get lost (F11, F12)."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psycopg
import pytest

from codeherd_producer.client import Client
from codeherd_schema.errors import DatabaseUnavailable
from codeherd_schema.migrations import upgrade
from codeherd_schema.requests import GenerateRequest, Sampling
from codeherd_schema.states import JobState
from codeherd_schema.store import Store
from tests.chaos.null_herd import NullHerd, held
from tests.chaos.proxy import Proxy
from tests.services import PostgresServer, RedisServer, wait_until

WORKERS = ("one", "two")
SLOTS = 3
#: Long against an outage on a busy machine: no lease ends in one.
LONG_LEASE = {"CODEHERD_LEASE_S": "120", "CODEHERD_HEARTBEAT_S": "0.5"}
#: Its fifth, the worker's margin, is more than the pause between two looks of the lease guard.
SHORT_LEASE = {"CODEHERD_LEASE_S": "8", "CODEHERD_HEARTBEAT_S": "0.5"}


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer(aof=False) as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server to be hurt."""
    with PostgresServer() as server:
        yield server


@dataclass(frozen=True, slots=True)
class Site:
    """A herd whose processes reach PostgreSQL through a proxy; the tests reach it straight."""

    herd: NullHerd
    server: PostgresServer
    proxy: Proxy
    url: str


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer, server: PostgresServer
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("postgresql")
    name = server.create_database()
    upgrade(server.url_of(name))
    with Proxy(server.port) as proxy:
        url = f"postgresql://postgres@127.0.0.1:{proxy.port}/{name}"
        with NullHerd(
            database_url=url,
            broker_url=redis_server.url,
            folder=folder,
            workers=WORKERS,
            slots=SLOTS,
            variables=LONG_LEASE | {"CODEHERD_KEY_PREFIX": "postgresql:"},
        ) as herd:
            yield Site(herd, server, proxy, server.url_of(name))


@pytest.fixture(scope="module")
def sqlite_herd(
    tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer, migrated_sqlite: Path
) -> Iterator[NullHerd]:
    folder = tmp_path_factory.mktemp("sqlite")
    with NullHerd(
        database_url=f"sqlite:///{shutil.copy(migrated_sqlite, folder / 'codeherd.db')}",
        broker_url=redis_server.url,
        folder=folder,
        workers=WORKERS,
        slots=SLOTS,
        variables=LONG_LEASE | {"CODEHERD_KEY_PREFIX": "sqlite:"},
    ) as herd:
        yield herd


@pytest.fixture(params=["sqlite", "postgresql"])
def herd(request: pytest.FixtureRequest) -> NullHerd:
    """A herd on each database, with long leases."""
    if request.param == "sqlite":
        found: NullHerd = request.getfixturevalue("sqlite_herd")
        return found
    site: Site = request.getfixturevalue("site")
    return site.herd


@dataclass(frozen=True, slots=True)
class ShortSite:
    """A herd of one worker with a short lease, and how to lose the answer to its next claim."""

    herd: NullHerd
    lose_claim: Callable[[], Callable[[], bool]]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def short(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    redis_server: RedisServer,
    server: PostgresServer,
) -> Iterator[ShortSite]:
    folder = tmp_path_factory.mktemp(f"short-{request.param}")
    direct = f"sqlite:///{folder / 'codeherd.db'}"
    if request.param == "postgresql":
        direct = server.url_of(server.create_database())
    upgrade(direct)
    with (
        Proxy(server.port) as proxy,
        NullHerd(
            database_url=direct.replace(f":{server.port}/", f":{proxy.port}/"),
            broker_url=redis_server.url,
            folder=folder,
            workers=("one",),
            slots=SLOTS,
            variables=SHORT_LEASE | {"CODEHERD_KEY_PREFIX": f"short-{request.param}:"},
        ) as herd,
    ):

        def by_failpoint() -> Callable[[], bool]:
            point = herd.failpoint("lost-after-claim")
            return lambda: not point.exists()

        def by_proxy() -> Callable[[], bool]:
            word = b"attempt=(jobs.attempt + "
            cut = proxy.cut(first=word, last=word, answer=b"UPDATE 1")
            return cut.done.is_set

        yield ShortSite(herd, by_failpoint if request.param == "sqlite" else by_proxy)


def submit(herd: NullHerd, count: int) -> list[str]:
    requests = [GenerateRequest(prompt=f"job {n}", sampling=Sampling(max_new_tokens=4)) for n in range(count)]
    return [job.id for job in herd.client.submit_many(requests)]


def busy(herd: NullHerd, name: str, count: int = SLOTS * len(WORKERS)) -> tuple[Path, list[str]]:
    """Return a file, and jobs that run and wait for it to go."""
    hold = herd.hold(name)
    jobs = herd.client.submit_many(GenerateRequest(prompt=held(hold, f"{n}")) for n in range(count))
    herd.wait_state([job.id for job in jobs], JobState.RUNNING)
    return hold, [job.id for job in jobs]


def history(herd: NullHerd, job_id: str) -> list[str]:
    return [attempt.outcome for attempt in herd.store.attempts(job_id)]


def prove_first_attempts(herd: NullHerd, job_ids: list[str]) -> None:
    """Every job succeeded at its first attempt, and all processes are those of the start and take jobs."""
    prove_finished(herd, job_ids)
    assert {tuple(history(herd, job_id)) for job_id in job_ids} == {("succeed",)}


def prove_finished(herd: NullHerd, job_ids: list[str]) -> None:
    herd.wait_state(job_ids, JobState.SUCCEEDED)
    later = herd.prove_each_consumes(WORKERS)
    assert all("worker_died" not in herd.log(name) for name in WORKERS)
    assert not herd.has_ended("dispatcher")
    herd.check([*job_ids, *later])


def decoding(herd: NullHerd) -> bool:
    """Whether a worker makes text, or did not answer."""
    figures = herd.figures()
    return len(figures) < len(WORKERS) or any(worker["active"] for worker in figures.values())


def wait_log(herd: NullHerd, name: str, text: str, *, since: int = 0) -> None:
    wait_until(lambda: text in herd.log(name)[since:], f"{name} to say {text}", timeout_s=100)


# PostgreSQL goes away for real.


@contextmanager
def crashed(site: Site) -> Iterator[None]:
    site.server.crash()
    yield
    site.server.start()


@contextmanager
def frozen(site: Site) -> Iterator[None]:
    site.server.freeze()
    try:
        yield
    finally:
        site.server.thaw()


@contextmanager
def hung_up(site: Site) -> Iterator[None]:
    """Every connection that processes and tests hold at this moment is ended."""
    with psycopg.connect(site.server.url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
    yield


@pytest.mark.parametrize("outage", [crashed, frozen, hung_up])
def test_f11_jobs_outlast_an_outage_of_postgresql_at_commit(
    site: Site, outage: Callable[[Site], AbstractContextManager[None]]
) -> None:
    herd = site.herd
    hold, running = busy(herd, f"commit-{outage.__name__}")
    waiting = submit(herd, 20)

    with outage(site):
        # The texts are finished, and there is no database to put them in.
        hold.unlink()
        wait_until(lambda: not decoding(herd), "every text to be complete")

    prove_first_attempts(herd, [*running, *waiting])


def test_f11_clients_and_dispatcher_say_that_postgresql_is_away_and_go_on(site: Site) -> None:
    herd = site.herd
    said = {name: len(herd.log(name)) for name in ("dispatcher", *WORKERS)}
    hold, running = busy(herd, "away")
    with crashed(site):
        with pytest.raises(DatabaseUnavailable):
            herd.client.submit(GenerateRequest(prompt="never"))
        with pytest.raises(DatabaseUnavailable):
            herd.client.result(running[0], timeout_s=60)
        wait_log(
            herd, "dispatcher", "dispatch_interrupted code=database_unavailable", since=said["dispatcher"]
        )
        for name in WORKERS:
            wait_log(herd, name, "heartbeat_failed", since=said[name])
    wait_log(herd, "dispatcher", "dispatch_resumed", since=said["dispatcher"])
    hold.unlink()

    prove_first_attempts(herd, [*running, *submit(herd, 10)])
    for name, length in said.items():
        assert "Traceback" not in herd.log(name)[length:]


def test_f11_hints_that_come_while_postgresql_is_away_are_dropped_and_sent_again(site: Site) -> None:
    herd = site.herd
    for name in WORKERS:
        herd.freeze(name)
    job_ids = submit(herd, 20)
    with crashed(site):
        for name in WORKERS:
            herd.thaw(name)
        wait_until(lambda: herd.broker.waiting("codeherd.tiny") == 0, "the hints to be taken")
    prove_first_attempts(herd, job_ids)


# Answers get lost.


@pytest.mark.parametrize("call", ["succeed", "heartbeat"])
def test_f12_a_lost_answer_costs_no_second_attempt(herd: NullHerd, call: str) -> None:
    hold, running = busy(herd, f"lost-{call}", count=4)
    point = herd.failpoint(f"lost-after-{call}")
    if call == "heartbeat":
        wait_until(lambda: not point.exists(), "a heartbeat's answer to be lost")
    hold.unlink()

    herd.wait_state(running, JobState.SUCCEEDED)
    assert not point.exists()
    prove_first_attempts(herd, running)


def test_f12_an_answer_lost_on_the_way_from_postgresql_costs_no_second_attempt(site: Site) -> None:
    herd = site.herd
    hold, running = busy(herd, "proxy-succeed", count=4)
    # A word of the result: the statement itself is sent by the name that it was prepared under.
    word = b"engine_fingerprint"
    cut = site.proxy.cut(first=word, last=word, answer=b"SELECT ")
    hold.unlink()

    assert cut.done.wait(60)
    prove_first_attempts(herd, running)
    assert sum(herd.log(name).count("commit=already") for name in WORKERS) >= 1


def test_f12_a_submit_repeated_after_a_lost_answer_finds_its_row(site: Site) -> None:
    herd = site.herd
    settings = herd.settings
    request = GenerateRequest(prompt="once", idempotency_key="f12-submit")
    with Client(settings) as client:
        cut = site.proxy.cut(first=b"INSERT INTO jobs", last=b"COMMIT", answer=b"COMMIT")
        with pytest.raises(DatabaseUnavailable):
            client.submit(request)
        assert cut.done.is_set()
        job = client.submit(request)

    assert job.deduplicated
    with psycopg.connect(site.url) as connection:
        found = connection.execute("SELECT id FROM jobs WHERE idempotency_key = 'f12-submit'").fetchall()
    assert found == [(job.id,)]
    prove_first_attempts(herd, [job.id])


# A lost lease, on both databases.


def test_f12_a_claim_whose_answer_is_lost_burns_one_attempt_and_one_crash(short: ShortSite) -> None:
    herd = short.herd
    was_lost = short.lose_claim()
    [job_id] = submit(herd, 1)
    herd.wait_state([job_id], JobState.SUCCEEDED)

    row = herd.store.get(job_id)
    assert was_lost()
    assert history(herd, job_id) == ["reap", "succeed"]
    assert row is not None
    # No more than the crash of a worker would, and bounded in the same way.
    assert (row.attempt, row.crash_count) == (2, 1)
    herd.check([job_id])


def test_f11_what_can_be_neither_renewed_nor_stored_is_dropped_before_it_is_anothers(
    short: ShortSite,
) -> None:
    herd = short.herd
    held_back, [mute] = busy(herd, "mute", count=1)
    hold, [unstored] = busy(herd, "unstored", count=1)
    points = [herd.failpoint(f"away-before-{call}") for call in ("succeed", "heartbeat")]
    hold.unlink()
    wait_until(
        lambda: history(herd, mute) == history(herd, unstored) == ["reap"],
        "the leases to be taken back",
        timeout_s=100,
    )
    for point in points:
        point.unlink()
    held_back.unlink()
    herd.wait_state([mute, unstored], JobState.SUCCEEDED)

    for job_id, event in ((mute, "lease_given_up"), (unstored, "outcome_lost")):
        reaped, succeeded = herd.store.attempts(job_id)
        dropped_at = said_at(herd.log("one"), f"{event} job_id={job_id}")
        assert dropped_at[0] < reaped.ended_at.timestamp()
        assert (reaped.outcome, succeeded.outcome, succeeded.attempt) == ("reap", "succeed", 2)
    herd.check([mute, unstored])


def test_f11_a_result_is_stored_when_the_database_comes_back_within_the_lease(herd: NullHerd) -> None:
    hold, running = busy(herd, "within", count=4)
    tries = {name: herd.log(name).count("heartbeat_failed") for name in WORKERS}
    points = [herd.failpoint(f"away-before-{call}") for call in ("succeed", "heartbeat", "claim")]
    hold.unlink()
    wait_until(
        lambda: sum(herd.log(name).count("heartbeat_failed") - tries[name] for name in WORKERS) > 2,
        "the outage to last a while",
    )
    assert {row.state for row in herd.store.get_many(running).values()} == {JobState.RUNNING}
    for point in points:
        point.unlink()

    prove_first_attempts(herd, running)


def test_f11_a_claim_without_a_database_drops_the_hint_and_the_job_runs_later(herd: NullHerd) -> None:
    point = herd.failpoint("away-before-claim")
    job_ids = submit(herd, 10)
    wait_until(lambda: herd.broker.waiting("codeherd.tiny") == 0, "the hints to be taken")
    assert {(r.state, r.attempt) for r in herd.store.get_many(job_ids).values()} == {(JobState.QUEUED, 0)}
    point.unlink()

    prove_first_attempts(herd, job_ids)


def said_at(log: str, event: str) -> list[float]:
    """Return when an event was logged, seconds since 1970."""
    found = re.findall(rf"^(\S+ \S+) \S+ \S+ {event}", log, re.MULTILINE)
    return [datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f").astimezone().timestamp() for at in found]


# SQLite is locked, full or not to be written.


def test_f11_jobs_outlast_a_lock_on_the_sqlite_file(sqlite_herd: NullHerd) -> None:
    herd = sqlite_herd
    hold, running = busy(herd, "locked")
    waiting = submit(herd, 20)
    path = herd.settings.database.removeprefix("sqlite:///")
    locker = subprocess.Popen(
        [sys.executable, "-c", LOCKER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert locker.stdin is not None
    assert locker.stdout is not None
    with locker:
        assert locker.stdout.readline() == "locked\n"
        hold.unlink()
        # Readers wait for nobody.
        assert {row.state for row in herd.store.get_many(running).values()} == {JobState.RUNNING}
        impatient = Store.open(herd.settings.database, timeout_s=0.5)
        with pytest.raises(DatabaseUnavailable, match="locked"):
            impatient.submit([GenerateRequest(prompt="never")])
        impatient.close()
        assert {row.state for row in herd.store.get_many(running).values()} == {JobState.RUNNING}
        locker.stdin.close()

    prove_first_attempts(herd, [*running, *waiting])


#: Holds the only write lock of a SQLite file until its input ends.
LOCKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
connection.execute("ROLLBACK")
"""


def test_f11_jobs_outlast_a_full_file_system_under_sqlite(sqlite_herd: NullHerd) -> None:
    herd = sqlite_herd
    said = {name: len(herd.log(name)) for name in WORKERS}
    hold, running = busy(herd, "full")
    waiting = submit(herd, 20)
    path = Path(herd.settings.database.removeprefix("sqlite:///"))
    log_file = path.with_name(path.name + "-wal")
    with closing(sqlite3.connect(path, isolation_level=None)) as writer, ExitStack() as limits:
        # From an empty write-ahead log on, which a reader keeps from being started anew, every write makes
        # it longer; first so long that the processes' own logs are not what is too large.
        wait_until(lambda: truncated(writer), "the write-ahead log to be emptied")
        reader = limits.enter_context(closing(sqlite3.connect(path, isolation_level=None)))
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM jobs").fetchone()
        writer.execute("CREATE TABLE padding AS SELECT randomblob(2000000)")
        writer.execute("DROP TABLE padding")
        log_bytes = log_file.stat().st_size
        assert log_bytes > 2_000_000
        for name in (*WORKERS, "dispatcher"):
            for pid in herd.pids(name):
                limits.enter_context(file_size_limit(pid, log_bytes))
        hold.unlink()
        for name in WORKERS:
            wait_log(herd, name, "heartbeat_failed", since=said[name])
        assert {row.state for row in herd.store.get_many(running).values()} == {JobState.RUNNING}

    prove_first_attempts(herd, [*running, *waiting])


def truncated(writer: sqlite3.Connection) -> bool:
    """Empty the write-ahead log, unless somebody uses it at this moment."""
    busy, *_ = writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not busy


@contextmanager
def file_size_limit(pid: int, size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes by this process."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def test_f11_a_client_that_may_not_write_the_sqlite_file_says_so(tmp_path: Path, sqlite_url: str) -> None:
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CODEHERD_")}
    environment |= {"CODEHERD_DATABASE_URL": sqlite_url, "XDG_CONFIG_HOME": str(tmp_path)}
    submit_once = [sys.executable, "-c", UNPRIVILEGED, "submit", "generate", "x", "--idempotency-key", "once"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(submit_once, env=environment, capture_output=True, text=True, check=False)

    path.chmod(0o444)
    refused = run()
    for made in tmp_path.glob("codeherd.db*"):
        made.chmod(0o644)
    accepted = run()

    assert "[database_unavailable]" in refused.stderr, refused.stderr
    assert "readonly" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (refused.returncode != 0, accepted.returncode) == (True, 0), accepted.stderr
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM jobs").fetchone() == (1,)


#: The command without root's right to write what it may not (PR_CAPBSET_DROP is 24, CAP_DAC_OVERRIDE 1).
UNPRIVILEGED = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-m", "codeherd_producer.cli", *sys.argv[1:]])
"""
