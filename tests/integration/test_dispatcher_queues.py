from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta

import pytest
import redis

from codeherd_producer.client import Client
from codeherd_producer.dispatcher import Dispatcher, Tick
from codeherd_schema.broker import Broker, queue_name
from codeherd_schema.errors import DatabaseUnavailable, SchemaOutdated
from codeherd_schema.migrations import upgrade
from codeherd_schema.requests import GenerateRequest
from codeherd_schema.settings import SharedSettings
from codeherd_schema.states import JobState, PauseScope
from codeherd_schema.store import Store
from tests.by_hand import HandClock, claim, requests
from tests.integration.redis_variants import OddRedisServer, flush, messages, take
from tests.samples import rewrite
from tests.services import PostgresServer, RedisServer, wait_until

QUEUE = queue_name("tiny")


class Parts:
    """A dispatcher and what it works between; the dispatcher's clock is moved by hand."""

    def __init__(self, database_url: str, broker_url: str, **more: object) -> None:
        values = {
            "database_url": database_url,
            "broker_url": broker_url,
            "connect_timeout_s": 0.3,
            "dispatch_interval_s": 0.02,
            **more,
        }
        self.settings = SharedSettings.model_validate(values)
        self.clock = HandClock()
        with ExitStack() as stack:
            self.store = Store.open(database_url)
            stack.callback(self.store.close)
            self.broker = Broker(self.settings)
            stack.callback(self.broker.close)
            self.client = stack.enter_context(Client(self.settings, publish=False))
            self._stack = stack.pop_all()
        self.dispatcher = self.another_dispatcher()

    def another_dispatcher(self) -> Dispatcher:
        return Dispatcher(self.store, self.broker, self.settings, clock=self.clock)

    def find_lost(self) -> Tick:
        """Look twice, with enough time between that what is missing both times is lost."""
        first = self.dispatcher.run_once()
        self.clock.now += self.settings.republish_after_s
        assert first.published == 0, "whoever took them may be about to claim"
        return self.dispatcher.run_once()

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def parts(database_url: str, broker_url: str) -> Iterator[Parts]:
    parts = Parts(database_url, broker_url)
    yield parts
    parts.close()


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server to be hurt; it forgets everything when it dies."""
    with RedisServer(aof=False) as server:
        yield server


@pytest.fixture
def own_parts(sqlite_url: str, own_server: RedisServer) -> Iterator[Parts]:
    parts = Parts(sqlite_url, own_server.url)
    yield parts
    parts.close()


def hints_of(parts: Parts, jobs: int) -> list[str]:
    return [f"{job.id}.1" for job in parts.client.submit_many(requests(jobs))]


def test_due_jobs_are_published_once(parts: Parts, redis_server: RedisServer) -> None:
    hints = hints_of(parts, 3)

    assert parts.dispatcher.run_once() == Tick(published=3)
    assert parts.dispatcher.run_once() == Tick()
    assert messages(redis_server) == hints


def test_the_window_bounds_what_waits_in_redis(
    database_url: str, broker_url: str, redis_server: RedisServer
) -> None:
    parts = Parts(database_url, broker_url, publish_window=10)
    hints = hints_of(parts, 50)

    assert parts.dispatcher.run_once() == Tick(published=10, half_empty_in_s=0)
    assert parts.dispatcher.run_once() == Tick()
    taken = take(redis_server, 4)
    parts.clock.now += 1
    # Four in a second: half of the ten in 1.25.
    assert parts.dispatcher.run_once() == Tick(published=4, half_empty_in_s=1.25)

    assert taken == hints[:4]
    assert messages(redis_server) == hints[4:14]
    parts.close()


def test_nobody_hurries_when_there_is_no_more_to_publish(
    database_url: str, broker_url: str, redis_server: RedisServer
) -> None:
    parts = Parts(database_url, broker_url, publish_window=10)
    hints_of(parts, 12)

    assert parts.dispatcher.run_once() == Tick(published=10, half_empty_in_s=0)
    take(redis_server, 8)
    assert parts.dispatcher.run_once() == Tick(published=2)
    parts.close()


def test_what_is_urgent_goes_first_into_redis_and_out_of_it(
    database_url: str, broker_url: str, redis_server: RedisServer
) -> None:
    parts = Parts(database_url, broker_url, publish_window=10)
    for priority in (9, 5, 0, 7, 3):
        parts.client.submit_many(requests(4, priority=priority))

    parts.dispatcher.run_once()

    rows = parts.store.get_many([hint.partition(".")[0] for hint in messages(redis_server)])
    taken = [rows[hint.partition(".")[0]].priority for hint in take(redis_server, 10)]
    assert taken == [0, 0, 0, 0, 3, 3, 3, 3, 5, 5]
    parts.close()


def test_an_urgent_job_overtakes_a_backlog_that_fills_the_window(
    database_url: str, broker_url: str, redis_server: RedisServer
) -> None:
    parts = Parts(database_url, broker_url, publish_window=5)
    hints_of(parts, 50)
    parts.dispatcher.run_once()
    urgent = parts.client.submit_many(requests(7, priority=0))

    assert parts.dispatcher.run_once().published == 5
    assert parts.dispatcher.run_once() == Tick()

    assert take(redis_server, 5) == [f"{job.id}.1" for job in urgent[:5]]
    assert parts.dispatcher.run_once().published == 2
    parts.close()


def test_every_queue_has_a_window_of_its_own(parts: Parts) -> None:
    hints_of(parts, 2)
    parts.client.submit_many(requests(3, model="codellama-7b"))

    assert parts.dispatcher.run_once() == Tick(published=5)
    assert parts.broker.waiting(queue_name("codellama-7b")) == 3


def test_a_job_for_later_is_published_when_it_is_due(parts: Parts) -> None:
    parts.client.submit(GenerateRequest(prompt="x", run_at=timedelta(milliseconds=300)))
    parts.client.submit(GenerateRequest(prompt="y", run_at=timedelta(hours=1)))

    wait_until(lambda: parts.dispatcher.run_once().published == 1, "the job to be due")

    assert parts.store.count_by_state()[JobState.QUEUED] == 2
    assert parts.broker.waiting(QUEUE) == 1


def test_dispatchers_at_once_share_the_jobs(
    database_url: str, broker_url: str, redis_server: RedisServer
) -> None:
    parts = Parts(database_url, broker_url, publish_window=1000)
    hints = hints_of(parts, 400)
    dispatchers = [parts.another_dispatcher() for _ in range(4)]
    barrier = threading.Barrier(len(dispatchers))

    def work(dispatcher: Dispatcher) -> int:
        barrier.wait()
        return sum(dispatcher.run_once().published for _ in range(3))

    with ThreadPoolExecutor(len(dispatchers)) as pool:
        published = sum(pool.map(work, dispatchers))

    assert published == len(hints)
    assert sorted(messages(redis_server)) == sorted(hints)
    parts.close()


def test_what_a_client_published_is_left_alone(parts: Parts, redis_server: RedisServer) -> None:
    with Client(parts.settings) as client:
        hint = f"{client.submit(GenerateRequest(prompt='x')).id}.1"

    assert parts.dispatcher.run_once() == Tick()
    assert messages(redis_server) == [hint]


def test_a_redis_that_forgot_gets_all_hints_again(parts: Parts, redis_server: RedisServer) -> None:
    hints = hints_of(parts, 20)
    parts.dispatcher.run_once()

    flush(redis_server)
    # A hint that came after the loss must not hide it.
    with Client(parts.settings) as client:
        late = client.submit(GenerateRequest(prompt="x"))

    assert parts.find_lost() == Tick(published=20)
    assert messages(redis_server) == [f"{late.id}.1", *(hint.replace(".1", ".2") for hint in hints)]


def test_claimed_jobs_are_not_published_again_after_a_loss(parts: Parts, redis_server: RedisServer) -> None:
    hints = hints_of(parts, 3)
    parts.dispatcher.run_once()
    claim(parts.store, hints[0].partition(".")[0])

    flush(redis_server)

    assert parts.find_lost() == Tick(published=2)


def test_a_redis_that_died_without_a_file_gets_all_hints_again(
    own_parts: Parts, own_server: RedisServer
) -> None:
    hints_of(own_parts, 5)
    own_parts.dispatcher.run_once()

    own_server.kill()
    assert own_parts.dispatcher.run_once() == Tick()
    own_server.start()
    own_parts.clock.now += 60

    assert own_parts.find_lost() == Tick(published=5)


def test_hints_that_somebody_took_and_did_not_claim_come_back_while_others_wait(
    parts: Parts, redis_server: RedisServer
) -> None:
    hints = hints_of(parts, 5)
    parts.dispatcher.run_once()
    taken = take(redis_server, 2)

    assert parts.find_lost() == Tick(published=2)

    assert messages(redis_server) == hints[2:] + [hint.replace(".1", ".2") for hint in taken]
    assert parts.find_lost() == Tick()


def pause_until_sent(parts: Parts) -> float:
    """Look again and again until hints are sent; return the seconds until then."""
    began = parts.clock.now
    for _ in range(100):
        if parts.dispatcher.run_once().published:
            return parts.clock.now - began
        parts.clock.now += parts.settings.republish_after_s / 2
    raise TimeoutError("no hint was ever sent")


def test_a_hint_that_is_taken_again_and_again_and_never_claimed_is_sent_less_and_less_often(
    parts: Parts, redis_server: RedisServer
) -> None:
    [hint] = hints_of(parts, 1)
    parts.dispatcher.run_once()
    pauses_s, taken = [], []

    for _ in range(5):
        taken += take(redis_server, 1)
        pauses_s.append(pause_until_sent(parts))

    assert pauses_s == [parts.settings.republish_after_s * times for times in (1, 2, 4, 8, 8)]
    assert taken == [hint.replace(".1", f".{number}") for number in range(1, 6)]


@pytest.mark.parametrize("how", ["another job is claimed", "its hint waits in Redis"])
def test_a_hint_is_sent_again_as_soon_as_ever_once_a_worker_may_be_free(
    parts: Parts, redis_server: RedisServer, how: str
) -> None:
    hints_of(parts, 1)
    parts.dispatcher.run_once()
    take(redis_server, 1)
    pause_until_sent(parts)
    take(redis_server, 1)
    assert pause_until_sent(parts) == 2 * parts.settings.republish_after_s

    if how == "another job is claimed":
        take(redis_server, 1)
        [other] = hints_of(parts, 1)
        assert parts.dispatcher.run_once() == Tick(published=1)
        assert take(redis_server, 1) == [other]
        claim(parts.store, other.partition(".")[0])
    else:
        assert parts.dispatcher.run_once() == Tick()
        take(redis_server, 1)

    assert pause_until_sent(parts) == parts.settings.republish_after_s


def test_hints_that_are_claimed_between_two_looks_are_not_lost(
    parts: Parts, redis_server: RedisServer
) -> None:
    hints_of(parts, 6)
    parts.dispatcher.run_once()

    # At every look some were taken and not yet claimed: never the same ones.
    for _ in range(3):
        [one, two] = take(redis_server, 2)
        assert parts.dispatcher.run_once() == Tick()
        for hint in (one, two):
            claim(parts.store, hint.partition(".")[0])
        parts.clock.now += parts.settings.republish_after_s

    assert parts.dispatcher.run_once() == Tick()


def test_hints_that_wait_in_redis_are_not_doubled_however_old(
    parts: Parts, redis_server: RedisServer
) -> None:
    hints = hints_of(parts, 3)
    parts.dispatcher.run_once()

    parts.clock.now += 86_400

    assert parts.find_lost() == Tick()
    assert messages(redis_server) == hints


def test_a_loss_is_seen_among_garbage(parts: Parts, redis_server: RedisServer) -> None:
    hints_of(parts, 3)
    parts.dispatcher.run_once()
    take(redis_server, 2)
    key = f"{parts.settings.key_prefix}{QUEUE}"
    with redis.Redis(port=redis_server.port) as client:
        client.lpush(key, b"\xff", b"[1]", b"{}", b'{"headers": {"id": 7}}')
        # As long as garbage makes up the numbers, nothing seems lost; workers drop it.
        assert parts.find_lost() == Tick()
        client.lpop(key, 3)

        assert parts.find_lost() == Tick(published=2)


def test_hints_that_could_not_be_sent_are_owed_again(sqlite_url: str) -> None:
    # Redis answers every question but takes no message.
    with OddRedisServer({"rename-command": "LPUSH nope"}) as server:
        parts = Parts(sqlite_url, server.url)
        jobs = parts.client.submit_many(requests(3))

        assert parts.dispatcher.run_once() == Tick()

        rows = parts.store.get_many([job.id for job in jobs])
        assert [(row.published_at, row.publish_no) for row in rows.values()] == [(None, 1)] * 3
        parts.close()


@pytest.mark.timeout(60)
def test_a_hung_redis_is_left_alone_for_a_while_and_lost_jobs_are_still_reaped(
    own_parts: Parts, own_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    job = own_parts.client.submit(GenerateRequest(prompt="x"))
    own_parts.dispatcher.run_once()
    claim(own_parts.store, job.id, lease_s=0.01)
    own_server.pause()

    ticks: list[Tick] = []

    def is_reaped() -> bool:
        own_parts.clock.now += 10
        ticks.append(own_parts.dispatcher.run_once())
        return ticks[-1].reaped == 1

    wait_until(is_reaped, "the job to be taken back")
    own_server.resume()
    own_parts.clock.now += 60

    assert own_parts.dispatcher.run_once().published == 1
    assert sum("broker_away" in record.message for record in caplog.records) == 1
    assert sum("broker_back" in record.message for record in caplog.records) == 1


def test_a_lost_job_is_reaped_and_published_in_one_tick(parts: Parts, redis_server: RedisServer) -> None:
    job = parts.client.submit(GenerateRequest(prompt="x"))
    claim(parts.store, job.id, lease_s=0.01)

    ticks: list[Tick] = []

    def is_reaped() -> bool:
        parts.clock.now += 10
        ticks.append(parts.dispatcher.run_once())
        return ticks[-1].reaped == 1

    wait_until(is_reaped, "the job to be taken back")

    assert ticks[-1] == Tick(published=1, reaped=1)
    assert messages(redis_server) == [f"{job.id}.1"]


def test_a_job_that_kills_workers_is_buried(database_url: str, broker_url: str) -> None:
    parts = Parts(database_url, broker_url, max_crashes=1)
    job = parts.client.submit(GenerateRequest(prompt="x"))
    claim(parts.store, job.id, lease_s=0.01)

    def is_buried() -> bool:
        parts.clock.now += 10
        return parts.dispatcher.run_once() == Tick(buried=1)

    wait_until(is_buried, "the job to be buried")
    assert job.state is JobState.DEAD
    parts.close()


def test_a_job_that_is_too_late_is_expired(parts: Parts) -> None:
    job = parts.client.submit(
        GenerateRequest(prompt="x", run_at=timedelta(milliseconds=20), expires_at=timedelta(milliseconds=21))
    )

    def is_expired() -> bool:
        parts.clock.now += 10
        return parts.dispatcher.run_once().expired == 1

    wait_until(is_expired, "the job to expire")
    assert job.state is JobState.EXPIRED


def test_whoever_waits_hears_of_jobs_that_expired_or_were_buried(database_url: str, broker_url: str) -> None:
    parts = Parts(database_url, broker_url, max_crashes=2)
    jobs = parts.client.submit_many(requests(6))
    unstarted, late, buried, cancelled, queued_again, _waiting = (job.id for job in jobs)
    rewrite(database_url, unstarted, expires_at=1.0)
    for job_id in (late, buried, cancelled, queued_again):
        claim(parts.store, job_id, lease_s=-1.0)
    rewrite(database_url, late, deadline=1.0)
    rewrite(database_url, buried, crash_count=1)
    parts.store.request_cancel(cancelled)

    with parts.broker.endings() as heard:
        tick = parts.dispatcher.run_once()

        # Heard after all that was said before.
        parts.broker.announce("last")
        news: set[str] = set()
        while "last" not in news:
            news |= heard.wait(30)

    assert tick == Tick(published=2, reaped=1, buried=1, expired=2)
    assert news == {unstarted, late, buried, cancelled, "last"}
    parts.close()


# A wait that is not told of the end lasts until its next look, and the test's time is over.
@pytest.mark.timeout(60)
@pytest.mark.parametrize("end", [JobState.EXPIRED, JobState.DEAD])
def test_a_wait_for_a_job_that_the_dispatcher_ends_needs_no_poll(
    database_url: str, broker_url: str, redis_server: RedisServer, end: JobState
) -> None:
    parts = Parts(database_url, broker_url, max_crashes=1, poll_interval_s=60)
    with (
        Client(parts.settings) as client,
        ThreadPoolExecutor(1) as pool,
        redis.Redis(port=redis_server.port) as plain,
    ):
        job = client.submit(GenerateRequest(prompt="x"))
        waiting = pool.submit(job.wait, 60)
        wait_until(lambda: plain.pubsub_numsub("codeherd:done")[0][1] == 1, "the client to listen")
        if end is JobState.DEAD:
            claim(parts.store, job.id, lease_s=-1.0)
        else:
            rewrite(database_url, job.id, expires_at=1.0)

        parts.dispatcher.run_once()

        waiting.result()
        assert job.state is end
    parts.close()


def test_reaps_keep_their_interval(parts: Parts) -> None:
    parts.dispatcher.run_once()
    job = parts.client.submit(GenerateRequest(prompt="x"))
    claimed = claim(parts.store, job.id, lease_s=0.01)
    wait_until(lambda: parts.store.clock() > claimed.claimed_at.timestamp() + 0.02, "the lease to run out")

    assert parts.dispatcher.run_once() == Tick()
    parts.clock.now += 1.25 * parts.settings.reap_interval_s
    assert parts.dispatcher.run_once().reaped == 1


class Running:
    """A dispatcher's `run` in a thread."""

    def __init__(self, parts: Parts) -> None:
        self._stop = threading.Event()
        dispatcher = Dispatcher(parts.store, parts.broker, parts.settings)
        self._thread = threading.Thread(target=dispatcher.run, args=(self._stop,))

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_run_publishes_until_it_is_stopped(parts: Parts) -> None:
    with Running(parts):
        hints_of(parts, 3)
        wait_until(lambda: parts.broker.waiting(QUEUE) == 3, "the hints")


@pytest.mark.timeout(120)
def test_run_outlives_a_database_that_goes_away(broker_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with PostgresServer() as server:
        upgrade(server.url)
        parts = Parts(server.url, broker_url)
        with Running(parts):
            hints_of(parts, 1)
            wait_until(lambda: parts.broker.waiting(QUEUE) == 1, "the first hint")
            server.stop()
            wait_until(lambda: "dispatch_interrupted" in caplog.text, "the loss to be noticed")
            with pytest.raises(DatabaseUnavailable):
                parts.dispatcher.run_once()
            server.start()
            wait_until(lambda: "dispatch_resumed" in caplog.text, "the recovery")
            hints_of(parts, 1)
            wait_until(lambda: parts.broker.waiting(QUEUE) == 2, "the second hint")
        parts.close()
    assert caplog.text.count("dispatch_interrupted") == 1


def test_run_waits_for_the_schema(
    tmp_path_factory: pytest.TempPathFactory, broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"sqlite:///{tmp_path_factory.mktemp('empty') / 'codeherd.db'}"
    parts = Parts(url, broker_url)
    with pytest.raises(SchemaOutdated):
        parts.dispatcher.run_once()

    with Running(parts):
        wait_until(lambda: "schema_outdated" in caplog.text, "the missing schema to be noticed")
        upgrade(url)
        hints_of(parts, 1)
        wait_until(lambda: parts.broker.waiting(QUEUE) == 1, "the hint")
    parts.close()


def test_a_paused_queue_gets_no_hints_and_gets_them_at_once_when_it_is_resumed(parts: Parts) -> None:
    hints_of(parts, 3)
    parts.client.pause(PauseScope.QUEUE, QUEUE, reason="new driver")

    assert parts.dispatcher.run_once() == Tick()
    assert parts.client.resume(PauseScope.QUEUE, QUEUE)
    assert parts.dispatcher.run_once() == Tick(published=3)


def test_old_jobs_are_deleted_where_a_retention_is_set(database_url: str, broker_url: str) -> None:
    parts = Parts(database_url, broker_url, retention_days=30)
    old, fresh = parts.client.submit_many(requests(2))
    for job in (old, fresh):
        job.cancel()
    rewrite(database_url, old.id, finished_at=parts.store.clock() - 31 * 86_400)

    assert parts.dispatcher.run_once() == Tick(pruned=1)

    assert parts.store.get(old.id) is None
    assert parts.store.get(fresh.id) is not None
    parts.close()
