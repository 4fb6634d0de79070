"""Whatever lies in Redis under our names: it is dropped and counted, and the next job runs (F14, F20)."""

from __future__ import annotations

import base64
import copy
import gzip
import json
import logging
import pickle
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis

from codeherd_schema import transport
from codeherd_schema.broker import Broker, make_app, task_name
from codeherd_schema.hints import Hint
from codeherd_schema.requests import GenerateRequest, JobKind
from codeherd_schema.settings import SharedSettings
from codeherd_schema.states import JobState
from tests.chaos.null_herd import JOBS_TIMEOUT_S, NullHerd
from tests.samples import a_request, rewrite
from tests.services import RedisServer, wait_until

QUEUE = "codeherd.tiny"
JOB = "0190d5a0-0000-7000-8000-000000000000"
#: In every forged message; must be in no log.
MARK = "hush-hush"


def settings_at(url: str) -> SharedSettings:
    return SharedSettings.model_validate({"broker_url": url, "connect_timeout_s": 5.0})


@pytest.fixture
def broker(broker_url: str) -> Iterator[Broker]:
    broker = Broker(settings_at(broker_url))
    yield broker
    broker.close()


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis(port=redis_server.port) as client:
        yield client


def taken(client: redis.Redis, priority: int) -> bytes:
    suffix = "" if priority == 0 else f"\x06\x16{priority}"
    reply: Any = client.rpop(f"codeherd:{QUEUE}{suffix}")
    return bytes(reply)


#: What `Broker.publish` sends with celery 5.7.0; the first test holds it against a real one.
GENUINE: dict[str, Any] = {
    "body": None,
    "content-encoding": "utf-8",
    "content-type": "application/json",
    "headers": {
        "lang": "py",
        "task": "codeherd.generate",
        "id": f"{JOB}.1",
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": f"{JOB}.1",
        "parent_id": None,
        "argsrepr": f"({JOB})",
        "kwargsrepr": "{}",
        "origin": "gen1@host",
        "ignore_result": None,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
    },
    "properties": {
        "correlation_id": f"{JOB}.1",
        "reply_to": "0775841b-c50f-36fb-a0fd-ebeeebb5b963",
        "argsrepr": f"({JOB})",
        "kwargsrepr": "{}",
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": QUEUE},
        "priority": 5,
        "body_encoding": "base64",
        "delivery_tag": "b52ed86f-4006-4619-87be-0606dcf22191",
    },
}
#: Its body before base64.
BODY: list[Any] = [[JOB], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]


def encoded(value: object) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


def message(*, body: object = BODY, **changes: Any) -> bytes:
    """Return the genuine hint with changes, `headers__eta=…` for one in a part."""
    made = copy.deepcopy(GENUINE) | {"body": encoded(body)}
    for path, value in changes.items():
        *outer, last = path.replace("_type", "-type").replace("_encoding_", "-encoding").split("__")
        target = made
        for name in outer:
            target = target[name]
        target[last] = value
    return json.dumps(made).encode()


def without(*path: str) -> bytes:
    made = copy.deepcopy(GENUINE) | {"body": encoded(BODY)}
    target = made
    for name in path[:-1]:
        target = target[name]
    del target[path[-1]]
    return json.dumps(made).encode()


def embedded(**embed: object) -> bytes:
    return message(body=[[JOB], {}, BODY[2] | embed])


def for_job(job_id: str) -> bytes:
    text = message().decode().replace(JOB, job_id)
    return text.replace(encoded(BODY), encoded([[job_id], *BODY[1:]])).encode()


SIGNATURE = {"task": "codeherd.chat", "args": [MARK], "kwargs": {}, "options": {"queue": QUEUE}}

#: By name, what no worker may act on.
GARBAGE: Mapping[str, bytes] = {
    "bytes that are no text": b"\xff\xfe\x00" + MARK.encode(),
    "text that is no JSON": b"{" + MARK.encode(),
    "nothing": b"",
    "a number": b"42",
    "a text": b'"x"',
    "a list": b"[]",
    "an object": b"{}",
    "null": b"null",
    "not a number": b"NaN",
    "a megabyte of zeros": bytes(1_000_000),
    "deep nesting": b"[" * 4000 + b"]" * 4000,
    "deep objects": b'{"a":' * 4000 + b"1" + b"}" * 4000,
    "a number of a thousand digits": message(headers__retries=10**1000),
    "a number of ten thousand digits": b"1" * 7000,
    "infinity": message().replace(b'"retries": 0', b'"retries": Infinity'),
    "no properties": without("properties"),
    "no headers": without("headers"),
    "no body": without("body"),
    "no delivery tag": without("properties", "delivery_tag"),
    "no delivery info": without("properties", "delivery_info"),
    "no priority": without("properties", "priority"),
    "no id": without("headers", "id"),
    "no task": without("headers", "task"),
    "no root id": without("headers", "root_id"),
    "headers that are a list": message(headers=[]),
    "properties that are a text": message(properties="x"),
    "a body that is no text": message(body=BODY).replace(encoded(BODY).encode(), b"").replace(b'""', b"7", 1),
    "a body that is no base64": message().replace(encoded(BODY).encode(), b"%%%"),
    "a body that is no JSON": message().replace(encoded(BODY).encode(), base64.b64encode(MARK.encode())),
    "another body encoding": message(properties__body_encoding="rot13"),
    "a plain body": message(properties__body_encoding=None),
    "a delivery tag that is a list": message(properties__delivery_tag=[1]),
    "a priority that is a text": message(properties__priority="x"),
    "a priority beyond 9": message(properties__priority=99),
    "pickle": message(
        content_type="application/x-python-serialize", properties__body_encoding="base64"
    ).replace(encoded(BODY).encode(), base64.b64encode(pickle.dumps([[MARK], {}, {}]))),
    "yaml": message(content_type="application/x-yaml"),
    "another charset": message().replace(b'"utf-8"', b'"utf-7"'),
    "an unknown compression": message(headers__compression="application/x-none"),
    "a compression bomb": message(headers__compression="application/x-gzip").replace(
        encoded(BODY).encode(), base64.b64encode(gzip.compress(bytes(3_000_000)))
    ),
    "a marked type that kombu decodes": message(
        headers__stamps={"__type__": "uuid", "__value__": {"bytes": 1}}
    ),
    "a task of somebody else": message(headers__task="celery.backend_cleanup"),
    "a task name with a trick": message(headers__task="codeherd.generate\nx"),
    "a task that is a list": message(headers__task=["codeherd.generate"]),
    "an id with a NUL": for_job("x\\u0000y"),
    "an id with a quote": for_job("x' OR 1=1"),
    "an id with a newline": for_job("x\\ny"),
    "an id without end": for_job("x" * 65),
    "an id that is a number": message(headers__id=7),
    "another job in the arguments": message(body=[["other"], *BODY[1:]]),
    "two arguments": message(body=[[JOB, JOB], *BODY[1:]]),
    "no arguments": message(body=[[], *BODY[1:]]),
    "an argument that is an object": message(body=[[{"a": MARK}], *BODY[1:]]),
    "arguments by name": message(body=[[JOB], {"job_id": JOB}, BODY[2]]),
    "the first protocol": message(body={"task": task_name(JobKind.GENERATE), "id": "x", "args": [JOB]}),
    "a start far away": message(headers__eta="2999-01-01T00:00:00+00:00"),
    "a start that is no time": message(headers__eta=MARK),
    "an end": message(headers__expires="2999-01-01T00:00:00+00:00"),
    "retries": message(headers__retries=3),
    "a time limit": message(headers__timelimit=[1, 1]),
    "another name": message(headers__shadow=MARK),
    "a group": message(headers__group=MARK),
    "stamps": message(headers__stamps={"a": MARK}, headers__stamped_headers=["a"]),
    "a nesting": message(headers__replaced_task_nesting=1000),
    "a result that is kept": message(headers__ignore_result=True),
    "an unknown header": message(headers__further=MARK),
    "an unknown property": message(properties__further=MARK),
    "an unknown part": message(further=MARK),
    "arguments shown otherwise": message(headers__argsrepr=MARK),
    "an origin that is an object": message(headers__origin={"a": MARK}),
    "an address for answers": message(properties__reply_to=f"codeherd.{MARK} x"),
    "a callback": embedded(callbacks=[SIGNATURE]),
    "an error callback": embedded(errbacks=[SIGNATURE]),
    "a chain": embedded(chain=[SIGNATURE]),
    "a chord": embedded(chord=SIGNATURE),
    "another queue": message(properties__delivery_info={"exchange": "", "routing_key": "codeherd.other"}),
    "another exchange": message(
        properties__delivery_info={"exchange": "celery.pidbox", "routing_key": QUEUE}
    ),
}


@pytest.mark.parametrize("kind", list(JobKind))
@pytest.mark.parametrize("priority", [0, 3, 9])
def test_what_the_broker_publishes_is_a_hint(
    broker: Broker, client: redis.Redis, kind: JobKind, priority: int
) -> None:
    broker.publish([Hint(JOB, QUEUE, kind, priority, 12)])

    transport.check_hint(taken(client, priority), QUEUE)


def test_the_genuine_message_of_these_tests_is_one(broker: Broker, client: redis.Redis) -> None:
    broker.publish([Hint(JOB, QUEUE, JobKind.GENERATE, 5, 1)])

    published = json.loads(taken(client, 3))
    transport.check_hint(message(), QUEUE)

    assert published.keys() == GENUINE.keys()
    assert published["headers"].keys() == GENUINE["headers"].keys()
    assert published["properties"].keys() == GENUINE["properties"].keys()


@pytest.mark.parametrize("name", sorted(GARBAGE))
def test_what_asks_for_anything_but_one_job_is_no_hint(name: str) -> None:
    with pytest.raises(transport.NotOurs):
        transport.check_hint(GARBAGE[name], QUEUE)


def test_headers_that_a_newer_celery_adds_may_be_there_when_they_say_nothing() -> None:
    transport.check_hint(message(headers__further=None, properties__further={}), QUEUE)


def test_a_kind_of_job_that_only_a_newer_version_knows_is_told_apart() -> None:
    with pytest.raises(transport.NotOurs) as told:
        transport.check_hint(message(headers__task="codeherd.embed"), QUEUE)

    assert told.value.kind == transport.NEWER_KIND


def command(method: str = "ping", arguments: object = None, **changes: Any) -> bytes:
    headers = changes.pop("headers", {"clock": 1, "expires": 0})
    body = {"method": method, "arguments": arguments or {}, "destination": None, "pattern": None}
    return message(body=body | {"matcher": None} | changes, headers=headers)


#: Each is refused, and would do harm: run a regular expression, publish elsewhere, import, kill or hang.
FORGED_COMMANDS: Mapping[str, bytes] = {
    "no object": message(body=[MARK], headers={"clock": 1}),
    "no method": message(body={"arguments": {}}, headers={"clock": 1}),
    "an unknown method": command(MARK),
    "a method that is a list": command(["ping"]),  # type: ignore[arg-type]
    "an import": command("pool_restart", {"modules": [MARK], "reload": True}),
    "another model's queue": command("add_consumer", {"queue": "codeherd.other"}),
    "an argument that is none": command("ping", {"state": MARK}),
    "an argument of another type": command("cancel_job", {"job_id": ["x"]}),
    "a job id with a NUL": command("cancel_job", {"job_id": "\0"}),
    "arguments that are a list": command("ping", [MARK]),
    "a signal that is none": command("revoke", {"task_id": "x", "terminate": True, "signal": MARK}),
    "a regular expression without end": command(pattern="(a+)+$", matcher="pcre"),
    "a destination that is a text": command(destination="one"),
    "an answer to a queue": command(reply_to={"exchange": "", "routing_key": QUEUE}, ticket="a1"),
    "an answer to no address": command(reply_to=7, ticket="a1"),
    "a ticket that is a list": command(ticket=[1]),
    "a clock that is a text": command(headers={"clock": MARK}),
    "a clock without end": command(headers={"clock": 10**4000}),
    "a further key": command(further=MARK),
}


@pytest.mark.parametrize("name", sorted(FORGED_COMMANDS))
def test_what_no_operator_sends_is_no_command(name: str) -> None:
    with pytest.raises(transport.NotOurs):
        transport.check_command(FORGED_COMMANDS[name])


def heartbeat(**changes: object) -> dict[str, object]:
    plain = {"type": "worker-heartbeat", "hostname": "one@host", "utcoffset": 0.0, "pid": 7, "clock": 1}
    return plain | {"timestamp": 1795362311.4, "freq": 2} | changes


def event(body: object) -> bytes:
    return message(body=body, headers={"hostname": "one@host"})


@pytest.mark.parametrize(
    "body",
    [
        42,
        {},
        [heartbeat(), 42],
        heartbeat(type=MARK),
        heartbeat(type=["worker-heartbeat"]),
        heartbeat(hostname=None),
        heartbeat(clock="x"),
        heartbeat(clock=-1),
        heartbeat(timestamp="x"),
        heartbeat(timestamp=float("nan")),
        heartbeat(utcoffset=None),
        heartbeat(type="task-started"),
    ],
    ids=repr,
)
def test_what_flower_could_not_read_is_no_event(body: object) -> None:
    with pytest.raises(transport.NotOurs):
        transport.check_event(event(body))


@pytest.mark.parametrize("body", [heartbeat(), [heartbeat(), heartbeat(type="task-started", uuid="x")]])
def test_what_workers_tell_flower_is_an_event(body: object) -> None:
    transport.check_event(event(body))


@pytest.mark.parametrize("body", [42, [], "x", None])
def test_an_answer_that_is_no_object_is_none(body: object) -> None:
    with pytest.raises(transport.NotOurs):
        transport.check_reply(message(body=body, headers={"ticket": "a1", "clock": 1}))


def test_the_log_has_a_line_a_minute_for_each_kind_and_no_content(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    refusals = transport.Refusals(clock=lambda: now)

    with caplog.at_level(logging.INFO):
        for second in range(120):
            now = float(second)
            for _ in range(100):
                refusals.add("not_json", QUEUE, 3)
        refusals.add("too_large", QUEUE, 3)
        refusals.add(transport.NEWER_KIND, QUEUE, 3)

    assert refusals.counts() == {"not_json": 12_000, "too_large": 1, transport.NEWER_KIND: 1}
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", f"message_refused kind=not_json place={QUEUE} bytes=3 count=1"),
        ("WARNING", f"message_refused kind=not_json place={QUEUE} bytes=3 count=6001"),
        ("WARNING", f"message_refused kind=too_large place={QUEUE} bytes=3 count=1"),
        ("INFO", f"message_refused kind={transport.NEWER_KIND} place={QUEUE} bytes=3 count=1"),
    ]


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+socket", "sentinel"])
def test_every_kind_of_address_goes_through_the_check(scheme: str) -> None:
    settings = SharedSettings.model_validate(
        {"broker_url": f"{scheme}://:pw@127.0.0.1:1/0", "sentinel_master": "herd"}
    )
    app = make_app(settings, [QUEUE])
    checked = {transport.RedisTransport, transport.SentinelTransport}

    connections = (
        app.connection(),
        app.connection_for_read().clone(),
        app.connection().Pool(1).new(),
        app.pool.new(),
    )
    for connection in connections:
        assert connection.get_transport_cls() in checked
        if "+" not in scheme:  # kombu cannot go on to another socket file
            connection.switch(f"{scheme}://:pw@127.0.0.1:2/0")
        assert connection.get_transport_cls() in checked


def test_what_nobody_announced_is_no_ending(broker: Broker, client: redis.Redis) -> None:
    with broker.endings() as heard:
        for data in (b"", b"\xff\xfe", b"x" * 10_000, b"a b", b"job1"):
            client.publish("codeherd:done", data)

        found = [heard.wait(1) for _ in range(2)]

    assert frozenset().union(*found) == {"job1"}


def test_answers_that_are_none_are_passed_over(broker: Broker, client: redis.Redis) -> None:
    stop = threading.Event()

    def answer_badly() -> None:
        while not stop.wait(0.01):
            members: Any = client.smembers("codeherd:_kombu.binding.reply.celery.pidbox")
            for member in members:
                queue = b"codeherd:" + member.rpartition(b"\x06\x16")[2]
                if not client.llen(queue):
                    client.lpush(queue, *GARBAGE.values())

    before = sum(transport.refused().values())
    liar = threading.Thread(target=answer_badly)
    liar.start()
    try:
        assert broker.workers(2.0) == {}
    finally:
        stop.set()
        liar.join()
    assert sum(transport.refused().values()) > before


def test_whoever_watches_events_sees_the_real_ones_only(broker_url: str, client: redis.Redis) -> None:
    app = make_app(settings_at(broker_url), [QUEUE])
    seen: list[dict[str, Any]] = []
    before = sum(transport.refused().values())

    with app.connection() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": seen.append})
        captured = receiver.itercapture(limit=None, timeout=60, wakeup=False)
        next(captured)
        for topic in ("worker.heartbeat", "", "x/y"):
            for data in (*GARBAGE.values(), event(42), event(heartbeat(clock="x"))):
                client.publish(f"codeherd:/0.celeryev/{topic}", data)
        client.publish("codeherd:/0.celeryev/worker.heartbeat", event(heartbeat(freq=3)))
        for _ in captured:
            if seen:
                break
        captured.close()

    assert [e["freq"] for e in seen] == [3]
    assert sum(transport.refused().values()) - before == 3 * (len(GARBAGE) + 2)
    app.close()


class Target:
    """A worker to be pelted, and one job after the other to see that it lives."""

    def __init__(self, herd: NullHerd, client: redis.Redis) -> None:
        self.herd = herd
        self.client = client
        self.pids = herd.pids("one")

    def pelt(self, *elements: bytes) -> None:
        for priority in ("", "\x06\x163", "\x06\x166", "\x06\x169"):
            self.client.lpush(f"codeherd:{QUEUE}{priority}", *elements)

    def broadcast(self, *messages: bytes) -> None:
        for data in messages:
            self.client.publish("codeherd:/0.celery.pidbox", data)

    def is_well(self) -> None:
        """Run a job on the process that was there from the start."""
        job = self.herd.client.submit(GenerateRequest(prompt="def fib(n):"))
        assert job.result(JOBS_TIMEOUT_S).text
        assert self.herd.pids("one") == self.pids
        wait_until(lambda: self.herd.broker.waiting(QUEUE) == 0, "the queue to be empty")

    def refusals(self) -> dict[str, int]:
        """Return the last count that the log gives of each kind."""
        found = re.findall(r"message_refused kind=(\w+) .* count=(\d+)", self.herd.log("one"))
        return {kind: int(count) for kind, count in found}


@pytest.fixture(scope="module")
def own_redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def target(
    tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path, own_redis: RedisServer
) -> Iterator[Target]:
    """One worker for all of these tests: none of them may so much as restart it."""
    folder = tmp_path_factory.mktemp("garbage")
    database = folder / "codeherd.db"
    database.write_bytes(migrated_sqlite.read_bytes())
    with redis.Redis(port=own_redis.port) as client:
        # What a worker of another version, or somebody, may have left before it starts.
        client.hset("codeherd:unacked", "tag", b"\xff{")
        client.zadd("codeherd:unacked_index", {"tag": 1, b"\xff": 1})
        client.sadd("codeherd:_kombu.binding.reply.celery.pidbox", b"\xff\xfe", "one", "a\x06\x16b")
        client.sadd("codeherd:_kombu.binding.celery.pidbox", b"\xff\xfe", "one")
        with NullHerd(
            database_url=f"sqlite:///{database}", broker_url=own_redis.url, folder=folder, slots=2
        ) as herd:
            yield Target(herd, client)


def test_a_worker_outlives_every_kind_of_garbage_in_its_queue(target: Target) -> None:
    target.pelt(*GARBAGE.values())

    target.is_well()

    log = target.herd.log("one")
    assert MARK not in log
    assert "Traceback" not in log
    assert {"not_json", "not_a_message", "not_a_hint", "too_large"} <= target.refusals().keys()


def test_a_worker_outlives_every_kind_of_garbage_on_its_control_channel(target: Target) -> None:
    elsewhere = ("codeherd:/0.celery.pidbox", "codeherd:/0.", "codeherd:/0.celeryev/worker.heartbeat")
    keys = set(target.client.keys())
    for channel in elsewhere:
        for data in (*GARBAGE.values(), *FORGED_COMMANDS.values()):
            target.client.publish(channel, data)

    target.is_well()

    assert "Traceback" not in target.herd.log("one")
    assert MARK not in target.herd.log("one")
    assert target.herd.figures()
    # No answer was sent anywhere; reply queues of our own inspections come and go.
    new = {key for key in set(target.client.keys()) - keys if b"reply.celery.pidbox" not in key}
    assert not new


def test_nothing_forged_is_held_and_nothing_is_published_for_it(target: Target) -> None:
    forged = [
        message(headers__eta="2999-01-01T00:00:00+00:00"),
        embedded(callbacks=[SIGNATURE], chain=[SIGNATURE], errbacks=[SIGNATURE]),
    ]
    target.pelt(*forged * 10)
    target.is_well()

    app = make_app(target.herd.settings, [QUEUE])
    inspect = app.control.inspect(timeout=10, limit=1)
    assert [len(held) for held in inspect.scheduled().values()] == [0]
    assert [len(held) for held in inspect.reserved().values()] == [0]
    assert target.herd.broker.waiting(QUEUE) == 0
    app.close()


def test_a_flood_of_garbage_leaves_few_lines_in_the_log_and_the_next_job_runs(target: Target) -> None:
    before = len(target.herd.log("one").splitlines())
    target.client.lpush(f"codeherd:{QUEUE}\x06\x163", *[b"{" + MARK.encode()] * 10_000)

    wait_until(lambda: target.herd.broker.waiting(QUEUE) == 0, "the flood to be over", timeout_s=240)
    target.is_well()

    after = target.herd.log("one").splitlines()[before:]
    assert len(after) < 100
    assert MARK not in "\n".join(after)


def test_a_key_that_is_no_list_is_cleared_away(target: Target) -> None:
    for kind in (lambda key: target.client.set(key, MARK), lambda key: target.client.sadd(key, MARK)):
        kind(f"codeherd:{QUEUE}")
        kind(f"codeherd:{QUEUE}\x06\x169")

        wait_until(lambda: not target.client.exists(f"codeherd:{QUEUE}"), "the key to go")
        target.is_well()

    assert target.refusals()["not_a_list"] >= 1


def test_a_hint_of_a_job_that_is_not_there_does_nothing(target: Target) -> None:
    target.pelt(for_job(JOB), for_job("no-such-job"), message(headers__task=task_name(JobKind.CHAT)))

    target.is_well()


def test_every_command_of_an_operator_is_heard(target: Target) -> None:
    app = make_app(target.herd.settings, [QUEUE])
    inspect = app.control.inspect(timeout=30, limit=1)
    questions: dict[str, Callable[[], Any]] = {
        "ping": inspect.ping,
        "clock": inspect.clock,
        "conf": inspect.conf,
        "conf with defaults": lambda: inspect.conf(with_defaults=True),
        "report": inspect.report,
        "stats": inspect.stats,
        "active": inspect.active,
        "reserved": inspect.reserved,
        "scheduled": inspect.scheduled,
        "revoked": inspect.revoked,
        "registered": inspect.registered,
        "active queues": inspect.active_queues,
        "query": lambda: inspect.query_task(["a.1"]),
    }
    control = app.control
    orders: dict[str, Callable[[], Any]] = {
        "revoke": lambda: control.revoke("a.1", reply=True, timeout=30, limit=1),
        "revoke all": lambda: control.revoke(["a.1", "b.1"], terminate=True, reply=True, timeout=30, limit=1),
        # As Flower's button does.
        "revoke with a number": lambda: control.revoke(
            "a.1", terminate=1, signal="SIGTERM", reply=True, timeout=30, limit=1
        ),
        "terminate": lambda: control.terminate("a.1", reply=True, timeout=30, limit=1),
        "enable events": lambda: control.enable_events(reply=True, timeout=30, limit=1),
        "cancel": lambda: control.broadcast("cancel_job", {"job_id": "x"}, reply=True, timeout=30, limit=1),
    }

    silent = [name for name, ask in (questions | orders).items() if not ask()]

    assert silent == []
    app.close()


@pytest.mark.parametrize("method", sorted(transport.COMMANDS))
def test_every_command_that_is_let_in_exists(method: str) -> None:
    from celery.worker.control import Panel

    import codeherd_worker.app  # noqa: F401 -- registers ours

    assert method in Panel.data


def test_a_job_of_a_newer_version_waits_for_a_newer_worker(target: Target) -> None:
    herd = target.herd
    [answer] = herd.store.submit([a_request(run_at=timedelta(days=1))], queue_of=lambda _: QUEUE)
    rewrite(herd.settings.database, answer.job_id, schema_version=99, run_at=0)

    def is_hinted_again() -> bool:
        [job] = herd.store.get_many([answer.job_id]).values()
        return job.publish_no >= 2

    wait_until(is_hinted_again, "a second hint")
    target.is_well()

    [job] = herd.store.get_many([answer.job_id]).values()
    assert (job.state, job.attempt) == (JobState.QUEUED, 0)
    herd.store.request_cancel(answer.job_id)


def test_a_hint_of_a_kind_that_only_newer_workers_know_is_dropped_quietly(target: Target) -> None:
    target.pelt(message(headers__task="codeherd.embed"))

    target.is_well()

    assert target.refusals()[transport.NEWER_KIND] == 1
    assert "WARNING" not in "".join(
        line for line in target.herd.log("one").splitlines() if transport.NEWER_KIND in line
    )
