from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from codeherd_producer.commands.failures import ExitCode
from codeherd_schema.requests import GenerateRequest, InfillRequest
from codeherd_schema.store import Store
from tests.by_hand import claim, finish
from tests.unit.producer.conftest import CommandLine


@pytest.fixture(autouse=True)
def _database(monkeypatch: pytest.MonkeyPatch, sqlite_url: str) -> None:
    monkeypatch.setenv("CODEHERD_DATABASE_URL", sqlite_url)


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


def lines_of(*lines: Any) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def test_one_id_a_line_in_the_files_order(command_line: CommandLine, store: Store) -> None:
    lines = [{"kind": "generate", "prompt": f"x = {i}", "custom_id": f"line-{i}"} for i in range(200)]

    done = command_line("submit", "jsonl", "-", stdin=lines_of(*lines))

    jobs = [store.get(job_id) for job_id in done.text.split()]
    assert done.status == 0
    assert [job.labels["custom_id"] for job in jobs if job] == [f"line-{i}" for i in range(200)]
    assert len({job.batch_id for job in jobs if job}) == 1


def test_a_line_may_hold_any_field_of_a_request(command_line: CommandLine, store: Store) -> None:
    Path("jobs.jsonl").write_bytes(
        lines_of(
            {"kind": "infill", "text": "a <FILL_ME> b", "labels": {"team": "docs"}},
            {"kind": "generate", "prompt": "x", "sampling": {"max_new_tokens": 3}, "model": "codellama-7b"},
        )
        + b"\n"
    )

    done = command_line("submit", "jsonl", "jobs.jsonl", "--model", "tiny", "--batch", "night")

    first, second = (job.request for job_id in done.text.split() if (job := store.get(job_id)))
    assert isinstance(first, InfillRequest)
    assert (first.prefix, first.suffix, first.labels, first.model) == ("a ", " b", {"team": "docs"}, "tiny")
    assert isinstance(second, GenerateRequest)
    assert (second.model, second.sampling.max_new_tokens) == ("codellama-7b", 3)


WRONG = (
    lines_of({"kind": "generate", "prompt": "x", "custom_id": "a"}, {"kind": "paint"})
    + b"{\n[]\n\n"
    + b'{"kind": "generate", "prompt": "\xff"}\n'
    + lines_of(
        {"kind": "infill", "text": "no hole"},
        {"kind": "infill", "prefix": "a", "suffix": "b", "model": "codellama-34b"},
        {"kind": "generate", "prompt": "y", "custom_id": "a"},
        {"kind": "generate", "prompt": "y", "custom_id": 7},
        {"kind": "generate", "prompt": "y", "frobnicate": 1},
        {"kind": "generate", "prompt": "y", "labels": "x", "custom_id": "b"},
    )
    + b"[" * 100_000
    + b"\n"
    + b'{"kind": "generate", "prompt": "x", "priority": '
    + b"9" * 5000
    + b"}\n"
)


def test_every_wrong_line_is_listed_and_nothing_is_queued(command_line: CommandLine, store: Store) -> None:
    done = command_line("submit", "jsonl", "-", stdin=WRONG)

    said = [line.split(":")[0] for line in done.stderr.splitlines()]
    assert (done.status, done.stdout) == (ExitCode.USAGE, b"")
    assert sorted(said[:-2]) == sorted(f"line {n}" for n in (2, 3, 4, *range(6, 15)))
    assert said[-2:] == ["error", "hint"]
    assert store.list() == []


def test_wrong_lines_can_be_left_out(command_line: CommandLine, store: Store) -> None:
    done = command_line("submit", "jsonl", "-", "--skip-invalid", stdin=WRONG)

    assert done.status == 0
    assert [job.id for job in store.list()] == done.text.split()


def test_a_named_batch_can_be_submitted_again(command_line: CommandLine, store: Store) -> None:
    lines = lines_of(
        {"kind": "generate", "prompt": "x"}, {"kind": "generate", "prompt": "x", "custom_id": "b"}
    )

    first = command_line("submit", "jsonl", "-", "--batch", "night", stdin=lines)
    again = command_line("submit", "jsonl", "-", "--batch", "night", stdin=lines)

    assert first.text == again.text
    assert len(store.list()) == 2


def test_waiting_for_a_batch_tells_how_it_ended(command_line: CommandLine, store: Store) -> None:
    lines = lines_of(*[{"kind": "generate", "prompt": f"x = {i}"} for i in range(3)])
    submit = ("submit", "jsonl", "-", "--batch", "night")
    ids = command_line(*submit, stdin=lines).text.split()
    finish(store, ids[0])
    finish(store, ids[1])
    store.fail(claim(store, ids[2]), code="engine_failed", message="broke")

    done = command_line(*submit, "--wait", stdin=lines)
    document = command_line(*submit, "--wait", "--json", stdin=lines).document

    assert (done.status, done.text.split()) == (ExitCode.SOME_FAILED, ids)
    assert done.stderr.splitlines() == ["batch night: 3 jobs", "2 succeeded, 1 failed"]
    assert document == {
        "schema": 1,
        "batch_id": "night",
        "jobs": [
            {"id": job_id, "state": state}
            for job_id, state in zip(ids, ("succeeded", "succeeded", "failed"), strict=True)
        ],
    }


def test_results_of_a_batch_have_one_schema_for_success_and_failure(
    command_line: CommandLine, store: Store
) -> None:
    lines = [{"kind": "generate", "prompt": "x", "custom_id": name} for name in ("good", "bad", "late")]
    ids = command_line("submit", "jsonl", "-", "--batch", "night", stdin=lines_of(*lines)).text.split()
    finish(store, ids[0], "1")
    store.fail(claim(store, ids[1]), code="engine_failed", message="broke")

    early = command_line("result", "--batch", "night")
    command_line("cancel", ids[2])
    done = command_line("result", "--batch", "night")

    assert (early.status, done.status) == (ExitCode.STILL_ALIVE, ExitCode.SOME_FAILED)
    answers = [json.loads(line) for line in done.text.splitlines()]
    assert [set(answer) for answer in answers] == [
        {"schema", "id", "custom_id", "state", "result", "error"}
    ] * 3
    assert [(a["custom_id"], a["state"]) for a in answers] == [
        ("good", "succeeded"),
        ("bad", "failed"),
        ("late", "cancelled"),
    ]
    assert answers[0]["result"]["candidates"][0]["text"] == "1"
    assert answers[1]["error"] == {"code": "engine_failed", "message": "broke"}


def test_retry_of_a_batch_takes_only_what_ended_without_a_result(
    command_line: CommandLine, store: Store
) -> None:
    lines = [{"kind": "generate", "prompt": "x"}] * 3
    ids = command_line("submit", "jsonl", "-", "--batch", "night", stdin=lines_of(*lines)).text.split()
    finish(store, ids[0])
    store.fail(claim(store, ids[1]), code="engine_failed", message="broke")

    done = command_line("retry", "--batch", "night")

    assert (done.status, done.rows) == (0, [[ids[1], "queued"]])


def test_a_file_that_is_not_there_is_wrong_use(command_line: CommandLine) -> None:
    assert command_line("submit", "jsonl", "none.jsonl").status == ExitCode.USAGE


def test_options_of_a_wait_need_the_wait(command_line: CommandLine) -> None:
    for option in (("--timeout", "1"), ("--cancel-on-interrupt",)):
        assert command_line("submit", "jsonl", "-", *option).status == ExitCode.USAGE
    assert command_line("submit", "generate", "x", "--echo").status == ExitCode.USAGE
