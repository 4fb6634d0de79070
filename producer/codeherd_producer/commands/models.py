"""`codeherd models`: the table of what can be served, quantized copies, and what a quantization costs.

Owns: columns, options, and asking the worker's model command, which has torch. Does not know any model
(`codeherd_schema.models` does) or how one is quantized (`codeherd_worker.engine` does).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from codeherd_producer.commands.configuration import settings_of
from codeherd_producer.commands.help_text import Noun
from codeherd_producer.commands.output import print_json, print_table
from codeherd_producer.commands.request_options import options
from codeherd_producer.commands.talk import is_quiet, note
from codeherd_schema.errors import CodeherdError, ConfigurationError, UnknownModel
from codeherd_schema.models import ModelTable, ServedModel
from codeherd_schema.requests import JobKind

#: `-P` keeps the current folder off the path: it may hold anybody's `codeherd_worker`.
MODEL_COMMAND = (sys.executable, "-P", "-m", "codeherd_worker.model_command")
#: What every quantization of `codeherd worker` is called.
_QUANTIZATIONS = ("auto", "nf4", "int8", "none", "bf16", "fp16", "torchao-int8", "torchao-int4")

_asked = options(
    click.option(
        "--device",
        type=click.Choice(["cpu", "cuda", "cuda-group"]),
        help="Where to compute; `cuda-group` spreads the model over all GPUs [a GPU if there is one].",
    ),
    click.option("--json", "as_json", is_flag=True, help="One JSON document."),
    click.pass_context,
)


@click.group(cls=Noun, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """Show what can be served: name, context window, infilling, chat, KV cache per token, source.

    Models of your own are tables in the TOML file of CODEHERD_MODELS_FILE:

        [models.my-finetune]
        source = "/models/my-finetune"      # a folder or a hub id, with @revision to pin it
        parameters = 6739000000
        layers = 32
        kv_heads = 32
        head_dim = 128
        vocab_size = 32016
        context_window = 16384
        infilling = true                    # false if left out
        chat = "inst"                       # "inst", "step", or left out
    """
    if ctx.invoked_subcommand is not None:
        return
    table = ModelTable.from_file(settings_of(ctx).models_file)
    if as_json:
        print_json({"models": [_document(model) for model in table]})
        return
    print_table(
        ("name", "context", "infill", "chat", "KV bytes/token", "source"),
        [
            (
                model.name,
                str(model.context_window),
                "yes" if model.infilling else "no",
                model.chat or "no",
                str(model.kv_bytes_per_token()),
                model.source,
            )
            for model in table
        ],
    )


@models.command("quantize")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--quantization",
    type=click.Choice(["nf4", "int8"]),
    default="nf4",
    help="What to hold the weights in [nf4].",
)
@_asked
def _quantize(
    ctx: click.Context, model: str, out: Path, quantization: str, device: str | None, as_json: bool
) -> None:
    """Write a quantized copy of MODEL to the new folder OUT, which workers load as it is.

        codeherd models quantize codellama-7b /models/7b-nf4
        codeherd models quantize /models/my-finetune /models/my-finetune-int8 --quantization int8

    MODEL is a name of `codeherd models`, a hub id (both with `@revision` if pinned) or a folder; it must
    be on this machine. A 7B model shrinks from 13.5 GB to 3.9 GB, and a worker starts from that. OUT is
    there whole or not at all.
    """
    answer = _ask(
        "quantize",
        {
            "source": _source(ctx, model),
            "out": str(out.absolute()),
            "quantization": quantization,
            "device": device,
        },
    )
    if as_json:
        print_json(answer)
        return
    note(f"{_size(answer['source_bytes'])} before, {_size(answer['saved_bytes'])} now, as {quantization}")
    print_table(
        ("folder", "bytes before", "bytes now", "revision"),
        [(answer["folder"], str(answer["source_bytes"]), str(answer["saved_bytes"]), answer["revision"])],
    )


@models.command("compare")
@click.argument("model")
@click.option("--a", "a", type=click.Choice(_QUANTIZATIONS), default="nf4", help="One setting [nf4].")
@click.option("--b", "b", type=click.Choice(_QUANTIZATIONS), default="none", help="The other [none].")
@click.option(
    "--text",
    "texts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="A file to read, repeatable [some of Python's standard library].",
)
@click.option("--slots", type=click.IntRange(1, 512), default=8, help="Prompts continued together [8].")
@click.option("--prompts", type=click.IntRange(1), default=16, help="Most prompts to continue [16].")
@click.option("--tokens", type=click.IntRange(2), default=8192, help="Most tokens of text [8192].")
@_asked
def _compare(ctx: click.Context, model: str, as_json: bool, texts: tuple[Path, ...], **values: Any) -> None:
    """Measure what a quantization of MODEL costs: the same text and prompts under two settings.

        codeherd models compare codellama-7b --a nf4 --b none
        codeherd models compare codellama-7b --a int8 --b none --text src/app.py --text src/io.py

    Shows for both the perplexity of the text and, together, how often they would choose the same next
    token, and for how many tokens their greedy continuations are the same. Judge code by your own files.
    """
    answer = _ask(
        "compare",
        {"source": _source(ctx, model), "texts": [str(path.absolute()) for path in texts], **values},
    )
    if as_json:
        print_json(answer)
        return
    a, b = answer["a"], answer["b"]
    note(f"{answer['tokens']} tokens read, {answer['prompts']} prompts continued by {answer['new_tokens']}")
    print_table(
        ("measure", a["quantization"], b["quantization"]),
        [
            *(
                (name, shown.format(a[name]), shown.format(b[name]))
                for name, shown in (
                    ("quantization", "{}"),
                    ("dtype", "{}"),
                    ("weight_bytes", "{}"),
                    ("load_s", "{:.1f}"),
                    ("nats_per_token", "{:.4f}"),
                    ("perplexity", "{:.4f}"),
                )
            ),
            ("agreement", f"{answer['agreement']:.4f}", ""),
            ("same_tokens", f"{answer['same_tokens']:.1f}", ""),
        ],
    )


def _document(model: ServedModel) -> dict[str, object]:
    return {
        "name": model.name,
        "source": model.source,
        "parameters": model.parameters,
        "context_window": model.context_window,
        "kv_bytes_per_token": model.kv_bytes_per_token(),
        "kinds": [kind for kind in JobKind if model.can(kind)],
        "chat": model.chat,
    }


def _source(ctx: click.Context, model: str) -> str:
    """Return what the worker package loads for a folder, a name of the table or a hub id.

    Names and ids may be pinned: `codellama-7b@main`, `owner/name@0123abc`.
    """
    table = ModelTable.from_file(settings_of(ctx).models_file)
    if Path(model).is_dir():
        return str(Path(model).absolute())
    try:
        return table.find(model).source
    except UnknownModel:
        # A hub id may be of a model that nobody serves yet.
        if "/" in model:
            return model
        name, _, revision = model.partition("@")
        if revision:
            return f"{table.find(name).source}@{revision}"
        raise


def _ask(command: str, question: dict[str, Any]) -> dict[str, Any]:
    """Ask the model command, whose stderr is ours: it draws its own bar there.

    Raises:
        CodeherdError: its error, or that it ended without an answer.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigurationError(
            "the worker package is not installed here", hint="pip install 'codeherd[worker]'"
        )
    process = subprocess.Popen(  # noqa: S603 -- our own module, no shell
        [*MODEL_COMMAND, command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # OpenMP threads that spin while they wait starve whatever shares the cores.
        env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ,
    )
    text = json.dumps(question | {"quiet": is_quiet()}).encode()
    try:
        output, _ = process.communicate(text)
    except KeyboardInterrupt:
        # A terminal has told it too; it takes away what it has half written.
        process.wait()
        raise
    try:
        answer: dict[str, Any] = json.loads(output)
    except json.JSONDecodeError as err:
        raise CodeherdError(f"the model command ended with status {process.returncode}") from err
    if "error" in answer:
        error = answer["error"]
        kinds = {kind.code: kind for kind in _family(CodeherdError)}
        raise kinds.get(error["code"], CodeherdError)(error["message"], hint=error["hint"])
    return answer


def _family(kind: type[CodeherdError]) -> Iterator[type[CodeherdError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _family(child)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
