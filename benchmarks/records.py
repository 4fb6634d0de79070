"""What a system says about the jobs it ran, and how it crosses a process border.

Owns: the record of a job and of a round. Does not know what is computed from them (`benchmarks.figures`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One job, in seconds of `time.perf_counter()`."""

    token_ids: tuple[int, ...]
    submitted_at: float
    #: When each token was known; None where the system does not show it.
    token_times: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """All jobs of one round, in the order of the workload."""

    jobs: tuple[JobRecord, ...]
    wall_s: float
    #: Of the system's process, all its threads together.
    cpu_s: float
    #: Most memory that the process ever held, from its start.
    peak_rss_mb: float

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> RoundRecord:
        """Build a record from `to_json`'s fields."""
        jobs = tuple(
            JobRecord(
                token_ids=tuple(job["token_ids"]),
                submitted_at=job["submitted_at"],
                token_times=None if job["token_times"] is None else tuple(job["token_times"]),
            )
            for job in fields["jobs"]
        )
        return cls(jobs, fields["wall_s"], fields["cpu_s"], fields["peak_rss_mb"])
