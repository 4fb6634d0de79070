from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from codeherd_schema.broker import BATCH, CONNECTIONS, Broker, make_app
from codeherd_schema.errors import BrokerUnavailable
from codeherd_schema.hints import Hint
from codeherd_schema.requests import JobKind
from codeherd_schema.settings import SharedSettings
from tests.integration.redis_variants import OddRedisServer, allow, messages
from tests.services import RedisServer, free_port, wait_until

QUEUE = "codeherd.tiny"
PASSWORD = "s3cret"


def broker_at(url: str, **more: object) -> Broker:
    values = {"broker_url": url, "connect_timeout_s": 0.3, **more}
    return Broker(SharedSettings.model_validate(values))


def hint(i: int, priority: int = 5, publish_no: int = 1) -> Hint:
    return Hint(f"job{i}", QUEUE, JobKind.GENERATE, priority, publish_no)


@pytest.fixture
def broker(broker_url: str) -> Iterator[Broker]:
    broker = broker_at(broker_url)
    yield broker
    broker.close()


@pytest.fixture(scope="module")
def odd_server() -> Iterator[OddRedisServer]:
    with OddRedisServer({"requirepass": PASSWORD}) as server:
        yield server


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server to be hurt."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def own_broker(own_server: RedisServer) -> Iterator[Broker]:
    broker = broker_at(own_server.url)
    yield broker
    broker.close()


def test_hints_wait_in_the_order_of_their_priority(broker: Broker, redis_server: RedisServer) -> None:
    broker.publish([hint(1, 9), hint(2, 5), hint(3, 0), hint(4, 6), hint(5, 5)])

    assert broker.waiting(QUEUE) == 5
    assert messages(redis_server) == ["job3.1", "job2.1", "job5.1", "job4.1", "job1.1"]


def test_an_unknown_queue_is_empty(broker: Broker) -> None:
    assert broker.waiting("codeherd.nobody") == 0


def test_publishing_nothing_needs_no_broker() -> None:
    broker_at(f"redis://127.0.0.1:{free_port()}/0").publish([])


def test_every_publication_has_a_task_id_of_its_own(broker: Broker, redis_server: RedisServer) -> None:
    broker.publish([hint(1, publish_no=1)])
    broker.publish([hint(1, publish_no=2)])

    assert messages(redis_server) == ["job1.1", "job1.2"]


def test_more_hints_than_one_batch_all_arrive(broker: Broker, redis_server: RedisServer) -> None:
    broker.publish([hint(i) for i in range(250)])

    assert messages(redis_server) == [f"job{i}.1" for i in range(250)]


def test_two_herds_share_a_redis_by_their_prefixes(broker_url: str, redis_server: RedisServer) -> None:
    ours, theirs = broker_at(broker_url, key_prefix="a:"), broker_at(broker_url, key_prefix="b:")

    with ours.endings() as heard:
        ours.publish([hint(1)])
        theirs.announce("job1")
        ours.announce("job2")

        assert heard.wait(30) == {"job2"}
    assert (ours.waiting(QUEUE), theirs.waiting(QUEUE)) == (1, 0)
    assert messages(redis_server, prefix="a:") == ["job1.1"]
    with redis.Redis(port=redis_server.port) as client:
        assert all(key.startswith((b"a:", b"b:")) for key in client.scan_iter())
    ours.close()
    theirs.close()


@pytest.mark.parametrize("scheme", ["tcp", "socket"])
def test_a_password_is_used_on_every_kind_of_address(odd_server: OddRedisServer, scheme: str) -> None:
    plain = odd_server.url if scheme == "tcp" else odd_server.socket_url
    broker = broker_at(plain.replace("://", f"://:{PASSWORD}@"), key_prefix=f"{scheme}:")

    with broker.endings() as heard:
        broker.publish([hint(1)])
        broker.request_cancel("job1")
        broker.announce("job1")

        assert heard.wait(30) == {"job1"}
    assert broker.waiting(QUEUE) == 1
    assert broker.check()["maxmemory_policy"] == "noeviction"
    broker.close()


def test_a_wrong_password_is_told_apart_and_not_repeated(odd_server: OddRedisServer) -> None:
    broker = broker_at(odd_server.url.replace("://", "://:wr0ng@"))

    with pytest.raises(BrokerUnavailable, match="AuthenticationError") as told:
        broker.waiting(QUEUE)

    assert "wr0ng" not in str(told.value)
    broker.close()


def test_an_ending_right_after_subscribing_is_heard(broker: Broker) -> None:
    for i in range(20):
        with broker.endings() as heard:
            broker.announce(f"job{i}")

            assert heard.wait(30) == {f"job{i}"}


def test_endings_that_came_together_are_heard_together(broker: Broker) -> None:
    with broker.endings() as heard:
        for i in range(3):
            broker.announce(f"job{i}")

        news: set[str] = set()
        while len(news) < 3:
            news |= heard.wait(30)
        assert news == {"job0", "job1", "job2"}
        assert heard.wait(0.01) == frozenset()


def test_many_endings_are_announced_at_once_and_none_needs_no_broker(broker: Broker) -> None:
    job_ids = {f"job{n}" for n in range(2 * BATCH + 50)}
    with broker.endings() as heard:
        broker.announce(*job_ids)

        news: set[str] = set()
        while len(news) < len(job_ids):
            news |= heard.wait(30)
        assert news == job_ids
    broker_at(f"redis://127.0.0.1:{free_port()}/0").announce()


def test_a_cancel_request_reaches_every_worker_that_listens(
    broker: Broker, redis_server: RedisServer
) -> None:
    with redis.Redis(port=redis_server.port) as client, client.pubsub() as worker:
        worker.subscribe("codeherd:/0.celery.pidbox")
        assert worker.get_message(timeout=30)

        broker.request_cancel("job1")

        message = worker.get_message(timeout=30)
        assert message is not None
        order = json.loads(base64.b64decode(json.loads(message["data"])["body"]))
        assert (order["method"], order["arguments"]) == ("cancel_job", {"job_id": "job1"})


def test_workers_that_are_silent_are_left_out(broker: Broker) -> None:
    assert broker.workers(0.05) == {}


def test_check_tells_version_eviction_and_persistence(broker: Broker) -> None:
    facts = broker.check()

    assert facts["aof_enabled"] == "1"
    assert facts["redis_version"][0].isdigit()


def test_a_queue_tells_whose_hints_it_holds_whatever_their_priority(broker: Broker) -> None:
    broker.publish([hint(n, priority=n) for n in range(8)])

    assert broker.hinted(QUEUE) == {f"job{n}" for n in range(8)}
    assert broker.hinted("codeherd.other") == frozenset()


def test_what_is_no_list_counts_as_none_and_other_refusals_are_told(
    broker: Broker, broker_url: str, redis_server: RedisServer
) -> None:
    broker.publish([hint(1, priority=9)])
    key = f"codeherd:{QUEUE}"
    with redis.Redis(port=redis_server.port) as client:
        client.set(key, "no list")
        assert broker.waiting_by_step(QUEUE) == (0, 0, 0, 1)
        assert broker.hinted(QUEUE) == {"job1"}
        client.acl_setuser(
            "poor",
            enabled=True,
            passwords=["+word"],
            categories=["+@all"],
            commands=["-lrange", "-llen"],
            keys=["*"],
            channels=["*"],
        )
        poor = broker_at(broker_url.replace("redis://", "redis://poor:word@"))
        for ask in (poor.waiting_by_step, poor.hinted):
            with pytest.raises(BrokerUnavailable):
                ask(QUEUE)
        poor.close()
        client.acl_deluser("poor")


def test_keys_and_the_jobs_that_their_messages_name_are_told_to_who_may_look(
    broker: Broker, broker_url: str, redis_server: RedisServer
) -> None:
    broker.publish([hint(1), hint(2), hint(3, priority=9)])
    odd, others = "codeherd:codeherd.odd", "others"
    with redis.Redis(port=redis_server.port) as client:
        client.set(odd, "no list")
        client.rpush(others, b"\xff", b"{}")

        keys = broker.keys(100)

        assert keys is not None
        assert {f"codeherd:{QUEUE}\x06\x169", odd, others} <= keys
        assert broker.named_in(keys, 10) == frozenset({"job1", "job2", "job3"})
        # The newest message of each list.
        assert broker.named_in(keys, 1) == frozenset({"job2", "job3"})
        assert broker.named_in([], 1) == frozenset()
        assert len(broker.keys(2) or ()) == 2
        rights = ("~*", "&*", "+@all", "-scan", "-lrange")
        allow(redis_server, "blind", "word", *rights)
        blind = broker_at(broker_url.replace("redis://", "redis://blind:word@"))
        assert blind.keys(100) is None
        assert blind.named_in(keys, 10) is None
        blind.close()
        client.acl_deluser("blind")


CALLS: dict[str, Callable[[Broker], object]] = {
    "publish": lambda broker: broker.publish([hint(1)]),
    "waiting": lambda broker: broker.waiting(QUEUE),
    "request_cancel": lambda broker: broker.request_cancel("job1"),
    "announce": lambda broker: broker.announce("job1"),
    "endings": lambda broker: broker.endings().close(),
    "check": lambda broker: broker.check(),
    "workers": lambda broker: broker.workers(0.05),
    "hinted": lambda broker: broker.hinted(QUEUE),
    "keys": lambda broker: broker.keys(10),
    "named_in": lambda broker: broker.named_in(["list"], 10),
}


# A bound that is missing shows as a test that never ends: pytest-timeout ends it.
@pytest.mark.timeout(60)
@pytest.mark.parametrize("call", CALLS)
def test_a_redis_that_is_not_there_is_told_at_once(call: str) -> None:
    broker = broker_at(f"redis://127.0.0.1:{free_port()}/0")

    with pytest.raises(BrokerUnavailable):
        CALLS[call](broker)
    broker.close()


@pytest.mark.timeout(60)
def test_a_redis_that_hangs_or_dies_is_told_soon_and_found_again(
    own_server: RedisServer, own_broker: Broker
) -> None:
    for call in CALLS.values():
        call(own_broker)

    for hurt, heal in [(own_server.pause, own_server.resume), (own_server.kill, own_server.start)]:
        hurt()
        for call in CALLS.values():
            with pytest.raises(BrokerUnavailable):
                call(own_broker)
        heal()
        for call in CALLS.values():
            call(own_broker)


@pytest.mark.timeout(60)
def test_a_listener_whose_redis_dies_says_so(own_server: RedisServer, own_broker: Broker) -> None:
    with own_broker.endings() as heard:
        own_server.kill()

        def is_told() -> bool:
            try:
                return bool(heard.wait(0.01))
            except BrokerUnavailable:
                return True

        wait_until(is_told, "the listener to notice")


def test_many_threads_share_few_connections_and_closing_gives_them_back(
    own_server: RedisServer, own_broker: Broker
) -> None:
    def clients() -> int:
        with redis.Redis(port=own_server.port) as client:
            return int(client.info("clients")["connected_clients"]) - 1

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda i: own_broker.publish([hint(i)] * 3), range(200)))

    assert own_broker.waiting(QUEUE) == 600
    # kombu holds two connections for each of ours.
    assert clients() <= 2 * CONNECTIONS
    own_broker.close()
    wait_until(lambda: clients() == 0, "the connections to close")


@pytest.mark.parametrize("what", ["heartbeat", "answer"])
def test_nothing_is_sent_again_and_again_while_redis_is_away(what: str) -> None:
    """Celery asks for retries without end in both, on the thread that has to hear of a stop."""
    ends: list[str] = []

    def send() -> None:
        settings = SharedSettings.model_validate({"broker_url": server.url, "connect_timeout_s": 0.3})
        app = make_app(settings, [QUEUE])
        with app.connection_for_write() as connection:
            mailbox = app.control.mailbox(connection)
            node = mailbox.Node("one@here", channel=connection.channel())
            node.reply({}, "reply", "key", "ticket")
            dispatcher = app.events.Dispatcher(connection)
            dispatcher.send("worker-heartbeat", retry=True)
            assert not dispatcher._outbound_buffer
            server.kill()
            if what == "heartbeat":
                dispatcher.send("worker-heartbeat", retry=True)
                ends.append("kept" if dispatcher._outbound_buffer else "lost")
                return
            try:
                node.reply({}, "reply", "key", "ticket")
            except (KombuError, RedisError):
                ends.append("told")

    with RedisServer() as server:
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        sender.join(60)

    assert ends == [{"heartbeat": "kept", "answer": "told"}[what]]
