"""Judge the broker: what Redis tells of itself, who shares it, which messages wait in it.

Owns: the judgement of what was seen in one Redis database. Changes nothing, and asks by the broker's own door
(`codeherd_schema.broker`). What Redis' own figures mean is said in `codeherd_schema.redis_facts`, since
workers want to know it too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from codeherd_producer.findings import Finding, Verdict
from codeherd_schema.broker import Broker
from codeherd_schema.redis_facts import Gravity, faults

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


def tenants_of(broker: Broker, prefix: str) -> Tenants | None:
    """Return who uses the Redis database; None if this user may not look.

    Args:
        broker: the way to it.
        prefix: of our own keys.

    Raises:
        BrokerUnavailable: Redis did not answer in time.
    """
    keys = broker.keys(MOST_KEYS)
    if keys is None:
        return None
    ours = [key for key in sorted(keys) if key.startswith(prefix)]
    job_ids = broker.named_in([key for key in ours if key.startswith(prefix + _OURS)], MOST_MESSAGES)
    if job_ids is None:
        return None
    return Tenants(
        intruders=_first(name for name in map(_exchange, _without(prefix, ours)) if name),
        strangers=_first(keys - set(ours)),
        job_ids=job_ids,
    )


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
