"""A real herd, asked for its health while its parts freeze, start, drain and stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from codeherd_producer.client import Client
from codeherd_producer.liveness import Aspect, Health, check_dispatcher, check_flower, check_worker
from codeherd_producer.local_processes import Process, processes_of
from codeherd_schema.migrations import upgrade
from codeherd_schema.requests import GenerateRequest, Sampling
from codeherd_schema.states import JobState
from tests.acceptance.endless import LONG, NAME, endless_model
from tests.acceptance.herd import QUICK, READY_TIMEOUT_S, Herd, children
from tests.services import PostgresServer, RedisServer, free_port, wait_until

#: Seconds in which each command must answer; frozen servers would keep it for ever.
TIMEOUT_S = 5


class Services:
    """A herd whose Redis and PostgreSQL are its own, to be frozen."""

    def __init__(self, herd: Herd, redis: RedisServer, postgres: PostgresServer) -> None:
        self.herd, self.redis, self.postgres = herd, redis, postgres

    def ask(self, service: str, aspect: str) -> dict[str, Any]:
        """Return the JSON answer; the exit status must say the same."""
        done = self.herd.cli("health", service, f"--{aspect}", "--json", "--timeout", str(TIMEOUT_S))
        answer: dict[str, Any] = json.loads(done.stdout)
        assert (done.returncode, answer["aspect"]) == (0 if answer["ok"] else 1, aspect), done
        return answer

    def is_well(self, service: str, aspect: str) -> bool:
        """Whether there is no fault."""
        return bool(self.ask(service, aspect)["ok"])

    def await_well(self) -> None:
        """Return when everything is ready again; asked in this process, which is sooner."""
        settings, options = self.herd.settings, {"timeout_s": TIMEOUT_S}

        def are_ready() -> bool:
            processes = processes_of(settings)
            return not (
                check_worker(settings, Aspect.READY, processes=processes, name=None, **options).faults
                or check_dispatcher(settings, Aspect.READY, processes=processes, **options).faults
                or check_flower(settings, Aspect.READY, **options).faults
            )

        wait_until(are_ready, "a herd that is ready", timeout_s=READY_TIMEOUT_S)

    def process(self, service: str) -> Process:
        """Return the process of a service."""
        [found] = [p for p in processes_of(self.herd.settings) if p.service == service]
        return found


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with ExitStack() as stack:
        redis, postgres = stack.enter_context(RedisServer()), stack.enter_context(PostgresServer())
        upgrade(postgres.url)
        herd = Herd(
            database_url=postgres.url,
            broker_url=redis.url,
            folder=tmp_path_factory.mktemp("herd"),
            launchers={"one": "cpu"},
            slots=2,
            variables=QUICK | {"CODEHERD_FLOWER_PORT": str(free_port())},
            beside={"flower": ("flower",)},
        )
        services = Services(stack.enter_context(herd), redis, postgres)
        services.await_well()
        yield services


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Freeze processes for the length of the block."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(pids):
            os.kill(pid, signal.SIGCONT)


def pid_of(server: RedisServer | PostgresServer) -> int:
    assert server._process is not None
    return server._process.pid


@pytest.mark.parametrize("service", ["worker", "dispatcher", "flower"])
@pytest.mark.parametrize("aspect", ["live", "ready"])
def test_a_herd_that_is_well_is_live_and_ready(services: Services, service: str, aspect: str) -> None:
    services.await_well()

    done = services.herd.cli("health", service, f"--{aspect}")

    assert done.returncode == 0, done
    assert done.stdout.startswith(f"{service} is {aspect}: ")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_a_frozen_redis_leaves_everything_live_and_nothing_ready(services: Services) -> None:
    services.await_well()

    with stopped(pid_of(services.redis)):
        for service in ("worker", "dispatcher", "flower"):
            assert services.ask(service, "live")["faults"] == []
            [*_, fault] = services.ask(service, "ready")["faults"]
            assert "broker" in fault


def test_a_frozen_database_leaves_everything_live_and_only_flower_ready(services: Services) -> None:
    services.await_well()
    server = pid_of(services.postgres)

    # The backends too: a connection that stands gets no answer, and no error either.
    with stopped(server, *children(server)):
        for service in ("worker", "dispatcher"):
            assert services.ask(service, "live")["faults"] == []
            [fault] = services.ask(service, "ready")["faults"]
            assert "database" in fault
        assert services.is_well("flower", "ready")


@pytest.mark.parametrize("service", ["worker", "launcher", "dispatcher"])
def test_a_stopped_process_is_not_live_and_says_so(services: Services, service: str) -> None:
    services.await_well()
    asked = "worker" if service == "launcher" else service

    with stopped(services.process(service).pid):
        [fault] = services.ask(asked, "live")["faults"]

    assert fault.startswith(f"{service} ")
    assert fault.endswith(" is stopped (SIGSTOP)")


def test_a_flower_that_hangs_is_not_live(services: Services) -> None:
    services.await_well()

    with stopped(services.process("flower").pid):
        assert not services.is_well("flower", "live")


def test_a_worker_of_another_name_is_not_there(services: Services) -> None:
    done = services.herd.cli("health", "worker", "nobody", "--ready")

    assert done.returncode == 1
    assert "no worker process of this herd" in done.stdout


def test_a_herd_of_another_broker_is_not_seen(services: Services) -> None:
    other = services.herd.settings.model_copy(update={"key_prefix": "another:"})

    assert processes_of(other) == []


def test_a_read_only_database_is_not_ready(services: Services) -> None:
    services.await_well()

    with psycopg.connect(services.postgres.url, autocommit=True) as connection:
        connection.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
        try:
            [fault] = services.ask("worker", "ready")["faults"]
            live = services.ask("worker", "live")["faults"]
        finally:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute("ALTER DATABASE postgres RESET default_transaction_read_only")

    assert "read-only transaction" in fault
    assert live == []


def health(herd: Herd, aspect: Aspect) -> Health:
    """Ask in this process: many times in a short while."""
    processes = processes_of(herd.settings)
    return check_worker(herd.settings, aspect, processes=processes, name=None, timeout_s=TIMEOUT_S)


def test_a_loading_worker_is_live_and_not_ready_and_a_draining_one_too(
    tmp_path: Path, sqlite_url: str, broker_url: str
) -> None:
    variables = QUICK | endless_model(tmp_path) | {"CODEHERD_WORKER_DRAIN_TIMEOUT_S": "600"}
    with Herd(
        database_url=sqlite_url, broker_url=broker_url, folder=tmp_path, launchers={}, variables=variables
    ) as herd:
        assert health(herd, Aspect.LIVE).faults == ("no worker of this herd runs on this machine",)
        with (tmp_path / "launcher.log").open("wb") as log:
            launcher = subprocess.Popen(
                [sys.executable, "-m", "codeherd_worker", "--gpus", "cpu", "--slots", "2", "--threads", "1"],
                env=herd.environment,
                stderr=log,
                start_new_session=True,
            )
        try:
            # It answers nobody yet, and must not be killed for it.
            wait_until(lambda: bool(children(launcher.pid)), "a worker process")
            early = health(herd, Aspect.READY)
            while (found := health(herd, Aspect.READY)).faults:
                assert health(herd, Aspect.LIVE).faults == (), found
                assert launcher.poll() is None
            assert early.faults
            assert found.facts == (f"cpu0@{os.uname().nodename} holds {NAME}",)

            with Client(herd.settings) as client:
                request = GenerateRequest(prompt="x", model=NAME, sampling=Sampling(max_new_tokens=LONG))
                job = client.submit(request)
                wait_until(
                    lambda: job.refresh().state is JobState.RUNNING, "the job", timeout_s=READY_TIMEOUT_S
                )
                launcher.terminate()
                # From here on it is silent: for longer than a lease, so that only renewals keep it.
                wait_until(lambda: bool(health(herd, Aspect.READY).faults), "the drain")
                for _ in range(4):
                    draining = health(herd, Aspect.LIVE)
                    assert draining.faults == ()
                    assert draining.facts[0].endswith("is silent and renews its leases: it drains")
                    assert job.refresh().state is JobState.RUNNING
                assert not health(herd, Aspect.READY).facts
        finally:
            # The second signal does not wait.
            launcher.terminate()
            assert launcher.wait(60) == 0


@pytest.mark.parametrize("command", [("dispatcher",), ("up", "--no-flower")])
def test_a_start_on_a_replica_is_refused_with_the_fix(
    tmp_path: Path, sqlite_url: str, command: tuple[str, ...]
) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CODEHERD_")}
    with RedisServer(aof=False) as server, redis.Redis(port=server.port) as client:
        client.replicaof("127.0.0.1", str(free_port()))
        own = {"CODEHERD_BROKER_URL": server.url, "CODEHERD_DATABASE_URL": sqlite_url}
        done = subprocess.run(
            [sys.executable, "-m", "codeherd_producer.cli", "--data-dir", str(tmp_path / "data"), *command],
            env=clean | own,
            capture_output=True,
            text=True,
            timeout=READY_TIMEOUT_S,
            check=False,
        )

    assert done.returncode == 1
    error, hint = done.stderr.splitlines()[-2:]
    assert error.endswith("is a replica: it refuses every write [broker_unavailable]")
    assert hint.startswith("hint: name the master")
