"""Turn the records of rounds into numbers.

Owns: what each number means, and that it is the median of the rounds. Does not know tables.

    tokens per second       new tokens of the round / seconds from the first submission to the last answer
    time to first token     from submission to the first token, waiting in line included; median of the jobs
    gap                     between two tokens of one job; the 99th percentile over all jobs
    decode step             the median gap while the same 16 jobs decode and none prefills
    CPU seconds             of the system's process, on all its cores, during the round
    peak memory             most resident memory of the system's process, weights and libraries included
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.contest import Contest, Outcome
from benchmarks.records import JobRecord, RoundRecord


@dataclass(frozen=True, slots=True)
class Figures:
    """One system on one workload; None where it cannot be observed."""

    tokens_per_s: float
    #: Of the slowest and the fastest round.
    tokens_per_s_range: tuple[float, float]
    jobs_per_s: float
    ttft_p50_s: float | None
    gap_p99_s: float | None
    peak_rss_mb: float
    cpu_s: float
    cpu_ms_per_token: float
    #: Part of its jobs whose tokens are those of the reference; None without a reference.
    identical_share: float | None


def figures_of(outcome: Outcome, contest: Contest, reference: Outcome | None) -> Figures | None:
    """Return the medians over the rounds; None if there are none.

    Args:
        outcome: of the system in question.
        contest: that it took part in.
        reference: whose tokens the system's are compared with.
    """
    if not outcome.rounds:
        return None
    pairs = list(zip(outcome.rounds, outcome.asked, strict=True))
    rates = [share.new_tokens / record.wall_s for record, share in pairs]
    # How long the last of all jobs would wait is not seen in a few of them.
    saw_all_jobs = all(share == asked for (_, share), asked in zip(pairs, contest.asked, strict=True))
    return Figures(
        tokens_per_s=statistics.median(rates),
        tokens_per_s_range=(min(rates), max(rates)),
        jobs_per_s=statistics.median(len(share.jobs) / record.wall_s for record, share in pairs),
        ttft_p50_s=_median_of(outcome.rounds, _ttft_p50) if saw_all_jobs else None,
        gap_p99_s=_median_of(outcome.rounds, _gap_p99),
        peak_rss_mb=max(record.peak_rss_mb for record in outcome.rounds),
        cpu_s=statistics.median(record.cpu_s for record in outcome.rounds),
        cpu_ms_per_token=statistics.median(1000 * record.cpu_s / share.new_tokens for record, share in pairs),
        identical_share=_identical_share(outcome, reference),
    )


def decode_step_s(outcome: Outcome, rows: int) -> float | None:
    """Return the median gap while the same `rows` jobs decode; None if there is no such moment."""
    steps: list[float] = []
    for record in outcome.rounds:
        spans = [(job.token_times[0], job.token_times[-1]) for job in record.jobs if job.token_times]
        for job in record.jobs:
            for before, after in itertools.pairwise(job.token_times or ()):
                # A slot that is decoding at both ends has not prefilled in between.
                if sum(first <= before and after <= last for first, last in spans) == rows:
                    steps.append(after - before)
    return statistics.median(steps) if steps else None


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that at least `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _median_of(rounds: Sequence[RoundRecord], figure: Callable[[RoundRecord], float | None]) -> float | None:
    values = [figure(record) for record in rounds]
    return None if None in values else statistics.median(v for v in values if v is not None)


def _ttft_p50(record: RoundRecord) -> float | None:
    if not _shows_times(record.jobs):
        return None
    return statistics.median(job.token_times[0] - job.submitted_at for job in record.jobs if job.token_times)


def _gap_p99(record: RoundRecord) -> float | None:
    if not _shows_times(record.jobs):
        return None
    gaps = [
        after - before for job in record.jobs for before, after in itertools.pairwise(job.token_times or ())
    ]
    return percentile(gaps, 0.99) if gaps else None


def _shows_times(jobs: Sequence[JobRecord]) -> bool:
    return all(job.token_times is not None for job in jobs)


def _identical_share(outcome: Outcome, reference: Outcome | None) -> float | None:
    if reference is None or not reference.rounds:
        return None
    same = total = 0
    for number, (record, share) in enumerate(zip(outcome.rounds, outcome.asked, strict=True)):
        known = {
            job: done.token_ids
            for job, done in zip(reference.asked[number].jobs, reference.rounds[number].jobs, strict=True)
        }
        same += sum(known[job] == done.token_ids for job, done in zip(share.jobs, record.jobs, strict=True))
        total += len(share.jobs)
    return same / total
