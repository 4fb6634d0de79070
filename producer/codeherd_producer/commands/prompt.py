"""`codeherd prompt`: the exact tokens that a model would get for a request.

Owns: asking the worker's prompt command, which has the tokenizer, and showing its answer. Does not
know how a prompt is built: `codeherd_worker.engine.prompts` does.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import click

from codeherd_producer.commands.configuration import settings_of
from codeherd_producer.commands.help_text import Noun
from codeherd_producer.commands.output import print_json, print_table
from codeherd_producer.commands.request_options import (
    chat_text,
    fitting,
    generate_text,
    infill_text,
    make_request,
    options,
)
from codeherd_producer.commands.talk import note
from codeherd_producer.counter import PROMPT_COMMAND, tokenizer_folder
from codeherd_schema.errors import (
    CodeherdError,
    ConfigurationError,
    FillMarkerError,
    InvalidRequest,
    ModelFilesInvalid,
    PromptTooLong,
    ReservedText,
    TokenizerMismatch,
    UnsupportedByModel,
)
from codeherd_schema.models import ModelTable
from codeherd_schema.requests import JobKind, dump_request

#: Errors that the prompt command can answer with, by their code.
_ANSWERED = {
    kind.code: kind
    for kind in (
        FillMarkerError,
        InvalidRequest,
        ModelFilesInvalid,
        PromptTooLong,
        ReservedText,
        TokenizerMismatch,
        UnsupportedByModel,
    )
}

_shown = options(
    fitting,
    click.option("--folder", metavar="DIR", help="A folder with the model's tokenizer."),
    click.option("--json", "as_json", is_flag=True, help="One JSON document."),
    click.pass_context,
)


@click.group(cls=Noun)
def prompt() -> None:
    """Show the exact tokens that a model would get, and what truncation would cut.

        codeherd prompt generate "def fib(n):"
        codeherd prompt infill 'def f(): <FILL_ME>' --spm --json

    Needs `codeherd[worker]` here, and for a model other than `tiny` its tokenizer in a local folder.
    """


@prompt.command("generate")
@generate_text
@_shown
def _generate(ctx: click.Context, **values: Any) -> None:
    """Show the prompt of a completion."""
    _show(ctx, JobKind.GENERATE, values)


@prompt.command("infill")
@infill_text
@_shown
def _infill(ctx: click.Context, **values: Any) -> None:
    """Show the prompt of an infilling."""
    _show(ctx, JobKind.INFILL, values)


@prompt.command("chat")
@chat_text
@_shown
def _chat(ctx: click.Context, **values: Any) -> None:
    """Show the prompt of a chat turn."""
    _show(ctx, JobKind.CHAT, values)


def _show(ctx: click.Context, kind: JobKind, values: dict[str, Any]) -> None:
    settings = settings_of(ctx)
    request = make_request(kind, values, ctx=ctx, default_model=settings.default_model)
    model = ModelTable.from_file(settings.models_file).check(request)
    folder = values["folder"] or tokenizer_folder(model)
    if folder is None:
        raise ConfigurationError(
            f"this machine has no tokenizer for `{model.name}`",
            hint="pip install 'codeherd[worker]', and give the model's folder with --folder",
        )
    question = {
        "requests": [dump_request(request)],
        "folder": folder,
        "model": model.model_dump(mode="json"),
    }
    answer = _ask(question)
    if values["as_json"]:
        print_json({"model": model.name, "kind": kind, **answer})
        return
    for cut in answer["cut"]:
        note(f"cut: {cut['removed']} of {cut['total']} of the {cut['part']}")
    note(f"{answer['prompt_tokens']} tokens, stops at {answer['stop_ids']}")
    print_table(
        ("id", "piece"),
        [(str(i), piece) for i, piece in zip(answer["token_ids"], answer["pieces"], strict=True)],
    )


def _ask(question: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(  # noqa: S603 -- our own module, no shell
        PROMPT_COMMAND,
        input=json.dumps(question).encode(),
        stdout=subprocess.PIPE,
        check=False,
    )
    try:
        answers: dict[str, Any] = json.loads(done.stdout)
        answer: dict[str, Any] = answers if "error" in answers else answers["prompts"][0]
    except (json.JSONDecodeError, LookupError) as err:
        raise CodeherdError(f"the prompt command ended with status {done.returncode}") from err
    if "error" in answer:
        error = answer["error"]
        raise _ANSWERED.get(error["code"], CodeherdError)(error["message"], hint=error["hint"])
    return answer
