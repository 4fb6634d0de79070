"""The real process: what it costs, what it imports, and how it takes signals and closed pipes."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from codeherd_schema.migrations import upgrade
from codeherd_schema.requests import GenerateRequest
from codeherd_schema.states import JobState
from codeherd_schema.store import Store
from tests.by_hand import finish
from tests.services import PostgresServer, wait_until

CODEHERD = (sys.executable, "-m", "codeherd_producer.cli")
#: The budget of CPU seconds, on a machine that imports click, pydantic and SQLAlchemy in `LIBRARIES_S`.
BUDGET_S, LIBRARIES_S = 0.5, 0.3
LIBRARIES = (sys.executable, "-c", "import click, pydantic, sqlalchemy")
#: Nothing that a submit needs: what a Celery, a GPU or a terminal is for.
TOO_MUCH = ("celery", "kombu", "redis", "torch", "transformers", "codeherd_worker", "alembic", "rich")


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


@pytest.fixture
def environment(sqlite_url: str, tmp_path: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CODEHERD_")}
    own = {
        "CODEHERD_DATABASE_URL": sqlite_url,
        "CODEHERD_DATA_DIR": str(tmp_path / "data"),
        "CODEHERD_POLL_INTERVAL_S": "0.05",
        "XDG_CONFIG_HOME": str(tmp_path),
    }
    return clean | own


def cpu_s(command: tuple[str, ...], environment: Mapping[str, str]) -> float:
    """User and system seconds of one run."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("arguments", [("--help",), ("submit", "generate", "x")], ids=["help", "submit"])
def test_a_short_command_is_cheap(environment: dict[str, str], arguments: tuple[str, ...]) -> None:
    # Interleaved, and the best of each: a busy machine makes every import dearer.
    runs = [(cpu_s(LIBRARIES, environment), cpu_s((*CODEHERD, *arguments), environment)) for _ in range(3)]

    libraries_s, command_s = (min(times) for times in zip(*runs, strict=True))
    assert command_s < BUDGET_S * max(1.0, libraries_s / LIBRARIES_S)


@pytest.mark.parametrize("arguments", ["['--help']", "['submit', 'generate', 'x']", "['ls']"])
def test_a_short_command_imports_no_more_than_it_needs(environment: dict[str, str], arguments: str) -> None:
    code = f"from codeherd_producer.cli import run; run({arguments}); print(*sys.modules, file=sys.stderr)"

    command = [sys.executable, "-c", f"import sys; {code}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    assert set(TOO_MUCH).isdisjoint(done.stderr.split())


def test_a_reader_that_goes_away_is_no_error(environment: dict[str, str], store: Store) -> None:
    reader, writer = os.pipe()
    os.close(reader)

    done = subprocess.run(
        [*CODEHERD, "models"], env=environment, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)

    assert (done.returncode, done.stderr) == (141, b"")


def test_no_terminal_no_colour_and_no_bar(environment: dict[str, str], store: Store) -> None:
    done = subprocess.run(
        [*CODEHERD, "submit", "generate", "x", "--wait", "--timeout", "0.2"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 3
    assert "\x1b" not in done.stderr


class Terminal:
    """A command on a terminal of its own; Ctrl-C is what a person would press."""

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [*CODEHERD, *arguments], {**environment, "TERM": "xterm-256color"})
        self.shown = ""

    def read_until(self, words: str) -> None:
        def found() -> bool:
            self._read()
            return words in self.shown

        wait_until(found, words)

    def press_ctrl_c(self) -> None:
        os.write(self._fd, b"\x03")

    def end(self) -> int:
        while self._read():
            pass
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, 4096)
        except OSError:
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)


def test_ctrl_c_while_waiting_detaches(environment: dict[str, str], store: Store) -> None:
    terminal = Terminal(("submit", "generate", "x", "--wait"), environment)
    terminal.read_until("waiting, Ctrl-C detaches")
    [job] = store.list()
    terminal.read_until("0/1")

    terminal.press_ctrl_c()

    assert terminal.end() == 130
    assert f"`codeherd wait {job.id}` waits again" in " ".join(terminal.shown.split())
    assert "Traceback" not in terminal.shown
    assert store.pending([job.id]) == {job.id}


def test_ctrl_c_as_a_connection_goes_back_shows_no_trace(environment: dict[str, str], store: Store) -> None:
    code = """
import sys
from sqlalchemy.pool.base import _ConnectionFairy

def interrupted(*_, **__) -> None:
    print("interrupted", file=sys.stderr)
    raise KeyboardInterrupt

from codeherd_producer import cli
_ConnectionFairy._reset = interrupted
sys.argv = ["codeherd", "ls"]
cli.main()
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_withdraws_if_asked_to(environment: dict[str, str], store: Store) -> None:
    terminal = Terminal(("submit", "generate", "x", "--wait", "--cancel-on-interrupt"), environment)
    terminal.read_until("0/1")

    terminal.press_ctrl_c()

    assert terminal.end() == 130
    assert [job.state for job in store.list()] == [JobState.CANCELLED]


def test_a_terminal_gets_a_bar_and_the_text(environment: dict[str, str], store: Store) -> None:
    terminal = Terminal(("submit", "generate", "x", "--wait"), environment)
    terminal.read_until("0/1")

    finish(store, store.list()[0].id, "the text")

    assert terminal.end() == 0
    # The bar is erased before the text is written, not with it.
    assert terminal.shown.rindex("the text") > terminal.shown.rindex("\x1b[2K")


def test_a_terminal_gets_a_table_without_colour_if_asked(environment: dict[str, str], store: Store) -> None:
    coloured, plain = (Terminal((*option, "models"), environment) for option in ((), ("--no-color",)))

    assert coloured.end() == plain.end() == 0
    assert "KV bytes/token" in plain.shown
    assert "\x1b[1m" in coloured.shown


def test_a_terminal_without_text_gets_the_help(environment: dict[str, str]) -> None:
    terminal = Terminal(("submit", "infill"), environment)

    assert terminal.end() == 2
    assert "Usage: codeherd submit infill" in terminal.shown


def test_sigterm_ends_the_dispatcher(environment: dict[str, str], store: Store, broker_url: str) -> None:
    process = subprocess.Popen(
        [*CODEHERD, "dispatcher"],
        env={**environment, "CODEHERD_BROKER_URL": broker_url, "CODEHERD_LOG_LEVEL": "debug"},
        stderr=subprocess.PIPE,
    )
    job = store.submit([_request()], tenant="default", queue_of=lambda _: "codeherd.tiny")[0]
    wait_until(lambda: _is_published(store, job.job_id), "the dispatcher to publish")

    process.send_signal(signal.SIGTERM)

    _, said = process.communicate(timeout=60)
    assert (process.returncode, b"Traceback" in said) == (0, False)


def test_a_dispatcher_that_starts_while_the_database_is_down_works_when_it_is_up(
    environment: dict[str, str], broker_url: str, tmp_path: Path
) -> None:
    said = tmp_path / "said"
    with PostgresServer() as server:
        url = server.url_of(server.create_database())
        upgrade(url)
        with closing(Store.open(url)) as store:
            job = store.submit([_request()], queue_of=lambda _: "codeherd.tiny")[0]
            server.crash()
            with said.open("wb") as log:
                process = subprocess.Popen(
                    [*CODEHERD, "dispatcher"],
                    env={**environment, "CODEHERD_DATABASE_URL": url, "CODEHERD_BROKER_URL": broker_url},
                    stderr=log,
                )
            wait_until(lambda: "database_away" in said.read_text(), "the dispatcher to notice")
            server.start()
            wait_until(lambda: _is_published(store, job.job_id), "the dispatcher to publish")

            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0


def test_a_dispatcher_without_a_schema_does_not_start(environment: dict[str, str], tmp_path: Path) -> None:
    empty = {**environment, "CODEHERD_DATABASE_URL": f"sqlite:///{tmp_path / 'empty.db'}"}

    done = subprocess.run([*CODEHERD, "dispatcher"], env=empty, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "hint: run `codeherd db upgrade`"


def _request() -> GenerateRequest:
    return GenerateRequest(prompt="x")


def _is_published(store: Store, job_id: str) -> bool:
    job = store.get(job_id)
    return job is not None and job.published_at is not None
