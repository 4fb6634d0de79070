"""Messages that are doubled, late, strange or made up (F5, F14, F20): a message is only a hint."""

from __future__ import annotations

import base64
import json
import random
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pytest
import redis
from sqlalchemy import update

from codeherd_schema.broker import PRIORITY_STEPS
from codeherd_schema.database import Database
from codeherd_schema.migrations import upgrade
from codeherd_schema.queues import queue_name
from codeherd_schema.requests import GenerateRequest, Sampling
from codeherd_schema.states import JobState
from codeherd_schema.tables import jobs as jobs_table
from tests.chaos.null_herd import NullHerd, held
from tests.services import PostgresServer, RedisServer, wait_until

WORKERS = ("one", "two")
SLOTS = 3
QUEUE = "codeherd:" + queue_name("tiny")
#: kombu's names of the queue's lists, most urgent first.
LISTS = [f"{QUEUE}\x06\x16{step}" if step else QUEUE for step in PRIORITY_STEPS]

#: Most messages of ours in the lists, and how many of any kind there are while garbage comes.
WINDOW, FULL = 400, 300


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer(aof=False) as server:
        yield server


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def herd(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    postgres_server: PostgresServer,
    redis_server: RedisServer,
) -> Iterator[NullHerd]:
    folder = tmp_path_factory.mktemp(request.param)
    url = (
        f"sqlite:///{folder / 'codeherd.db'}"
        if request.param == "sqlite"
        else postgres_server.url_of(postgres_server.create_database())
    )
    upgrade(url)
    with (
        redis.Redis(port=redis_server.port) as client,
        NullHerd(
            database_url=url,
            broker_url=redis_server.url,
            folder=folder,
            workers=WORKERS,
            slots=SLOTS,
            variables={"CODEHERD_PUBLISH_WINDOW": str(WINDOW)},
        ) as herd,
    ):
        yield herd
        client.flushall()


@pytest.fixture
def lists(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """A plain connection to the lists of messages."""
    with redis.Redis(port=redis_server.port) as client:
        yield client


def waiting(lists: redis.Redis) -> list[bytes]:
    """Return the messages that no worker has taken, as they lie in Redis."""
    return [raw for found in waiting_by_list(lists) for raw in found]


def waiting_by_list(lists: redis.Redis) -> list[list[bytes]]:
    with lists.pipeline() as pipeline:
        for name in LISTS:
            pipeline.lrange(name, 0, -1)
        found: list[list[bytes]] = pipeline.execute()
    return found


def published(lists: redis.Redis, count: int) -> list[bytes]:
    """Return the messages that wait, so many; the dispatcher may be about to send what was just submitted."""
    wait_until(lambda: len(waiting(lists)) >= count, f"{count} messages to wait")
    found = waiting(lists)
    assert len(found) == count
    return found


def wait_taken(lists: redis.Redis) -> None:
    wait_until(lambda: not waiting(lists), "every message to be taken")


def push_shuffled(lists: redis.Redis, raws: Sequence[bytes], rng: random.Random) -> None:
    for raw in rng.sample(raws, len(raws)):
        lists.lpush(rng.choice(LISTS), raw)


def busy(herd: NullHerd, name: str) -> tuple[Path, list[str]]:
    """Fill every slot of the herd with jobs that wait for the returned file to go."""
    hold = herd.hold(name)
    count = SLOTS * len(WORKERS)
    jobs = herd.client.submit_many(GenerateRequest(prompt=held(hold, f"{n}")) for n in range(count))
    herd.wait_state([job.id for job in jobs], JobState.RUNNING)
    return hold, [job.id for job in jobs]


def submit(herd: NullHerd, count: int) -> list[str]:
    requests = [GenerateRequest(prompt=f"job {n}", sampling=Sampling(max_new_tokens=4)) for n in range(count)]
    return [job.id for job in herd.client.submit_many(requests)]


def outcomes(herd: NullHerd, job_ids: Collection[str]) -> set[tuple[str, ...]]:
    return {tuple(a.outcome for a in herd.store.attempts(job_id)) for job_id in job_ids}


def pids(herd: NullHerd) -> list[list[int]]:
    return [herd.pids(name) for name in WORKERS]


def test_f5_copies_out_of_order_are_claimed_once(
    herd: NullHerd, lists: redis.Redis, rng: random.Random
) -> None:
    hold, first = busy(herd, "f5-copies")
    job_ids = submit(herd, 30)
    raws = published(lists, 30)

    push_shuffled(lists, raws * 5, rng)
    hold.unlink()
    herd.wait_state([*first, *job_ids], JobState.SUCCEEDED)
    wait_taken(lists)

    assert outcomes(herd, [*first, *job_ids]) == {("succeed",)}
    herd.check([*first, *job_ids])


def test_f5_messages_of_ended_jobs_change_nothing(
    herd: NullHerd, lists: redis.Redis, rng: random.Random
) -> None:
    hold, first = busy(herd, "f5-ended")
    job_ids = submit(herd, 20)
    raws = published(lists, 20)
    hold.unlink()
    herd.wait_state([*first, *job_ids], JobState.SUCCEEDED)
    before = herd.store.get_many(job_ids), herd.store.results(job_ids)

    push_shuffled(lists, raws * 3, rng)
    wait_taken(lists)
    # Behind these, so what was taken has also been answered.
    later = herd.prove_each_consumes(WORKERS)

    assert (herd.store.get_many(job_ids), herd.store.results(job_ids)) == before
    assert outcomes(herd, job_ids) == {("succeed",)}
    herd.check([*first, *job_ids, *later])


def test_f5_a_running_jobs_message_starts_it_on_no_other_worker(herd: NullHerd, lists: redis.Redis) -> None:
    full, first = busy(herd, "f5-full")
    hold = herd.hold("f5-running")
    job = herd.client.submit(GenerateRequest(prompt=held(hold)))
    [raw] = published(lists, 1)
    full.unlink()
    herd.wait_state([job.id], JobState.RUNNING)
    before = job.row

    for name in LISTS:
        lists.lpush(name, *[raw] * 10)
    wait_taken(lists)
    # All slots but the job's own are there to be had, so both workers have gone on.
    others = submit(herd, 20)
    herd.wait_state(others, JobState.SUCCEEDED)

    assert job.refresh().lease_id == before.lease_id is not None
    hold.unlink()
    herd.wait_state([job.id, *first], JobState.SUCCEEDED)
    assert outcomes(herd, [job.id]) == {("succeed",)}
    herd.check([job.id, *first, *others])


def test_f14_workers_live_through_garbage_among_two_hundred_jobs(
    herd: NullHerd, lists: redis.Redis, rng: random.Random
) -> None:
    hold, first = busy(herd, "f14")
    submit_one = submit(herd, 1)
    [good] = published(lists, 1)
    before = pids(herd)
    stop = threading.Event()
    pushed = 0

    def push() -> None:
        nonlocal pushed
        with redis.Redis(connection_pool=lists.connection_pool) as mine:
            while not stop.is_set():
                # More would leave no room for hints in the window: a flood is another matter.
                if sum(map(len, waiting_by_list(mine))) < FULL:
                    mine.lpush(rng.choice(LISTS), garbage(good, rng))
                    pushed += 1

    pusher = threading.Thread(target=push)
    pusher.start()
    try:
        job_ids = [*submit_one, *submit(herd, 200)]
        hold.unlink()
        herd.wait_state(job_ids, JobState.SUCCEEDED)
    finally:
        stop.set()
        pusher.join()
    wait_taken(lists)
    later = herd.prove_each_consumes(WORKERS)

    assert pushed > 0
    assert pids(herd) == before
    assert any("message_refused" in herd.log(name) for name in WORKERS)
    herd.check([*first, *job_ids, *later])


def test_f14_workers_start_though_what_waits_for_them_is_no_list(herd: NullHerd, lists: redis.Redis) -> None:
    for name in WORKERS:
        herd.kill(name)
    lists.delete(*LISTS)
    for name in LISTS:
        lists.set(name, b"no list")
    job_ids = submit(herd, 3)

    # Both look at all lists before they take from any.
    for name in WORKERS:
        herd.start_worker(name)
    herd.wait_ready(WORKERS)
    herd.wait_state(job_ids, JobState.SUCCEEDED)

    later = herd.prove_each_consumes(WORKERS)
    for name in WORKERS:
        assert "worker_died" not in herd.last_log(name)
    herd.check([*job_ids, *later])


def garbage(good: bytes, rng: random.Random) -> bytes:
    """Return bytes that are no message: random, or a good one with something wrong."""
    message = json.loads(good)
    match rng.randrange(8):
        case 0:
            return rng.randbytes(rng.randrange(200))
        case 1:
            return good[: rng.randrange(len(good))]
        case 2:
            place = rng.randrange(len(good))
            return good[:place] + rng.randbytes(1) + good[place + 1 :]
        case 3:
            return rng.choice(
                [b"", b"null", b"[]", b"{}", b'"x"', b"1e999", b"[" * 5000, b"NaN", b"\xff\xfe"]
            )
        case 4:
            del message[rng.choice(list(message))]
        case 5:
            message["body"] = base64.b64encode(rng.choice([b"", b"[]", b"\x80", b"[[1],{},{}]"])).decode()
        case 6:
            message["headers"][rng.choice(list(message["headers"]))] = rng.choice(
                [None, -1, [], {"a": 1}, "x"]
            )
        case _:
            message["properties"][rng.choice(list(message["properties"]))] = rng.choice(
                [None, 1e308, [], "x"]
            )
    return json.dumps(message).encode()


def test_f20_a_job_of_a_newer_schema_waits_for_a_worker_that_knows_it(
    herd: NullHerd, lists: redis.Redis
) -> None:
    said = {name: len(herd.log(name)) for name in WORKERS}
    database = Database.open(herd.settings.database)
    with database.begin() as connection:
        [job] = [herd.client.submit(GenerateRequest(prompt="newer"), connection=connection)]
        connection.execute(update(jobs_table).where(jobs_table.c.id == job.id).values(schema_version=99))

    # Sent again: the first hint was dropped.
    wait_until(lambda: publish_no(database, job.id) >= 2, "the hint to be sent again")
    wait_taken(lists)
    later = herd.prove_each_consumes(WORKERS)
    row = herd.store.get(job.id)
    assert row is not None
    assert (row.state, row.attempt, row.schema_version) == (JobState.QUEUED, 0, 99)
    for name in WORKERS:
        assert not {"ERROR", "Traceback", "CRITICAL"} & set(herd.log(name)[said[name] :].split())

    # The newer worker, as far as this one can be it.
    with database.begin() as connection:
        connection.execute(update(jobs_table).where(jobs_table.c.id == job.id).values(schema_version=1))
    herd.wait_state([job.id], JobState.SUCCEEDED)
    database.close()
    herd.check([job.id, *later])


def publish_no(database: Database, job_id: str) -> int:
    with database.read() as connection:
        statement = jobs_table.select().where(jobs_table.c.id == job_id)
        return int(connection.execute(statement).one().publish_no)


def test_f20_a_message_for_a_task_unknown_here_is_dropped_and_its_job_kept(
    herd: NullHerd, lists: redis.Redis
) -> None:
    before = pids(herd)
    hold, first = busy(herd, "f20")
    [job_id] = submit(herd, 1)
    [raw] = published(lists, 1)
    assert b"codeherd.generate" in raw
    # A newer producer's hint: its job is due, and no worker here knows the task.
    lists.delete(*LISTS)
    for _ in range(8):
        lists.lpush(LISTS[0], raw.replace(b"codeherd.generate", b"codeherd.from_the_future"))

    hold.unlink()
    wait_taken(lists)
    # The dispatcher sends a message that is known, as that of a newer version would not.
    herd.wait_state([job_id], JobState.SUCCEEDED)
    later = herd.prove_each_consumes(WORKERS)

    assert pids(herd) == before
    assert any("kind=newer_kind" in herd.log(name) for name in WORKERS)
    assert outcomes(herd, [job_id]) == {("succeed",)}
    herd.check([*first, job_id, *later])
