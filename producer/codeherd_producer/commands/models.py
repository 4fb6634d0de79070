"""`codeherd models`: the table of what can be served.

Owns: its columns. Does not know any model: `codeherd_schema.models` does.
"""

from __future__ import annotations

import click

from codeherd_producer.commands.configuration import settings_of
from codeherd_producer.commands.help_text import Verb
from codeherd_producer.commands.output import print_json, print_table
from codeherd_schema.models import ModelTable, ServedModel
from codeherd_schema.requests import JobKind


@click.command(cls=Verb)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """Show what can be served: name, context window, infilling, chat, KV cache per token, source.

    Models of your own are tables in the TOML file of CODEHERD_MODELS_FILE:

        [models.my-finetune]
        source = "/models/my-finetune"      # a folder or a hub id
        parameters = 6739000000
        layers = 32
        kv_heads = 32
        head_dim = 128
        vocab_size = 32016
        context_window = 16384
        infilling = true                    # false if left out
        chat = "inst"                       # "inst", "step", or left out
    """
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
