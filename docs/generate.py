"""Write the parts of docs/ that are facts of the code: `cli.md`, `settings.md`, `states.md`.

    python docs/generate.py            write them
    python docs/generate.py --check    say which are out of date, and exit with 1 if any is

A field's sentence is the `#:` comment above it, so that the code and its documentation cannot differ.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
from pydantic.fields import FieldInfo

from codeherd_producer.cli import codeherd
from codeherd_producer.commands import failures
from codeherd_producer.commands.failures import ExitCode
from codeherd_schema import settings as shared
from codeherd_schema import states
from codeherd_schema.settings import PREFIX, SharedSettings
from codeherd_schema.states import FINAL_STATES, MOVES, JobState
from codeherd_worker import settings as worker
from codeherd_worker.settings import WorkerSettings

DOCS = Path(__file__).parent
#: Columns of the help texts.
WIDTH = 100
#: Defaults that differ from machine to machine.
SHOWN_DEFAULTS = {"data_dir": "`$XDG_DATA_HOME/codeherd`"}


def main() -> int:
    """Write or check the pages; return the exit status."""
    pages = {"cli.md": cli_page(), "settings.md": settings_page(), "states.md": states_page()}
    if "--check" in sys.argv[1:]:
        stale = [name for name, text in pages.items() if _read(DOCS / name) != text]
        for name in stale:
            print(f"docs/{name} is out of date: run `make docs`", file=sys.stderr)
        return 1 if stale else 0
    for name, text in pages.items():
        (DOCS / name).write_text(text, encoding="utf-8")
    return 0


def cli_page() -> str:
    """Return the page of the command line: conventions by hand, everything else from the code."""
    comments = field_comments(failures)
    codes = "\n".join(f"| {code.value} | {comments[code.name]} |" for code in ExitCode)
    helps = "\n\n".join(
        f"### `{path}`\n\n```text\n{text}\n```" for path, text in help_texts(codeherd, "codeherd", None)
    )
    return CLI_PAGE.replace("{codes}", codes).replace("{helps}", helps)


def settings_page() -> str:
    """Return the page of all settings."""
    parts = [SETTINGS_PAGE, "## Shared by all processes", "", *_settings_table(SharedSettings, shared)]
    parts += ["", "## Workers only", "", *_settings_table(WorkerSettings, worker), ""]
    return "\n".join(parts)


def states_page() -> str:
    """Return the page of the states of a job."""
    picture = re.search(r"\n\n((?: {4}.*\n)+)", states.__doc__ or "")
    drawn = "" if picture is None else inspect.cleandoc(picture[1])
    comments = field_comments(states)
    rows = [
        f"| `{state}` | {'yes' if state in FINAL_STATES else 'no'} | {comments[state.name]} |"
        for state in JobState
    ]
    moves = [f"| {move} | `{source}` | `{to}` |" for (move, source), to in MOVES.items()]
    return (
        STATES_PAGE.replace("{picture}", drawn)
        .replace("{states}", "\n".join(rows))
        .replace("{moves}", "\n".join(moves))
    )


def field_comments(module: ModuleType) -> dict[str, str]:
    """Return the `#:` comment above each name of a module."""
    comments: dict[str, str] = {}
    collected: list[str] = []
    for line in inspect.getsource(module).splitlines():
        comment = re.match(r"\s*#: ?(.*)", line)
        name = re.match(r"\s*(\w+)\s*[:=]", line)
        if comment is not None:
            collected.append(comment[1])
            continue
        if name is not None and collected:
            comments.setdefault(name[1], " ".join(collected))
        collected = []
    return comments


def help_texts(command: click.Command, path: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    """Yield the help of a command and of all below it."""
    ctx = click.Context(
        command,
        info_name=path.rpartition(" ")[2],
        parent=parent,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        help_option_names=["-h", "--help"],
    )
    yield path, "\n".join(line.rstrip() for line in command.get_help(ctx).splitlines())
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            below = command.get_command(ctx, name)
            if below is not None:
                yield from help_texts(below, f"{path} {name}", ctx)


def _settings_table(cls: type[SharedSettings], module: ModuleType) -> list[str]:
    comments = field_comments(module)
    lines = ["| variable | default | range | meaning |", "|---|---|---|---|"]
    for name in cls.__annotations__:
        if name in cls.model_fields:
            field = cls.model_fields[name]
            default = SHOWN_DEFAULTS.get(name) or _default(field)
            lines.append(f"| `{PREFIX}{name.upper()}` | {default} | {_range(field)} | {comments[name]} |")
    return lines


def _default(field: FieldInfo) -> str:
    default = field.default
    if default is None:
        return ""
    return f"{default:g}" if isinstance(default, float) else f"`{default}`"


def _range(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "max_length": "characters ≤"}
    return ", ".join(
        f"{sign} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, sign in signs.items()
        if getattr(rule, name, None) is not None
    )


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


_NOTICE = "<!-- Written by docs/generate.py (`make docs`); a test compares it with the code. -->"

SETTINGS_PAGE = f"""{_NOTICE}
# Settings

The first source that names a setting wins: an option of the command line, the environment variable,
`[tool.codeherd]` in the current folder's `pyproject.toml`, the user's file
`$XDG_CONFIG_HOME/codeherd/config.toml`, the default. In files the name is the variable's without
`CODEHERD_`, in lower case: `lease_s = 30`. An unknown name or an impossible value stops the start.
`codeherd config show` prints what is in force and where it came from.
"""

STATES_PAGE = f"""{_NOTICE}
# The states of a job

```text
{{picture}}
```

| state | final | meaning |
|---|---|---|
{{states}}

Every legal move; what is not here cannot happen. Each is one conditional UPDATE in SQL.

| move | from | to |
|---|---|---|
{{moves}}
"""

CLI_PAGE = f"""{_NOTICE}
# The command line

Data goes to stdout, talk to stderr. A table is drawn on a terminal; elsewhere rows are tab-separated,
without a header, the id first. A progress bar is drawn only on a terminal, else there is one line every
10 seconds; `codeherd --quiet` leaves both out, and all notes.

## Text

Where a command takes a text, the argument is the text itself, `-` is stdin, `@FILE` a file, and `@@text`
a text that begins with `@`; without an argument it is what is piped. Text is UTF-8 and kept as it is: no
newline is added, removed or changed. `--at FILE:LINE[:COL]` puts the hole at a cursor: lines and columns
count from 1, columns in characters, column 1 is before the first character; without a column the hole is
at the end of the line.

`--wait` and `result` print the generated text byte for byte (on a terminal a newline follows, if it has
none). Several candidates are separated by lines `==> candidate 0 <==`; `result --index` prints one alone.

A time is a duration (`90`, `10m`, `1h30m`, `2d`, counted from the database's clock at submit) or a moment
with its time zone (`2026-05-01T09:00Z`).

## Exit status

| status | meaning |
|---|---|
{{codes}}

An error is one line on stderr, `error: message [code]`, and often a second, `hint: …`. The codes are those
of `codeherd_schema/errors.py`, `usage` for a wrong command line, and `internal_error`.

## JSON

With `--json` a command writes one JSON document to stdout. Its `schema` is 1: fields may be added to it,
none is renamed or removed.

| command | document |
|---|---|
| `submit` | `{{"schema", "deduplicated", "job"}}`; with `--wait` that of `result` |
| `submit jsonl` | `{{"schema", "batch_id", "jobs": [{{"id", "state"}}]}}`; `state` is null without `--wait` |
| `result ID` | `{{"schema", "job", "result"}}` |
| `result --batch` | one line each: `{{"schema", "id", "custom_id", "state", "result", "error"}}` |
| `ls`, `wait` | `{{"schema", "jobs": [job]}}` |
| `status` | `{{"schema", "jobs": [job and "attempts": [attempt]]}}` |
| `cancel`, `retry` | `{{"schema", "jobs": [{{"id", "state"}}]}}` |
| `pause`, `resume` | `{{"schema", "pauses": [{{"scope", "name", "since", "reason"}}]}}`: all that hold now |
| `prune` | `{{"schema", "jobs", "deleted"}}`: how many, and whether they are gone |
| `prompt` | `{{"schema", "model", "kind", "prompt_tokens", "token_ids", "pieces", "text", …}}` |
| `backfill docstrings`, `backfill resume` | `{{"schema", "run"}}` |
| `backfill docstrings --dry-run` | `plan and "schema"` |
| `backfill check`, `backfill docstrings --check` | `coverage and "schema"` |
| `backfill runs` | `{{"schema", "runs": [run]}}` |
| `backfill status` | `progress and "schema"` |
| `backfill show` | `{{"schema", "symbols": [symbol]}}` |
| `backfill report --format json` | `report and "schema"` |
| `backfill eval` | `{{"schema", "evaluation"}}` |
| `models` | `{{"schema", "models": [model]}}` |
| `models quantize` | `{{"schema", "folder", "quantization", "revision", "source_bytes", "saved_bytes"}}` |
| `models compare` | `comparison and "schema"` |
| `inspect` | `{{"schema", "workers": [worker]}}`; with `--watch` one a line |
| `inspect --mask` | `{{"schema", "job", "running", "slots": [mask]}}` |
| `doctor` | `{{"schema", "findings": [{{"part", "verdict", "message", "hint"}}]}}` |
| `health` | `{{"schema", "service", "aspect", "ok", "faults", "facts"}}` |
| `config show` | `{{"schema", "settings": {{name: {{"value", "origin"}}}}}}` |
| `db` | `{{"schema", "database", "revision"}}` |
| any, on failure | `{{"schema", "error": {{"code", "message", "hint"}}}}` |

A job is `{{"id", "kind", "model", "state", "priority", "attempt", "max_attempts", "crash_count", "worker",
"run_at", "expires_at", "deadline", "created_at", "started_at", "finished_at", "batch_id",
"idempotency_key", "labels": {{name: value}}, "error"}}`, an attempt `{{"attempt", "worker", "started_at",
"ended_at", "outcome", "error"}}`, an error `{{"code", "message"}}` or null, a model `{{"name", "source",
"parameters", "context_window", "kv_bytes_per_token", "kinds", "chat"}}`, a comparison `{{"a": side,
"b": side, "tokens", "agreement", "prompts", "same_tokens", "new_tokens"}}`, a side `{{"quantization",
"dtype", "weight_bytes", "load_s", "nats_per_token", "perplexity"}}`. Times are ISO 8601 in UTC, or null.
A result is `Result` of `codeherd_schema/results.py`.

A worker is `{{"worker", "model", "queue", "revision", "quantization", "dtype", "device", "fingerprint",
"uptime_s", "slots", "active", "waiting", "steps", "passes", "last_step_age_s", "tokens", "tokens_per_s",
"busy_share", "window_s", "prompt_tokens", "reused_tokens", "reuse_rate", "drafted", "accepted",
"acceptance_rate", "cache_bytes", "weight_bytes", "memory_bytes", "memory_peak_bytes",
"slot_views": [view], …}}`, a view `{{"slot", "length", "name", "prompt_tokens", "reused_tokens",
"prefilled_tokens", "new_tokens"}}`, whose name is the job's id or null, a mask `{{"slot", "length", "spare",
"prompt_tokens", "reused_tokens", "prefilled_tokens", "new_tokens", "granule", "prefill_chunk",
"kv_lengths", "step_width"}}`. Sizes are tokens, or bytes where the name says so.

Those of a backfill are made of these:

```text
run         {{"id", "state", "folder", "model", "created_at", "finished_at", "files": {{state: count}},
             "symbols": {{state: count}}, "documented", "questions": {{"asked", "answered"}}, "tokens"}}
plan        {{"files", "targets", "left_files": {{reason: count}}, "passed_over": {{reason: count}}}}
progress    {{"run", "rejected": {{reason: count}}, "passed_over": {{reason: count}},
             "skipped_files": {{reason: count}},
             "files_asked": [{{"path", "targets", "accepted", "rejected"}}]}}
symbol      {{"path", "name", "line", "state", "reason", "text", "candidates": [candidate]}}
candidate   {{"exchange", "text", "seed", "tokens", "reason", "scores": {{part: score}}}}
report      {{"run", "model", "version", "repository", "revision", "counts": {{status: count}},
             "reasons": {{reason: count}}, "left_for_a_human": [{{"path", "line", "name", "reason"}}],
             "symbols": [{{"path", "line", "name", "kind", "status", "reason", "score", "text"}}]}}
coverage    {{"total", "covered", "percent", "min", "ratchet", "met",
             "files": [{{"path", "total", "covered"}}], "skipped": [{{"path", "reason"}}]}}
evaluation  {{"cases", "files", "model", "form", "convention", "seed", "new_only", "documented",
             "passed_over": {{reason: count}}, "unread_files", "scores": {{row: {{measure: interval}}}},
             "leads": {{row: {{measure: interval}}}}, "rejected": {{reason: count}}, "tokens", "seconds",
             "notes"}}
interval    {{"value", "low", "high"}}, or null
```

## Commands

{{helps}}
"""

if __name__ == "__main__":
    sys.exit(main())
