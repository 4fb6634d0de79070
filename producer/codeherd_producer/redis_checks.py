"""Judge the broker: what Redis tells of itself, who shares it, which messages wait in it.

Owns: a look at the keys of one Redis database, and the judgement of what was seen. Changes nothing. What
Redis' own figures mean is said in `codeherd_schema.redis_facts`, since workers want to know it too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from kombu.exceptions import KombuError
from redis.exceptions import NoPermissionError, RedisError

from codeherd_producer.findings import Finding, Verdict
from codeherd_schema.broker import make_app
from codeherd_schema.errors import BrokerUnavailable
from codeherd_schema.redis_facts import Gravity, faults
from codeherd_schema.settings import SharedSettings

#: Keys that are looked at; a herd has a dozen, a shared database may have millions.
MOST_KEYS: Final = 10_000
#: Messages of each list whose jobs are looked up, and names that are shown.
MOST_MESSAGES, MOST_NAMES = 20, 3
#: First part of our queues' names.
_OURS: Final = "codeherd."
#: What kombu calls the bindings of an exchange, and the exchanges that every Celery worker has.
_BINDINGS: Final = "_kombu.binding."
_COMMON: Final = frozenset({"celeryev", "celery.pidbox", "reply.celery.pidbox"})
#: Parts whose message is about the server, and so names it.
_OF_SERVER: Final = frozenset({"broker", "role", "loading"})


@dataclass(frozen=True, slots=True)
class Tenants:
    """Who uses the Redis database."""

    #: Queues of other Celery apps under our key prefix.
    intruders: tuple[str, ...]
    #: Keys without our prefix; a few of them.
    strangers: tuple[str, ...]
    #: Ids of jobs that messages under our prefix name; a few of them.
    job_ids: frozenset[str]


def judge_redis(facts: Mapping[str, str], place: str) -> Iterator[Finding]:
    """Judge Redis' own figures.

    Args:
        facts: fields of INFO by name, as text.
        place: its address without a password.
    """
    found = {fault.part: fault for fault in faults(facts)}
    well = {
        "broker": f"{place}, Redis {facts['redis_version']}",
        "eviction": "maxmemory-policy is `noeviction`",
        "append-only file": "on",
    }
    for part, message in well.items():
        if part not in found:
            yield Finding(part, Verdict.OK, message)
    for fault in found.values():
        verdict = Verdict.WARN if fault.gravity is Gravity.DELAYS else Verdict.FAIL
        message = f"{place} {fault.message}" if fault.part in _OF_SERVER else fault.message
        yield Finding(fault.part, verdict, message, fault.hint)


def judge_tenants(tenants: Tenants, prefix: str, known: Collection[str] | None) -> Iterator[Finding]:
    """Judge who shares the Redis database.

    Args:
        tenants: who does.
        prefix: of our own keys.
        known: those of the jobs with a message that the database has; None if it could not be asked.
    """
    hint = (
        "give each its own CODEHERD_KEY_PREFIX, or another Redis database (the number in CODEHERD_BROKER_URL)"
    )
    messages = []
    if tenants.intruders:
        messages.append(f"another Celery app has queues under `{prefix}`: {_listed(tenants.intruders)}")
    foreign = tenants.job_ids - set(known) if known is not None else frozenset()
    if foreign:
        messages.append(
            f"{len(foreign)} of {len(tenants.job_ids)} messages under `{prefix}` name jobs that this "
            "database has not: another herd uses the prefix too"
        )
    for message in messages:
        yield Finding("key prefix", Verdict.WARN, message, hint)
    if not messages:
        others = f"others in the same Redis database: {_listed(tenants.strangers)}"
        alone = "alone in its Redis database"
        yield Finding("key prefix", Verdict.OK, f"`{prefix}`, {others if tenants.strangers else alone}")


class RedisLook:
    """A look around in Redis, one connection for each question."""

    def __init__(self, settings: SharedSettings) -> None:
        """Remember where to look."""
        self._settings = settings
        self._app = make_app(settings, ())

    def tenants(self) -> Tenants | None:
        """Return who uses the Redis database; None if this user may not look.

        Raises:
            BrokerUnavailable: Redis did not answer in time.
        """
        prefix = self._settings.key_prefix
        with self._client() as client:
            try:
                keys = _keys(client)
                ours = [key for key in keys if key.startswith(prefix)]
                lists = [key for key in ours if key.startswith(prefix + _OURS)]
                return Tenants(
                    intruders=_first(name for name in map(_exchange, _without(prefix, ours)) if name),
                    strangers=_first(set(keys) - set(ours)),
                    job_ids=frozenset(job_id for key in lists for job_id in _job_ids(client, key)),
                )
            except NoPermissionError:
                return None

    def close(self) -> None:
        """Forget the app."""
        self._app.close()

    @contextmanager
    def _client(self) -> Iterator[Any]:
        settings = self._settings
        # As short as `Broker` is with it: one try, and no longer than told.
        options = {"max_retries": 0, "socket_timeout": settings.connect_timeout_s}
        try:
            with (
                self._app.connection_for_write(transport_options=options) as connection,
                connection.default_channel.conn_or_acquire() as client,
            ):
                yield client
        except (KombuError, RedisError, OSError) as err:
            raise BrokerUnavailable(
                f"broker {settings.broker.masked()} did not answer: {_reason(err)}",
                hint="`codeherd up` starts an embedded one; CODEHERD_BROKER_URL names another",
            ) from err


def _reason(err: BaseException) -> str:
    """Name the error below kombu's wrappers: it says whether to look at the network or the password."""
    return type(err).__name__ if err.__cause__ is None else _reason(err.__cause__)


def _keys(client: Any) -> list[str]:
    found: set[str] = set()
    for key in client.scan_iter(count=1000):
        found.add(key.decode(errors="replace"))
        if len(found) >= MOST_KEYS:
            break
    return sorted(found)


def _job_ids(client: Any, key: str) -> Iterator[str]:
    if client.type(key) != b"list":
        return
    # Commands that kombu gives the prefix to would get it twice; this one it leaves alone.
    for raw in client.execute_command("LRANGE", key, 0, MOST_MESSAGES - 1):
        try:
            yield str(json.loads(raw)["headers"]["id"]).rpartition(".")[0]
        except (ValueError, KeyError, TypeError):
            continue


def _exchange(name: str) -> str | None:
    """Return the exchange of a list of bindings that is not ours; None for any other key."""
    exchange = name.removeprefix(_BINDINGS)
    is_foreign = exchange != name and exchange not in _COMMON and not exchange.startswith(_OURS)
    return exchange if is_foreign else None


def _without(prefix: str, keys: Sequence[str]) -> Iterator[str]:
    return (key.removeprefix(prefix) for key in keys)


def _first(names: Iterator[str] | Collection[str]) -> tuple[str, ...]:
    return tuple(sorted(names)[:MOST_NAMES])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
