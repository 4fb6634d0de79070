from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from codeherd_producer.health import (
    Finding,
    Verdict,
    judge_clock,
    judge_dispatcher,
    judge_queues,
    judge_redis,
    judge_user,
    judge_workers,
)
from codeherd_schema.requests import GenerateRequest
from codeherd_schema.store import QueueDepth, Store
from tests.samples import rewrite
from tests.services import RedisServer, free_port
from tests.unit.producer.conftest import CommandLine

GOOD_REDIS = {"redis_version": "6.2.14", "maxmemory_policy": "noeviction", "aof_enabled": "1"}


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


@pytest.fixture(autouse=True)
def _database(monkeypatch: pytest.MonkeyPatch, sqlite_url: str) -> None:
    monkeypatch.setenv("CODEHERD_DATABASE_URL", sqlite_url)


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    with RedisServer(aof=False) as server:
        yield server


def verdicts(findings: list[dict[str, str]]) -> dict[str, str]:
    return {finding["part"]: finding["verdict"] for finding in findings}


def depth(*, queued: int = 1, due_s: float | None = None) -> QueueDepth:
    return QueueDepth("codeherd.tiny", queued, running=0, oldest_due_age_s=due_s, oldest_lease_age_s=None)


@pytest.mark.parametrize(
    ("wrong", "part", "verdict"),
    [
        ({}, "broker", Verdict.OK),
        ({"redis_version": "6.0.16"}, "broker", Verdict.FAIL),
        ({"redis_version": "7.0.15"}, "broker", Verdict.OK),
        ({"redis_version": "10.0"}, "broker", Verdict.OK),
        ({"maxmemory_policy": "allkeys-lru"}, "eviction", Verdict.FAIL),
        ({"aof_enabled": "0"}, "append-only file", Verdict.WARN),
    ],
)
def test_redis_is_judged(wrong: dict[str, str], part: str, verdict: Verdict) -> None:
    findings = {finding.part: finding for finding in judge_redis(GOOD_REDIS | wrong, "redis://host")}

    assert findings[part].verdict is verdict
    assert all(f.verdict is Verdict.OK for name, f in findings.items() if name != part)


def test_a_queue_with_jobs_and_no_worker_fails() -> None:
    depths = {"codeherd.tiny": depth(), "codeherd.codellama-7b": depth()}

    tiny, big = judge_queues(depths, served={"codeherd.tiny"})

    assert (tiny.verdict, big.verdict) == (Verdict.OK, Verdict.FAIL)
    assert big.hint == "`codeherd worker --model codellama-7b` does"


@pytest.mark.parametrize(
    ("due_s", "waiting", "verdict"),
    [(None, 0, Verdict.OK), (2.0, 0, Verdict.OK), (60.0, 5, Verdict.OK), (60.0, 0, Verdict.FAIL)],
)
def test_the_dispatcher_is_silent_when_due_jobs_have_no_message(
    due_s: float | None, waiting: int, verdict: Verdict
) -> None:
    found = judge_dispatcher({"codeherd.tiny": depth(due_s=due_s)}, {"codeherd.tiny": waiting})

    assert found.verdict is verdict


def test_clock_user_and_workers_are_judged() -> None:
    assert [judge_clock(s).verdict for s in (0.1, -30.0)] == [Verdict.OK, Verdict.WARN]
    assert [judge_user(i).verdict for i in (0, 1000)] == [Verdict.WARN, Verdict.OK]
    assert judge_workers({}).verdict is Verdict.WARN
    figures = {"model": "tiny", "active": 1, "slots": 8}
    assert judge_workers({"cpu0@host": figures}) == Finding(
        "workers", Verdict.OK, "cpu0@host (tiny, 1 of 8 slots)"
    )


def test_doctor_without_a_broker_fails_and_still_judges_the_database(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEHERD_BROKER_URL", f"redis://127.0.0.1:{free_port()}/0")

    done = command_line("doctor", "--json")

    found = verdicts(done.document["findings"])
    assert done.status == 1
    assert (found["database"], found["schema"], found["broker"]) == ("OK", "OK", "FAIL")


def test_doctor_without_a_database_fails_and_still_judges_the_broker(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, broker_url: str
) -> None:
    monkeypatch.setenv("CODEHERD_DATABASE_URL", f"postgresql://127.0.0.1:{free_port()}/none")
    monkeypatch.setenv("CODEHERD_BROKER_URL", broker_url)

    done = command_line("doctor", "--json", "--answer-s", "0.1")

    found = verdicts(done.document["findings"])
    assert done.status == 1
    assert (found["database"], found["broker"], found["eviction"]) == ("FAIL", "OK", "OK")


def test_doctor_finds_the_queue_without_worker_and_the_silent_dispatcher(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, broker_url: str, store: Store, sqlite_url: str
) -> None:
    monkeypatch.setenv("CODEHERD_BROKER_URL", broker_url)
    [job] = store.submit([GenerateRequest(prompt="x")], tenant="default", queue_of=lambda _: "codeherd.tiny")
    rewrite(sqlite_url, job.job_id, run_at=time.time() - 60)

    done = command_line("doctor", "--answer-s", "0.1")

    lines = done.text.splitlines()
    assert done.status == 1
    assert "FAIL  queue codeherd.tiny: 1 queued, 0 running, and no worker takes from it" in lines
    assert any(
        line.startswith("FAIL  dispatcher: a job in codeherd.tiny has been due for 6") for line in lines
    )
    assert any(line.startswith("WARN  workers: none answered") for line in lines)


def test_doctor_warns_of_a_redis_that_forgets(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, own_redis: RedisServer
) -> None:
    monkeypatch.setenv("CODEHERD_BROKER_URL", own_redis.url)
    with socket.create_connection(("127.0.0.1", own_redis.port)) as connection:
        connection.sendall(b"CONFIG SET maxmemory-policy allkeys-lru\r\n")
        assert connection.recv(16).startswith(b"+OK")

    done = command_line("doctor", "--json", "--answer-s", "0.1")

    found = verdicts(done.document["findings"])
    assert (done.status, found["eviction"], found["append-only file"]) == (1, "FAIL", "WARN")
