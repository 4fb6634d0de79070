"""The one door to Celery and Redis: every setting of theirs that we use, once, with its reason.

Owns: the Celery configuration, queue and task names, publishing hints, Redis notifications.
Does not know jobs beyond their id, kind and priority: SQL is the queue of record, a message here is
a hint that may be lost, repeated or late without harm. Settings were tried with celery 5.7.0,
kombu 5.7.0 and redis-server 6.2 and 7.0.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import ssl
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import kombu
from celery import Celery
from celery.app.control import Control
from celery.app.events import Events
from celery.events import EventDispatcher
from kombu.exceptions import KombuError
from kombu.pidbox import Mailbox
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from codeherd_schema.errors import BrokerUnavailable
from codeherd_schema.queues import queue_name as queue_name
from codeherd_schema.settings import SharedSettings
from codeherd_schema.store import Hint
from codeherd_schema.transport import HerdAMQP, hint_id, hint_repr, is_job_id
from codeherd_schema.transport import task_name as task_name

T = TypeVar("T")

#: Sub-queues per queue; Redis 0 is the first to be taken (kombu's default steps, given for Flower).
PRIORITY_STEPS = (0, 3, 6, 9)
#: Seconds after which a silent Redis counts as gone; without it a publish can hang for ever.
SOCKET_TIMEOUT_S = 5.0
#: Connections to Redis that one `Broker` keeps; more threads than this wait for one another.
CONNECTIONS = 8
#: Messages that go to Redis in one round trip.
BATCH = 100
#: Seconds for which nobody has heard an event until events of tasks are left out: a Flower that is started
#: with its workers misses none.
QUIET_S = 10.0
#: Seconds for which they are left out after another one that nobody has heard. Workers tell that they live
#: every two seconds, so whoever begins to listen is noticed within that.
DEAF_S = 10.0
#: Events of tasks that have not ended.
_NOT_ENDED = frozenset({"task-received", "task-started"})
#: Pub/sub channel, after the key prefix, on which workers say that a job has ended.
DONE_CHANNEL = "done"

#: What a certificate that is refused may lack.
_CERTIFICATE_HINT = (
    "CODEHERD_BROKER_CA_FILE must name the authority that signed the server's certificate, which must be "
    "in force and hold the host of CODEHERD_BROKER_URL"
)


def celery_settings(settings: SharedSettings, queues: Sequence[str]) -> dict[str, Any]:
    """Return the Celery configuration for producers, dispatchers and workers alike."""
    secure = settings.broker.startswith("rediss://")
    transport_options = {
        # A second copy of every message in Redis until it is acknowledged: SQL knows what was lost.
        # What others put there would be restored, or stop every worker at its start.
        "ack_emulation": False,
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": settings.connect_timeout_s,
        "socket_keepalive": True,
        # Finds half-open connections; must stay below what firewalls forget.
        "health_check_interval": 10,
        "priority_steps": list(PRIORITY_STEPS),
        # Takes the most urgent of all queues first, not one queue after the other.
        "queue_order_strategy": "priority",
        "global_keyprefix": settings.key_prefix,
        "client_name": "codeherd",
    }
    if settings.sentinel_master:
        transport_options["master_name"] = settings.sentinel_master
    return {
        "broker_url": str(settings.broker),
        "broker_use_ssl": _ssl_options(settings) if secure else None,
        "broker_transport_options": transport_options,
        "broker_connection_retry": True,
        "broker_connection_retry_on_startup": True,
        # The default of 100 tries ends after 46 minutes, and every GPU worker with it.
        "broker_connection_max_retries": None,
        # Results live in SQL and nowhere else.
        "result_backend": None,
        "task_ignore_result": True,
        "task_store_errors_even_if_ignored": False,
        "task_serializer": "json",
        "accept_content": ["json"],
        "event_serializer": "json",
        "enable_utc": True,
        # The lease in SQL is the acknowledgement: a late ack would be redelivered on every reconnect.
        "task_acks_late": False,
        "task_reject_on_worker_lost": None,
        "task_retry_on_worker_lost": False,
        # With early acks a worker would otherwise hold one more message per slot than it can run.
        "worker_disable_prefetch": True,
        "worker_prefetch_multiplier": 1,
        # Flower needs them; and without events the loop sleeps up to 0.7 s between two jobs.
        "worker_send_task_events": True,
        # A hint that may be lost is sent again: Flower would show the first one as a task that never starts.
        "task_send_sent_event": False,
        "task_track_started": False,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_soft_shutdown_timeout": 0,
        "worker_enable_soft_shutdown_on_idle": False,
        "worker_state_db": None,
        "worker_enable_remote_control": True,
        # One quick second try; the dispatcher repairs the rest.
        "task_publish_retry": True,
        "task_publish_retry_policy": {
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0.2,
            "interval_max": 0.5,
        },
        # A typing error in a queue name must not become a queue that nobody reads.
        "task_create_missing_queues": False,
        "task_queues": [kombu.Queue(name) for name in queues],
        "task_default_queue": queues[0] if queues else queue_name(settings.default_model),
    }


def make_app(settings: SharedSettings, queues: Sequence[str]) -> Celery:
    """Build the Celery app for these queues. Connects to nothing yet."""
    # The user's address stays as it is; what comes from there is checked (`codeherd_schema.transport`).
    app = Celery("codeherd", set_as_current=False, amqp=HerdAMQP, control=_Control, events=_Events)
    app.conf.update(celery_settings(settings, queues))
    return app


class Broker:
    """Publishes hints, asks workers to cancel, and carries "job ended" notifications."""

    def __init__(self, settings: SharedSettings) -> None:
        """Remember where the broker is; the first call connects."""
        self._settings = settings
        self._app = make_app(settings, ())
        # A pool of our own: Celery's are shared by all apps of the process with the same address,
        # so closing one would close the other's.
        self._pool = self._connection().Pool(limit=CONNECTIONS)
        self._queues: dict[str, kombu.Queue] = {}
        # Jobs that have ended and of which nobody was told yet.
        self._ended: deque[str] = deque()
        self._speaks = threading.Lock()
        self._speaker: Any = None
        self._channel: Any = None

    def publish(self, hints: Sequence[Hint]) -> None:
        """Send one message per hint.

        A failure leaves it unknown which messages were sent; sending again is harmless.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        if not hints:
            return
        with self._connected() as connection:
            producer = self._app.amqp.Producer(connection, auto_declare=False)
            with producer.batch(max_size=BATCH):
                for hint in hints:
                    self._app.send_task(
                        task_name(hint.kind),
                        args=(hint.job_id,),
                        task_id=hint_id(hint.job_id, hint.publish_no),
                        queue=self._queue(hint.queue),
                        priority=hint.priority,
                        argsrepr=hint_repr(hint.job_id),
                        kwargsrepr="{}",
                        producer=producer,
                        retry=False,
                    )

    def waiting(self, queue: str) -> int:
        """Count the messages of `queue` that no worker has taken.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        return sum(self.waiting_by_step(queue))

    def waiting_by_step(self, queue: str) -> tuple[int, ...]:
        """Count them for each of `PRIORITY_STEPS`, the most urgent first.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        with self._connected() as connection:
            channel = connection.default_channel
            names = [channel._q_for_pri(queue, step) for step in PRIORITY_STEPS]  # noqa: SLF001 -- the transport's own names
            with channel.conn_or_acquire() as client, client.pipeline() as pipe:
                for name in names:
                    pipe.llen(name)
                return tuple(_of_list(count, 0) for count in pipe.execute(raise_on_error=False))

    def hinted(self, queue: str) -> frozenset[str]:
        """Return the ids of the jobs whose messages are in `queue`; reads all of it.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        with self._connected() as connection:
            channel = connection.default_channel
            names = [channel._q_for_pri(queue, step) for step in PRIORITY_STEPS]  # noqa: SLF001 -- the transport's own names
            with channel.conn_or_acquire() as client:
                return _named_in(client, [f"{self._settings.key_prefix}{name}" for name in names])

    def keys(self, most: int) -> frozenset[str] | None:
        """Return the names of keys in our Redis database, whoever's they are; None if this user may not look.

        Args:
            most: how many are looked at: a herd has a dozen, a shared database may have millions.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        with self._connected() as connection, connection.default_channel.conn_or_acquire() as client:
            try:
                names = itertools.islice(client.scan_iter(count=1000), most)
                return frozenset(name.decode(errors="replace") for name in names)
            except NoPermissionError:
                return None

    def named_in(self, keys: Collection[str], most: int) -> frozenset[str] | None:
        """Return the ids of jobs that messages of these keys name; None if this user may not look.

        Args:
            keys: as `keys` gives them; what is no list is passed over.
            most: messages of each.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        with self._connected() as connection, connection.default_channel.conn_or_acquire() as client:
            try:
                return _named_in(client, keys, most)
            except NoPermissionError:
                return None

    def request_cancel(self, job_id: str) -> None:
        """Tell all workers at once; the heartbeat would tell them too, a few seconds later.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        with self._connected() as connection:
            self._app.control.broadcast("cancel_job", arguments={"job_id": job_id}, connection=connection)

    def announce(self, *job_ids: str) -> None:
        """Say that jobs have ended, to whoever listens.

        One thread at a time speaks, also for those who come meanwhile: they return at once.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        self._ended.extend(job_ids)
        # Looked at again after the release: who comes just before it leaves a word with nobody to say it.
        while self._ended and self._speaks.acquire(blocking=False):
            try:
                self._announce_all()
            finally:
                self._speaks.release()

    def _announce_all(self) -> None:
        job_ids = [self._ended.popleft() for _ in range(len(self._ended))]
        with self._reachable():
            if self._speaker is None:
                self._speaker = self._connection()
            if self._channel is None:
                # Kept: kombu's pool, and its look at the connection, cost more than the message.
                self._channel = self._speaker.default_channel
            with self._channel.conn_or_acquire() as client:
                if len(job_ids) == 1:
                    client.publish(DONE_CHANNEL, job_ids[0])
                    return
                for start in range(0, len(job_ids), BATCH):
                    with client.pipeline(transaction=False) as pipe:
                        for job_id in job_ids[start : start + BATCH]:
                            pipe.publish(DONE_CHANNEL, job_id)
                        pipe.execute()

    def endings(self) -> Endings:
        """Listen for ended jobs, from now until the listener is closed.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        with self._reachable():
            connection = self._connection()
            try:
                with connection.default_channel.conn_or_acquire() as client:
                    pubsub = client.pubsub()
                pubsub.subscribe(DONE_CHANNEL)
                # Without the confirmation an ending could pass between now and the first look at SQL.
                if pubsub.get_message(timeout=self._settings.connect_timeout_s) is None:
                    raise TimeoutError("no answer to SUBSCRIBE")
            except BaseException:
                connection.release()
                raise
        return Endings(connection, pubsub)

    def check(self) -> Mapping[str, str]:
        """Return what Redis tells of itself: the fields of INFO by name, as text.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        with self._connected() as connection, connection.default_channel.conn_or_acquire() as client:
            return {str(name): str(value) for name, value in client.info().items()}

    def workers(self, timeout_s: float) -> dict[str, dict[str, Any]]:
        """Ask every worker for its engine's figures; silent ones are left out.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        with self._reachable(), self._connection() as connection:
            replies = self._app.control.broadcast(
                "engine_stats", reply=True, timeout=timeout_s, connection=connection
            )
        return {
            name: facts
            for reply in replies or ()
            for name, facts in reply.items()
            # Anybody may answer.
            if isinstance(facts, dict)
        }

    def close(self) -> None:
        """Close every connection."""
        if self._speaker is not None:
            self._speaker.release()
        self._pool.force_close_all()
        self._app.close()

    def _queue(self, name: str) -> kombu.Queue:
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = kombu.Queue(name)
        return queue

    def _connection(self) -> Any:
        """Return an own connection: same address, TLS, Sentinel and prefix as the workers'."""
        return self._app.connection_for_write(
            transport_options={
                # Whoever publishes or waits has SQL to go on with: one try, and no longer than told.
                "max_retries": 0,
                "socket_timeout": min(SOCKET_TIMEOUT_S, self._settings.connect_timeout_s),
            }
        )

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        # Other threads' turns are waited for longer than Redis: a busy broker is not one that is away.
        with self._reachable(), self._pool.acquire(block=True, timeout=SOCKET_TIMEOUT_S) as connection:
            yield connection

    @contextlib.contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except (KombuError, RedisError, OSError) as err:
            reason, hint = _explained(_root(err))
            raise BrokerUnavailable(
                f"broker {self._settings.broker.masked()} did not answer: {reason}", hint=hint
            ) from err


# Celery and kombu send commands, answers and heartbeats with `retry=True`, which has no end while Redis does
# not answer: a worker's main thread would stay there for as long, and hear of no stop.


class _OnceProducer(kombu.Producer):
    """Sends once, whatever the caller says."""

    def publish(self, *args: Any, **options: Any) -> Any:
        return super().publish(*args, **{**options, "retry": False})


class _Mailbox(Mailbox):
    """Carries commands to workers and their answers."""

    @contextlib.contextmanager
    def producer_or_acquire(self, producer: Any = None, channel: Any = None) -> Iterator[Any]:
        yield producer or _OnceProducer(channel, auto_declare=False)


class _Control(Control):
    Mailbox = _Mailbox


class HerdEvents(EventDispatcher):
    """Sends events to whoever listens; what cannot be sent now is kept for the next connection.

    Redis says how many have heard a message. Once nobody has for `QUIET_S`, what happens to tasks is told no
    more than once in `DEAF_S`: to make and send these events costs a worker a tenth of a short job.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Take somebody to be there."""
        self._heard_at = time.monotonic()
        self._nobody_until = float("-inf")
        super().__init__(*args, **options)

    @property
    def has_some(self) -> bool:
        """Whether events of tasks wait to be sent."""
        return any(self._group_buffer.values()) or bool(self._outbound_buffer)

    def send(self, type: str, **options: Any) -> None:  # noqa: A002 -- the name of Celery's own parameter
        """Send an event, or keep it for a while to send it with others."""
        if not type.startswith("task-") or time.monotonic() >= self._nobody_until:
            super().send(type, **{**options, "retry": False})
        elif self.on_send_buffered and type not in _NOT_ENDED:
            # A thread is free: the event loop must be woken to look for the next hint.
            self.on_send_buffered()

    def _publish(self, event: Any, producer: Any, routing_key: str, **options: Any) -> None:
        kept = len(self._outbound_buffer)
        super()._publish(event, producer, routing_key, **options)
        if producer is None or len(self._outbound_buffer) > kept:
            return
        now = time.monotonic()
        if producer.channel.listeners:
            self._heard_at, self._nobody_until = now, float("-inf")
        elif now - self._heard_at >= QUIET_S:
            self._nobody_until = now + DEAF_S


class _Events(Events):
    dispatcher_cls = HerdEvents


class Endings:
    """A subscription to the ids of jobs that end; may miss some, so look at SQL as well."""

    def __init__(self, connection: Any, pubsub: Any) -> None:
        """Take over both; `close` gives them back."""
        self._connection = connection
        self._pubsub = pubsub

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self, timeout_s: float) -> frozenset[str]:
        """Return ids of jobs that ended, as soon as there is one; empty after `timeout_s` seconds.

        Raises:
            BrokerUnavailable: the connection broke; go on by looking at SQL alone.
        """
        found: set[str] = set()
        try:
            message = self._pubsub.get_message(timeout=timeout_s)
            while message is not None:
                if message["type"] == "message":
                    text = bytes(message["data"]).decode(errors="replace")
                    found |= {text} if is_job_id(text) else set()
                message = self._pubsub.get_message(timeout=0)
        except (RedisError, OSError) as err:
            raise BrokerUnavailable("the notification channel broke") from err
        return frozenset(found)

    def close(self) -> None:
        """Unsubscribe and close the connection."""
        with contextlib.suppress(RedisError, OSError):
            self._pubsub.close()
        self._connection.release()


def _named_in(client: Any, keys: Collection[str], most: int | None = None) -> frozenset[str]:
    """Return the ids of the jobs that the messages of lists name, `most` of each, or all."""
    with client.pipeline() as pipe:
        for key in keys:
            # kombu's client prefixes the keys of those commands alone that it uses itself.
            pipe.lrange(key, 0, -1 if most is None else most - 1)
        lists: list[Sequence[bytes]] = [
            _of_list(elements, ()) for elements in pipe.execute(raise_on_error=False)
        ]
    elements = (element for waiting in lists for element in waiting)
    return frozenset(job_id for job_id in map(_job_of, elements) if job_id is not None)


def _of_list(answer: Any, otherwise: T) -> T:
    """Return what Redis says of a list; `otherwise` of what is none, which workers delete."""
    if isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE"):
        return otherwise
    if isinstance(answer, Exception):
        raise answer
    found: T = answer
    return found


def _job_of(element: bytes) -> str | None:
    """Return the id of the job that a raw message names; None if it is no message of ours."""
    try:
        return str(json.loads(element)["headers"]["id"]).partition(".")[0]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _root(err: BaseException) -> BaseException:
    """Return the error below kombu's wrappers: it says whether to look at the network or the password."""
    while err.__cause__ is not None:
        err = err.__cause__
    # redis-py raises its own error while it handles that of TLS.
    return err.__context__ if isinstance(err.__context__, ssl.SSLError) else err


def _explained(err: BaseException) -> tuple[str, str]:
    """Return what went wrong and what to do about it; no server's text, which may hold anything."""
    name = type(err).__name__
    match err:
        case ssl.SSLCertVerificationError():
            return f"{name}, {err.verify_message}", _CERTIFICATE_HINT
        case ssl.SSLError():
            return name, "`rediss://` in CODEHERD_BROKER_URL is for a TLS port, `redis://` for a plain one"
        case AuthenticationError():
            return name, "user or password in CODEHERD_BROKER_URL is wrong, or the user is off"
        case NoPermissionError():
            return name, "the user of CODEHERD_BROKER_URL lacks a right: docs/security.md lists all"
    return name, "`codeherd up` starts an embedded one; CODEHERD_BROKER_URL names another"


def _ssl_options(settings: SharedSettings) -> dict[str, Any]:
    options: dict[str, Any] = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    if settings.broker_ca_file is not None:
        options["ssl_ca_certs"] = str(settings.broker_ca_file)
    return options
