"""`codeherd up` for real: one stack, from ready to the last process, on a folder of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import (
    Request,
    urlopen,
)

import pytest

from tests.services import PATIENCE_S, wait_until

CODEHERD = (sys.executable, "-m", "codeherd_producer.cli")
#: Seconds to load torch and the embedded model on a busy machine.
READY_S = 180.0


class Up:
    """A running `codeherd up`."""

    def __init__(self, folder: Path, *options: str, **variables: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CODEHERD_")}
        self.environment = {**clean, "CODEHERD_DATA_DIR": str(folder), **variables}
        self.process = subprocess.Popen(
            [*CODEHERD, "up", *options], env=self.environment, stderr=subprocess.PIPE, text=True
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_for(self, words: str) -> None:
        def has_said() -> bool:
            return any(words in line for line in self.said) or self.process.poll() is not None

        wait_until(has_said, words, timeout_s=READY_S)
        assert any(words in line for line in self.said), self.said

    def codeherd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*CODEHERD, *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def processes(self) -> dict[int, str]:
        """Every process that was started with this stack's folder, `up` itself left out."""
        data_dir = self.environment["CODEHERD_DATA_DIR"].encode()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            with suppress(OSError):
                command = (folder / "cmdline").read_bytes()
                variables = (folder / "environ").read_bytes().split(b"\0")
                # Redis writes its title, with the socket in it, over its environment.
                if b"CODEHERD_DATA_DIR=" + data_dir in variables or data_dir in command:
                    found[pid] = command.replace(b"\0", b" ").decode()
        found.pop(self.process.pid, None)
        return found

    def pid_of(self, words: str) -> int:
        [pid] = [pid for pid, command in self.processes().items() if words in command]
        return pid

    def end(self) -> int:
        status = self.process.wait(READY_S)
        self._reader.join()
        return status

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            self.said.extend(line.rstrip() for line in stream)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name is short enough for a socket."""
    return tmp_path_factory.mktemp("up") / "d"


@pytest.fixture
def up(folder: Path) -> Iterator[Up]:
    # A hint that dies with Redis is sent again after this time.
    options = ("--flower-port", "0", "--slots", "2", "--threads", "1")
    stack = Up(folder, *options, CODEHERD_REPUBLISH_AFTER_S="3")
    yield stack
    if stack.process.poll() is None:
        stack.process.send_signal(signal.SIGTERM)
    stack.end()


def test_up_answers_mends_itself_and_leaves_nothing(up: Up) -> None:
    up.wait_for("ready")

    # One stack takes half a minute to start, so this test is a story instead of ten tests.
    answered = up.codeherd("submit", "generate", "def f(", "--max-new-tokens", "4", "--wait")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout
    checked = up.codeherd("doctor")
    assert checked.returncode == 0, checked.stdout

    second = up.codeherd("up")
    assert second.returncode == 1
    assert f"(process {up.process.pid})" in second.stderr

    _flower_asks_for_its_password(up)

    os.kill(up.pid_of("dispatcher"), signal.SIGKILL)
    up.wait_for("dispatcher was ended by SIGKILL; starting it again in 0.5 s")
    os.kill(up.pid_of("redis-server"), signal.SIGKILL)
    up.wait_for("redis was ended by SIGKILL")
    # Published by the new dispatcher, through the new Redis.
    mended = up.codeherd("submit", "generate", "def g(", "--max-new-tokens", "4")
    waited = up.codeherd("wait", mended.stdout.strip(), "--timeout", "2m")
    assert waited.returncode == 0, waited.stderr + str(up.said)

    up.process.send_signal(signal.SIGINT)

    assert up.end() == 0
    assert up.said[-1] == "stopped"
    assert up.processes() == {}


def test_a_killed_up_takes_its_processes_with_it(folder: Path) -> None:
    stack = Up(folder, "--no-flower")
    wait_until(lambda: len(stack.processes()) >= 3, "redis, dispatcher and worker", timeout_s=READY_S)

    stack.process.kill()

    stack.end()
    wait_until(lambda: not stack.processes(), "every process to end", timeout_s=PATIENCE_S)


def test_a_folder_too_deep_for_a_socket_is_refused(folder: Path) -> None:
    stack = Up(folder / ("x" * 100))

    assert stack.end() == 2
    assert "the system allows 100" in stack.said[0]
    assert stack.said[1].startswith("hint: ")


def test_a_worker_that_can_never_start_ends_the_stack(folder: Path, broker_url: str) -> None:
    stack = Up(
        folder, "--no-flower", "--quantization", "none", "--gpus", "99", CODEHERD_BROKER_URL=broker_url
    )

    assert stack.end() == 1
    assert stack.said[-2] == "error: worker 0 cannot start [service_unavailable]"
    assert stack.processes() == {}
    assert not (folder / "redis.sock").exists()


def _flower_asks_for_its_password(up: Up) -> None:
    [line] = [line for line in up.said if line.startswith("flower: ")]
    found = re.fullmatch(r"flower: (http://127\.0\.0\.1:\d+), user `codeherd`, password `(.+)`", line)
    assert found is not None
    url, password = found.groups()
    assert not any(password in command for command in up.processes().values())

    def answers() -> bool:
        try:
            with urlopen(f"{url}/healthcheck") as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    wait_until(answers, "flower", timeout_s=READY_S)
    with pytest.raises(HTTPError) as refused:
        urlopen(f"{url}/api/workers")
    refused.value.close()
    assert refused.value.code == 401
    credentials = b64encode(f"codeherd:{password}".encode()).decode()
    request = Request(f"{url}/api/tasks", headers={"Authorization": f"Basic {credentials}"})
    with urlopen(request) as reply:
        tasks = json.load(reply).values()
    # A hint may be sent twice; the second one runs nothing.
    assert {(task["name"], task["state"]) for task in tasks} == {("codeherd.generate", "SUCCESS")}
    assert any("'out': 4" in task["result"] for task in tasks)
