"""The options that describe a request, and the request they make.

Owns: the names of these options and how they become the fields of a request, for `codeherd submit`
and `codeherd prompt` alike. Does not know ranges or defaults: `codeherd_schema.requests` judges them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import click

from codeherd_producer.commands.durations import Moment
from codeherd_producer.commands.text_sources import hole_at, read_file, read_text
from codeherd_schema.errors import InvalidRequest
from codeherd_schema.requests import (
    FILL_MARKER,
    InfillRequest,
    JobKind,
    Overflow,
    Request,
    Sampling,
    parse_request,
)

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]

_FILE = click.Path(path_type=Path)


def options(*decorators: Decorator) -> Callable[[F], F]:
    """Join decorators into one; `--help` lists them in this order."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def pairs(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """Turn `NAME=VALUE` options into a dict: a click callback."""
    found: dict[str, str] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"`{pair}` is not written NAME=VALUE", ctx, param)
        if name in found:
            raise click.BadParameter(f"`{name}` is given twice", ctx, param)
        found[name] = value
    return found


generate_text = options(
    click.argument("prompt", required=False),
)
infill_text = options(
    click.argument("text", required=False),
    click.option("--prefix-file", type=_FILE, help="The text before the hole."),
    click.option("--suffix-file", type=_FILE, help="The text after the hole."),
    click.option(
        "--at",
        metavar="FILE:LINE[:COL]",
        help="The hole is at this cursor: line and column from 1; the line's end without a column.",
    ),
    click.option(
        "--fill-token", metavar="TEXT", default=FILL_MARKER, show_default=True, help="Marks the hole in TEXT."
    ),
    click.option("--spm", is_flag=True, help="Suffix-prefix-middle order instead of prefix-suffix-middle."),
)
chat_text = options(
    click.argument("prompt", required=False),
    click.option("--system", metavar="TEXT", help="The system message; `@FILE` reads it from a file."),
    click.option(
        "--messages",
        metavar="FILE",
        help="JSON list of earlier {role, content} turns, `-` for stdin; PROMPT is added as the last.",
    ),
)
fitting = options(
    click.option("-m", "--model", metavar="NAME", help="A name of `codeherd models`."),
    click.option("--max-new-tokens", type=int, metavar="N", help="Most new tokens per candidate [256]."),
    click.option("--truncate", is_flag=True, help="Cut a prompt that is too long, instead of refusing it."),
)
sampling = options(
    click.option("--temperature", type=float, metavar="X", help="0 is greedy, up to 2 [0]."),
    click.option("--top-p", type=float, metavar="X", help="Keep the likeliest tokens up to this mass [1]."),
    click.option(
        "--top-k", type=int, metavar="N", help="Keep this many of the likeliest tokens; 0 is all [0]."
    ),
    click.option(
        "--min-p", type=float, metavar="X", help="Keep tokens this fraction as likely as the likeliest [0]."
    ),
    click.option("--repetition-penalty", type=float, metavar="X", help="1 is off, up to 2 [1]."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable."),
    click.option(
        "--seed", type=int, metavar="N", help="Same request and seed, same text [from the job's id]."
    ),
    click.option("-n", "--n", type=int, metavar="N", help="Candidates [1]."),
    click.option(
        "--logprobs",
        type=int,
        metavar="N",
        help="With --json: tell each token's log-probability and the N likeliest, up to 5 [0].",
    ),
)
scheduling = options(
    click.option("--priority", type=int, metavar="N", help="0 runs first, 9 last [5]."),
    click.option(
        "--run-at", type=Moment(), metavar="TIME", help="Not started before: 10m, or 2026-05-01T09:00Z."
    ),
    click.option("--expires", "expires_at", type=Moment(), metavar="TIME", help="Not started after."),
    click.option("--deadline", type=Moment(), metavar="TIME", help="Stopped if not finished by."),
    click.option(
        "--label", "labels", multiple=True, callback=pairs, metavar="NAME=VALUE", help="For `ls --label`."
    ),
    click.option(
        "--metadata", multiple=True, callback=pairs, metavar="NAME=VALUE", help="Kept and given back."
    ),
    click.option("--idempotency-key", metavar="KEY", help="The same key and request give the same job."),
)


def make_request(
    kind: JobKind, values: Mapping[str, Any], *, ctx: click.Context, default_model: str
) -> Request:
    """Make the request that the options in `values` describe.

    Raises:
        InvalidRequest: a text cannot be read or a value is out of range.
        NoArgsIsHelpError: no text was given and stdin is a terminal.
    """
    stdin = sys.stdin.buffer
    readers = {JobKind.GENERATE: _generate, JobKind.INFILL: _infill, JobKind.CHAT: _chat}
    fields: dict[str, Any] = {"kind": kind, **readers[kind](values, ctx, stdin)}
    fields["model"] = values.get("model") or default_model
    fields["sampling"] = _given(values, tuple(Sampling.model_fields))
    if values.get("truncate"):
        fields["overflow"] = Overflow.TRUNCATE
    scheduled = ("priority", "run_at", "expires_at", "deadline", "labels", "metadata", "idempotency_key")
    return parse_request(fields | _given(values, scheduled))


def _generate(values: Mapping[str, Any], ctx: click.Context, stdin: BinaryIO) -> dict[str, Any]:
    return {"prompt": _text(values["prompt"], ctx, stdin)}


def _infill(values: Mapping[str, Any], ctx: click.Context, stdin: BinaryIO) -> dict[str, Any]:
    files = values["prefix_file"] is not None or values["suffix_file"] is not None
    if (values["text"] is not None) + files + (values["at"] is not None) > 1:
        raise click.UsageError("give one of TEXT, --prefix-file with --suffix-file, or --at", ctx)
    if values["at"] is not None:
        hole = hole_at(values["at"])
        sides = {"prefix": hole.prefix, "suffix": hole.suffix}
    elif files:
        sides = {
            side: "" if values[f"{side}_file"] is None else read_file(values[f"{side}_file"])
            for side in ("prefix", "suffix")
        }
    else:
        marked = InfillRequest.from_text(_text(values["text"], ctx, stdin), marker=values["fill_token"])
        sides = {"prefix": marked.prefix, "suffix": marked.suffix}
    return {**sides, "suffix_first": values["spm"]}


def _chat(values: Mapping[str, Any], ctx: click.Context, stdin: BinaryIO) -> dict[str, Any]:
    messages: list[Any] = []
    if values["system"] is not None:
        messages.append({"role": "system", "content": read_text(values["system"], stdin)})
    if values["messages"] is not None:
        messages += _earlier_turns(values["messages"], stdin)
    if values["messages"] is None or values["prompt"] is not None:
        messages.append({"role": "user", "content": _text(values["prompt"], ctx, stdin)})
    return {"messages": messages}


def _earlier_turns(source: str, stdin: BinaryIO) -> list[Any]:
    text = read_text("-", stdin) if source == "-" else read_file(Path(source))
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise InvalidRequest(f"`--messages {source}` is not JSON: {err}") from err
    if not isinstance(turns, list):
        raise InvalidRequest(
            f"`--messages {source}` is not a list", hint='write [{"role": "user", "content": "…"}, …]'
        )
    return turns


def _text(argument: str | None, ctx: click.Context, stdin: BinaryIO) -> str:
    if argument is None and stdin.isatty():
        raise click.exceptions.NoArgsIsHelpError(ctx)
    return read_text("-" if argument is None else argument, stdin)


def _given(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) not in (None, (), {})}
