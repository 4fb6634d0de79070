from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    json_format,
    message_factory,
)
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from codeherd_producer.backfill.reports import (
    NO_REASON,
    REPORTS,
    About,
    Row,
    Status,
    as_json,
    as_markdown,
    as_rdjson,
    as_sarif,
    left_for_a_human,
)

ABOUT = About("0199-run", "codellama-7b", "0.1.0", "https://git.example.org/a/b", "c0ffee")
ACCEPTED = Row("pkg/a.py", 7, "A.f", "method", Status.ACCEPTED, None, 0.914, "Return the size.\n\nIn bytes.")
REJECTED = Row("pkg/a.py", 3, "A", "class", Status.REJECTED, "restates the name")
MODULE = Row("b.py", 1, "", "module", Status.REJECTED, "restates the name")
OPEN = Row("b.py", 9, "g", "function", Status.OPEN)
SKIPPED = Row("b.py", 5, "f.<locals>.g", "function", Status.SKIPPED, "changed meanwhile")
ROWS = [ACCEPTED, REJECTED, MODULE, OPEN, SKIPPED]

#: What a model, a path or a parser's message may hold.
HOSTILE = [
    "a``` b\n```\n# not a heading\n@somebody <img src=x> [x](1) | {0} }{ ]( \\",
    "````text\n~~~",
    "` @somebody <b> `",
    "\r# heading\r\n- item\n\n    code",
    *("`", "``` `` `", " ` ", "   ", "\n", "\x00\x1b[31m\u2028\u202e", "\ud800 lone", "</details>"),
    "| a | b |\n| - | - |",
]

texts = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=40))
paths = st.lists(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=9),
    min_size=1,
    max_size=3,
).map("/".join)
rows = st.lists(
    st.builds(
        Row,
        path=paths,
        line=st.integers(1, 10**6),
        name=st.sampled_from(["", "f", "A.f", "größe"]),
        kind=st.sampled_from(["class", "function", "method"]),
        status=st.sampled_from(list(Status)),
        reason=st.none() | texts,
        score=st.none() | st.floats(0, 2),
        text=st.none() | texts,
    ),
    max_size=6,
)


def reviewdogs_message() -> Any:
    """Return `reviewdog.rdf.DiagnosticResult`, as far as a report uses it."""
    field = descriptor_pb2.FieldDescriptorProto
    messages: dict[str, list[tuple[str, int, int, str | None]]] = {
        "DiagnosticResult": [
            ("diagnostics", 1, field.LABEL_REPEATED, "Diagnostic"),
            ("source", 2, field.LABEL_OPTIONAL, "Source"),
        ],
        "Diagnostic": [
            ("message", 1, field.LABEL_OPTIONAL, None),
            ("location", 2, field.LABEL_OPTIONAL, "Location"),
            ("severity", 3, field.LABEL_OPTIONAL, "Severity"),
            ("code", 5, field.LABEL_OPTIONAL, "Code"),
        ],
        "Location": [
            ("path", 2, field.LABEL_OPTIONAL, None),
            ("range", 3, field.LABEL_OPTIONAL, "Range"),
        ],
        "Range": [("start", 1, field.LABEL_OPTIONAL, "Position")],
        "Position": [("line", 1, field.LABEL_OPTIONAL, "int32")],
        "Source": [("name", 1, field.LABEL_OPTIONAL, None)],
        "Code": [("value", 1, field.LABEL_OPTIONAL, None)],
    }
    file = descriptor_pb2.FileDescriptorProto(name="rdf.proto", package="reviewdog.rdf", syntax="proto3")
    severity = file.enum_type.add(name="Severity")
    for number, name in enumerate(("UNKNOWN_SEVERITY", "ERROR", "WARNING", "INFO")):
        severity.value.add(name=name, number=number)
    for message, fields in messages.items():
        added = file.message_type.add(name=message)
        for name, number, label, kind in fields:
            one = added.field.add(name=name, number=number, label=label)
            if kind is None or kind == "int32":
                one.type = field.TYPE_INT32 if kind else field.TYPE_STRING
            else:
                one.type = field.TYPE_ENUM if kind == "Severity" else field.TYPE_MESSAGE
                one.type_name = f".reviewdog.rdf.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindMessageTypeByName("reviewdog.rdf.DiagnosticResult")
    return message_factory.GetMessageClass(found)


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def displayed(message: str) -> str:
    """Return a SARIF message as a viewer shows it: no placeholders, doubled braces once."""
    assert not re.search(r"(?<!\{)(?:\{\{)*\{(?!\{)", message), "an open brace that is not doubled"
    return message.replace("{{", "{").replace("}}", "}")


def results(report: str) -> list[dict[str, Any]]:
    [run] = json.loads(report)["runs"]
    found: list[dict[str, Any]] = run["results"]
    return found


def test_rejected_and_skipped_symbols_are_left_for_a_human() -> None:
    assert left_for_a_human(ROWS) == [MODULE, SKIPPED, REJECTED]


def test_json_holds_every_field_and_the_counts() -> None:
    document = json.loads(as_json(ROWS, ABOUT))

    assert document["schema"] == 1
    assert (document["run"], document["model"], document["revision"]) == (
        "0199-run",
        "codellama-7b",
        "c0ffee",
    )
    assert document["counts"] == {"open": 1, "accepted": 1, "rejected": 2, "skipped": 1}
    assert document["reasons"] == {"restates the name": 2, "changed meanwhile": 1}
    assert [one["name"] for one in document["symbols"]] == ["", "f.<locals>.g", "g", "A", "A.f"]
    assert document["symbols"][4] == {
        "path": "pkg/a.py",
        "line": 7,
        "name": "A.f",
        "kind": "method",
        "status": "accepted",
        "reason": None,
        "score": 0.914,
        "text": "Return the size.\n\nIn bytes.",
    }
    assert document["left_for_a_human"][0] == {
        "path": "b.py",
        "line": 1,
        "name": "",
        "reason": "restates the name",
    }


def test_markdown_tells_what_is_left_and_what_is_to_be_read() -> None:
    assert as_markdown(ROWS, ABOUT) == (
        "# Docstrings of run `0199-run`\n\n"
        "1 of 5 symbols have a docstring by `codellama-7b`.\n"
        "3 are left for a human, 1 are still open.\n\n"
        "| reason | symbols |\n| --- | ---: |\n| `restates the name` | 2 |\n| `changed meanwhile` | 1 |\n\n"
        "## Left for a human\n\n"
        "### `b.py`\n\n"
        "- line 1, module: `restates the name`\n"
        "- line 5, function `f.<locals>.g`: `changed meanwhile`\n\n"
        "### `pkg/a.py`\n\n"
        "- line 3, class `A`: `restates the name`\n\n"
        "## To be read\n\n"
        "### `pkg/a.py`\n\n"
        "- line 7, method `A.f`, score 0.91\n"
        "  ```text\n  Return the size.\n  \n  In bytes.\n  ```\n"
    )


def test_an_empty_run_has_every_report() -> None:
    assert as_markdown([], ABOUT).startswith("# Docstrings of run `0199-run`\n\n0 of 0 symbols")
    assert json.loads(as_json([], ABOUT))["symbols"] == []
    assert results(as_sarif([], ABOUT)) == []
    assert json.loads(as_rdjson([], ABOUT))["diagnostics"] == []


def test_sarif_results_name_their_rule_place_and_reason() -> None:
    module, skipped, is_open, rejected, accepted = results(as_sarif(ROWS, ABOUT))

    assert (accepted["ruleId"], accepted["level"]) == ("docstring-accepted", "note")
    assert (rejected["ruleId"], rejected["level"]) == ("docstring-rejected", "warning")
    assert (skipped["ruleId"], skipped["level"]) == ("docstring-skipped", "warning")
    assert (is_open["ruleId"], is_open["level"]) == ("docstring-open", "note")
    [place] = accepted["locations"]
    assert place["physicalLocation"] == {
        "artifactLocation": {"uri": "pkg/a.py", "uriBaseId": "SRCROOT"},
        "region": {"startLine": 7},
    }
    assert place["logicalLocations"] == [{"fullyQualifiedName": "A.f", "kind": "member"}]
    assert "logicalLocations" not in module["locations"][0]
    assert accepted["properties"] == {
        "status": "accepted",
        "symbol": "A.f",
        "kind": "method",
        "score": 0.914,
        "text": "Return the size.\n\nIn bytes.",
    }
    assert rejected["properties"]["reason"] == "restates the name"
    assert rejected["message"]["text"] == "No docstring for A: restates the name. Left for a human."


def test_sarif_keeps_the_standards_rules_for_one_log() -> None:
    log = json.loads(as_sarif(ROWS, ABOUT))

    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("/sarif-schema-2.1.0.json")
    [run] = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules) == len(Status)
    for rule in rules:
        assert rule["help"]["text"]
        assert rule["shortDescription"]["text"].endswith(".")
    for result in run["results"]:
        rule = rules[result["ruleIndex"]]
        assert (rule["id"], rule["defaultConfiguration"]["level"]) == (result["ruleId"], result["level"])
        assert result["message"].keys() == {"text", "markdown"}
    assert run["automationDetails"]["id"] == "codeherd-backfill/0199-run"
    assert run["versionControlProvenance"] == [
        {
            "repositoryUri": "https://git.example.org/a/b",
            "mappedTo": {"uriBaseId": "SRCROOT"},
            "revisionId": "c0ffee",
        }
    ]
    assert "SRCROOT" in run["originalUriBaseIds"]


def test_what_is_not_known_of_the_repository_is_left_out_of_sarif() -> None:
    [run] = json.loads(as_sarif(ROWS, About("r", "m", "0.1.0")))["runs"]
    [of_url] = json.loads(as_sarif(ROWS, About("r", "m", "0.1.0", "https://git.example.org/a")))["runs"]

    assert "versionControlProvenance" not in run
    assert of_url["versionControlProvenance"][0].keys() == {"repositoryUri", "mappedTo"}


def test_fingerprints_stay_when_lines_move_and_differ_for_twins_and_texts() -> None:
    def prints(*given: Row) -> list[str]:
        return [
            one["partialFingerprints"]["primaryLocationLineHash"] for one in results(as_sarif(given, ABOUT))
        ]

    first = Row("a.py", 3, "f", "function", Status.ACCEPTED, text="Do it.")
    twin = Row("a.py", 9, "f", "function", Status.ACCEPTED, text="Do it.")
    moved = Row("a.py", 4, "f", "function", Status.ACCEPTED, text="Do it.")
    other = Row("a.py", 3, "f", "function", Status.ACCEPTED, text="Do that.")
    rejected = Row("a.py", 3, "f", "function", Status.REJECTED, "empty")

    assert prints(first) == prints(moved)
    assert len({*prints(first, twin), *prints(other), *prints(rejected)}) == 4


def test_rdjson_is_read_by_a_reader_of_its_protocol() -> None:
    read: Any = json_format.Parse(as_rdjson(ROWS, ABOUT), reviewdogs_message()())

    assert read.source.name == "codeherd backfill"
    last = read.diagnostics[4]
    assert (last.location.path, last.location.range.start.line) == ("pkg/a.py", 7)
    assert (last.severity, last.code.value) == (3, "docstring-accepted")
    assert last.message == "Docstring of A.f, written by codellama-7b: Return the size.\n\nIn bytes."
    assert [one.severity for one in read.diagnostics] == [2, 2, 3, 2, 3]


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_reports_do_not_depend_on_the_order_of_the_rows(report: Any) -> None:
    assert report(ROWS, ABOUT) == report(list(reversed(ROWS)), ABOUT) == report(iter(ROWS), ABOUT)


@pytest.mark.parametrize("report", ["json", "sarif", "rdjson"])
@given(given_rows=rows)
def test_any_text_gives_ascii_json_without_lone_surrogates(report: str, given_rows: list[Row]) -> None:
    text = REPORTS[report](given_rows, ABOUT)

    assert text.isascii()
    for one in strings(json.loads(text)):
        one.encode("utf-8")


@given(given_rows=rows)
def test_any_text_is_read_back_from_rdjson(given_rows: list[Row]) -> None:
    read: Any = json_format.Parse(as_rdjson(given_rows, ABOUT), reviewdogs_message()())

    assert len(read.diagnostics) == len(given_rows)


@given(given_rows=rows)
def test_any_path_and_message_survives_sarif(given_rows: list[Row]) -> None:
    found = results(as_sarif(given_rows, ABOUT))

    ordered = sorted(given_rows, key=lambda row: (row.path, row.line, row.name))
    for row, result in zip(ordered, found, strict=True):
        uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert re.fullmatch(r"[A-Za-z0-9._~/%-]+", uri)
        assert unquote_to_bytes(uri) == os.fsencode(row.path)
        assert "](" not in result["message"]["text"]
        shown = displayed(result["message"]["text"])
        displayed(result["message"]["markdown"])
        if row.status is Status.ACCEPTED and row.text is not None:
            clean = row.text.encode("utf-8", "replace").decode()
            assert shown.endswith(clean.replace("](", "] ("))


def test_a_path_that_is_no_unicode_is_told_in_every_report() -> None:
    path = os.fsdecode(b"raw\xff.py")
    given_rows = [Row(path, 1, "f", "function", Status.REJECTED, "empty")]

    [result] = results(as_sarif(given_rows, ABOUT))
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "raw%FF.py"
    assert "`raw?.py`" in as_markdown(given_rows, ABOUT)
    assert json.loads(as_json(given_rows, ABOUT))["symbols"][0]["path"] == "raw?.py"


@given(given_rows=rows)
def test_no_text_breaks_out_of_its_place_in_markdown(given_rows: list[Row]) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(as_markdown(given_rows, ABOUT))

    accepted = [row for row in given_rows if row.status is Status.ACCEPTED]
    left = left_for_a_human(given_rows)
    headings = [token for token in tokens if token.type == "heading_open"]
    files = len({row.path for row in left}) + len({row.path for row in accepted})
    assert len(headings) == 1 + files + bool(left) + bool(accepted)
    assert sum(token.type == "fence" for token in tokens) == len(accepted)
    assert sum(token.type == "list_item_open" for token in tokens) == len(left) + len(accepted)
    reasons = {row.reason or NO_REASON for row in left}
    assert sum(token.type == "tr_open" for token in tokens) == (1 + len(reasons) if left else 0)
    inline = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inline} <= {"text", "code_inline", "softbreak"}
    # Nothing that could ping somebody or be run stands outside of code.
    outside = "".join(child.content for child in inline if child.type == "text")
    assert not re.search(r"[@<>]", outside)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_shown_as_it_is_in_markdown(text: str) -> None:
    report = as_markdown([Row("a.py", 1, "f", "function", Status.ACCEPTED, text=text)], ABOUT)

    [fence] = [token for token in MarkdownIt("commonmark").parse(report) if token.type == "fence"]
    clean = re.sub(r"\r\n?", "\n", text.encode("utf-8", "replace").decode()).replace("\0", "\ufffd")
    assert fence.content == f"{clean}\n"


@pytest.mark.parametrize("text", [*HOSTILE, "a\n\n# b\n\n- c", "a\n===\n"])
def test_a_hostile_path_reason_and_model_stay_in_one_line_of_markdown(text: str) -> None:
    row = Row(text, 1, "f", "function", Status.REJECTED, text)

    tokens = MarkdownIt("commonmark").enable("table").parse(as_markdown([row], About(text, text, "0.1.0")))

    assert [token.type for token in tokens if token.type.endswith("_open") and token.level == 0] == [
        *("heading_open", "paragraph_open", "table_open", "heading_open", "heading_open", "bullet_list_open")
    ]
    codes = [child for token in tokens for child in token.children or [] if child.type == "code_inline"]
    # The run, the model, the reason in the table, the path, the symbol, the reason.
    assert len(codes) == 6
