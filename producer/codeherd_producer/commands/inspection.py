"""`codeherd inspect`: what workers do right now, and what a job's tokens may attend to.

Owns: asking, and how often. Does not know how a worker (`worker_picture`) or a mask (`mask_picture`) is
drawn. Shows numbers and job ids, never a prompt or a text.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

import click

from codeherd_producer.commands.clients import open_client
from codeherd_producer.commands.configuration import settings_of
from codeherd_producer.commands.help_text import Verb
from codeherd_producer.commands.mask_picture import SlotFacts, draw, picture
from codeherd_producer.commands.output import print_json, print_table
from codeherd_producer.commands.talk import note, say
from codeherd_producer.commands.worker_picture import SUMMARY, describe, summary_row
from codeherd_schema.errors import BrokerUnavailable, ServiceUnavailable
from codeherd_schema.settings import SharedSettings

#: What pictures are drawn for where stdout is no terminal: columns, lines.
_SIZE: Final = (100, 40)
#: Shapes of an engine that did not answer, in tokens: the smallest granule, the default chunk, and how far
#: CPU engines read.
_GRANULE, _CHUNK, _KV_STEP, _ALIGNMENT = 32, 256, 64, 16

Workers = Mapping[str, Mapping[str, Any]]


@click.command(cls=Verb)
@click.argument("worker", required=False)
@click.option("--mask", "job_id", metavar="ID", help="Draw what each token of this job may attend to.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, with --watch one a line.")
@click.option(
    "--watch", "every_s", type=click.FloatRange(min=0.2), metavar="S", help="Again every S seconds."
)
@click.option(
    "--answer-s", type=float, default=1.0, metavar="S", help="Seconds that workers get to answer [1]."
)
@click.pass_context
def inspect(
    ctx: click.Context,
    worker: str | None,
    job_id: str | None,
    as_json: bool,
    every_s: float | None,
    answer_s: float,
) -> None:
    """Show what workers do right now: slots, speed, memory; never a prompt or a text.

        codeherd inspect
        codeherd inspect gpu0 --watch 2
        codeherd inspect --mask 0199d1a2-…

    WORKER is a name as in Flower, with or without the part after the `@`. On a terminal each slot that is
    used is drawn as a bar; elsewhere every worker is one tab-separated line. --mask draws the attention mask
    of a job that runs, or of one that has succeeded from its token counts: one row for each token that
    attends, one column for each place in the cache of its slot. Exit status 1 if nobody answers.
    """
    settings = settings_of(ctx)
    if job_id is not None:
        _show_mask(settings, worker, job_id, as_json=as_json, answer_s=answer_s)
        return
    _show(_asked(settings, worker, answer_s), as_json=as_json)
    while every_s is not None:
        time.sleep(every_s)
        try:
            found = _asked(settings, worker, answer_s)
        except ServiceUnavailable as err:
            # Whoever watches wants to see them come back.
            say(f"{err.message}; asking again")
            continue
        if sys.stdout.isatty():
            click.clear()
        _show(found, as_json=as_json)


def _asked(settings: SharedSettings, name: str | None, answer_s: float) -> Workers:
    """Ask the workers.

    Raises:
        BrokerUnavailable: there is nobody to ask through.
        ServiceUnavailable: nobody answered, or not the one that was named.
    """
    found = _answers(settings, name, answer_s)
    if not found:
        asked = f"worker `{name}`" if name else "any worker"
        raise ServiceUnavailable(
            f"no answer from {asked} within {answer_s:g} s",
            hint="`codeherd worker --model …` starts one; `codeherd doctor` looks further",
        )
    return found


def _answers(settings: SharedSettings, name: str | None, answer_s: float) -> Workers:
    # Celery: too much for a command line that only asks for help.
    from codeherd_schema.broker import Broker

    broker = Broker(settings)
    try:
        workers = broker.workers(answer_s)
    finally:
        broker.close()
    return {node: figures for node, figures in sorted(workers.items()) if _is_called(node, name)}


def _is_called(node: str, name: str | None) -> bool:
    return name is None or name in (node, node.partition("@")[0])


def _show(workers: Workers, *, as_json: bool) -> None:
    if as_json:
        print_json({"workers": list(workers.values())})
    elif sys.stdout.isatty():
        width = shutil.get_terminal_size(_SIZE).columns
        click.echo("\n\n".join("\n".join(describe(figures, width)) for figures in workers.values()))
    else:
        print_table(SUMMARY, [summary_row(figures) for figures in workers.values()])


def _show_mask(
    settings: SharedSettings, name: str | None, job_id: str, *, as_json: bool, answer_s: float
) -> None:
    """Draw a job's mask.

    Raises:
        JobNotFound, WaitTimeout, JobFailed, JobCancelled, JobExpired: it does not run and has no result.
    """
    try:
        workers = _answers(settings, name, answer_s)
    except BrokerUnavailable as err:
        # A job that has ended is in SQL.
        note(f"{err.message}; no worker was asked")
        workers = {}
    slots = [
        SlotFacts.of(figures, view)
        for figures in workers.values()
        for view in figures["slot_views"]
        if view["name"] == job_id
    ]
    is_running = bool(slots)
    if not is_running:
        slots = _from_result(settings, job_id, workers)
    if as_json:
        print_json({"job": job_id, "running": is_running, "slots": [asdict(facts) for facts in slots]})
        return
    if not is_running:
        note(f"job {job_id} does not run: drawn from its token counts, as if alone in an empty slot")
    width = shutil.get_terminal_size(_SIZE).columns
    click.echo("\n\n".join("\n".join(draw(picture(facts, width))) for facts in slots))


def _from_result(settings: SharedSettings, job_id: str, workers: Workers) -> list[SlotFacts]:
    """Return slots as the candidates of a job that has ended would have filled them."""
    with open_client(settings, publish=False) as client:
        result = client.result(job_id, timeout_s=0)
    figures = next((f for f in workers.values() if f["model"] == result.model), None)
    prompt = result.prompt_tokens
    slots = []
    for number, candidate in enumerate(result.candidates):
        need = prompt + candidate.completion_tokens
        shapes = _assumed(need) if figures is None else _shapes_for(figures, need)
        view = {
            "slot": number,
            "length": shapes["classes"][0]["length"],
            "prompt_tokens": prompt,
            "reused_tokens": 0,
            "prefilled_tokens": prompt,
            "new_tokens": candidate.completion_tokens,
        }
        slots.append(SlotFacts.of(shapes, view))
    return slots


def _shapes_for(figures: Mapping[str, Any], need: int) -> Mapping[str, Any]:
    """Return an engine's shapes with the class first that holds `need` tokens."""
    fitting = [part for part in figures["classes"] if part["length"] >= need]
    return {**figures, "classes": fitting} if fitting else _assumed(need)


def _assumed(need: int) -> Mapping[str, Any]:
    length = -(-need // _ALIGNMENT) * _ALIGNMENT
    reads = [*range(_KV_STEP, length, _KV_STEP), length]
    return {
        "granule": _GRANULE,
        "prefill_chunk": _CHUNK,
        "draft_tokens": 0,
        "drafts_are_optional": True,
        "classes": [{"length": length, "spare": length, "kv_lengths": reads}],
    }
