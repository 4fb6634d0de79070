from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import redis

from codeherd_producer.broker_courier import REST_S
from codeherd_producer.client import Client
from codeherd_schema.broker import Broker
from codeherd_schema.database import Database
from codeherd_schema.errors import WaitTimeout
from codeherd_schema.requests import GenerateRequest
from codeherd_schema.settings import SharedSettings
from codeherd_schema.states import JobState
from codeherd_schema.store import Store
from tests.by_hand import HandClock, claim, finish, requests
from tests.integration.redis_variants import OddRedisServer, flush, messages
from tests.services import RedisServer, free_port, wait_until

#: Longer than any test may take: what ends sooner did not end by polling.
NEVER_S = 60.0


def settings_of(database_url: str, broker_url: str, **more: object) -> SharedSettings:
    values = {
        "database_url": database_url,
        "broker_url": broker_url,
        "connect_timeout_s": 0.2,
        "poll_interval_s": 0.02,
        **more,
    }
    return SharedSettings.model_validate(values)


@pytest.fixture
def client(database_url: str, broker_url: str) -> Iterator[Client]:
    with Client(settings_of(database_url, broker_url)) as client:
        yield client


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server to be hurt; it forgets everything when it dies."""
    with RedisServer(aof=False) as server:
        yield server


def listeners(server: RedisServer) -> int:
    with redis.Redis(port=server.port) as client:
        [(_, count)] = client.pubsub_numsub("codeherd:done")
        return int(count)


def away(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "broker_away" in record.message]


def test_submit_publishes_a_hint(client: Client, redis_server: RedisServer) -> None:
    job = client.submit(GenerateRequest(prompt="x"))

    assert messages(redis_server) == [f"{job.id}.1"]
    assert job.row.published_at is not None


def test_a_job_that_was_there_before_is_not_published_again(
    client: Client, redis_server: RedisServer
) -> None:
    request = GenerateRequest(prompt="x", idempotency_key="k")

    jobs = [client.submit(request), client.submit(request), *client.submit_many([request] * 3)]

    assert len(messages(redis_server)) == 1
    assert [job.deduplicated for job in jobs] == [False, True, True, True, True]


def test_a_job_for_later_is_left_to_the_dispatcher(client: Client, redis_server: RedisServer) -> None:
    job = client.submit(GenerateRequest(prompt="x", run_at=timedelta(hours=1)))

    assert messages(redis_server) == []
    assert job.row.published_at is None


def test_a_client_fills_the_window_with_the_most_urgent_and_no_more(
    database_url: str, broker_url: str, redis_server: RedisServer, store: Store
) -> None:
    with Client(settings_of(database_url, broker_url, publish_window=5)) as client:
        jobs = client.submit_many([*requests(20, priority=7), *requests(3, priority=1)])
        late = client.submit(GenerateRequest(prompt="x"))

    assert messages(redis_server) == [f"{job.id}.1" for job in [*jobs[20:], *jobs[:2]]]
    published = [row.id for row in store.get_many([job.id for job in jobs]).values() if row.published_at]
    assert sorted(published) == sorted(job.id for job in [*jobs[20:], *jobs[:2]])
    assert late.id not in published


def test_a_callers_transaction_is_published_by_the_dispatcher_alone(
    client: Client, database_url: str, redis_server: RedisServer
) -> None:
    database = Database.open(database_url)
    with database.begin() as connection:
        job = client.submit(GenerateRequest(prompt="x"), connection=connection)
    database.close()

    assert messages(redis_server) == []
    assert job.row.published_at is None


def test_a_retried_job_is_published(client: Client, store: Store, redis_server: RedisServer) -> None:
    job = client.submit(GenerateRequest(prompt="x"))
    job.cancel()
    flush(redis_server)

    job.retry()

    assert messages(redis_server) == [f"{job.id}.2"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("is_hung", [False, True], ids=["down", "hung"])
def test_submits_go_on_without_redis_and_leave_it_alone_for_a_while(
    sqlite_url: str, own_server: RedisServer, caplog: pytest.LogCaptureFixture, is_hung: bool
) -> None:
    clock = HandClock()
    with Client(settings_of(sqlite_url, own_server.url), clock=clock) as client:
        if is_hung:
            own_server.pause()
        else:
            own_server.kill()

        jobs = [client.submit(request) for request in requests(20)]

        assert {job.state for job in jobs} == {JobState.QUEUED}
        assert {job.row.published_at for job in jobs} == {None}
        assert len(away(caplog)) == 1
        if is_hung:
            own_server.resume()
        else:
            own_server.start()
        clock.now += REST_S

        last = client.submit(GenerateRequest(prompt="x"))

        assert messages(own_server) == [f"{last.id}.1"]
        assert len(away(caplog)) == 1


def test_hints_that_could_not_be_sent_are_owed_by_the_dispatcher(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Redis answers every question but takes no message.
    with (
        OddRedisServer({"rename-command": "LPUSH nope"}) as server,
        Client(settings_of(sqlite_url, server.url)) as client,
    ):
        jobs = client.submit_many(requests(3))

        assert {(job.row.published_at, job.row.publish_no) for job in jobs} == {(None, 1)}
    assert len(away(caplog)) == 1


@pytest.mark.timeout(NEVER_S)
def test_an_ending_is_heard_without_a_poll(
    database_url: str, redis_server: RedisServer, broker_url: str, store: Store
) -> None:
    settings = settings_of(database_url, broker_url, poll_interval_s=NEVER_S)
    worker = Broker(settings)
    with Client(settings) as client, ThreadPoolExecutor(8) as pool:
        jobs = client.submit_many(requests(8))
        waiting = [pool.submit(job.result, NEVER_S) for job in jobs]
        wait_until(lambda: listeners(redis_server) == len(jobs), "everybody to listen")

        for job in jobs:
            finish(store, job.id, text=job.id)
            worker.announce(job.id)

        assert [w.result().text for w in waiting] == [job.id for job in jobs]
    worker.close()


@pytest.mark.timeout(NEVER_S)
def test_a_job_that_ends_while_a_wait_begins_is_never_missed(
    database_url: str, broker_url: str, store: Store
) -> None:
    settings = settings_of(database_url, broker_url, poll_interval_s=NEVER_S)
    worker = Broker(settings)
    with Client(settings) as client, ThreadPoolExecutor(1) as pool:
        for job in client.submit_many(requests(30)):
            waiting = pool.submit(job.result, NEVER_S)

            finish(store, job.id)
            worker.announce(job.id)

            assert waiting.result().job_id == job.id
    worker.close()


@pytest.mark.timeout(NEVER_S)
def test_news_of_an_ending_that_was_taken_back_ends_no_wait(
    database_url: str, broker_url: str, redis_server: RedisServer
) -> None:
    settings = settings_of(database_url, broker_url, poll_interval_s=NEVER_S)
    worker = Broker(settings)
    with Client(settings) as client, ThreadPoolExecutor(1) as pool:
        job = client.submit(GenerateRequest(prompt="x"))
        waiting = pool.submit(job.wait, 0.5)
        wait_until(lambda: listeners(redis_server) == 1, "the client to listen")

        worker.announce(job.id)

        with pytest.raises(WaitTimeout):
            waiting.result()
    worker.close()


@pytest.mark.timeout(NEVER_S)
@pytest.mark.parametrize("is_hung", [False, True], ids=["down", "hung"])
def test_a_wait_outlives_its_redis(sqlite_url: str, own_server: RedisServer, is_hung: bool) -> None:
    store = Store.open(sqlite_url)
    with Client(settings_of(sqlite_url, own_server.url)) as client, ThreadPoolExecutor(1) as pool:
        job = client.submit(GenerateRequest(prompt="x"))
        waiting = pool.submit(job.result, NEVER_S)
        wait_until(lambda: listeners(own_server) == 1, "the client to listen")

        if is_hung:
            own_server.pause()
        else:
            own_server.kill()
        stored = finish(store, job.id)

        assert waiting.result() == stored
    store.close()


def test_a_wait_needs_no_redis_at_all(sqlite_url: str) -> None:
    store = Store.open(sqlite_url)
    with (
        Client(settings_of(sqlite_url, f"redis://127.0.0.1:{free_port()}/0")) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        job = client.submit(GenerateRequest(prompt="x"))
        waiting = pool.submit(job.result, NEVER_S)

        stored = finish(store, job.id)

        assert waiting.result() == stored
    store.close()


def test_a_wait_gives_its_connections_back(client: Client, redis_server: RedisServer, store: Store) -> None:
    jobs = client.submit_many(requests(3))
    finish(store, jobs[0].id)
    with pytest.raises(WaitTimeout):
        client.wait(jobs, timeout_s=0.1)
    for _ in client.as_completed(jobs):
        # Left half-way: the rest is never asked for.
        break

    wait_until(lambda: listeners(redis_server) == 0, "the listener to leave")


def test_results_outlive_a_redis_that_forgets(
    client: Client, store: Store, redis_server: RedisServer
) -> None:
    job = client.submit(GenerateRequest(prompt="x"))
    stored = finish(store, job.id)

    flush(redis_server)

    assert job.result(timeout_s=0) == stored


@pytest.mark.timeout(NEVER_S)
def test_cancelling_a_queued_job_ends_the_waits_for_it(
    database_url: str, broker_url: str, redis_server: RedisServer
) -> None:
    with (
        Client(settings_of(database_url, broker_url, poll_interval_s=NEVER_S)) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        job = client.submit(GenerateRequest(prompt="x"))
        waiting = pool.submit(job.wait, NEVER_S)
        wait_until(lambda: listeners(redis_server) == 1, "the client to listen")

        assert job.cancel() is JobState.CANCELLED

        waiting.result()


def test_cancelling_a_running_job_tells_the_workers(
    client: Client, store: Store, redis_server: RedisServer
) -> None:
    job = client.submit(GenerateRequest(prompt="x"))
    claim(store, job.id)
    with redis.Redis(port=redis_server.port) as plain, plain.pubsub() as worker:
        worker.subscribe("codeherd:/0.celery.pidbox")
        assert worker.get_message(timeout=30)

        assert job.cancel() is JobState.RUNNING

        assert worker.get_message(timeout=30)


@pytest.mark.timeout(60)
def test_cancelling_needs_no_redis(sqlite_url: str, own_server: RedisServer) -> None:
    store = Store.open(sqlite_url)
    with Client(settings_of(sqlite_url, own_server.url)) as client:
        queued, running = client.submit_many(requests(2))
        claim(store, running.id)
        own_server.pause()

        assert [queued.cancel(), running.cancel()] == [JobState.CANCELLED, JobState.RUNNING]
    store.close()


def test_a_client_serves_many_threads(client: Client, redis_server: RedisServer, store: Store) -> None:
    def work(i: int) -> str:
        job = client.submit(GenerateRequest(prompt=f"x = {i}"))
        finish(store, job.id, f"{i}")
        return job.result(timeout_s=NEVER_S).text

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(work, range(48))) == [f"{i}" for i in range(48)]
    assert len(messages(redis_server)) == 48
