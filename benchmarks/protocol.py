"""What a system must be able to do to take part.

Owns: the interface of the modules in `benchmarks.systems`, and the numbers that are equal for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from benchmarks.records import JobRecord
from benchmarks.workloads import Arrival, Job, Workload

#: Sequences that decode together, in every system that can.
SLOTS = 16
#: CPU threads of every system.
THREADS = 2


class System(Protocol):
    """A way to generate greedily, with float32 weights and cache, past any end-of-text token."""

    def prepare(self, folder: Path, converted: Path) -> None:
        """Write the checkpoint in `folder` to `converted` in the system's own format, if it has one."""
        ...

    def load(self, folder: Path, converted: Path, longest: int) -> None:
        """Get ready for jobs of up to `longest` tokens, prompt and answer together."""
        ...

    def warm(self, workload: Workload) -> None:
        """Run a short workload, and whatever else the first round must not pay for."""
        ...

    def run(self, workload: Workload) -> list[JobRecord]:
        """Run all jobs as they arrive; return their records in the workload's order."""
        ...


def run_each(workload: Workload, generate: Callable[[Job], JobRecord]) -> list[JobRecord]:
    """Run jobs one after the other; if all arrived at once, all were submitted at the start."""
    started_at = time.perf_counter()
    records = [generate(job) for job in workload.jobs]
    if workload.arrival is Arrival.ONE_BY_ONE:
        return records
    return [JobRecord(record.token_ids, started_at, record.token_times) for record in records]
