"""What a storm does: its jobs, what people do to them, and what goes wrong, all from one seed.

Owns: the mix of jobs, the kinds of faults, and when each is due. A plan is a pure function of its seed
and size, the same on every machine and database. Moments are in progress (so many jobs have ended), not
in seconds, so that a replay does the same things at the same points as far as processes allow. Does not
know how a fault is brought about (`tests.chaos.storm`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from itertools import groupby
from typing import Any, Final

from codeherd_schema.requests import ChatRequest, GenerateRequest, InfillRequest, Request, Sampling

#: The served model: one that can do every kind of job.
MODEL: Final = "storm"
TENANTS: Final = ("default", "ann", "bob")
#: Jobs that were submitted and have not ended, at most.
BACKLOG: Final = 60
#: Jobs to a fault.
JOBS_PER_FAULT: Final = 20
#: Jobs before the first fault: something must be under way.
CALM_JOBS: Final = 10


class Ending(StrEnum):
    """How a job must end, whatever happens."""

    #: With a result, the same as without faults.
    RESULT = "result"
    #: With or without one: it depends on the moment of a cancellation or deadline.
    EITHER = "either"
    #: Its error cannot be mended.
    FAILED = "failed"
    #: It kills its worker, or fails each time.
    DEAD = "dead"


class Deed(StrEnum):
    """What is done to the herd at a moment of the plan."""

    # By people, to a job.
    CANCEL = "cancel"
    #: Queue the job again if it ended without a result.
    RESUBMIT = "resubmit"
    #: Submit the same request with the same key again.
    REPEAT = "repeat"
    #: Submit another request with the same key.
    CONFLICT = "conflict"
    # To a launcher and its worker process.
    KILL_PROCESS = "kill the worker process"
    CUT_POWER = "kill launcher and worker process"
    FREEZE_WORKER = "freeze the worker process"
    STOP_WORKER = "stop the launcher in good order"
    # To a dispatcher.
    KILL_DISPATCHER = "kill the dispatcher"
    FREEZE_DISPATCHER = "freeze the dispatcher"
    # To Redis and its connections.
    DROP_CONNECTIONS = "drop all connections to Redis"
    WIPE_REDIS = "wipe Redis"
    RESTART_REDIS = "restart Redis"
    KILL_REDIS = "kill Redis and start it"
    FREEZE_REDIS = "freeze Redis"
    # To the database.
    RESTART_DATABASE = "restart the database"
    FREEZE_DATABASE = "freeze the database"
    # To messages.
    DUPLICATE = "send messages again"
    REORDER = "shuffle waiting messages"
    CORRUPT = "add garbage and spoil waiting messages"


#: Faults of one place; a plan takes the places in turn, so that a short one has some of each.
FAMILIES: Final = (
    (Deed.CUT_POWER, Deed.KILL_PROCESS, Deed.FREEZE_WORKER, Deed.STOP_WORKER),
    (Deed.CORRUPT, Deed.DUPLICATE, Deed.REORDER),
    (Deed.KILL_DISPATCHER, Deed.FREEZE_DISPATCHER),
    (Deed.DROP_CONNECTIONS, Deed.WIPE_REDIS, Deed.RESTART_REDIS, Deed.KILL_REDIS, Deed.FREEZE_REDIS),
    (Deed.FREEZE_WORKER,),
    (Deed.RESTART_DATABASE, Deed.FREEZE_DATABASE),
)


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """One job."""

    place: int
    request: Request
    ending: Ending
    tenant: str
    #: Jobs of one submit of many have the same.
    batch_id: str | None

    @property
    def has_result(self) -> bool:
        """Whether the job may end with a result."""
        return self.ending in (Ending.RESULT, Ending.EITHER)


@dataclass(frozen=True, slots=True)
class Planned:
    """One deed."""

    #: Due when so many jobs have ended.
    after: int
    deed: Deed
    #: Place of a job, or number of a launcher or dispatcher.
    target: int = 0
    #: Length of a freeze in leases.
    leases: float = 0.0
    #: Of what is random in the deed itself.
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that happens."""

    seed: int
    jobs: tuple[PlannedJob, ...]
    #: In the order of their moments.
    deeds: tuple[Planned, ...]
    launchers: int
    dispatchers: int

    def submissions(self) -> Iterator[list[PlannedJob]]:
        """Yield the jobs in order, together those that are submitted together."""
        for _, group in groupby(self.jobs, key=lambda job: job.batch_id or job.place):
            yield list(group)


def make_plan(seed: int, jobs: int) -> Plan:
    """Return the plan of this seed.

    Args:
        seed: any number.
        jobs: how many; each `JOBS_PER_FAULT` of them bring a fault.
    """
    rng = random.Random(f"storm {seed} {jobs}")
    launchers = 2 if jobs < 500 else 3
    planned = tuple(_jobs(rng, jobs))
    endings = [job.place for job in planned if job.ending is Ending.EITHER and _has_no_limit(job.request)]
    deeds = [*_people(rng, planned, endings), *_faults(rng, jobs, launchers)]
    deeds.sort(key=lambda deed: deed.after)
    return Plan(seed, planned, tuple(deeds), launchers, dispatchers=2)


def _jobs(rng: random.Random, count: int) -> Iterator[PlannedJob]:
    troubles = _troubles(rng, count)
    tenant, batch_id, left = TENANTS[0], None, 0
    for place in range(count):
        if left == 0:
            tenant = rng.choice(TENANTS)
            is_batch = rng.random() < 0.1
            left = rng.randint(3, 12) if is_batch else 1
            batch_id = f"batch-{place}" if is_batch else None
        left -= 1
        prompt, ending = troubles.get(place, (None, Ending.RESULT))
        request, ending = _request(rng, place, prompt, ending)
        yield PlannedJob(place, request, ending, tenant, batch_id)


def _troubles(rng: random.Random, count: int) -> dict[int, tuple[str, Ending]]:
    """Return prompts that ask for trouble, by place; all early, since some wait between their attempts."""
    orders = ["#! kill\n"] * (1 + count // 700)
    orders += [
        f"#! raise {rng.choice(('GenerationError', 'PromptTooLong'))}\n" for _ in range(2 + count // 100)
    ]
    broken = ("RuntimeError", "MemoryError", "SystemExit", "OutOfMemory", "CancelledError")
    orders += [f"#! raise {rng.choice(broken)}\n" for _ in range(2 + count // 100)]
    places = rng.sample(range(count // 2), len(orders))
    mendable = ("GenerationError", "PromptTooLong")
    return {
        place: (order, Ending.FAILED if order.removeprefix("#! raise ").strip() in mendable else Ending.DEAD)
        for place, order in zip(places, orders, strict=True)
    }


def _request(rng: random.Random, place: int, trouble: str | None, ending: Ending) -> tuple[Request, Ending]:
    options: dict[str, Any] = {
        "model": MODEL,
        "sampling": _sampling(rng),
        "priority": rng.randrange(10),
        # Every job has a key: a storm must be able to ask whether a submit came through.
        "idempotency_key": f"key-{place}",
        "labels": {"place": str(place)},
    }
    if trouble is not None:
        return GenerateRequest(prompt=trouble + _text(rng), **options), ending
    lot = rng.random()
    if lot < 0.06:
        options["deadline"] = timedelta(seconds=rng.uniform(0.3, 4.0))
        ending = Ending.EITHER
    elif lot < 0.12:
        options["run_at"] = timedelta(seconds=rng.uniform(0.2, 3.0))
    elif lot < 0.24:
        # To be cancelled some time.
        ending = Ending.EITHER
    return _of_some_kind(rng, options), ending


def _of_some_kind(rng: random.Random, options: dict[str, Any]) -> Request:
    lot = rng.random()
    if lot < 0.1:
        return InfillRequest(prefix=_text(rng), suffix=_text(rng), suffix_first=rng.random() < 0.5, **options)
    if lot < 0.2:
        turns = ["system", "user", "assistant", "user"][rng.choice((0, 1, 3)) : None]
        return ChatRequest.model_validate(
            {"messages": [{"role": role, "content": _text(rng)} for role in turns], **options}
        )
    slow = f"#! steps {rng.randint(2, 5)}\n" if rng.random() < 0.15 else ""
    return GenerateRequest(prompt=slow + _text(rng), **options)


def _sampling(rng: random.Random) -> Sampling:
    return Sampling(
        max_new_tokens=rng.randint(1, 40),
        temperature=rng.choice((0.0, round(rng.uniform(0.1, 2.0), 2))),
        top_p=rng.choice((1.0, 0.9)),
        # Without one it would be made from the job's id, which no other run has.
        seed=rng.randrange(2**63),
        stop=rng.choice(((), (), (), ("an",), ("e", "in"))),
        n=rng.choice((1, 1, 1, 1, 1, 1, 2, 3)),
    )


def _text(rng: random.Random) -> str:
    length = rng.choice((1, 40, 400, 3000))
    words = ("def ", "return ", "x", "0", "\n", "    ", "é", "🐑", "self.", "+ ")
    return "".join(rng.choice(words) for _ in range(rng.randint(1, max(1, length // 3))))


def _has_no_limit(request: Request) -> bool:
    return request.deadline is None


def _people(rng: random.Random, jobs: tuple[PlannedJob, ...], cancelled: list[int]) -> Iterator[Planned]:
    last = len(jobs) - 1

    def some_time(place: int) -> int:
        # From when the job is there for sure until most likely it has ended.
        return min(last, max(0, place - BACKLOG + 1) + rng.randint(0, BACKLOG + 5))

    for place in cancelled:
        after = some_time(place)
        yield Planned(after, Deed.CANCEL, place)
        if rng.random() < 0.5:
            yield Planned(min(last, after + rng.randint(0, 20)), Deed.RESUBMIT, place)
    for place in rng.sample(range(len(jobs)), len(jobs) // 25):
        yield Planned(min(last, some_time(place) + BACKLOG), Deed.REPEAT, place)
    for place in rng.sample(range(len(jobs)), len(jobs) // 50):
        yield Planned(min(last, some_time(place) + BACKLOG), Deed.CONFLICT, place)


def _faults(rng: random.Random, jobs: int, launchers: int) -> Iterator[Planned]:
    count = jobs // JOBS_PER_FAULT
    # Before the last jobs are submitted: faults among nothing prove nothing.
    span = max(count, jobs - BACKLOG // 2 - CALM_JOBS) / count
    moments = [CALM_JOBS + round((number + rng.random() / 2) * span) for number in range(count)]
    decks = [list(family) for family in FAMILIES]
    for number, after in enumerate(moments):
        family = FAMILIES[number % len(FAMILIES)]
        deck = decks[number % len(FAMILIES)]
        deed = deck.pop(rng.randrange(len(deck)))
        deck[:] = deck or family
        is_dispatcher = deed in (Deed.KILL_DISPATCHER, Deed.FREEZE_DISPATCHER)
        yield Planned(
            after,
            deed,
            target=rng.randrange(2 if is_dispatcher else launchers),
            leases=rng.uniform(1.1, 1.8),
            seed=rng.getrandbits(32),
        )
