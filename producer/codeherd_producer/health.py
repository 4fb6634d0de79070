"""Judge every part that a job needs, from SQL to the worker that would take it.

Owns: what is asked, and what counts as well, doubtful or broken. Changes nothing. Does not know how
its findings are shown (`codeherd_producer.commands.doctor`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from codeherd_schema.broker import Broker
from codeherd_schema.errors import BrokerUnavailable, CodeherdError
from codeherd_schema.settings import SharedSettings
from codeherd_schema.store import QueueDepth, Store

#: Oldest Redis that was tried.
OLDEST_REDIS: Final = (6, 2)
#: Seconds between the database's clock and this machine's that nobody needs to look at.
CLOCK_SKEW_S: Final = 2.0
#: Seconds that a due job may wait for its first message before the dispatcher counts as silent.
UNPUBLISHED_S: Final = 10.0


class Verdict(StrEnum):
    """How a part stands."""

    OK = "OK"
    #: Works, but a person should know.
    WARN = "WARN"
    #: Jobs will not run, or may be lost.
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One part and how it stands."""

    part: str
    verdict: Verdict
    message: str
    hint: str | None = None


def examine(
    settings: SharedSettings, *, user_id: int, clock: Callable[[], float], answer_s: float
) -> Iterator[Finding]:
    """Look at everything and yield what was found, as it is found.

    Args:
        settings: which database and broker.
        user_id: of this process.
        clock: this machine's time in seconds since 1970.
        answer_s: seconds that workers get to answer.
    """
    yield judge_user(user_id)
    depths: Mapping[str, QueueDepth] | None = None
    try:
        store = Store.open(settings.database)
    except CodeherdError as err:
        hint = err.hint or "`codeherd up` makes one, or `codeherd db upgrade`"
        yield Finding("database", Verdict.FAIL, err.message, hint)
    else:
        try:
            before = clock()
            skew_s = store.clock() - (before + clock()) / 2
            yield Finding("database", Verdict.OK, settings.database.masked())
            yield judge_clock(skew_s)
            store.check_schema()
            yield Finding("schema", Verdict.OK, "up to date")
            depths = store.queue_depths()
        except CodeherdError as err:
            yield broken("schema" if err.code == "schema_outdated" else "database", err)
        finally:
            store.close()
    yield from _examine_broker(settings, depths, answer_s)


def _examine_broker(
    settings: SharedSettings, depths: Mapping[str, QueueDepth] | None, answer_s: float
) -> Iterator[Finding]:
    broker = Broker(settings)
    try:
        yield from judge_redis(broker.check(), settings.broker.masked())
        workers = broker.workers(answer_s)
        yield judge_workers(workers)
        if depths is not None:
            served = {str(figures.get("queue")) for figures in workers.values()}
            yield from judge_queues(depths, served)
            yield judge_dispatcher(depths, {queue: broker.waiting(queue) for queue in depths})
    except BrokerUnavailable as err:
        yield broken("broker", err)
    finally:
        broker.close()


def broken(part: str, err: CodeherdError) -> Finding:
    """Turn an error into a finding."""
    return Finding(part, Verdict.FAIL, err.message, err.hint)


def judge_user(user_id: int) -> Finding:
    """Nothing of codeherd needs root, and Celery says why not to."""
    if user_id == 0:
        return Finding("user", Verdict.WARN, "running as root", "use an account of its own")
    return Finding("user", Verdict.OK, f"user id {user_id}")


def judge_clock(skew_s: float) -> Finding:
    """Only the database's clock decides; another one here makes times look odd."""
    message = f"the database's clock is {abs(skew_s):.1f} s {'ahead' if skew_s > 0 else 'behind'}"
    if abs(skew_s) > CLOCK_SKEW_S:
        return Finding("clock", Verdict.WARN, message, "absolute times mean the database's; run NTP")
    return Finding("clock", Verdict.OK, message)


def judge_redis(facts: Mapping[str, str], place: str) -> Iterator[Finding]:
    """Version, eviction policy and append-only file."""
    version = facts["redis_version"]
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    oldest = ".".join(map(str, OLDEST_REDIS))
    if numbers < OLDEST_REDIS:
        yield Finding("broker", Verdict.FAIL, f"{place} is Redis {version}, {oldest} is needed")
    else:
        yield Finding("broker", Verdict.OK, f"{place}, Redis {version}")
    policy = facts["maxmemory_policy"]
    if policy != "noeviction":
        yield Finding(
            "eviction",
            Verdict.FAIL,
            f"maxmemory-policy is `{policy}`: Redis may drop whole queues",
            "`CONFIG SET maxmemory-policy noeviction`, and in redis.conf",
        )
    else:
        yield Finding("eviction", Verdict.OK, "maxmemory-policy is `noeviction`")
    if facts["aof_enabled"] != "1":
        yield Finding(
            "append-only file",
            Verdict.WARN,
            "off: after a restart of Redis jobs wait for `republish_after_s`",
            "`CONFIG SET appendonly yes`, and in redis.conf",
        )
    else:
        yield Finding("append-only file", Verdict.OK, "on")


def judge_workers(workers: Mapping[str, Mapping[str, Any]]) -> Finding:
    """Who answered, with which model."""
    if not workers:
        return Finding("workers", Verdict.WARN, "none answered", "`codeherd worker --model …` starts one")
    names = (
        f"{name} ({figures.get('model')}, {figures.get('active')} of {figures.get('slots')} slots)"
        for name, figures in sorted(workers.items())
    )
    return Finding("workers", Verdict.OK, ", ".join(names))


def judge_queues(depths: Mapping[str, QueueDepth], served: set[str]) -> Iterator[Finding]:
    """Every queue that holds jobs needs a worker."""
    for queue, depth in depths.items():
        figures = f"{depth.queued} queued, {depth.running} running"
        if queue not in served:
            model = queue.partition(".")[2]
            yield Finding(
                f"queue {queue}",
                Verdict.FAIL,
                f"{figures}, and no worker takes from it",
                f"`codeherd worker --model {model}` does",
            )
        else:
            yield Finding(f"queue {queue}", Verdict.OK, figures)


def judge_dispatcher(depths: Mapping[str, QueueDepth], waiting: Mapping[str, int]) -> Finding:
    """Jobs that have been due for a while without one message in Redis: nobody publishes."""
    silent = {
        queue: depth.oldest_due_age_s
        for queue, depth in depths.items()
        if depth.oldest_due_age_s is not None
        and depth.oldest_due_age_s > UNPUBLISHED_S
        and not waiting.get(queue)
    }
    if silent:
        queue, age_s = max(silent.items(), key=lambda item: item[1])
        return Finding(
            "dispatcher",
            Verdict.FAIL,
            f"a job in {queue} has been due for {age_s:.0f} s and nobody published it",
            "`codeherd dispatcher` does; `codeherd up` includes it",
        )
    return Finding("dispatcher", Verdict.OK, "no due job waits to be published")
