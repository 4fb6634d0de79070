"""Tell what became of each symbol of a run: as JSON, Markdown, SARIF 2.1.0 or rdjson.

Owns: the four forms, what they escape, and which symbols are left for a human. Pure: does not read rows,
files or git, and does not know how a text was made. Every form has the same rows in the same order, by path
and line, so two reports of one run are equal byte for byte.

A generated text is called written or suggested, never an error of somebody. It stands in fences and strings
that it cannot end, and where it could not ping anybody.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any, Final
from urllib.parse import quote

#: Version of the JSON form; a field may be added without a new one, never renamed or removed.
JSON_SCHEMA: Final = 1
_SARIF_SCHEMA: Final = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_TOOL: Final = "codeherd backfill"
#: In the place of a reason that nobody gave.
NO_REASON: Final = "no reason is known"
_BACKTICKS: Final = re.compile("`+")


class Status(StrEnum):
    """What became of a symbol."""

    #: Not decided yet: the run goes on, or was stopped.
    OPEN = "open"
    #: Has a text that passed every check.
    ACCEPTED = "accepted"
    #: No text passed.
    REJECTED = "rejected"
    #: Was not or cannot be worked on: its file cannot be read, or changed meanwhile.
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Row:
    """One symbol of a run."""

    #: From the run's folder, with `/`.
    path: str
    #: Of the header, from 1, as it was planned.
    line: int
    #: Qualified; "" is the module.
    name: str
    #: `module`, `class`, `function` or `method`.
    kind: str
    status: Status
    #: Why it was rejected or skipped.
    reason: str | None = None
    #: More is better; only of accepted texts.
    score: float | None = None
    #: The docstring's value, before it is wrapped; only of accepted texts.
    text: str | None = None


@dataclass(frozen=True, slots=True)
class About:
    """The run that is reported."""

    run: str
    model: str
    #: Of codeherd.
    version: str
    #: URL of the repository, and the commit that was planned, where they are known.
    repository: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a status is told to programs that show findings."""

    #: SARIF's level.
    level: str
    #: rdjson's severity.
    severity: str
    short: str
    help: str


_RULES: Final[Mapping[Status, _Rule]] = {
    Status.OPEN: _Rule(
        "note", "INFO", "A docstring is still to come.", "Let the run go on; nothing is to be done here."
    ),
    Status.ACCEPTED: _Rule(
        "note",
        "INFO",
        "A docstring was written by a model.",
        "Read it: the checks know its form and its names, not whether it is true.",
    ),
    Status.REJECTED: _Rule(
        "warning",
        "WARNING",
        "No docstring of the model was good enough.",
        "Write one by hand; the reason tells what was wrong with the last one.",
    ),
    Status.SKIPPED: _Rule(
        "warning",
        "WARNING",
        "The symbol could not be worked on.",
        "See the reason; run the backfill again once it is gone, or write a docstring by hand.",
    ),
}


def left_for_a_human(rows: Iterable[Row]) -> list[Row]:
    """Return the symbols that stay undocumented unless somebody writes a docstring, by path and line."""
    return _ordered(row for row in rows if row.status in (Status.REJECTED, Status.SKIPPED))


def as_json(rows: Iterable[Row], about: About) -> str:
    """Return the report as one JSON document in ASCII, with every field of every row."""
    ordered = _ordered(rows)
    document = {
        "schema": JSON_SCHEMA,
        "run": about.run,
        "model": about.model,
        "version": about.version,
        "repository": about.repository,
        "revision": about.revision,
        "counts": _counts(ordered),
        "reasons": _reasons(ordered),
        "symbols": [
            {
                "path": row.path,
                "line": row.line,
                "name": row.name,
                "kind": row.kind,
                "status": row.status.value,
                "reason": row.reason,
                "score": row.score,
                "text": row.text,
            }
            for row in ordered
        ],
        "left_for_a_human": [
            {"path": row.path, "line": row.line, "name": row.name, "reason": row.reason}
            for row in left_for_a_human(ordered)
        ],
    }
    return _dumped(document)


def as_markdown(rows: Iterable[Row], about: About) -> str:
    """Return the report as Markdown for people: counts, what is left for them, and the texts to be read."""
    ordered = _ordered(rows)
    counts, left = _counts(ordered), left_for_a_human(ordered)
    lines = [
        f"# Docstrings of run {_code(about.run)}",
        "",
        f"{counts[Status.ACCEPTED]} of {len(ordered)} symbols have a docstring by {_code(about.model)}.",
        f"{len(left)} are left for a human, {counts[Status.OPEN]} are still open.",
    ]
    if reasons := _reasons(ordered):
        lines += ["", "| reason | symbols |", "| --- | ---: |"]
        lines += [f"| {_code(reason, in_table=True)} | {count} |" for reason, count in reasons.items()]
    if left:
        lines += ["", "## Left for a human"]
        lines += _by_file(left, lambda row: [f"- {_place(row)}: {_code(row.reason or NO_REASON)}"])
    if accepted := [row for row in ordered if row.status is Status.ACCEPTED]:
        lines += ["", "## To be read"]
        lines += _by_file(accepted, _quoted)
    return _clean("\n".join(lines) + "\n")


def as_sarif(rows: Iterable[Row], about: About) -> str:
    """Return the report as SARIF 2.1.0.

    Fingerprints hold no line numbers: what was dismissed stays so when code above it grows. A receiver may
    take fewer results than there are symbols; the report holds them all.
    """
    ordered = _ordered(rows)
    statuses = list(_RULES)
    run: dict[str, Any] = {
        "tool": {
            "driver": {
                "name": _TOOL,
                "version": about.version,
                "semanticVersion": about.version,
                "rules": [
                    {
                        "id": _rule_id(status),
                        "name": f"Docstring{status.value.capitalize()}",
                        "shortDescription": {"text": rule.short},
                        "fullDescription": {"text": f"{rule.short} {rule.help}"},
                        "help": {"text": rule.help},
                        "defaultConfiguration": {"level": rule.level},
                    }
                    for status, rule in _RULES.items()
                ],
            }
        },
        "automationDetails": {"id": f"codeherd-backfill/{quote(about.run, safe='')}"},
        "columnKind": "unicodeCodePoints",
        "originalUriBaseIds": {"SRCROOT": {"description": {"text": "The folder that the run was made for."}}},
        "results": [_result(row, statuses.index(row.status), nth, about) for row, nth in _numbered(ordered)],
        "properties": {"ai/origin": "generated", "model": about.model},
    }
    if about.repository is not None:
        provenance = {"repositoryUri": about.repository, "mappedTo": {"uriBaseId": "SRCROOT"}}
        run["versionControlProvenance"] = [
            provenance | ({"revisionId": about.revision} if about.revision is not None else {})
        ]
    return _dumped({"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]})


def as_rdjson(rows: Iterable[Row], about: About) -> str:
    """Return the report as rdjson, reviewdog's diagnostic format (`reviewdog.rdf.DiagnosticResult`)."""
    return _dumped(
        {
            "source": {"name": _TOOL},
            "diagnostics": [
                {
                    "message": _message(row, about),
                    "location": {"path": row.path, "range": {"start": {"line": row.line}}},
                    "severity": _RULES[row.status].severity,
                    "code": {"value": _rule_id(row.status)},
                }
                for row in _ordered(rows)
            ],
        }
    )


#: The forms by the names that the command line has for them.
REPORTS: Final[Mapping[str, Callable[[Iterable[Row], About], str]]] = {
    "json": as_json,
    "markdown": as_markdown,
    "sarif": as_sarif,
    "rdjson": as_rdjson,
}


def _ordered(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.path, row.line, row.name))


def _numbered(rows: Iterable[Row]) -> Iterator[tuple[Row, int]]:
    """Yield each row with its number among those of the same path and name."""
    seen: Counter[tuple[str, str]] = Counter()
    for row in rows:
        yield row, seen[row.path, row.name]
        seen[row.path, row.name] += 1


def _counts(rows: Iterable[Row]) -> dict[str, int]:
    found = Counter(row.status for row in rows)
    return {status.value: found[status] for status in Status}


def _reasons(rows: Iterable[Row]) -> dict[str, int]:
    """Return how many symbols each reason left, the most frequent first."""
    found = Counter(row.reason or NO_REASON for row in left_for_a_human(rows))
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _rule_id(status: Status) -> str:
    return f"docstring-{status.value}"


def _called(row: Row) -> str:
    return row.name or "the module"


def _message(row: Row, about: About) -> str:
    if row.status is Status.ACCEPTED:
        return f"Docstring of {_called(row)}, written by {about.model}: {row.text or ''}"
    if row.status is Status.OPEN:
        return f"Docstring of {_called(row)}: still to come."
    return f"No docstring for {_called(row)}: {row.reason or NO_REASON}. Left for a human."


def _marked_message(row: Row, about: About) -> str:
    symbol = _code(row.name) if row.name else "the module"
    if row.status is Status.ACCEPTED:
        lines = [f"Docstring of {symbol}, written by {_code(about.model)}:", "", *_fenced(row.text or "")]
        return "\n".join(lines)
    if row.status is Status.OPEN:
        return f"Docstring of {symbol}: still to come."
    return f"No docstring for {symbol}: {_code(row.reason or NO_REASON)}. Left for a human."


def _result(row: Row, rule: int, nth: int, about: About) -> dict[str, Any]:
    properties = {"status": row.status.value, "symbol": row.name, "kind": row.kind}
    known = {"reason": row.reason, "score": row.score, "text": row.text}
    return {
        "ruleId": _rule_id(row.status),
        "ruleIndex": rule,
        "level": _RULES[row.status].level,
        "message": {
            # A link in plain text needs no more than this.
            "text": _braced(_message(row, about).replace("](", "] (")),
            "markdown": _braced(_marked_message(row, about)),
        },
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": quote(os.fsencode(row.path)), "uriBaseId": "SRCROOT"},
                    "region": {"startLine": row.line},
                },
            }
            | ({"logicalLocations": [_logical(row)]} if row.name else {})
        ],
        "partialFingerprints": {"primaryLocationLineHash": _fingerprint(row, nth)},
        "properties": properties | {name: value for name, value in known.items() if value is not None},
    }


def _braced(message: str) -> str:
    """Double the braces: single ones are placeholders (SARIF 2.1.0, 3.11.5)."""
    return message.replace("{", "{{").replace("}", "}}")


def _logical(row: Row) -> dict[str, str]:
    return {"fullyQualifiedName": row.name, "kind": _LOGICAL_KINDS[row.kind]}


#: SARIF has `member` for what belongs to a type.
_LOGICAL_KINDS: Final = {"class": "type", "function": "function", "method": "member"}


def _fingerprint(row: Row, nth: int) -> str:
    content = json.dumps([row.status.value, row.path, row.name, nth, row.text])
    return hashlib.sha256(content.encode()).hexdigest()


def _by_file(rows: Sequence[Row], lines: Callable[[Row], list[str]]) -> Iterator[str]:
    for path, of_file in groupby(rows, key=lambda row: row.path):
        yield from ("", f"### {_code(path)}", "")
        for row in of_file:
            yield from lines(row)


def _place(row: Row) -> str:
    return f"line {row.line}, {row.kind}" + (f" {_code(row.name)}" if row.name else "")


def _quoted(row: Row) -> list[str]:
    score = "" if row.score is None else f", score {row.score:.2f}"
    # Two columns in: what follows belongs to the item.
    return [f"- {_place(row)}{score}", *(f"  {line}" for line in _fenced(row.text or ""))]


def _fenced(text: str) -> list[str]:
    fence = "`" * max(3, _longest_run(text) + 1)
    # The three that end a line of Markdown; a carriage return alone would hide what is before it.
    return [f"{fence}text", *re.split(r"\r\n|\r|\n", text), fence]


def _code(text: str, *, in_table: bool = False) -> str:
    """Return one line of code in Markdown, whatever the text is."""
    line = " ".join(text.split()) or " "
    if in_table:
        line = line.replace("|", "\\|")
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if "`" in line else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in _BACKTICKS.findall(text)), default=0)


def _dumped(document: Mapping[str, Any]) -> str:
    # Lone surrogates are no Unicode, and strict readers refuse their escapes too.
    return json.dumps(_cleaned(document), indent=1) + "\n"


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, Mapping):
        return {_clean(name): _cleaned(inner) for name, inner in value.items()}
    return [_cleaned(inner) for inner in value] if isinstance(value, list) else value


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
