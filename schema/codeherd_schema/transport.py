"""The door between Redis and Celery: what is no message of ours is dropped, counted and not looked at.

Owns: the shape of every message that a process of ours takes from Redis, as far as it is ours to
say, and kombu's Redis transport with a check of it before anything else. Whoever may write to
Redis may put anything there; kombu and Celery would raise on some of it (which ends a worker), hold
some for ever (`eta`) and obey some (`chain`, `reply_to`). Does not know what a message asks for
(`codeherd_schema.broker` sends them) or whether its job exists (SQL). Tried with kombu 5.7.0,
celery 5.7.0 and flower 2.2.0.

    list `codeherd.MODEL`             hints, from `Broker.publish`: a job's id and nothing else
    list `….reply.celery.pidbox`      a worker's answer to an inspection
    channel `celery.pidbox`           commands to workers, from the broker and from Flower
    channel `celeryev/…`              events, for Flower
"""

from __future__ import annotations

import base64
import logging
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from queue import Empty
from types import MappingProxyType
from typing import Any, Final

import kombu
from celery.app.amqp import AMQP
from kombu import connection as kombu_connection
from kombu.transport import redis as kombu_redis
from kombu.utils.json import loads
from redis.exceptions import OutOfMemoryError, ResponseError

from codeherd_schema.requests import JobKind

logger = logging.getLogger(__name__)

#: Most bytes of a hint; one of ours has about 1,100.
MAX_HINT_BYTES: Final = 8_192
#: Most bytes of a command or an event; `revoke` may name many tasks.
MAX_NEWS_BYTES: Final = 262_144
#: Most bytes of an answer; the figures of a worker with many slots have some ten thousand.
MAX_REPLY_BYTES: Final = 8_388_608
#: Deepest nesting of lists and objects. Python's own limit depends on who calls.
MAX_DEPTH: Final = 32
#: Bound of every whole number: a clock beyond it could not be written as JSON again.
MAX_NUMBER: Final = 2**63
#: Seconds between two lines in the log about one kind of refusal.
LOG_INTERVAL_S: Final = 60.0

#: A message of this kind is for workers of a newer version: its job waits for them in SQL.
NEWER_KIND: Final = "newer_kind"

#: What a job's id may be made of.
_JOB_ID: Final = re.compile(r"[0-9A-Za-z_-]{1,64}", re.ASCII)
#: A hint's task id: the job's id and how often it was published.
_TASK_ID: Final = re.compile(r"([0-9A-Za-z_-]{1,64})\.[0-9]{1,18}", re.ASCII)
_TASK_NAME: Final = re.compile(r"codeherd\.[a-z_]{1,64}", re.ASCII)
#: kombu's tags, tickets and reply addresses are UUIDs.
_TAG: Final = re.compile(r"[0-9A-Fa-f-]{1,64}", re.ASCII)
_EVENT_TYPE: Final = re.compile(r"(task|worker)-[a-z-]{1,64}", re.ASCII)

#: The suffix of queues that answers go to, and their exchange.
_REPLIES: Final = "reply.celery.pidbox"
_COMMANDS_EXCHANGE: Final = "celery.pidbox"
_EVENTS_EXCHANGE: Final = "celeryev"


def task_name(kind: str) -> str:
    """Return the Celery task of a job kind: one each, so that Flower tells them apart."""
    return f"codeherd.{kind}"


def hint_id(job_id: str, publish_no: int) -> str:
    """Return a hint's task id, another for each publication.

    A worker discards an id that was once terminated there.
    """
    return f"{job_id}.{publish_no}"


def hint_repr(job_id: str) -> str:
    """Return what Flower shows as a hint's arguments."""
    return f"({job_id})"


def is_job_id(text: object) -> bool:
    """Whether this can be a job's id at all."""
    return isinstance(text, str) and _JOB_ID.fullmatch(text) is not None


class Refusals:
    """Counts what was dropped, by kind, and says so now and then."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start at nothing.

        Args:
            clock: seconds, monotonic.
        """
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._logged_at: dict[str, float] = {}

    def add(self, kind: str, place: str, size: int) -> None:
        """Count one; log the first of its kind, and then one a minute, without its content.

        Args:
            kind: why it was refused.
            place: the queue or exchange, by our own name of it.
            size: bytes.
        """
        now = self._clock()
        with self._lock:
            self._counts[kind] += 1
            count = self._counts[kind]
            logged_at = self._logged_at.get(kind)
            is_due = logged_at is None or now - logged_at >= LOG_INTERVAL_S
            if is_due:
                self._logged_at[kind] = now
        if is_due:
            level = logging.INFO if kind == NEWER_KIND else logging.WARNING
            logger.log(level, "message_refused kind=%s place=%s bytes=%d count=%d", kind, place, size, count)

    def counts(self) -> Mapping[str, int]:
        """Return how many were refused, by kind."""
        with self._lock:
            return MappingProxyType(dict(self._counts))


_REFUSALS = Refusals()


def refused() -> Mapping[str, int]:
    """Return how many messages this process has refused since it started, by kind."""
    return _REFUSALS.counts()


class NotOurs(Exception):
    """Nothing of ours says this; `kind` is the reason in one word."""

    def __init__(self, kind: str) -> None:
        """Keep the reason."""
        super().__init__(kind)
        self.kind = kind


def check_hint(raw: bytes, queue: str) -> None:
    """Accept what `Broker.publish` puts into `queue`, and nothing that asks for more than one job.

    A header or property that this version does not know must be empty: a newer Celery may add some.

    Raises:
        NotOurs: drop it.
    """
    headers, properties, body = _opened(raw, MAX_HINT_BYTES)
    task_id = headers.get("id")
    found = _TASK_ID.fullmatch(task_id) if isinstance(task_id, str) else None
    task = headers.get("task")
    if found is None or not isinstance(task, str):
        raise NotOurs("not_a_hint")
    if task not in _TASKS:
        raise NotOurs(NEWER_KIND if _TASK_NAME.fullmatch(task) else "not_a_hint")
    job_id = found[1]
    shown = {"argsrepr": hint_repr(job_id), "kwargsrepr": "{}"}
    _check_says(
        headers, {**_HEADERS, "task": task, "id": task_id, "root_id": task_id, **shown}, _FREE_HEADERS
    )
    _check_says(properties, {"correlation_id": task_id, **shown}, _FREE_PROPERTIES)
    _require(_goes_to(properties, "", queue), "not_a_hint")
    _require(isinstance(body, list) and len(body) == 3 and body[:2] == [[job_id], {}], "not_a_hint")
    _require(isinstance(body[2], dict) and not any(body[2].values()), "not_a_hint")


def check_reply(raw: bytes) -> None:
    """Accept an answer of a worker to an inspection.

    Raises:
        NotOurs: drop it.
    """
    headers, _, body = _opened(raw, MAX_REPLY_BYTES)
    _require(_is_tag(headers.get("ticket")) and _is_count(headers.get("clock")), "not_a_reply")
    _require(isinstance(body, dict), "not_a_reply")


def check_command(raw: bytes) -> None:
    """Accept a command of `COMMANDS` with arguments of the right types.

    Raises:
        NotOurs: drop it.
    """
    headers, _, body = _opened(raw, MAX_NEWS_BYTES)
    _require(isinstance(body, dict) and _is_count(headers.get("clock")), "not_a_command")
    wanted = COMMANDS.get(body.get("method")) if isinstance(body.get("method"), str) else None
    arguments = body.get("arguments")
    if wanted is None or not (isinstance(arguments, dict) or arguments is None):
        raise NotOurs("not_a_command")
    for name, value in (arguments or {}).items():
        _require(name in wanted and wanted[name](value), "not_a_command")
    destination = body.get("destination")
    _require(destination is None or _is_texts(destination), "not_a_command")
    # A pattern would be run as a regular expression, in the event loop.
    _require(body.get("pattern") is None and body.get("matcher") is None, "not_a_command")
    reply_to, ticket = body.get("reply_to"), body.get("ticket")
    _require(reply_to is None or _is_reply_address(reply_to), "not_a_command")
    _require(ticket is None or _is_tag(ticket), "not_a_command")
    _require(body.keys() <= _COMMAND_KEYS, "not_a_command")


def check_event(raw: bytes) -> None:
    """Accept an event, or a list of them, with everything that Flower reads of each.

    Raises:
        NotOurs: drop it.
    """
    _, _, body = _opened(raw, MAX_NEWS_BYTES)
    events = body if isinstance(body, list) else [body]
    _require(all(_is_event(event) for event in events), "not_an_event")


def _opened(raw: bytes, limit: int) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Return headers, properties and the decoded body of a message in kombu's envelope."""
    if len(raw) > limit:
        raise NotOurs("too_large")
    message = _decoded(raw)
    if not isinstance(message, dict) or not message.keys() >= _ENVELOPE_KEYS:
        raise NotOurs("not_a_message")
    headers, properties, body = message["headers"], message["properties"], message["body"]
    is_plain = (
        message.keys() <= _ENVELOPE_KEYS | {"redelivered"}
        and message["content-type"] == "application/json"
        and message["content-encoding"] == "utf-8"
        and isinstance(headers, dict)
        # A compressed body may be a bomb, and none of ours is.
        and "compression" not in headers
        and isinstance(properties, dict)
        and properties.get("body_encoding") == "base64"
        and _is_tag(properties.get("delivery_tag"))
        and isinstance(properties.get("delivery_info"), dict)
        and _is_priority(properties.get("priority"))
        and isinstance(body, str)
    )
    if not is_plain:
        raise NotOurs("not_a_message")
    try:
        decoded = base64.b64decode(body, validate=True)
    except ValueError as err:
        raise NotOurs("not_a_message") from err
    return headers, properties, _decoded(decoded)


def _decoded(raw: bytes) -> Any:
    """Decode as kombu will do again, and refuse what could hurt it or whoever reads the values."""
    try:
        value = loads(raw)
    except Exception as err:
        # The decoders of kombu's marked types raise what they like.
        raise NotOurs("not_json") from err
    _check_plain(value, MAX_DEPTH)
    return value


def _check_plain(value: Any, depth: int) -> None:
    match value:
        case dict() if depth:
            for item in value.values():
                _check_plain(item, depth - 1)
        case list() if depth:
            for item in value:
                _check_plain(item, depth - 1)
        case None | bool() | str() | float():
            # Celery itself answers with Infinity, for some limits.
            pass
        case int():
            _require(-MAX_NUMBER < value < MAX_NUMBER, "not_json")
        case _:
            raise NotOurs("not_json")


def _check_says(
    fields: Mapping[str, Any], said: Mapping[str, Any], free: Mapping[str, Callable[[Any], bool]]
) -> None:
    """Require that `fields` say this, have what is allowed in the free ones, and nothing else."""
    for name, value in said.items():
        _require(fields.get(name) == value, "not_a_hint")
    for name, value in fields.items():
        is_allowed = free.get(name, _is_empty)
        _require(name in said or is_allowed(value), "not_a_hint")


def _require(condition: bool, kind: str) -> None:
    if not condition:
        raise NotOurs(kind)


def _is_empty(value: Any) -> bool:
    return value in (None, 0, "", [], {}, [None, None])


def _is_tag(value: Any) -> bool:
    return isinstance(value, str) and _TAG.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_priority(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 9


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_maybe_flag(value: Any) -> bool:
    # Flower sends 1 for true.
    return value is None or (isinstance(value, int) and value in (0, 1))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_text_or_texts(value: Any) -> bool:
    return _is_text(value) or _is_texts(value)


def _is_maybe_texts(value: Any) -> bool:
    return value is None or _is_texts(value)


def _is_maybe_signal(value: Any) -> bool:
    return value is None or value in _SIGNALS


def _is_reply_address(value: Any) -> bool:
    # Anywhere else the worker's answer would become a message of the sender's choice.
    return (
        isinstance(value, dict)
        and value.keys() == {"exchange", "routing_key"}
        and value["exchange"] == _REPLIES
        and _is_tag(value["routing_key"])
    )


def _is_event(event: Any) -> bool:
    return (
        isinstance(event, dict)
        and isinstance(event.get("type"), str)
        and _EVENT_TYPE.fullmatch(event["type"]) is not None
        and isinstance(event.get("hostname"), str)
        and _is_count(event.get("clock"))
        and _is_number(event.get("timestamp"))
        and _is_number(event.get("utcoffset"))
        and (not event["type"].startswith("task-") or isinstance(event.get("uuid"), str))
    )


def _is_info(value: Any) -> bool:
    # `exchange` and `routing_key` are compared elsewhere.
    return isinstance(value, dict)


def _goes_to(properties: Mapping[str, Any], exchange: str, routing_key: str) -> bool:
    info = properties["delivery_info"]
    return bool(info.get("exchange") == exchange and info.get("routing_key") == routing_key)


#: What the headers of a hint say, but who it is about. Celery takes an `eta` or `expires` that is not None
#: for a moment, and ends on it if it is none.
_HEADERS: Final[Mapping[str, Any]] = {
    "lang": "py",
    "shadow": None,
    "eta": None,
    "expires": None,
    "group": None,
    "group_index": None,
    "retries": 0,
    "timelimit": [None, None],
    "parent_id": None,
    "ignore_result": None,
    "replaced_task_nesting": 0,
    "stamped_headers": None,
    "stamps": {},
}

_TASKS: Final = frozenset(task_name(kind) for kind in JobKind)
_ENVELOPE_KEYS: Final = frozenset({"body", "content-encoding", "content-type", "headers", "properties"})
_FREE_HEADERS: Final[Mapping[str, Callable[[Any], bool]]] = {"origin": _is_text}
#: Beside what `_opened` has looked at: the address that Celery would send a result to, which it never does
#: without a result backend.
_FREE_PROPERTIES: Final[Mapping[str, Callable[[Any], bool]]] = {
    "body_encoding": _is_text,
    "delivery_info": _is_info,
    "delivery_mode": _is_count,
    "delivery_tag": _is_tag,
    "priority": _is_priority,
    "reply_to": _is_tag,
}
_COMMAND_KEYS: Final = frozenset(
    {"method", "arguments", "destination", "pattern", "matcher", "reply_to", "ticket"}
)

_SIGNALS: Final = tuple(prefix + name for prefix in ("", "SIG") for name in ("TERM", "INT", "KILL", "QUIT"))

#: The commands that a worker hears, with the arguments of each. Celery has more: `pool_restart` imports
#: modules, `objgraph`, `memsample` and `memdump` take memory, `add_consumer` would have a worker take
#: another model's jobs; pools and time limits of ours cannot be changed while they run.
COMMANDS: Final[Mapping[str, Mapping[str, Callable[[Any], bool]]]] = {
    "cancel_job": {"job_id": is_job_id},
    "engine_stats": {},
    "ping": {},
    "clock": {},
    "conf": {"with_defaults": _is_maybe_flag},
    "report": {},
    "stats": {},
    "active": {"safe": _is_maybe_flag},
    "reserved": {},
    "scheduled": {},
    "revoked": {},
    "registered": {"taskinfoitems": _is_maybe_texts, "builtins": _is_maybe_flag},
    "active_queues": {},
    "query_task": {"ids": _is_text_or_texts},
    "enable_events": {},
    "disable_events": {},
    "heartbeat": {},
    "revoke": {"task_id": _is_text_or_texts, "terminate": _is_maybe_flag, "signal": _is_maybe_signal},
    "terminate": {"task_id": _is_text_or_texts, "signal": _is_maybe_signal},
    "shutdown": {},
}


def _passes(check: Callable[[], None], place: str, size: int) -> bool:
    try:
        check()
    except NotOurs as err:
        _REFUSALS.add(err.kind, place, size)
        return False
    return True


def _is_admitted_from_list(key: bytes, raw: bytes) -> bool:
    queue = key.decode().rsplit(kombu_redis.Channel.sep, 1)[0]
    if queue.endswith(_REPLIES):
        return _passes(lambda: check_reply(raw), _REPLIES, len(raw))
    return _passes(lambda: check_hint(raw, queue), queue, len(raw))


def _is_admitted_from_channel(channel: bytes, raw: bytes) -> bool:
    # kombu's own way from a channel's name, `/DB.EXCHANGE/ROUTING.KEY`, to the exchange's.
    exchange = channel.decode(errors="replace").partition(".")[2].split("/", 1)[0]
    check = {_COMMANDS_EXCHANGE: check_command, _EVENTS_EXCHANGE: check_event}.get(exchange)
    if check is None:
        _REFUSALS.add("not_a_message", "unknown exchange", len(raw))
        return False
    return _passes(lambda: check(raw), exchange, len(raw))


def _is_binding(member: bytes) -> bool:
    try:
        return member.decode().count(kombu_redis.Channel.sep) == 2
    except UnicodeDecodeError:
        return False


class _CheckedPubSub(kombu_redis.PrefixedRedisPubSub):  # type: ignore[misc]
    """Hands on no message that is none of ours; an empty one is passed over by kombu."""

    def parse_response(self, *args: Any, **options: Any) -> Any:
        reply = super().parse_response(*args, **options)
        # kombu subscribes to patterns; a subscription by name is the caller's own to judge.
        if isinstance(reply, list) and reply[0] in (b"pmessage", "pmessage"):
            *head, channel, raw = reply
            if not _is_admitted_from_channel(channel, raw):
                return [*head, channel, b""]
        return reply


class _CheckedRedis(kombu_redis.PrefixedStrictRedis):  # type: ignore[misc]
    """Hands on no list element that is no message of ours: as if it had waited in vain."""

    #: How many have heard what this client published last.
    listeners = 0

    def publish(self, channel: Any, message: Any, **options: Any) -> Any:
        self.listeners = super().publish(channel, message, **options)
        return self.listeners

    def parse_response(self, connection: Any, command_name: str, **options: Any) -> Any:
        reply = super().parse_response(connection, command_name, **options)
        if command_name == "BRPOP" and reply and not _is_admitted_from_list(*reply):
            return None
        if command_name == "SMEMBERS":
            return {member for member in reply if _is_binding(member)}
        return reply

    def pubsub(self, **options: Any) -> _CheckedPubSub:
        return _CheckedPubSub(self.connection_pool, global_keyprefix=self.global_keyprefix, **options)


class _CheckedChannel(kombu_redis.Channel):  # type: ignore[misc]
    """A channel whose clients check what they receive."""

    _own_client: Any = None

    @property
    def listeners(self) -> int:
        """How many have heard what was published last, other than in a batch."""
        return 0 if self._own_client is None else int(self._own_client.listeners)

    def _create_client(self, asynchronous: bool = False) -> Any:
        """Return a client; without `asynchronous` one that stays: kombu makes another for each call."""
        if asynchronous:
            return super()._create_client(asynchronous=True)
        pool = self.pool
        if self._own_client is None or self._own_client.connection_pool is not pool:
            self._own_client = super()._create_client()
        return self._own_client

    def _get_client(self) -> Callable[..., _CheckedRedis]:
        super()._get_client()  # its check of redis-py's version
        prefix = self.global_keyprefix
        return lambda **options: _CheckedRedis(global_keyprefix=prefix, **options)

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)
        except ResponseError as err:
            self._drop_what_is_no_list(self.active_queues, err)
            raise Empty from err

    def _size(self, queue: str) -> Any:
        try:
            return super()._size(queue)
        except ResponseError as err:
            # Asked for when a worker starts: it would end, and so would the next.
            self._drop_what_is_no_list([queue], err)
            return super()._size(queue)

    def _drop_what_is_no_list(self, queues: Iterable[str], err: ResponseError) -> None:
        """Delete whatever else lies under the name of a queue: the worker would wait there for ever.

        Raises:
            ResponseError: the error is another one.
        """
        # In a pipeline the command is named before it.
        if "WRONGTYPE" not in str(err):
            raise err
        with self.conn_or_acquire() as client:
            for queue in queues:
                for priority in self.priority_steps:
                    key = self._q_for_pri(queue, priority)
                    try:
                        client.llen(key)
                    except ResponseError:
                        client.delete(key)
                        _REFUSALS.add("not_a_list", queue, 0)


class _CheckedSentinelChannel(_CheckedChannel, kombu_redis.SentinelChannel):  # type: ignore[misc]
    """The same behind Sentinel."""


# A Redis that is full is one that is away for a while: a worker that reconnects tries again.
class RedisTransport(kombu_redis.Transport):  # type: ignore[misc]
    """kombu's Redis transport that hands on messages of ours only."""

    Channel = _CheckedChannel
    connection_errors = (*kombu_redis.Transport.connection_errors, OutOfMemoryError)


class SentinelTransport(kombu_redis.SentinelTransport):  # type: ignore[misc]
    """kombu's Sentinel transport that hands on messages of ours only."""

    Channel = _CheckedSentinelChannel
    connection_errors = RedisTransport.connection_errors


_CHECKED: Final = {
    kombu_redis.Transport: RedisTransport,
    kombu_redis.SentinelTransport: SentinelTransport,
}


class _Checked:
    """Takes the checked transport in place of the one that the address names.

    A transport given by name would not do: kombu takes the scheme's own for `redis+socket://`, and
    after a failover to another Sentinel.
    """

    def get_transport_cls(self) -> Any:
        named = super().get_transport_cls()  # type: ignore[misc]
        return _CHECKED.get(named, named)


class _PooledConnection(_Checked, kombu_connection.PooledConnection):  # type: ignore[misc]
    """A connection of a pool."""


class _ConnectionPool(kombu_connection.ConnectionPool):  # type: ignore[misc]
    """A pool of connections like the one it is made from."""

    def new(self) -> _PooledConnection:
        return _PooledConnection(self, **dict(self.connection._info(resolve=False)))  # noqa: SLF001 -- as kombu's own


class HerdConnection(_Checked, kombu.Connection):  # type: ignore[misc]
    """A connection to the user's own address, through a transport of ours."""

    def Pool(self, limit: int | None = None, **options: Any) -> _ConnectionPool:  # noqa: N802 -- kombu's name
        """Return a pool of connections to the same address."""
        return _ConnectionPool(self, limit, **options)


class HerdAMQP(AMQP):  # type: ignore[misc]
    """What a Celery app makes its connections with: `Celery(amqp=HerdAMQP)`."""

    Connection = HerdConnection
