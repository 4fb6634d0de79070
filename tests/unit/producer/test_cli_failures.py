from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from codeherd_producer import cli
from codeherd_producer.commands.failures import ExitCode, exit_code, report
from codeherd_schema.errors import (
    BrokerUnavailable,
    CodeherdError,
    FillMarkerError,
    IllegalMove,
    InvalidSetting,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    ModelFilesInvalid,
    SchemaOutdated,
    WaitTimeout,
)
from tests.unit.producer.conftest import CommandLine


def family(kind: type[CodeherdError]) -> Iterator[type[CodeherdError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from family(child)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BrokerUnavailable, 1),
        (SchemaOutdated, 1),
        (ModelFilesInvalid, 1),
        (FillMarkerError, 2),
        (InvalidSetting, 2),
        (IllegalMove, 2),
        (WaitTimeout, 3),
        (JobNotFound, 4),
        (JobFailed, 5),
        (JobCancelled, 6),
        (JobExpired, 6),
        (ValueError, 1),
    ],
)
def test_exit_codes_never_change(error: type[Exception], code: int) -> None:
    assert exit_code(error) == code


@pytest.mark.parametrize("error", list(family(CodeherdError)), ids=lambda error: error.code)
def test_every_error_is_one_line_and_a_hint(
    error: type[CodeherdError], capsys: pytest.CaptureFixture[str]
) -> None:
    report(error("4 is not 5", hint="take 5"), as_json=False)

    assert capsys.readouterr() == ("", f"error: 4 is not 5 [{error.code}]\nhint: take 5\n")


def test_an_error_as_json_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    report(InvalidSetting("4 is not 5"), as_json=True)

    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "schema": 1,
        "error": {"code": "invalid_setting", "message": "4 is not 5", "hint": None},
    }


def test_an_unexpected_error_is_one_line_without_a_trace(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_ctx: click.Context) -> None:
        raise ZeroDivisionError("division by zero\nand more")

    monkeypatch.setattr(cli.codeherd, "invoke", broken)
    caplog.set_level(logging.INFO)

    done = command_line("ls")

    assert (done.status, done.stdout) == (ExitCode.SERVICE, b"")
    assert done.stderr.splitlines() == [
        "error: unexpected ZeroDivisionError: division by zero [internal_error]",
        "hint: set CODEHERD_LOG_LEVEL=debug for the trace",
    ]


def test_an_unknown_command_points_to_the_help(command_line: CommandLine) -> None:
    done = command_line("frobnicate")

    assert done.status == ExitCode.USAGE
    assert done.stderr == "error: no such command 'frobnicate' [usage]\nhint: `codeherd --help`\n"


def test_an_unknown_setting_names_its_source(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEHERD_LEESE_S", "3")

    done = command_line("ls")

    assert done.status == ExitCode.USAGE
    assert done.stderr.splitlines() == [
        "error: unknown setting `leese_s` in the environment [invalid_setting]",
        "hint: did you mean `lease_s`?",
    ]


def test_a_machine_without_a_database_is_told_what_makes_one(command_line: CommandLine) -> None:
    done = command_line("submit", "generate", "x")

    assert (done.status, done.stdout) == (ExitCode.SERVICE, b"")
    assert "codeherd up" in done.stderr


def test_an_old_schema_is_told_what_mends_it(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CODEHERD_DATABASE_URL", f"sqlite:///{tmp_path / 'empty.db'}")

    done = command_line("ls")

    assert done.status == ExitCode.SERVICE
    assert done.stderr.splitlines()[-1] == "hint: run `codeherd db upgrade`"
