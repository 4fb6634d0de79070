"""Redis forgets, dies, freezes, hangs up and fills up (F6 to F10): jobs take longer, and that is all."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
import redis

from codeherd_producer.broker_courier import REST_S
from codeherd_producer.client import Client
from codeherd_schema.errors import WaitTimeout
from codeherd_schema.requests import GenerateRequest, Sampling
from codeherd_schema.settings import Url
from codeherd_schema.states import JobState
from tests.by_hand import HandClock
from tests.chaos.null_herd import NullHerd, held
from tests.chaos.proxy import Proxy
from tests.services import RedisServer, free_port, wait_until

WORKERS = ("one", "two")
SLOTS = 3


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    """With an append-only file; `forget` takes it away."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def herd(
    tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path, redis_server: RedisServer
) -> Iterator[NullHerd]:
    folder = tmp_path_factory.mktemp("herd")
    with NullHerd(
        database_url=f"sqlite:///{shutil.copy(migrated_sqlite, folder / 'codeherd.db')}",
        broker_url=redis_server.url,
        folder=folder,
        workers=WORKERS,
        slots=SLOTS,
        variables={"CODEHERD_LEASE_S": "30", "CODEHERD_CONNECT_TIMEOUT_S": "1"},
    ) as herd:
        yield herd


@pytest.fixture
def admin(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis(port=redis_server.port) as client:
        yield client


def submit(herd: NullHerd, count: int, text: str = "job") -> list[str]:
    requests = [
        GenerateRequest(prompt=f"{text} {n}", sampling=Sampling(max_new_tokens=4)) for n in range(count)
    ]
    return [job.id for job in herd.client.submit_many(requests)]


def busy(herd: NullHerd, name: str, count: int = SLOTS * len(WORKERS)) -> tuple[Path, list[str]]:
    """Return a file, and jobs that run and wait for it to go."""
    hold = herd.hold(name)
    jobs = herd.client.submit_many(GenerateRequest(prompt=held(hold, f"{n}")) for n in range(count))
    herd.wait_state([job.id for job in jobs], JobState.RUNNING)
    return hold, [job.id for job in jobs]


def attempts(herd: NullHerd, job_ids: Collection[str]) -> set[tuple[str, ...]]:
    return {tuple(a.outcome for a in herd.store.attempts(job_id)) for job_id in job_ids}


def prove_well(herd: NullHerd, job_ids: Collection[str]) -> None:
    """Every job succeeded at its first attempt, and both workers take jobs without being started anew."""
    prove_finished(herd, job_ids)
    assert attempts(herd, job_ids) == {("succeed",)}
    assert all("worker_died" not in herd.log(name) for name in WORKERS)


def prove_finished(herd: NullHerd, job_ids: Collection[str]) -> None:
    """Every job succeeded, and both workers take jobs again."""
    herd.wait_state(job_ids, JobState.SUCCEEDED)
    herd.wait_ready(WORKERS)
    later = herd.prove_each_consumes(WORKERS)
    herd.check([*job_ids, *later])


def forget(server: RedisServer) -> None:
    """Kill Redis, and let it know nothing of before when it is started again."""
    server.kill()
    for path in server.folder.glob("appendonly*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_f6_jobs_finish_once_though_redis_is_flushed_under_load(herd: NullHerd, admin: redis.Redis) -> None:
    hold, running = busy(herd, "f6-flush")
    waiting = submit(herd, 40)
    admin.flushall()
    hold.unlink()
    for _ in range(3):
        more = submit(herd, 40)
        admin.flushall()
        waiting += more

    prove_well(herd, [*running, *waiting])


@pytest.mark.parametrize("remembers", [False, True], ids=["empty", "append-only file"])
def test_f6_jobs_finish_once_though_redis_is_killed_and_comes_back(
    herd: NullHerd, redis_server: RedisServer, remembers: bool
) -> None:
    hold, running = busy(herd, f"f6-{remembers}")
    waiting = submit(herd, 40)
    if remembers:
        redis_server.kill()
    else:
        forget(redis_server)
    hold.unlink()
    # Their results need no Redis.
    herd.wait_state(running, JobState.SUCCEEDED)
    redis_server.start()

    prove_well(herd, [*running, *waiting])


def test_f7_a_job_submitted_without_redis_runs_when_redis_comes(
    herd: NullHerd, redis_server: RedisServer
) -> None:
    forget(redis_server)

    job_ids = submit(herd, 20)

    assert {row.state for row in herd.store.get_many(job_ids).values()} == {JobState.QUEUED}
    redis_server.start()
    prove_well(herd, job_ids)


def test_f7_submits_without_redis_knock_once_in_a_while(herd: NullHerd) -> None:
    clock = HandClock()
    with Proxy(free_port()) as nobody:
        nobody.refuses = True
        broker_url = Url(f"redis://127.0.0.1:{nobody.port}/0")
        settings = herd.settings.model_copy(update={"broker_url": broker_url})
        with Client(settings, clock=clock) as client:
            jobs = [client.submit(GenerateRequest(prompt="first"))]
            knocks = nobody.accepted
            jobs += [client.submit(GenerateRequest(prompt=f"{n}")) for n in range(10)]
            jobs += client.submit_many([GenerateRequest(prompt=f"{n}") for n in range(10)])
            assert 1 <= knocks <= 2
            assert nobody.accepted == knocks, "a broker that is away was asked again at once"

            clock.now += REST_S + 1
            jobs.append(client.submit(GenerateRequest(prompt="last")))
            assert nobody.accepted <= 2 * knocks

    # The dispatcher has another way.
    prove_well(herd, [job.id for job in jobs])


def test_f8_results_are_stored_and_read_and_jobs_submitted_while_redis_is_frozen(
    herd: NullHerd, redis_server: RedisServer
) -> None:
    hold, running = busy(herd, "f8")
    redis_server.pause()
    try:
        job_ids = submit(herd, 5)
        hold.unlink()
        herd.client.wait(running, timeout_s=100)
        for job_id in running:
            assert herd.client.result(job_id, timeout_s=100).candidates
        with pytest.raises(WaitTimeout):
            herd.client.result(job_ids[0], timeout_s=0.5)
    finally:
        redis_server.resume()

    prove_well(herd, [*running, *job_ids])


def test_f9_jobs_run_on_though_redis_hangs_up_on_everybody_again_and_again(
    herd: NullHerd, admin: redis.Redis
) -> None:
    hold, running = busy(herd, "f9", count=4)
    before = {job_id: row.lease_id for job_id, row in herd.store.get_many(running).items()}
    others: list[str] = []
    for n in range(3):
        others += submit(herd, 10, f"f9 {n}")
        # This connection of ours is spared.
        for kind in ("normal", "pubsub"):
            admin.client_kill_filter(_type=kind, skipme=True)
        herd.wait_state(others, JobState.SUCCEEDED)
        herd.wait_ready(WORKERS)
    assert {job_id: row.lease_id for job_id, row in herd.store.get_many(running).items()} == before
    hold.unlink()

    prove_well(herd, [*running, *others])


@pytest.fixture
def limits(admin: redis.Redis) -> Iterator[redis.Redis]:
    """Memory limits may be set, and are taken away."""
    yield admin
    admin.config_set("maxmemory", "0")
    admin.config_set("maxmemory-policy", "noeviction")


def used_memory(admin: redis.Redis) -> int:
    facts = admin.info("memory")
    assert isinstance(facts, dict)
    return int(facts["used_memory"])


def evicted(admin: redis.Redis) -> int:
    facts = admin.info("stats")
    assert isinstance(facts, dict)
    return int(facts["evicted_keys"])


def test_f10_jobs_finish_though_redis_evicts_their_hints(herd: NullHerd, limits: redis.Redis) -> None:
    hold, running = busy(herd, "f10-evicts")
    waiting = submit(herd, 40)
    limits.config_set("maxmemory-policy", "allkeys-lru")
    before = evicted(limits)
    # Below what is used: Redis throws out what it can, the lists of hints among it.
    limits.config_set("maxmemory", str(used_memory(limits) // 2))
    wait_until(lambda: _write(limits) and evicted(limits) > before, "keys to be evicted")
    assert not limits.keys("codeherd:codeherd.*"), "hints were spared: the test shows nothing"
    limits.config_set("maxmemory", str(used_memory(limits) + 3_000_000))
    hold.unlink()

    prove_well(herd, [*running, *waiting])


def _write(admin: redis.Redis) -> bool:
    try:
        admin.set("anything", "x")
    except redis.ResponseError:
        # Nothing is left to throw out.
        return True
    return True


def test_f10_a_worker_that_starts_warns_of_eviction(herd: NullHerd, limits: redis.Redis) -> None:
    limits.config_set("maxmemory-policy", "allkeys-lru")
    herd.start_worker("warned")
    herd.wait_ready(["warned"])
    herd.kill("warned")

    assert "allkeys-lru" in herd.log("warned")
    prove_finished(herd, [])


def test_f10_a_full_redis_takes_no_hints_and_no_job_is_lost(herd: NullHerd, limits: redis.Redis) -> None:
    hold, running = busy(herd, "f10-full")
    limits.config_set("maxmemory", "1")

    job_ids = submit(herd, 20)
    hold.unlink()
    herd.wait_state(running, JobState.SUCCEEDED)
    assert {row.state for row in herd.store.get_many(job_ids).values()} == {JobState.QUEUED}
    limits.config_set("maxmemory", "0")

    prove_well(herd, [*running, *job_ids])


def test_f10_workers_that_lose_a_full_redis_go_on_when_it_has_room_again(
    herd: NullHerd, limits: redis.Redis
) -> None:
    hold, running = busy(herd, "f10-reconnect")
    before = {name: len(herd.log(name)) for name in WORKERS}
    limits.config_set("maxmemory", "1")
    for kind in ("normal", "pubsub"):
        limits.client_kill_filter(_type=kind, skipme=True)
    wait_until(
        lambda: all(len(herd.log(name)) > before[name] for name in WORKERS), "the workers to miss Redis"
    )
    job_ids = submit(herd, 5)
    hold.unlink()
    herd.wait_state(running, JobState.SUCCEEDED)
    limits.config_set("maxmemory", "0")

    prove_well(herd, [*running, *job_ids])
