"""What counts as live and as ready, and that the answer comes; a real herd is in tests/integration."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codeherd_producer.bounded import Answer, Answers
from codeherd_producer.heartbeat import BeatingFlag, last_beat
from codeherd_producer.liveness import (
    SILENT_S,
    STEP_TIMEOUT_S,
    Aspect,
    Outside,
    ask_workers,
    judge_dispatchers,
    judge_live,
    judge_ready,
    lease_holders,
)
from codeherd_producer.local_processes import Process, role_of
from codeherd_schema.database import Database
from codeherd_schema.requests import GenerateRequest
from codeherd_schema.settings import SharedSettings, Url
from codeherd_schema.store import Store
from tests.services import RedisServer, free_port, wait_until
from tests.unit.producer.conftest import CommandLine

WELL = Outside(database=None, broker=None)
NODE = f"cpu0@{os.uname().nodename}"


def process(service: str = "worker", **facts: Any) -> Process:
    known: dict[str, Any] = {"name": "cpu0", "is_stopped": False, "is_loaded": True, "age_s": 3600.0}
    known["silent_s"] = None
    return Process(pid=7, service=service, **(known | facts))


def live(
    worker: Process,
    figures: dict[str, Any] | None = None,
    *,
    held: frozenset[str] | None = frozenset(),
    broker_answers: bool = True,
) -> tuple[str, ...]:
    answers = {} if figures is None else {NODE: figures}
    return judge_live([worker], [process("launcher")], answers, held, broker_answers=broker_answers).faults


def test_a_worker_that_answers_is_live() -> None:
    assert live(process(), {"active": 2, "waiting": 1}) == ()


def test_a_silent_worker_is_dead_only_if_nothing_explains_its_silence() -> None:
    assert live(process()) == (f"{NODE} does not answer and holds no lease",)
    assert live(process(is_loaded=False)) == ()
    assert live(process(), held=frozenset({NODE})) == ()
    assert live(process(), held=None) == ()
    assert live(process(), broker_answers=False) == ()
    assert live(process(is_stopped=True), held=frozenset({NODE})) == ("worker cpu0 is stopped (SIGSTOP)",)


@pytest.mark.parametrize(
    ("figures", "is_live"),
    [
        ({"active": 1, "last_step_age_s": 1.0}, True),
        ({"active": 1, "last_step_age_s": 10 * STEP_TIMEOUT_S}, False),
        ({"active": 0, "waiting": 1, "last_step_age_s": 10 * STEP_TIMEOUT_S}, False),
        ({"active": 0, "waiting": 0, "last_step_age_s": 10 * STEP_TIMEOUT_S}, True),
        ({"active": 1, "last_step_age_s": 900.0, "step_timeout_s": 3600.0}, True),
    ],
)
def test_an_engine_must_step_while_it_has_work(figures: dict[str, Any], is_live: bool) -> None:
    assert (live(process(), figures) == ()) is is_live


def test_a_launcher_between_two_starts_is_live_and_nothing_at_all_is_not() -> None:
    waiting = judge_live([], [process("launcher")], {}, frozenset(), broker_answers=True)
    nothing = judge_live([], [], {}, frozenset(), broker_answers=True)

    assert waiting.faults == ()
    assert nothing.faults == ("no worker of this herd runs on this machine",)


@pytest.mark.parametrize(
    ("worker", "figures", "outside", "fault"),
    [
        (process(), {"model": "tiny"}, WELL, None),
        (process(), {"model": "tiny", "draining": True}, WELL, f"{NODE}: drains"),
        (process(), {"consuming": False}, WELL, f"{NODE}: takes no messages from its queue"),
        (process(), None, WELL, f"{NODE} does not answer"),
        (process(is_loaded=False), None, WELL, f"{NODE} has not loaded its model yet"),
        (process(is_stopped=True), None, WELL, f"{NODE} is stopped (SIGSTOP)"),
        (process(), {}, Outside(database="takes no writes", broker=None), "takes no writes"),
        (process(), None, Outside(database=None, broker="away"), "away"),
    ],
)
def test_a_worker_is_ready_when_it_takes_jobs_and_can_store_them(
    worker: Process, figures: dict[str, Any] | None, outside: Outside, fault: str | None
) -> None:
    found = judge_ready([worker], {} if figures is None else {NODE: figures}, outside)

    assert found.faults == (() if fault is None else (fault,))


@pytest.mark.parametrize(
    ("facts", "outside", "is_live", "is_ready"),
    [
        ({"silent_s": 1.0}, WELL, True, True),
        ({"silent_s": 2 * SILENT_S}, WELL, False, False),
        # Whoever waits for a frozen database need not be killed for it.
        ({"silent_s": 2 * SILENT_S}, Outside("frozen", None), True, False),
        ({"silent_s": 1.0}, Outside(None, "away"), True, False),
        ({"age_s": 1.0}, WELL, True, False),
        ({"age_s": 2 * SILENT_S}, WELL, False, False),
        ({"silent_s": 1.0, "is_stopped": True}, WELL, False, False),
    ],
)
def test_a_dispatcher_is_judged_by_its_loop(
    facts: dict[str, Any], outside: Outside, is_live: bool, is_ready: bool
) -> None:
    dispatchers = [process("dispatcher", name="", **facts)]

    assert (judge_dispatchers(dispatchers, Aspect.LIVE, outside).faults == ()) is is_live
    assert (judge_dispatchers(dispatchers, Aspect.READY, outside).faults == ()) is is_ready


@pytest.mark.parametrize(
    ("arguments", "role"),
    [
        ("python -m codeherd_worker.serve --name gpu0 --device cuda", ("worker", "gpu0", None)),
        ("python -P -m codeherd_worker --gpus all", ("launcher", "", None)),
        ("python -P -m codeherd_producer.cli dispatcher", ("dispatcher", "", None)),
        ("/opt/bin/python /opt/bin/codeherd dispatcher", ("dispatcher", "", None)),
        ("codeherd -q --data-dir /d dispatcher", ("dispatcher", "", "/d")),
        ("codeherd --data-dir=/d flower", ("flower", "", "/d")),
        ("codeherd", None),
        ("grep codeherd_worker", None),
        ("vi dispatcher", None),
    ],
)
def test_a_process_is_known_by_its_command_line(arguments: str, role: tuple[str, str, str | None]) -> None:
    assert role_of(arguments.split()) == role


def test_a_loop_that_looks_at_its_flag_leaves_a_beat_until_its_thread_ends() -> None:
    stop, may_end = BeatingFlag(), threading.Event()
    own = Path("/proc/self")

    def loop() -> None:
        while not stop.is_set():
            may_end.wait(0.01)

    thread = threading.Thread(target=loop)
    before = time.monotonic()
    thread.start()
    try:
        wait_until(lambda: last_beat(own) is not None, "a beat")
        beat = last_beat(own)
    finally:
        stop.set()
        thread.join()

    assert beat is not None
    # Whole seconds.
    assert before - 1 <= beat <= time.monotonic() + 1
    assert last_beat(own) is None


def test_an_answer_that_never_comes_is_given_up() -> None:
    release = threading.Event()

    def some() -> Iterator[int]:
        yield 1
        release.wait()

    def fail() -> int:
        raise ValueError("broken")

    found = []
    with pytest.raises(TimeoutError):
        found += [*Answers(some).until(time.monotonic() + 0.2)] or [0]
    with pytest.raises(ValueError, match="broken"):
        Answer(fail).until(time.monotonic() + 60)
    release.set()

    assert Answer(lambda: 5).until(time.monotonic() + 60) == 5


def test_only_renewed_leases_speak_for_a_silent_worker(store: Store, database_url: str) -> None:
    for worker, lease_s in (("lost@host", -60.0), ("alive@host", 60.0)):
        [job] = store.submit([GenerateRequest(prompt="x")], tenant="t", queue_of=lambda _: "q")
        assert store.claim(job.job_id, worker_id=worker, lease_s=lease_s) is not None
    database = Database.open(database_url)

    try:
        assert lease_holders(database, ["lost@host", "alive@host"]) == {"alive@host"}
        assert lease_holders(database, ["other@host"]) == set()
    finally:
        database.close()


def test_nobody_is_asked_when_nobody_is_expected(tmp_path: Path) -> None:
    settings = SharedSettings(data_dir=tmp_path, broker_url=Url("redis://127.0.0.1:1/0"))

    assert ask_workers(settings, frozenset(), ends_at=0) == {}


@pytest.mark.parametrize("service", ["worker", "dispatcher", "flower"])
@pytest.mark.parametrize("aspect", ["live", "ready"])
def test_where_nothing_runs_nothing_is_well(
    command_line: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    sqlite_url: str,
    broker_url: str,
    service: str,
    aspect: str,
) -> None:
    monkeypatch.setenv("CODEHERD_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("CODEHERD_BROKER_URL", broker_url)
    monkeypatch.setenv("CODEHERD_FLOWER_PORT", str(free_port()))

    done = command_line("health", service, f"--{aspect}", "--timeout", "2")
    as_json = command_line("health", service, f"--{aspect}", "--timeout", "2", "--json")

    assert (done.status, as_json.status) == (1, 1)
    assert done.text.startswith(f"{service} is not {aspect}: ")
    assert done.text.count("\n") == 1
    assert done.text == f"{service} is not {aspect}: {'; '.join(as_json.document['faults'])}\n"
    assert as_json.document | {"faults": [], "facts": []} == {
        "schema": 1, "service": service, "aspect": aspect, "ok": False, "faults": [], "facts": [],
    }  # fmt: skip


def test_a_wrong_setting_is_a_fault_with_status_1(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEHERD_LEASE_S", "never")

    done = command_line("health", "worker")

    assert done.status == 1
    assert done.text.startswith("worker is not ready: ")


def test_no_password_is_in_an_answer(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, sqlite_url: str
) -> None:
    monkeypatch.setenv("CODEHERD_DATABASE_URL", f"postgresql://me:secret@127.0.0.1:{free_port()}/none")
    monkeypatch.setenv("CODEHERD_BROKER_URL", f"redis://:secret@127.0.0.1:{free_port()}/0")

    done = command_line("health", "worker", "--json", "--timeout", "3")

    assert len(done.document["faults"]) == 3
    assert "secret" not in json.dumps(done.document)


@pytest.fixture
def frozen_redis() -> Iterator[RedisServer]:
    with RedisServer(aof=False) as server:
        server.pause()
        yield server
        server.resume()


@pytest.mark.parametrize("command", [("health", "worker"), ("health", "dispatcher"), ("doctor",)])
def test_a_frozen_redis_gets_an_answer_all_the_same(
    command_line: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    sqlite_url: str,
    frozen_redis: RedisServer,
    command: tuple[str, ...],
) -> None:
    monkeypatch.setenv("CODEHERD_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("CODEHERD_BROKER_URL", frozen_redis.url)

    done = command_line(*command, "--timeout", "3")

    assert done.status == 1
    assert done.text
