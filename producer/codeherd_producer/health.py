"""Judge every part that a job needs, from SQL to the worker that would take it.

Owns: what is asked in which order, what the parts mean for one another, and that an answer comes even when
a server is frozen. Changes nothing. Does not know how findings are shown (`commands.doctor`), nor what a
database, a Redis or a machine must be like (`database_checks`, `redis_checks`, `machine_checks`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from codeherd_producer.bounded import Answers
from codeherd_producer.database_checks import (
    Backlog,
    Room,
    Work,
    examine_database,
    judge_room,
    known_jobs,
)
from codeherd_producer.dispatcher import MOST_PATIENCE
from codeherd_producer.findings import Finding, Verdict, broken
from codeherd_producer.machine_checks import examine_machine
from codeherd_producer.redis_checks import Tenants, judge_redis, judge_tenants, tenants_of
from codeherd_schema.broker import Broker
from codeherd_schema.database import Database
from codeherd_schema.errors import BrokerUnavailable, CodeherdError, UnknownModel
from codeherd_schema.models import ModelTable
from codeherd_schema.pauses import Pause
from codeherd_schema.settings import SharedSettings
from codeherd_schema.states import PauseScope
from codeherd_schema.store import QueueDepth

#: Seconds that a due job may wait for its first message before the dispatcher counts as silent.
UNPUBLISHED_S: Final = 10.0
#: So many times `republish_after_s` after it was sent a hint is overdue: no dispatcher waits as long.
OVERDUE_TIMES: Final = MOST_PATIENCE + 1

Workers = Mapping[str, Mapping[str, Any]]


def examine(
    settings: SharedSettings,
    *,
    origins: Mapping[str, Path | None],
    user_id: int,
    clock: Callable[[], float],
    answer_s: float,
    timeout_s: float,
) -> Iterator[Finding]:
    """Look at everything and yield what was found, as it is found.

    Args:
        settings: which database and broker.
        origins: the file that each setting came from, None for another source.
        user_id: of this process.
        clock: this machine's time in seconds since 1970.
        answer_s: seconds that workers get to answer.
        timeout_s: seconds that the database gets, and the broker beside `answer_s`.
    """
    yield from examine_machine(settings, origins, user_id)
    work: Work | None = None
    room: Room | None = None
    looks = Answers(lambda: examine_database(settings, clock))
    try:
        for found in looks.until(time.monotonic() + timeout_s):
            match found:
                case Work():
                    work = found
                case Room():
                    room = found
                case Finding():
                    yield found
    except TimeoutError:
        yield _frozen("database", timeout_s)
    if work is not None:
        yield from judge_pauses(work.pauses, work.depths)
    looks_at_broker = Answers(lambda: _examine_broker(settings, work, room, answer_s))
    try:
        yield from looks_at_broker.until(time.monotonic() + timeout_s + answer_s)
    except TimeoutError:
        yield _frozen("broker", timeout_s + answer_s)


def _examine_broker(
    settings: SharedSettings, work: Work | None, room: Room | None, answer_s: float
) -> Iterator[Finding]:
    broker = Broker(settings)
    try:
        yield from judge_redis(broker.check(), settings.broker.masked())
        tenants = tenants_of(broker, settings.key_prefix)
        if tenants is not None:
            known = None if work is None else _known(settings, tenants)
            yield from judge_tenants(tenants, settings.key_prefix, known)
        workers = broker.workers(answer_s)
        yield judge_workers(workers)
        yield from judge_served_models(settings, workers)
        if room is not None:
            yield judge_room(room, len(workers))
        if work is not None:
            yield from judge_queues(work.depths, {str(figures.get("queue")) for figures in workers.values()})
            waiting = {queue: broker.waiting(queue) for queue in work.depths}
            yield judge_dispatcher(work.backlogs, waiting)
            yield from judge_hints(work.backlogs, waiting, settings)
    except BrokerUnavailable as err:
        yield broken("broker", err)
    finally:
        broker.close()


def judge_workers(workers: Workers) -> Finding:
    """Who answered, with which model."""
    if not workers:
        return Finding("workers", Verdict.WARN, "none answered", "`codeherd worker --model …` starts one")
    names = (
        f"{name} ({figures.get('model')}, {figures.get('active')} of {figures.get('slots')} slots)"
        for name, figures in sorted(workers.items())
    )
    return Finding("workers", Verdict.OK, ", ".join(names))


def judge_served_models(settings: SharedSettings, workers: Workers) -> Iterator[Finding]:
    """Yield the models that workers hold and nobody here can submit to."""
    try:
        table = ModelTable.from_file(settings.models_file)
    except CodeherdError:
        # Said already, with the reason.
        return
    for name, figures in sorted(workers.items()):
        model = str(figures.get("model"))
        try:
            table.find(model)
        except UnknownModel:
            message = f"worker {name} holds `{model}`, which this machine's models file has not"
            hint = f"add its `[models.{model}]` table to CODEHERD_MODELS_FILE here too"
            yield Finding("models", Verdict.WARN, message, hint)


def judge_pauses(pauses: Collection[Pause], depths: Mapping[str, QueueDepth]) -> Iterator[Finding]:
    """Yield everything that is paused: its jobs wait for a person."""
    for pause in pauses:
        waiting = (
            depths[pause.name].queued if pause.scope is PauseScope.QUEUE and pause.name in depths else None
        )
        jobs = f", {waiting} jobs wait" if waiting is not None else ""
        is_queue = pause.scope is PauseScope.QUEUE
        what = f"model {pause.name.partition('.')[2]}" if is_queue else f"{pause.scope} {pause.name}"
        reason = f" ({pause.reason})" if pause.reason else ""
        message = f"{what} since {pause.since.isoformat(timespec='seconds')}{reason}{jobs}"
        yield Finding("paused", Verdict.WARN, message, f"`codeherd resume {what}`")


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


def judge_dispatcher(backlogs: Mapping[str, Backlog], waiting: Mapping[str, int]) -> Finding:
    """Jobs that have been due for a while without one message in Redis: nobody publishes.

    Args:
        backlogs: how due jobs wait, by queue; paused ones are not due.
        waiting: messages in Redis, by queue.
    """
    silent = {
        queue: backlog.due_s
        for queue, backlog in backlogs.items()
        if backlog.due_s > UNPUBLISHED_S and not waiting.get(queue)
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


def judge_hints(
    backlogs: Mapping[str, Backlog], waiting: Mapping[str, int], settings: SharedSettings
) -> Iterator[Finding]:
    """Yield queues whose hints are so old that a dispatcher should have sent them again long ago.

    Not those whose window is full: there hints wait for busy workers, and more of them would not help.
    """
    overdue_s = OVERDUE_TIMES * settings.republish_after_s
    for queue, backlog in backlogs.items():
        if backlog.hinted_s is None or backlog.hinted_s <= overdue_s:
            continue
        if 0 < waiting.get(queue, 0) < settings.publish_window:
            message = (
                f"the oldest in {queue} was sent {backlog.hinted_s:.0f} s ago and nobody claimed its job"
            )
            hint = (
                f"a dispatcher sends it again after {settings.republish_after_s:g} s: look whether one runs"
            )
            yield Finding("hints", Verdict.WARN, message, hint)


def _known(settings: SharedSettings, tenants: Tenants) -> frozenset[str] | None:
    try:
        database = Database.open(settings.database, pool_size=1)
    except CodeherdError:
        return None
    try:
        return known_jobs(database, tenants.job_ids)
    except CodeherdError:
        return None
    finally:
        database.close()


def _frozen(part: str, timeout_s: float) -> Finding:
    message = f"no answer within {timeout_s:g} s, though the connection stands"
    return Finding(part, Verdict.FAIL, message, "the server is frozen or overloaded: look at its machine")
