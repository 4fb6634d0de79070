"""`codeherd backfill eval`: measure whether a model's docstrings are good enough.

Owns: the options, and the way from questions to jobs and back. Does not choose, ask or grade
(`backfill.evaluation`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from codeherd_producer.backfill import evaluation
from codeherd_producer.backfill.evaluation import Form, Reply
from codeherd_producer.backfill.interpreters import borrowed
from codeherd_producer.client import Client
from codeherd_producer.commands.backfill_options import make_options, text_options
from codeherd_producer.commands.backfill_runs import opened
from codeherd_producer.commands.configuration import settings_of
from codeherd_producer.commands.help_text import Verb
from codeherd_producer.commands.output import print_json, print_text
from codeherd_producer.commands.talk import progress
from codeherd_schema.errors import InvalidRequest
from codeherd_schema.models import ModelTable
from codeherd_schema.requests import InfillRequest


@click.command("eval", cls=Verb)
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@text_options
@click.option("--count", type=click.IntRange(1), default=200, help="Docstrings to hold back [200].")
@click.option("--seed", type=click.IntRange(0), default=0, help="Another one holds back others [0].")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only such paths; repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Not such paths; repeatable.")
@click.option("--python", metavar="PATH", help="An interpreter that reads syntax newer than this one's.")
@click.option(
    "--new-since",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Only docstrings that an older version of the same code lacks.",
)
@click.option(
    "--form",
    type=click.Choice([form.value for form in Form]),
    default=Form.OWN.value,
    help="`own` as a backfill asks, `paper` as the Code Llama paper does [own].",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_context
def evaluate(ctx: click.Context, /, path: Path, **given: Any) -> None:
    """Hold back docstrings that people wrote, ask the model for them, and say how near it comes.

        codeherd backfill eval src --model codellama-7b --count 500
        codeherd backfill eval python3.13/Lib --new-since python3.11/Lib

    Beside the model stand two baselines: the name in words, and the nearest neighbour's docstring.
    """
    settings = settings_of(ctx)
    wanted = make_options(path, ModelTable.from_file(settings.models_file), given)
    with borrowed(wanted.python) as other:
        sample = evaluation.sampled(
            path,
            given["count"],
            seed=given["seed"],
            selection=wanted.kinds,
            include=wanted.include,
            exclude=wanted.exclude,
            new_since=given["new_since"],
            other=other,
        )
        if not sample.places:
            raise InvalidRequest(f"below {path} there is no docstring that could be held back")
        # All of them now: the other interpreter need not wait until they are answered.
        held_back = list(evaluation.cases(path, sample, budget=wanted.context_chars, other=other))
    with opened(ctx, publish=True) as site:
        found = evaluation.evaluate(
            held_back,
            lambda questions: _answered(site.client, questions),
            sample=sample,
            policy=wanted.policy(usual_lengths=()),
            form=Form(given["form"]),
        )
    if given["as_json"]:
        print_json({"evaluation": found.to_json()})
    else:
        print_text(found.to_text())


def _answered(client: Client, questions: Sequence[InfillRequest]) -> Iterable[Reply]:
    jobs = client.submit_many(questions)
    with progress(len(jobs)) as meter:
        for ended, _ in enumerate(client.as_completed(jobs), start=1):
            meter.show(ended)
    results = client.results([job.id for job in jobs])
    for job in jobs:
        result = results.get(job.id)
        if result is not None:
            yield Reply.of(result)
        else:
            row = client.row(job.id)
            yield Reply("", error=row.error_code or row.state.value)
