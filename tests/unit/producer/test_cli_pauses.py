from __future__ import annotations

import pytest

from codeherd_producer.commands.failures import ExitCode
from codeherd_schema.states import JobState, PauseScope
from codeherd_schema.store import Store
from tests.by_hand import finish
from tests.samples import rewrite
from tests.unit.producer.conftest import CommandLine


@pytest.fixture(autouse=True)
def _database(monkeypatch: pytest.MonkeyPatch, sqlite_url: str) -> None:
    monkeypatch.setenv("CODEHERD_DATABASE_URL", sqlite_url)


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


def submit(command_line: CommandLine) -> str:
    return command_line("submit", "generate", "x = ").text.strip()


def test_a_paused_queue_is_listed_with_its_reason_until_it_is_resumed(
    command_line: CommandLine, store: Store
) -> None:
    paused = command_line("pause", "model", "tiny", "--reason", "new driver")

    scope, name, _, reason = paused.text.rstrip("\n").split("\t")
    assert (scope, name, reason) == ("model", "tiny", "new driver")
    job_id = submit(command_line)
    assert store.claim(job_id, worker_id="w", lease_s=60) is None
    assert command_line("resume", "model", "tiny").text == ""
    assert store.claim(job_id, worker_id="w", lease_s=60) is not None


def test_pauses_are_a_document_too(command_line: CommandLine) -> None:
    command_line("pause", "batch", "nightly")

    [pause] = command_line("pause", "--json").document["pauses"]

    assert (pause["scope"], pause["name"], pause["reason"]) == ("batch", "nightly", "")
    assert command_line("resume", "batch", "nightly", "--json").document["pauses"] == []


def test_saying_it_twice_is_said_and_no_error(command_line: CommandLine) -> None:
    command_line("pause", "tenant", "team")

    again = command_line("pause", "tenant", "team")
    never = command_line("resume", "tenant", "nobody")

    assert (again.status, never.status) == (0, 0)
    assert "was paused already" in again.stderr
    assert "was not paused" in never.stderr


@pytest.mark.parametrize("arguments", [("model",), ("planet", "earth"), ("queue", "tiny")])
def test_half_a_pause_and_an_unknown_scope_are_usage_errors(
    command_line: CommandLine, arguments: tuple[str, ...]
) -> None:
    assert command_line("pause", *arguments).status == ExitCode.USAGE


def test_prune_deletes_what_ended_long_ago_and_can_count_it_first(
    command_line: CommandLine, store: Store, database_url: str
) -> None:
    old, fresh, waiting = (submit(command_line) for _ in range(3))
    finish(store, old, "1")
    finish(store, fresh, "1")
    rewrite(database_url, old, finished_at=store.clock() - 40 * 86_400)

    assert command_line("prune", "--older-than", "30d", "--dry-run").text == "1\n"
    assert store.get(old) is not None
    assert command_line("prune", "--older-than", "30d", "--json").document["deleted"] is True
    assert store.get(old) is None
    assert store.get(fresh) is not None
    left = store.get(waiting)
    assert left is not None
    assert left.state is JobState.QUEUED
    assert command_line("prune", "--older-than", "30d").text == "0\n"


def test_prune_wants_to_be_told_how_old(command_line: CommandLine) -> None:
    assert command_line("prune").status == ExitCode.USAGE


def test_every_scope_can_be_paused(command_line: CommandLine, store: Store) -> None:
    for scope in ("model", "batch", "run", "tenant"):
        assert command_line("pause", scope, "x").status == 0

    assert {pause.scope for pause in store.pauses()} == set(PauseScope)
