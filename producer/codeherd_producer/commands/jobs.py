"""`codeherd status`, `result`, `wait`, `ls`, `cancel`, `retry`: what is done with jobs by their ids.

Owns: these commands. Does not know how anything is shown (`codeherd_producer.commands.output`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import click

from codeherd_producer.client import Client, Job
from codeherd_producer.commands.clients import open_client
from codeherd_producer.commands.configuration import settings_of
from codeherd_producer.commands.help_text import Verb
from codeherd_producer.commands.output import (
    attempt_document,
    job_document,
    print_candidates,
    print_jobs,
    print_json,
    print_table,
    result_document,
)
from codeherd_producer.commands.request_options import options, pairs
from codeherd_producer.commands.talk import note
from codeherd_producer.commands.waits import ended_jobs, exit_code_of, tally, wait_options
from codeherd_schema.errors import InvalidRequest, JobError
from codeherd_schema.requests import JobKind
from codeherd_schema.states import FINAL_STATES, JobState, Move, sources

#: Jobs read at a time when a batch is walked through.
_PAGE = 500

_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")
_ids_or_batch = options(
    click.argument("ids", metavar="[ID]...", nargs=-1),
    click.option("--batch", "batch_id", metavar="NAME", help="All jobs of this batch."),
)


@click.command(cls=Verb)
@_ids_or_batch
@_as_json
@click.pass_context
def status(ctx: click.Context, ids: tuple[str, ...], batch_id: str | None, as_json: bool) -> None:
    """Show where jobs are in their life; with --json also every ended attempt.

    codeherd status 0199d1a2-…
    codeherd status --batch nightly --json
    """
    with open_client(settings_of(ctx), publish=False) as client:
        chosen = _chosen(ctx, client, ids, batch_id)
        rows = [job.row for job in chosen.values()]
        if as_json:
            documents = [
                job_document(row) | {"attempts": [attempt_document(a) for a in client.attempts(row.id)]}
                for row in rows
            ]
            print_json({"jobs": documents})
        else:
            print_jobs(rows, now=datetime.now(UTC))


@click.command(cls=Verb)
@click.argument("job_id", metavar="ID", required=False)
@click.option("--batch", "batch_id", metavar="NAME", help="One JSON line for each job of this batch.")
@click.option("--index", type=click.IntRange(min=0), metavar="N", help="Only this candidate, from 0.")
@click.option("--echo", is_flag=True, help="Print the text in its place, prompt and all.")
@_as_json
@click.pass_context
def result(
    ctx: click.Context, job_id: str | None, batch_id: str | None, as_json: bool, echo: bool, index: int | None
) -> None:
    """Print what a finished job gave, byte for byte.

        codeherd result 0199d1a2-…
        codeherd result --batch nightly > answers.jsonl

    Several candidates are separated by lines `==> candidate 0 <==`; --index prints one as it is.
    Exit status: 3 not ended yet, 4 no such job, 5 failed, 6 cancelled or expired; of a batch: 3 some
    have not ended yet, 7 some ended without a result.
    """
    if (job_id is None) == (batch_id is None):
        raise click.UsageError("give one ID, or --batch NAME", ctx)
    with open_client(settings_of(ctx), publish=False) as client:
        if job_id is not None:
            print_result(client, client.get(job_id), as_json=as_json, echo=echo, index=index)
            return
        states = []
        for job in _chosen(ctx, client, (), batch_id).values():
            click.echo(json.dumps(_batch_line(client, job)))
            states.append(job.row.state)
        note(tally(states))
        if not set(states) <= FINAL_STATES:
            ctx.exit(3)
        ctx.exit(exit_code_of(states))


@click.command(cls=Verb)
@_ids_or_batch
@wait_options
@_as_json
@click.pass_context
def wait(
    ctx: click.Context, /, ids: tuple[str, ...], batch_id: str | None, as_json: bool, **values: Any
) -> None:
    """Wait until jobs have ended, and print each id and state as they do.

    Exit status: 0 all succeeded, 3 the time is over and some go on, 7 some ended without a result; of
    one job: 5 failed, 6 cancelled or expired.
    """
    with open_client(settings_of(ctx), publish=True) as client:
        chosen = _chosen(ctx, client, ids, batch_id)
        again = f"--batch {batch_id}" if batch_id else " ".join(ids)
        states = []
        for job in ended_jobs(client, chosen, reattach=f"codeherd wait {again}", **values):
            states.append(job.refresh().state)
            if not as_json:
                print_table(("id", "state"), [(job.id, job.row.state)])
        if as_json:
            print_json({"jobs": [job_document(job.row) for job in chosen.values()]})
        ctx.exit(exit_code_of(states))


@click.command(cls=Verb)
@click.option("--state", type=click.Choice([s.value for s in JobState]), help="Only these.")
@click.option("-m", "--model", metavar="NAME", help="Only these.")
@click.option("--kind", type=click.Choice([k.value for k in JobKind]), help="Only these.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    callback=pairs,
    metavar="NAME=VALUE",
    help="Only jobs with all of these.",
)
@click.option("--batch", "batch_id", metavar="NAME", help="Only jobs of this batch.")
@click.option("--before", metavar="ID", help="Only jobs older than this one: the last id of the page before.")
@click.option(
    "--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, metavar="N", help="At most."
)
@_as_json
@click.pass_context
def ls(ctx: click.Context, /, as_json: bool, state: str | None, kind: str | None, **filters: Any) -> None:
    """List jobs, newest first. Not on a terminal: tab-separated, the id first.

    codeherd ls --state failed --label team=docs
    codeherd ls --batch nightly | cut -f1 | xargs codeherd cancel
    """
    with open_client(settings_of(ctx), publish=False) as client:
        found = client.list(
            state=JobState(state) if state else None, kind=JobKind(kind) if kind else None, **filters
        )
        if as_json:
            print_json({"jobs": [job_document(job.row) for job in found]})
        else:
            print_jobs([job.row for job in found], now=datetime.now(UTC))


@click.command(cls=Verb)
@_ids_or_batch
@_as_json
@click.pass_context
def cancel(ctx: click.Context, ids: tuple[str, ...], batch_id: str | None, as_json: bool) -> None:
    """Withdraw jobs: queued ones at once, running ones at their worker's next token.

    A job that has ended stays as it is, so cancelling twice does no harm. Prints each id and state.
    """
    with open_client(settings_of(ctx), publish=True) as client:
        chosen = _chosen(ctx, client, ids, batch_id)
        _print_states({job_id: client.cancel(job_id) for job_id in chosen}, as_json=as_json)


@click.command(cls=Verb)
@_ids_or_batch
@_as_json
@click.pass_context
def retry(ctx: click.Context, ids: tuple[str, ...], batch_id: str | None, as_json: bool) -> None:
    """Queue ended jobs again, with all their attempts; their time limits no longer hold.

    Only jobs that ended without a result; with --batch all of these. Prints each id and state.
    """
    with open_client(settings_of(ctx), publish=False) as client:
        chosen = _chosen(ctx, client, ids, batch_id)
        if batch_id is not None:
            chosen = {i: job for i, job in chosen.items() if job.row.state in sources(Move.REQUEUE)}
        for job_id in chosen:
            client.retry(job_id)
        _print_states(dict.fromkeys(chosen, JobState.QUEUED), as_json=as_json)


def print_result(client: Client, job: Job, *, as_json: bool, echo: bool, index: int | None) -> None:
    """Print the result of an ended job.

    Raises:
        JobFailed, JobCancelled, JobExpired: it ended without one.
        WaitTimeout: it has not ended.
        InvalidRequest: there is no candidate `index`.
    """
    found = client.result(job.id, timeout_s=0)
    candidates = found.candidates
    if index is not None:
        candidates = tuple(c for c in candidates if c.index == index)
        if not candidates:
            raise InvalidRequest(f"job {job.id} has {len(found.candidates)} candidates, none is {index}")
    if as_json:
        kept = found.model_copy(update={"candidates": candidates})
        print_json({"job": job_document(job.refresh()), "result": result_document(kept)})
    else:
        print_candidates(candidates, job.row.request if echo else None)


def _batch_line(client: Client, job: Job) -> dict[str, Any]:
    row = job.row
    line = {
        "schema": 1,
        "id": row.id,
        "custom_id": row.labels.get("custom_id"),
        "state": row.state,
        "result": None,
        "error": None,
    }
    try:
        line["result"] = result_document(client.result(row.id, timeout_s=0))
    except JobError as err:
        line["error"] = {"code": row.error_code or err.code, "message": row.error_message or err.message}
    return line


def _chosen(ctx: click.Context, client: Client, ids: tuple[str, ...], batch_id: str | None) -> dict[str, Job]:
    """Return the jobs that the command line names, the oldest of a batch first.

    Raises:
        JobNotFound: before anything is done with the others.
    """
    if bool(ids) == (batch_id is not None):
        raise click.UsageError("give one ID or more, or --batch NAME", ctx)
    if batch_id is None:
        return client.handles(ids)
    found = list(_of_batch(client, batch_id))
    if not found:
        raise click.UsageError(f"no job belongs to batch `{batch_id}`", ctx)
    return {job.id: job for job in reversed(found)}


def _of_batch(client: Client, batch_id: str) -> Iterator[Job]:
    before = None
    while page := client.list(batch_id=batch_id, before=before, limit=_PAGE):
        yield from page
        before = page[-1].id


def _print_states(states: dict[str, JobState], *, as_json: bool) -> None:
    if as_json:
        print_json({"jobs": [{"id": job_id, "state": state} for job_id, state in states.items()]})
    else:
        print_table(("id", "state"), list(states.items()))
