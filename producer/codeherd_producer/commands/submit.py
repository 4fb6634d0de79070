"""`codeherd submit`: queue jobs, print their ids, and wait for them if asked to.

Owns: the order of a submit on the command line. Does not know how a request is made from options
(`codeherd_producer.commands.request_options`) or a file of many (`codeherd_producer.commands.batch`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import click

from codeherd_producer.client import Client, Job
from codeherd_producer.commands.batch import read_batch
from codeherd_producer.commands.clients import open_client
from codeherd_producer.commands.configuration import settings_of
from codeherd_producer.commands.help_text import Noun
from codeherd_producer.commands.jobs import print_result
from codeherd_producer.commands.output import job_document, print_json
from codeherd_producer.commands.request_options import (
    chat_text,
    fitting,
    generate_text,
    infill_text,
    make_request,
    options,
    sampling,
    scheduling,
)
from codeherd_producer.commands.talk import note
from codeherd_producer.commands.waits import ended_jobs, exit_code_of, tally, wait_options
from codeherd_schema.pauses import Pause
from codeherd_schema.requests import JobKind
from codeherd_schema.states import JobState, PauseScope

#: Jobs that are read at a time to see whether they are paused.
_PAGE: Final = 500

_waiting = options(
    click.option("--wait", is_flag=True, help="Wait, and print the text instead of the id."),
    wait_options,
)
_one_job = options(
    fitting,
    sampling,
    scheduling,
    _waiting,
    click.option("--echo", is_flag=True, help="With --wait: print the text in its place, prompt and all."),
    click.option("--json", "as_json", is_flag=True, help="One JSON document."),
    click.pass_context,
)


@click.group(cls=Noun)
def submit() -> None:
    """Queue jobs and print their ids.

        codeherd submit generate "def fib(n):"
        codeherd submit generate - --wait < start.py
        codeherd submit infill 'def f(): <FILL_ME>' --wait --echo
        codeherd submit infill --at main.py:12:5 --model codellama-7b
        codeherd submit chat "Why is the sky dark?" --model codellama-7b-instruct
        codeherd submit jsonl jobs.jsonl --wait

    A text is the argument itself, `-` for stdin, or `@FILE`; without one, what is piped. It is UTF-8
    and stays as it is, newlines included. stdout gets the job's id and nothing else; with --wait it
    gets the generated text byte for byte. Ctrl-C while waiting detaches: the job goes on.
    """


@submit.command()
@generate_text
@_one_job
def generate(ctx: click.Context, **values: Any) -> None:
    """Continue PROMPT."""
    _submit(ctx, JobKind.GENERATE, values)


@submit.command()
@infill_text
@_one_job
def infill(ctx: click.Context, **values: Any) -> None:
    """Fill the hole in TEXT, between two files, or at a cursor."""
    _submit(ctx, JobKind.INFILL, values)


@submit.command()
@chat_text
@_one_job
def chat(ctx: click.Context, **values: Any) -> None:
    """Answer PROMPT, as the last turn of a conversation."""
    _submit(ctx, JobKind.CHAT, values)


@submit.command()
@click.argument("file")
@click.option("-m", "--model", metavar="NAME", help="Model of lines that name none.")
@click.option("--batch", "batch_id", metavar="NAME", help="Name of the batch [made up].")
@click.option("--skip-invalid", is_flag=True, help="Queue the right lines even if others are wrong.")
@_waiting
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_context
def jsonl(ctx: click.Context, /, file: str, **values: Any) -> None:
    """Queue one job for each line of FILE, `-` for stdin.

    A line is a JSON object: `kind` (generate, infill, chat), its text (`prompt`; `prefix` and
    `suffix`, or `text` with one <FILL_ME>; `messages`), and any field of a request: `model`,
    `sampling`, `priority`, `labels`, `idempotency_key`, … `custom_id` is your own name of the line and
    becomes the label `custom_id`.

    Every line is checked before any is queued, and all wrong ones are listed. With --batch the same
    command can be repeated after a failure: a line that is queued already is not queued again.

    stdout gets one id a line, in the file's order.
    """
    _check_waiting(ctx, values)
    settings = settings_of(ctx)
    with (
        open_client(settings, publish=values["wait"]) as client,
        read_batch(
            client,
            file,
            default_model=values["model"] or settings.default_model,
            name=values["batch_id"],
            skip_invalid=values["skip_invalid"],
        ) as batch,
    ):
        jobs = client.submit_many(batch.requests(), batch_id=batch.name)
        note(f"batch {batch.name}: {len(jobs)} jobs")
        if not values["as_json"]:
            click.echo("".join(f"{job.id}\n" for job in jobs), nl=False)
        states = {}
        if values["wait"]:
            _note_pauses(client, jobs)
            wait = ended_jobs(
                client,
                {job.id: job for job in jobs},
                timeout=values["timeout"],
                cancel_on_interrupt=values["cancel_on_interrupt"],
                reattach=f"codeherd wait --batch {batch.name}",
            )
            states = {job.id: job.state for job in wait}
            note(tally(states.values()))
        if values["as_json"]:
            told = [{"id": job.id, "state": states.get(job.id)} for job in jobs]
            print_json({"batch_id": batch.name, "jobs": told})
        ctx.exit(exit_code_of(list(states.values())))


def _check_waiting(ctx: click.Context, values: dict[str, Any]) -> None:
    for name in ("timeout", "cancel_on_interrupt", "echo"):
        if values.get(name) and not values["wait"]:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --wait", ctx)


def _note_pauses(client: Client, jobs: Sequence[Job]) -> None:
    """Say which pauses keep jobs from starting: whoever waits for them waits for a person."""
    pauses = client.pauses()
    if not pauses:
        return
    named: set[tuple[PauseScope, str | None]] = set()
    for start in range(0, len(jobs), _PAGE):
        page = client.handles([job.id for job in jobs[start : start + _PAGE]])
        named.update(key for job in page.values() for key in _pausable(job))
    for pause in pauses:
        if (pause.scope, pause.name) in named:
            note(_told(pause))


def _pausable(job: Job) -> Iterator[tuple[PauseScope, str | None]]:
    """Yield what a pause must name for this job not to start."""
    row = job.row
    if row.state is JobState.QUEUED:
        yield PauseScope.QUEUE, row.queue
        yield PauseScope.BATCH, row.batch_id
        yield PauseScope.RUN, row.run_id
        yield PauseScope.TENANT, row.tenant


def _told(pause: Pause) -> str:
    # A queue is spelled as its model: nobody types the names of queues.
    is_queue = pause.scope is PauseScope.QUEUE
    what = f"model {pause.name.partition('.')[2]}" if is_queue else f"{pause.scope} {pause.name}"
    reason = f" ({pause.reason})" if pause.reason else ""
    return f"note: {what} is paused{reason}: nothing of it starts before `codeherd resume {what}`"


def _submit(ctx: click.Context, kind: JobKind, values: dict[str, Any]) -> None:
    _check_waiting(ctx, values)
    settings = settings_of(ctx)
    request = make_request(kind, values, ctx=ctx, default_model=settings.default_model)
    # Without a wait the dispatcher publishes, within half a second: Celery need not be imported here.
    with open_client(settings, publish=values["wait"]) as client:
        job = client.submit(request)
        if job.deduplicated:
            note("note: this key and request were submitted before, it is the same job")
        if values["wait"]:
            note(f"job {job.id}: waiting, Ctrl-C detaches")
            _note_pauses(client, [job])
            wait = ended_jobs(
                client,
                {job.id: job},
                timeout=values["timeout"],
                cancel_on_interrupt=values["cancel_on_interrupt"],
                reattach=f"codeherd wait {job.id}",
            )
            for ended in wait:
                print_result(client, ended, as_json=values["as_json"], echo=values["echo"], index=None)
        elif values["as_json"]:
            print_json({"deduplicated": job.deduplicated, "job": job_document(job.row)})
        else:
            click.echo(job.id)
