"""What a system must be able to do to take part, and the numbers that are equal for all of them.

Owns: the interface of the modules in `benchmarks.control.systems`, and the counts of a run. Does not know how
anything is measured (`benchmarks.control.turn`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

#: Jobs that each system runs at the same time.
CONCURRENCY = 8


@dataclass(frozen=True, slots=True)
class Place:
    """The servers and files of one turn; nothing else uses them."""

    #: An empty Redis.
    redis_url: str
    #: An empty database, `sqlite:///…` or `postgresql://…`.
    database_url: str
    #: For logs and whatever else.
    folder: Path


@dataclass(frozen=True, slots=True)
class Command:
    """How one of a system's processes is started, in the repository's root."""

    name: str
    arguments: Sequence[str]
    #: Further environment variables.
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """A result as the submitter reads it."""

    #: When the job began to run: seconds of `time.time()`, on the machine that all share.
    started_at: float
    #: Says to which request it belongs; None where a null engine cannot say.
    digest: str | None


class System(Protocol):
    """A client of one queue, and the command lines of its workers. Handles are of any type."""

    def prepare(self) -> None:
        """Create tables and whatever else must be there before the first worker starts."""
        ...

    def commands(self) -> Sequence[Command]:
        """Return the processes that a herd of `CONCURRENCY` consists of, servers apart."""
        ...

    def submit(self, prompt: str, *, urgent: bool = False) -> Any:
        """Submit one job and return its handle; an urgent one goes before all that wait."""
        ...

    def submit_many(self, prompts: Sequence[str]) -> list[Any]:
        """Submit jobs in the cheapest way that the system offers; return their handles in order."""
        ...

    def wait(self, handles: Sequence[Any], timeout_s: float) -> None:
        """Return as soon as every result can be read.

        Raises:
            TimeoutError: some could not be after `timeout_s` seconds.
        """
        ...

    def ready(self, handles: Sequence[Any]) -> list[bool]:
        """Return for each job whether its result can be read."""
        ...

    def runs(self, handle: Any) -> int | None:
        """Return how often a job was started; None where only the job itself could count."""
        ...

    def read(self, handle: Any) -> Answer:
        """Read a result back from where it is kept."""
        ...

    def close(self) -> None:
        """Close every connection."""
        ...


@dataclass(frozen=True, slots=True)
class Scale:
    """How many jobs each measurement has."""

    #: Before anything is measured.
    warm: int = 64
    #: One at a time, each after the result of the one before.
    idle: int = 100
    #: Submitted one after the other by one client while the worker runs.
    single: int = 300
    #: Submitted together to an idle worker, and waited for.
    many: int = 2_000
    #: Of those, results that are read back: an even sample.
    read: int = 200
    #: Submitted together while no worker runs.
    bulk: int = 10_000
    #: Queued before a worker starts, those of `bulk` included.
    backlog: int = 100_000

    def to_json(self) -> dict[str, int]:
        """Return the arguments that build it anew."""
        return asdict(self)


#: Enough to see that everything works.
QUICK = Scale(warm=4, idle=3, single=4, many=12, read=6, bulk=20, backlog=40)
