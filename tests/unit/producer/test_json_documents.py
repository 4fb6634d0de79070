"""The documents that docs/cli.md describes are those that the commands write."""

from __future__ import annotations

import pytest

from codeherd_schema.settings import SharedSettings
from codeherd_schema.store import Store
from tests.by_hand import finish
from tests.unit.producer.conftest import CommandLine
from tests.unit.producer.json_documents import Documents

PAGE = """
| command | document |
|---|---|
| `ls`, `wait` | `{"schema", "jobs": [job]}`; and more |
| `status` | `{"jobs": [job and "attempts": [{"outcome"}]]}` |
| `show` | `{"settings": {name: {"value"}}, …}` |

A job is `{"id",
"error": error}`, an error `{"code"}` or null.
"""


@pytest.fixture
def database_url(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CODEHERD_DATABASE_URL", sqlite_url)
    return sqlite_url


def test_a_field_too_many_or_too_few_is_a_fault_wherever_it_is() -> None:
    told = Documents(PAGE)

    assert told.commands == {"ls", "wait", "status", "show"}
    assert told.faults("ls", {"schema": 1, "jobs": [{"id": "a", "error": None}]}) == []
    assert told.faults("wait", {"schema": 1, "jobs": [{"id": "a", "error": {"code": "b"}}]}) == []
    assert told.faults("ls", {"jobs": [{"id": "a", "error": {"code": "b", "hint": 1}, "age": 2}]}) == [
        "document lacks schema",
        "document.jobs[].age is not described",
        "document.jobs[].error.hint is not described",
    ]
    assert told.faults("ls", {"schema": 1, "jobs": []}) == [
        "document.jobs is no list, or has nothing to compare"
    ]
    assert told.faults("ls", {"schema": {"version": 1}, "jobs": [{"id": "a", "error": None}]}) == [
        "document.schema has parts that are not described"
    ]
    assert told.faults("status", {"jobs": [{"id": "a", "error": None, "attempts": [{"outcome": 1}]}]}) == []
    assert told.faults("status", {"jobs": [{"id": "a", "error": None, "attempts": [{}]}]}) == [
        "document.jobs[].attempts[] lacks outcome"
    ]
    assert told.faults("show", {"settings": {"a": {"value": 1}, "b": {}}, "other": 1}) == [
        "document.settings.b lacks value"
    ]


def test_documents_of_jobs_are_as_they_are_described(command_line: CommandLine, store: Store) -> None:
    told = Documents()
    submitted = command_line("submit", "generate", "x", "--label", "a=b", "--json").document
    job_id = submitted["job"]["id"]
    finish(store, job_id)

    documents = {
        "submit": submitted,
        "ls": command_line("ls", "--json").document,
        "wait": command_line("wait", job_id, "--json").document,
        "status": command_line("status", job_id, "--json").document,
        "cancel": command_line("cancel", job_id, "--json").document,
        "pause": command_line("pause", "model", "tiny", "--json").document,
        "prune": command_line("prune", "--older-than", "30d", "--json").document,
    }

    assert {name: told.faults(name, one) for name, one in documents.items()} == {
        name: [] for name in documents
    }


@pytest.mark.usefixtures("database_url")
def test_documents_of_settings_and_models_are_as_they_are_described(command_line: CommandLine) -> None:
    told = Documents()

    documents = {
        "models": command_line("models", "--json").document,
        "config show": command_line("config", "show", "--json").document,
        "db": command_line("db", "current", "--json").document,
    }

    assert documents["config show"]["settings"].keys() == SharedSettings.model_fields.keys()
    assert {name: told.faults(name, one) for name, one in documents.items()} == {
        name: [] for name in documents
    }
