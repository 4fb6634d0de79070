"""A command line that runs in this process: the same `run` as the real one, with streams of its own."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from codeherd_producer import cli


@dataclass(frozen=True)
class Output:
    """What one command left behind."""

    status: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout.decode()

    @property
    def rows(self) -> list[list[str]]:
        return [line.split("\t") for line in self.text.splitlines()]

    @property
    def document(self) -> Any:
        return json.loads(self.stdout)


CommandLine = Callable[..., Output]


@pytest.fixture
def command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path
) -> CommandLine:
    """Runs `codeherd ARGUMENTS` on the database that CODEHERD_DATABASE_URL names, in an empty folder."""
    folder = tmp_path_factory.mktemp("cli")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    monkeypatch.setenv("CODEHERD_DATA_DIR", str(folder / "data"))
    monkeypatch.setenv("CODEHERD_POLL_INTERVAL_S", "0.02")
    monkeypatch.delenv("CODEHERD_TEST_SEED", raising=False)

    def run(*arguments: str, stdin: bytes = b"", terminal: bool = False) -> Output:
        source = io.TextIOWrapper(_Terminal(stdin) if terminal else io.BytesIO(stdin))
        out, err = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin", source)
            patch.setattr("sys.stdout", out)
            patch.setattr("sys.stderr", err)
            status = cli.run(arguments)
            out.flush()
            err.flush()
        return Output(int(status), out.buffer.getvalue(), err.buffer.getvalue().decode())

    return run


class _Terminal(io.BytesIO):
    def isatty(self) -> bool:
        return True
