"""Wait for jobs in a terminal: show progress, and let Ctrl-C detach instead of cancel.

Owns: that, and the exit code of a wait for several jobs. Does not know how endings are noticed
(`codeherd_producer.waiting`).
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from datetime import timedelta

import click

from codeherd_producer.client import Client, Job
from codeherd_producer.commands.durations import Duration
from codeherd_producer.commands.failures import ExitCode
from codeherd_producer.commands.request_options import options
from codeherd_producer.commands.talk import progress, say
from codeherd_schema.errors import WaitTimeout
from codeherd_schema.states import JobState

#: Seconds between two updates of the progress.
_TURN_S = 1.0

wait_options = options(
    click.option(
        "--timeout", type=Duration(), metavar="TIME", help="Longest wait: 90, 10m, 1h30m; the job goes on."
    ),
    click.option("--cancel-on-interrupt", is_flag=True, help="Ctrl-C while waiting withdraws the job."),
)


def ended_jobs(
    client: Client,
    handles: Mapping[str, Job],
    *,
    timeout: timedelta | None,
    cancel_on_interrupt: bool,
    reattach: str,
) -> Iterator[Job]:
    """Yield each job when it has ended, well or not.

    Args:
        client: the one that made the handles.
        handles: the jobs by id.
        timeout: longest wait.
        cancel_on_interrupt: whether Ctrl-C withdraws what has not ended, instead of leaving it.
        reattach: the command that waits for the same jobs again; shown when Ctrl-C detaches.

    Raises:
        WaitTimeout: some have not ended; they go on.
    """
    jobs = _as_they_end(client, handles, timeout, cancel_on_interrupt, reattach)
    if not (sys.stderr.isatty() and sys.stdout.isatty()):
        yield from jobs
        return
    # On the same terminal: what is written before the bar is gone would be erased with it.
    held: list[Job] = []
    try:
        for job in jobs:
            held.append(job)
    except WaitTimeout:
        yield from held
        raise
    yield from held


def _as_they_end(
    client: Client,
    handles: Mapping[str, Job],
    timeout: timedelta | None,
    cancel_on_interrupt: bool,
    reattach: str,
) -> Iterator[Job]:
    left = set(handles)
    try:
        with progress(len(handles)) as meter, client.watch() as watch:
            watch.add(left)
            until = math.inf if timeout is None else time.monotonic() + timeout.total_seconds()
            while left:
                remaining_s = until - time.monotonic()
                ended = watch.wait(max(0.0, min(_TURN_S, remaining_s)))
                left -= ended
                meter.show(len(handles) - len(left))
                yield from (handles[job_id] for job_id in sorted(ended))
                if not ended and remaining_s <= 0:
                    raise WaitTimeout(f"{_count(left)} not ended yet", hint=f"`{reattach}` waits again")
    except KeyboardInterrupt:
        if cancel_on_interrupt:
            for job_id in left:
                client.cancel(job_id)
            say(f"\ninterrupted: {_count(left)} been withdrawn")
        else:
            say(f"\ndetached: {_count(left)} not ended and will go on; `{reattach}` waits again")
        raise


def exit_code_of(states: Collection[JobState]) -> ExitCode:
    """Return the exit code of a wait that ended with these states."""
    if set(states) <= {JobState.SUCCEEDED}:
        return ExitCode.OK
    if len(states) > 1:
        return ExitCode.SOME_FAILED
    [state] = states
    withdrawn = state in (JobState.CANCELLED, JobState.EXPIRED)
    return ExitCode.WITHDRAWN if withdrawn else ExitCode.JOB_FAILED


def tally(states: Collection[JobState]) -> str:
    """Say how many jobs are in which state."""
    counts = Counter(states)
    return ", ".join(f"{counts[state]} {state}" for state in JobState if counts[state])


def _count(job_ids: Collection[str]) -> str:
    return "1 job has" if len(job_ids) == 1 else f"{len(job_ids)} jobs have"
