"""The commands that change nothing: config, models, db current, completion, help."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import click
import pytest

from codeherd_producer.cli import COMMANDS, codeherd
from codeherd_producer.commands.durations import parse_duration
from codeherd_producer.commands.output import age
from codeherd_schema.models import ModelTable
from codeherd_schema.settings import SharedSettings
from codeherd_schema.tables import REVISION
from tests.unit.producer.conftest import CommandLine

DOCS = Path(__file__).parents[3] / "docs"


def test_generated_docs_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True, check=False
    )

    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_that_begins_with_what_it_does(name: str) -> None:
    ctx = click.Context(codeherd)
    command = codeherd.get_command(ctx, name)

    assert command is not None
    assert command.name == name
    assert (command.help or "").splitlines()[0].endswith((".", ":"))


def test_config_show_tells_where_each_value_came_from(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("pyproject.toml").write_text('[tool.codeherd]\nlease_s = 40\ntenant = "project"\n')
    Path("config/codeherd").mkdir(parents=True)
    Path("config/codeherd/config.toml").write_text('tenant = "user"\nmax_attempts = 3\n')
    monkeypatch.setenv("CODEHERD_TENANT", "environment")
    monkeypatch.setenv("CODEHERD_FLOWER_PASSWORD", "hunter2")
    monkeypatch.setenv("CODEHERD_BROKER_URL", "redis://me:hunter2@host/0")

    done = command_line("--data-dir", "/elsewhere", "config", "show", "--json")

    shown = done.document["settings"]
    assert set(shown) == set(SharedSettings.model_fields)
    assert shown["data_dir"] == {"value": "/elsewhere", "origin": "flag"}
    assert shown["tenant"] == {"value": "environment", "origin": "environment"}
    assert shown["lease_s"] == {"value": 40.0, "origin": "project file"}
    assert shown["max_attempts"] == {"value": 3, "origin": "user file"}
    assert shown["flower_port"] == {"value": 5555, "origin": "default"}
    assert shown["flower_password"]["value"] == "***"
    assert shown["broker_url"]["value"] == "redis://me:***@host/0"
    assert "hunter2" not in command_line("config", "show").text


def test_a_folder_given_from_here_is_the_same_from_elsewhere(command_line: CommandLine) -> None:
    done = command_line("--data-dir", "data", "config", "show", "--json")

    assert done.document["settings"]["data_dir"]["value"] == str(Path("data").absolute())


def test_models_shows_the_whole_table(command_line: CommandLine) -> None:
    rows, document = command_line("models").rows, command_line("models", "--json").document

    assert [row[0] for row in rows] == [model.name for model in ModelTable()]
    by_name = {model["name"]: model for model in document["models"]}
    assert by_name["codellama-7b"] == {
        "name": "codellama-7b",
        "source": "codellama/CodeLlama-7b-hf",
        "parameters": 6_739_000_000,
        "context_window": 16_384,
        "kv_bytes_per_token": 524_288,
        "kinds": ["generate", "infill"],
        "chat": None,
    }


def test_models_of_ones_own_are_shown_and_checked(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEHERD_MODELS_FILE", "models.toml")
    shape = "parameters = 1\nlayers = 1\nkv_heads = 1\nhead_dim = 1\nvocab_size = 9\ncontext_window = 9\n"
    Path("models.toml").write_text(f'[models.mine]\nsource = "/m"\n{shape}')

    assert "mine" in [row[0] for row in command_line("models").rows]

    Path("models.toml").write_text(f"[models.mine]\n{shape}")
    assert command_line("models").status == 2


def test_db_upgrade_makes_the_folder_and_says_the_revision(command_line: CommandLine) -> None:
    assert command_line("db", "upgrade").rows == [[REVISION]]
    assert command_line("db", "upgrade").rows == [[REVISION]]
    assert command_line("db", "current", "--json").document["revision"] == REVISION
    assert Path("data").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_our_command(command_line: CommandLine, shell: str) -> None:
    done = command_line("completion", shell)

    assert done.status == 0
    assert "_CODEHERD_COMPLETE" in done.text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5", 1.5), ("10m", 600), ("1h30m", 5400), ("2d", 172_800), ("0s", 0)],
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    duration = parse_duration(text)

    assert duration is not None
    assert duration.total_seconds() == seconds


@pytest.mark.parametrize("text", ["", "m", "10x", "-5m", "1h 30m", "9" * 400 + "d"])
def test_what_is_no_duration_is_none(text: str) -> None:
    assert parse_duration(text) is None


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-1, "0s"), (59.9, "59s"), (190, "3m10s"), (18_120, "5h2m"), (792_000, "9d4h")],
)
def test_an_age_shows_its_two_largest_units(seconds: float, shown: str) -> None:
    assert age(seconds) == shown


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is None, reason="needs the worker extra")
def test_prompt_shows_what_the_model_reads(command_line: CommandLine) -> None:
    document = command_line("prompt", "infill", "def f(): <FILL_ME>\n", "--json").document
    rows = command_line("prompt", "infill", "def f(): <FILL_ME>\n").rows

    assert document["prompt_tokens"] == len(document["token_ids"]) == len(document["pieces"])
    assert document["pieces"][-1].strip("▁ ") == "<MID>"
    assert [int(row[0]) for row in rows] == document["token_ids"]


def test_prompt_of_a_model_whose_tokenizer_is_not_here(command_line: CommandLine) -> None:
    done = command_line("prompt", "generate", "x", "--model", "codellama-7b")

    assert done.status == 1
    assert "this machine has no tokenizer" in done.stderr
