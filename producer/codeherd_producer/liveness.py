"""Say whether a service on this machine is alive, and whether it is ready.

Owns: what both words mean for a worker, a dispatcher and Flower, and that the answer comes in time whatever
is frozen. Does not know how it is shown (`codeherd_producer.commands.health`).

    live    a restart would not help: nothing is wedged. Databases and brokers that are away, a model that
            still loads and a drain are no reasons to restart anything.
    ready   it can do its work now: it is there and not draining, its database takes writes, its broker
            answers.

A worker answers for its engine over Celery, except while it loads its model and while it drains. Then the
kernel tells the first (it has taken over no signals yet), and SQL the second: it renews the leases of what it
still runs. A ping would not do: it comes from a loop that knows nothing of the engine. A dispatcher's loop
leaves a heartbeat (`codeherd_producer.heartbeat`).
"""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import select

from codeherd_producer.bounded import Answer
from codeherd_producer.database_checks import check_writes
from codeherd_producer.local_processes import Process
from codeherd_schema.broker import Broker
from codeherd_schema.database import Database, now
from codeherd_schema.errors import BrokerUnavailable, CodeherdError
from codeherd_schema.settings import SharedSettings
from codeherd_schema.states import JobState
from codeherd_schema.store import Store
from codeherd_schema.tables import jobs, state_is

#: Seconds that workers get to answer before they are asked again.
ROUND_S: Final = 0.5
#: Share of the time that is waited for others; the rest is for saying so.
WAITING_SHARE: Final = 0.85
#: Seconds in which a dispatcher's loop turns, whatever is away: the longest wait for a lock is 30 s.
SILENT_S: Final = 60.0
#: Seconds without a step, if a worker does not tell its own `worker_step_timeout_s`: the default of that.
STEP_TIMEOUT_S: Final = 300.0
#: Seconds by which a worker's own watchdog may be late; it should have ended the process.
WATCHDOG_S: Final = 30.0

Figures = Mapping[str, Any]


class Aspect(StrEnum):
    """What is asked."""

    LIVE = "live"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class Health:
    """The answer: no fault is well."""

    aspect: Aspect
    faults: tuple[str, ...]
    #: What was seen, for the reader; said where there is no fault.
    facts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outside:
    """What the services that everybody needs have answered; None is well."""

    database: str | None
    broker: str | None

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with them."""
        return tuple(fault for fault in (self.database, self.broker) if fault is not None)


def check_worker(
    settings: SharedSettings,
    aspect: Aspect,
    *,
    processes: Sequence[Process],
    name: str | None,
    timeout_s: float,
) -> Health:
    """Judge every worker process that the launchers of this machine keep.

    Args:
        settings: whose herd.
        aspect: what is asked.
        processes: this herd's on this machine.
        name: only this worker, with or without the part after the `@`.
        timeout_s: the answer comes within this time.
    """
    ends_at = _waiting_until(timeout_s)
    wanted = None if name is None else name.partition("@")[0]
    workers = [p for p in processes if p.service == "worker" and wanted in (None, p.name)]
    launchers = [p for p in processes if p.service == "launcher"]
    names = frozenset(_node(worker) for worker in workers if worker.is_loaded and not worker.is_stopped)
    asked = Answer(lambda: ask_workers(settings, names, ends_at - ROUND_S))
    leases = Answer(lambda: _with_database(settings, timeout_s, lambda d: lease_holders(d, names)))
    outside = _outside(settings, timeout_s, ends_at)
    try:
        answers = asked.until(ends_at)
    except (TimeoutError, CodeherdError):
        answers = {}
    if aspect is Aspect.READY:
        return judge_ready(workers, answers, outside)
    held: Collection[str] | None
    try:
        held = leases.until(ends_at)
    except (TimeoutError, CodeherdError):
        held = None
    return judge_live(workers, launchers, answers, held, broker_answers=outside.broker is None)


def check_dispatcher(
    settings: SharedSettings, aspect: Aspect, *, processes: Sequence[Process], timeout_s: float
) -> Health:
    """Judge every dispatcher of this herd on this machine; arguments as in `check_worker`."""
    ends_at = _waiting_until(timeout_s)
    dispatchers = [process for process in processes if process.service == "dispatcher"]
    return judge_dispatchers(dispatchers, aspect, _outside(settings, timeout_s, ends_at))


def check_flower(settings: SharedSettings, aspect: Aspect, *, timeout_s: float) -> Health:
    """Judge Flower by its own page, which asks for no password; arguments as in `check_worker`."""
    ends_at = _waiting_until(timeout_s)
    page = Answer(lambda: _flower_fault(settings, timeout_s))
    broker = Answer(lambda: _broker_fault(settings, timeout_s))
    fault = _until(page, ends_at, "Flower")
    faults = [fault] if fault is not None else []
    if aspect is Aspect.READY and (fault := _until(broker, ends_at, "broker")) is not None:
        faults.append(fault)
    return Health(aspect, tuple(faults), () if faults else (f"port {settings.flower_port} answers",))


def judge_live(
    workers: Sequence[Process],
    launchers: Sequence[Process],
    answers: Mapping[str, Figures],
    held: Collection[str] | None,
    *,
    broker_answers: bool,
) -> Health:
    """Say whether worker processes are alive.

    Args:
        workers: the processes.
        launchers: what restarts them.
        answers: the figures of those that answered, by node.
        held: nodes that hold leases in SQL which have not run out; None if SQL did not answer.
        broker_answers: whether a silent worker can be blamed for its silence.
    """
    faults = [f"{_named(p)} is stopped (SIGSTOP)" for p in (*launchers, *workers) if p.is_stopped]
    facts = []
    if not workers:
        if not launchers:
            return Health(Aspect.LIVE, ("no worker of this herd runs on this machine",))
        facts.append("the launcher waits before it starts its processes again")
    for worker in workers:
        node = _node(worker)
        if worker.is_stopped:
            continue
        if node in answers:
            hang = _hang(answers[node])
            faults += [f"{node}: {hang}"] if hang is not None else []
            facts.append(f"{node} answers")
        elif not worker.is_loaded:
            facts.append(f"{node} is starting")
        elif not broker_answers:
            facts.append(f"{node} cannot be asked: the broker does not answer")
        elif held is None:
            facts.append(f"{node} is silent, and the database does not tell whether it drains")
        elif node in held:
            facts.append(f"{node} is silent and renews its leases: it drains")
        else:
            faults.append(f"{node} does not answer and holds no lease")
    return Health(Aspect.LIVE, tuple(faults), tuple(facts))


def judge_ready(workers: Sequence[Process], answers: Mapping[str, Figures], outside: Outside) -> Health:
    """Say whether worker processes take jobs; arguments as in `judge_live`."""
    faults = list(outside.faults)
    facts = []
    if not workers:
        faults.append("no worker process of this herd runs on this machine")
    for worker in workers:
        node = _node(worker)
        figures = answers.get(node)
        if worker.is_stopped:
            faults.append(f"{node} is stopped (SIGSTOP)")
        elif figures is not None:
            faults += [f"{node}: {fault}" for fault in _unready(figures)]
            facts.append(f"{node} holds {figures.get('model')}")
        elif not worker.is_loaded:
            faults.append(f"{node} has not loaded its model yet")
        elif outside.broker is None:
            faults.append(f"{node} does not answer")
    return Health(Aspect.READY, tuple(faults), tuple(facts))


def judge_dispatchers(dispatchers: Sequence[Process], aspect: Aspect, outside: Outside) -> Health:
    """Say whether dispatchers are alive, or ready.

    Args:
        dispatchers: the processes.
        aspect: what is asked.
        outside: a loop that stands still while something is away waits for that.
    """
    if not dispatchers:
        return Health(aspect, ("no dispatcher of this herd runs on this machine",))
    faults, facts = [], []
    for process in dispatchers:
        silent_s = process.age_s if process.silent_s is None else process.silent_s
        if process.is_stopped:
            faults.append(f"{_named(process)} is stopped (SIGSTOP)")
        elif silent_s > SILENT_S and (aspect is Aspect.READY or not outside.faults):
            faults.append(f"the loop of {_named(process)} has not turned for {silent_s:.0f} s")
        elif aspect is Aspect.READY and process.silent_s is None:
            faults.append(f"{_named(process)} has not begun its loop yet")
        facts.append(f"the loop of {_named(process)} turned {silent_s:.0f} s ago")
    if aspect is Aspect.READY:
        faults += outside.faults
    return Health(aspect, tuple(faults), tuple(facts))


def ask_workers(settings: SharedSettings, names: Collection[str], ends_at: float) -> dict[str, Figures]:
    """Ask until all of these nodes have answered or the time is over; return the figures of those that did.

    Raises:
        BrokerUnavailable: nobody can be asked.
    """
    found: dict[str, Figures] = {}
    broker = Broker(settings)
    try:
        while not found.keys() >= set(names):
            found |= broker.workers(ROUND_S)
            if time.monotonic() >= ends_at:
                break
    finally:
        broker.close()
    return found


def lease_holders(database: Database, names: Collection[str]) -> frozenset[str]:
    """Return those of the nodes whose leases have not run out: their heartbeat is alive."""
    statement = (
        select(jobs.c.worker_id)
        .where(state_is(JobState.RUNNING), jobs.c.lease_until > now(), jobs.c.worker_id.in_(names))
        .distinct()
    )
    with database.read() as connection:
        return frozenset(connection.scalars(statement))


def _hang(figures: Figures) -> str | None:
    age_s, most_s = figures.get("last_step_age_s"), figures.get("step_timeout_s", STEP_TIMEOUT_S)
    has_work = figures.get("active") or figures.get("waiting")
    if age_s is None or not has_work or age_s <= most_s + WATCHDOG_S:
        return None
    return f"the engine has work and made no step for {age_s:.0f} s"


def _unready(figures: Figures) -> Iterator[str]:
    if figures.get("draining", False):
        yield "drains"
    if not figures.get("consuming", True):
        yield "takes no messages from its queue"
    hang = _hang(figures)
    if hang is not None:
        yield hang


def _outside(settings: SharedSettings, timeout_s: float, ends_at: float) -> Outside:
    database = Answer(lambda: _database_fault(settings, timeout_s))
    broker = Answer(lambda: _broker_fault(settings, timeout_s))
    return Outside(_until(database, ends_at, "database"), _until(broker, ends_at, "broker"))


def _until(answer: Answer[str | None], ends_at: float, what: str) -> str | None:
    try:
        return answer.until(ends_at)
    except TimeoutError:
        return f"{what} did not answer in time"


def _database_fault(settings: SharedSettings, timeout_s: float) -> str | None:
    def look(database: Database) -> None:
        Store(database).check_schema()
        check_writes(database)

    try:
        _with_database(settings, timeout_s, look)
    except CodeherdError as err:
        return err.message
    return None


def _with_database(settings: SharedSettings, timeout_s: float, look: Callable[[Database], Any]) -> Any:
    database = Database.open(settings.database, pool_size=1, timeout_s=timeout_s)
    try:
        return look(database)
    finally:
        database.close()


def _broker_fault(settings: SharedSettings, timeout_s: float) -> str | None:
    hasty = settings.model_copy(update={"connect_timeout_s": min(settings.connect_timeout_s, timeout_s)})
    broker = Broker(hasty)
    try:
        broker.check()
    except BrokerUnavailable as err:
        return err.message
    finally:
        broker.close()
    return None


def _flower_fault(settings: SharedSettings, timeout_s: float) -> str | None:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.flower_address, settings.flower_address)  # noqa: S104 -- asked, not listened on
    try:
        with _page(host, settings.flower_port, timeout_s) as answer:
            return None if answer.status == 200 else f"Flower answers with status {answer.status}"
    except (OSError, http.client.HTTPException) as err:
        return f"Flower does not answer on {host}:{settings.flower_port}: {err}"


@contextmanager
def _page(host: str, port: int, timeout_s: float) -> Iterator[http.client.HTTPResponse]:
    # Not urllib: that would send it through a proxy that the environment names.
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", "/healthcheck")
        yield connection.getresponse()
    finally:
        connection.close()


def _waiting_until(timeout_s: float) -> float:
    return time.monotonic() + timeout_s * WAITING_SHARE


def _node(worker: Process) -> str:
    return f"{worker.name}@{socket.gethostname()}"


def _named(process: Process) -> str:
    return f"{process.service} {process.name or process.pid}"
