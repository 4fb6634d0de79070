"""Judge what a Redis server tells of itself: what codeherd cannot work on, may lose, or must wait for.

Owns: which facts of Redis' INFO matter, and the fix for each. Asks nobody: the facts are handed in as
text, and one that is missing is passed over. Used where it matters: when a worker or dispatcher starts
(`check_start`), and by `codeherd doctor`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from codeherd_schema.errors import BrokerUnavailable, ConfigurationError

#: Oldest Redis that was tried.
OLDEST_REDIS: Final = (6, 2)
#: Share of `maxmemory` from which on a person should look.
NEARLY_FULL: Final = 0.8

Facts = Mapping[str, str]


class Gravity(IntEnum):
    """What a fault costs."""

    #: Works, but a person should know: jobs may wait longer than they must.
    DELAYS = 1
    #: Works, until Redis drops or refuses messages; SQL still holds every job.
    LOSES = 2
    #: Does not work now, and will when the server is done with something.
    AWAY = 3
    #: Cannot work.
    IMPOSSIBLE = 4


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a server."""

    part: str
    gravity: Gravity
    message: str
    hint: str


def faults(facts: Facts) -> Iterator[Fault]:
    """Yield what is wrong.

    Args:
        facts: fields of INFO by name, as text.
    """
    for judge in _JUDGES:
        fault = judge(facts)
        if fault is not None:
            yield fault


def check_start(facts: Facts, place: str) -> list[Fault]:
    """Return what a process should warn of when it starts on this server.

    Args:
        facts: fields of INFO by name, as text.
        place: the server's address without its password.

    Raises:
        ConfigurationError: the server can never do; do not start again before it was changed.
        BrokerUnavailable: the server cannot do now; try again later.
    """
    found = list(faults(facts))
    for fault in found:
        if fault.gravity is Gravity.IMPOSSIBLE:
            raise ConfigurationError(f"Redis at {place}: {fault.message}", hint=fault.hint)
        if fault.gravity is Gravity.AWAY:
            raise BrokerUnavailable(f"Redis at {place}: {fault.message}", hint=fault.hint)
    return found


def version_of(facts: Facts) -> tuple[int, ...]:
    """Return the first two numbers of the server's version."""
    return tuple(int(number) for number in re.findall(r"\d+", facts["redis_version"])[:2])


def _version(facts: Facts) -> Fault | None:
    if "redis_version" not in facts or version_of(facts) >= OLDEST_REDIS:
        return None
    oldest = ".".join(map(str, OLDEST_REDIS))
    message = f"is version {facts['redis_version']}, {oldest} is needed"
    return Fault("broker", Gravity.IMPOSSIBLE, message, f"install Redis {oldest} or later")


def _role(facts: Facts) -> Fault | None:
    if facts.get("role", "master") == "master":
        return None
    master = f"{facts.get('master_host', 'its master')}:{facts.get('master_port', '6379')}"
    # After a failover the same address may be a master again.
    return Fault(
        "role",
        Gravity.AWAY,
        "is a replica: it refuses every write",
        f"name the master, {master}, in CODEHERD_BROKER_URL, or the Sentinels and CODEHERD_SENTINEL_MASTER",
    )


def _loading(facts: Facts) -> Fault | None:
    if facts.get("loading", "0") == "0":
        return None
    return Fault(
        "loading",
        Gravity.AWAY,
        "is still reading its files",
        f"wait: {facts.get('loading_eta_seconds', 'some')} s",
    )


def _eviction(facts: Facts) -> Fault | None:
    policy = facts.get("maxmemory_policy", "noeviction")
    if policy == "noeviction":
        return None
    fix = "`CONFIG SET maxmemory-policy noeviction`, and in redis.conf"
    if policy.startswith("volatile"):
        # Queues never expire: only what does is evicted, and none of that is ours to miss.
        message = f"maxmemory-policy is `{policy}`: harmless for queues, but `noeviction` is what was tried"
        return Fault("eviction", Gravity.DELAYS, message, fix)
    message = f"maxmemory-policy is `{policy}`: Redis may drop whole queues"
    return Fault("eviction", Gravity.LOSES, message, fix)


def _memory(facts: Facts) -> Fault | None:
    most = int(facts.get("maxmemory", "0"))
    share = int(facts.get("used_memory", "0")) / most if most else 0.0
    if share < NEARLY_FULL:
        return None
    return Fault(
        "memory",
        Gravity.LOSES if share >= 1 else Gravity.DELAYS,
        f"{share:.0%} of maxmemory ({most / 1e6:.0f} MB) is used; a full Redis refuses messages",
        f"`CONFIG SET maxmemory {2 * most}`, or a lower CODEHERD_PUBLISH_WINDOW",
    )


def _append_only_file(facts: Facts) -> Fault | None:
    if facts.get("aof_enabled", "1") != "1":
        return Fault(
            "append-only file",
            Gravity.DELAYS,
            "off: after a restart of Redis its messages are gone until the dispatcher has sent them again",
            "`CONFIG SET appendonly yes`, and in redis.conf",
        )
    if facts.get("aof_last_write_status", "ok") != "ok":
        return Fault(
            "append-only file",
            Gravity.LOSES,
            "its last write failed: Redis refuses messages until one succeeds",
            "make room on the disk of Redis' `dir`; the server's log has the reason",
        )
    if facts.get("aof_last_bgrewrite_status", "ok") != "ok":
        return Fault(
            "append-only file",
            Gravity.DELAYS,
            "it could not be rewritten the last time, and so grows",
            "make room on the disk, then `BGREWRITEAOF`; the server's log has the reason",
        )
    return None


def _snapshot(facts: Facts) -> Fault | None:
    if facts.get("rdb_last_bgsave_status", "ok") == "ok":
        return None
    return Fault(
        "snapshot",
        Gravity.LOSES,
        "the last background save failed: Redis refuses messages until one succeeds",
        'make room on the disk and in memory, then `BGSAVE`; or `CONFIG SET save ""`',
    )


_JUDGES: Final[tuple[Callable[[Facts], Fault | None], ...]] = (
    _version,
    _role,
    _loading,
    _eviction,
    _memory,
    _append_only_file,
    _snapshot,
)
