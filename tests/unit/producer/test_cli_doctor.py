"""Every finding of `codeherd doctor`, shown both ways: well and broken."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import celery
import psycopg
import pytest
import redis

from codeherd_producer.database_checks import (
    Backlog,
    Room,
    backlogs,
    check_writes,
    examine_database,
    file_system_of,
    judge_clock,
    judge_postgresql,
    judge_room,
    judge_sqlite,
)
from codeherd_producer.findings import Finding, Verdict
from codeherd_producer.health import (
    judge_dispatcher,
    judge_hints,
    judge_pauses,
    judge_queues,
    judge_served_models,
    judge_workers,
)
from codeherd_producer.machine_checks import (
    FEW_BYTES,
    NO_BYTES,
    is_local,
    judge_disk,
    judge_encryption,
    judge_files,
    judge_models,
    judge_user,
)
from codeherd_producer.redis_checks import Tenants, judge_redis, judge_tenants
from codeherd_schema.broker import Broker
from codeherd_schema.database import Database
from codeherd_schema.errors import BrokerUnavailable, ConfigurationError, DatabaseUnavailable
from codeherd_schema.migrations import upgrade
from codeherd_schema.pauses import Pause
from codeherd_schema.redis_facts import Gravity, check_start
from codeherd_schema.requests import GenerateRequest
from codeherd_schema.settings import SharedSettings, Url
from codeherd_schema.states import PauseScope
from codeherd_schema.store import QueueDepth, Store
from tests.samples import rewrite
from tests.services import PostgresServer, RedisServer, free_port
from tests.unit.producer.conftest import CommandLine

GOOD_REDIS = {
    "redis_version": "6.2.14",
    "role": "master",
    "loading": "0",
    "maxmemory": "0",
    "maxmemory_policy": "noeviction",
    "used_memory": "1000000",
    "aof_enabled": "1",
    "aof_last_write_status": "ok",
    "aof_last_bgrewrite_status": "ok",
    "rdb_last_bgsave_status": "ok",
}
GOOD_POSTGRESQL = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}
OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL


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
        ({}, "broker", OK),
        ({"redis_version": "6.0.16"}, "broker", FAIL),
        ({"redis_version": "7.0.15"}, "broker", OK),
        ({"redis_version": "10.0"}, "broker", OK),
        ({"role": "slave", "master_host": "other"}, "role", FAIL),
        ({"loading": "1"}, "loading", FAIL),
        ({"maxmemory_policy": "allkeys-lru"}, "eviction", FAIL),
        ({"maxmemory_policy": "volatile-lru"}, "eviction", WARN),
        ({"maxmemory": "4000000"}, "eviction", OK),
        ({"maxmemory": "1200000"}, "memory", WARN),
        ({"maxmemory": "900000"}, "memory", FAIL),
        ({"aof_enabled": "0"}, "append-only file", WARN),
        ({"aof_last_bgrewrite_status": "err"}, "append-only file", WARN),
        ({"aof_last_write_status": "err"}, "append-only file", FAIL),
        ({"rdb_last_bgsave_status": "err"}, "snapshot", FAIL),
    ],
)
def test_redis_is_judged(wrong: dict[str, str], part: str, verdict: Verdict) -> None:
    findings = {finding.part: finding for finding in judge_redis(GOOD_REDIS | wrong, "redis://host")}

    assert findings[part].verdict is verdict
    assert (findings[part].hint is None) is (verdict is OK)
    assert all(f.verdict is OK for name, f in findings.items() if name != part)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"redis_version": "6.0.16"}, ConfigurationError),
        ({"role": "slave"}, BrokerUnavailable),
        ({"loading": "1"}, BrokerUnavailable),
    ],
)
def test_a_start_on_a_redis_that_cannot_do_is_refused(wrong: dict[str, str], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"Redis at redis://host: is "):
        check_start(GOOD_REDIS | wrong, "redis://host")


def test_a_start_on_a_redis_that_may_lose_is_warned_of() -> None:
    assert check_start(GOOD_REDIS, "redis://host") == []
    [fault] = check_start(GOOD_REDIS | {"maxmemory_policy": "allkeys-lru"}, "redis://host")
    assert (fault.part, fault.gravity) == ("eviction", Gravity.LOSES)


@pytest.mark.parametrize(
    ("version", "mode", "file_system", "verdicts"),
    [
        ((3, 40, 1), "wal", "ext4", [OK, OK]),
        ((3, 40, 1), "wal", None, [OK, OK]),
        ((3, 34, 0), "wal", "ext4", [FAIL, OK]),
        ((3, 35, 0), "delete", "ext4", [OK, WARN]),
        ((3, 40, 1), "wal", "nfs4", [OK, WARN]),
    ],
)
def test_sqlite_is_judged(
    version: tuple[int, ...], mode: str, file_system: str | None, verdicts: list[Verdict]
) -> None:
    found = list(judge_sqlite(version, mode, file_system))

    assert [finding.part for finding in found] == ["database version", "durability"]
    assert [finding.verdict for finding in found] == verdicts


@pytest.mark.parametrize(
    ("version", "wrong", "is_replica", "expected"),
    [
        (150_004, {}, False, {"database version": OK, "durability": OK}),
        (90_624, {}, False, {"database version": FAIL, "durability": OK}),
        (100_000, {}, True, {"database version": OK, "role": FAIL, "durability": OK}),
        (150_004, {"fsync": "off"}, False, {"database version": OK, "durability": WARN}),
        (150_004, {"full_page_writes": "off"}, False, {"database version": OK, "durability": WARN}),
        (150_004, {"synchronous_commit": "off"}, False, {"database version": OK, "durability": WARN}),
        (150_004, {"synchronous_commit": "local"}, False, {"database version": OK, "durability": OK}),
    ],
)
def test_postgresql_is_judged(
    version: int, wrong: dict[str, str], is_replica: bool, expected: dict[str, Verdict]
) -> None:
    found = list(judge_postgresql(version, GOOD_POSTGRESQL | wrong, is_replica=is_replica))

    assert {finding.part: finding.verdict for finding in found} == expected
    for name in wrong:
        assert ("off" not in wrong.values()) or any(f"SET {name} = on" in (f.hint or "") for f in found)


@pytest.mark.parametrize(
    ("room", "workers", "verdict"),
    [(Room(100, 10), 2, OK), (Room(100, 85), 2, WARN), (Room(20, 1), 2, WARN), (Room(24, 1), 2, OK)],
)
def test_there_must_be_connections_for_all(room: Room, workers: int, verdict: Verdict) -> None:
    assert judge_room(room, workers).verdict is verdict


def test_the_nearest_mount_names_the_file_system() -> None:
    mounts = (
        "22 1 8:1 / / rw - ext4 /dev/sda rw\n"
        "30 22 0:40 / /data rw shared:1 - nfs4 host:/x rw\n"
        "31 22 0:41 / /my\\040disk rw - tmpfs tmpfs rw\n"
        "32 30 8:2 / /data/local rw - xfs /dev/sdb rw\n"
    )

    assert file_system_of(Path("/home/a.db"), mounts) == "ext4"
    assert file_system_of(Path("/data/a.db"), mounts) == "nfs4"
    assert file_system_of(Path("/data/local/a.db"), mounts) == "xfs"
    assert file_system_of(Path("/my disk/a.db"), mounts) == "tmpfs"
    assert file_system_of(Path("/home/a.db"), "") is None


def test_a_queue_with_jobs_and_no_worker_fails() -> None:
    depths = {"codeherd.tiny": depth(), "codeherd.codellama-7b": depth()}

    tiny, big = judge_queues(depths, served={"codeherd.tiny"})

    assert (tiny.verdict, big.verdict) == (Verdict.OK, Verdict.FAIL)
    assert big.hint == "`codeherd worker --model codellama-7b` does"


@pytest.mark.parametrize(("due_s", "waiting", "verdict"), [(2.0, 0, OK), (60.0, 5, OK), (60.0, 0, FAIL)])
def test_the_dispatcher_is_silent_when_due_jobs_have_no_message(
    due_s: float, waiting: int, verdict: Verdict
) -> None:
    found = judge_dispatcher({"codeherd.tiny": Backlog(due_s, None)}, {"codeherd.tiny": waiting})

    assert found.verdict is verdict
    assert judge_dispatcher({}, {}).verdict is OK


@pytest.mark.parametrize(
    ("hinted_s", "waiting", "count"),
    [(None, 5, 0), (60.0, 5, 0), (600.0, 5, 1), (600.0, 64, 0), (600.0, 0, 0)],
)
def test_hints_that_nobody_sends_again_are_found_unless_the_window_is_full(
    hinted_s: float | None, waiting: int, count: int, tmp_path: Path
) -> None:
    settings = SharedSettings(data_dir=tmp_path, republish_after_s=60, publish_window=64)

    found = list(judge_hints({"q": Backlog(600.0, hinted_s)}, {"q": waiting}, settings))

    assert [finding.verdict for finding in found] == [WARN] * count


def test_a_pause_is_told_with_its_end() -> None:
    since = datetime(2026, 5, 1, tzinfo=UTC)
    pauses = [
        Pause(PauseScope.QUEUE, "codeherd.tiny", "new driver", since),
        Pause(PauseScope.BATCH, "b1", "", since),
    ]

    model, batch = judge_pauses(pauses, {"codeherd.tiny": depth()})

    assert (model.verdict, model.hint) == (WARN, "`codeherd resume model tiny`")
    assert model.message == "model tiny since 2026-05-01T00:00:00+00:00 (new driver), 1 jobs wait"
    assert (batch.verdict, batch.hint) == (WARN, "`codeherd resume batch b1`")
    assert list(judge_pauses([], {})) == []


@pytest.mark.parametrize(
    ("intruders", "job_ids", "known", "verdict"),
    [
        ((), frozenset(), frozenset(), OK),
        ((), frozenset({"a"}), frozenset({"a"}), OK),
        ((), frozenset({"a"}), None, OK),
        ((), frozenset({"a", "b"}), frozenset({"a"}), WARN),
        (("celery",), frozenset(), frozenset(), WARN),
    ],
)
def test_who_shares_the_key_prefix_is_found(
    intruders: tuple[str, ...], job_ids: frozenset[str], known: frozenset[str] | None, verdict: Verdict
) -> None:
    [found] = judge_tenants(Tenants(intruders, ("other",), job_ids), "codeherd:", known)

    assert (found.verdict, found.hint is None) == (verdict, verdict is OK)


def test_a_worker_whose_model_nobody_here_knows_is_found(tmp_path: Path) -> None:
    settings = SharedSettings(data_dir=tmp_path)

    assert list(judge_served_models(settings, {"cpu0@host": {"model": "tiny"}})) == []
    [found] = judge_served_models(settings, {"cpu0@host": {"model": "mine"}})
    assert (found.verdict, found.hint) == (
        WARN,
        "add its `[models.mine]` table to CODEHERD_MODELS_FILE here too",
    )


def test_a_settings_file_with_a_password_is_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.touch(mode=0o644)
    settings = SharedSettings(data_dir=tmp_path, broker_url=Url("redis://:secret@host/0"))
    plain = SharedSettings(data_dir=tmp_path, broker_url=Url("redis://host/0"))
    origins: Mapping[str, Path | None] = {"broker_url": file, "tenant": None}

    [found] = judge_files(settings, origins)
    assert (found.verdict, found.hint) == (WARN, f"`chmod 600 {file}`")
    assert "secret" not in found.message
    assert list(judge_files(plain, origins)) == []
    assert list(judge_files(settings, {"broker_url": None})) == []
    file.chmod(0o600)
    assert [finding.verdict for finding in judge_files(settings, origins)] == [OK]


def test_the_models_file_and_the_disk_are_judged(tmp_path: Path) -> None:
    broken = tmp_path / "models.toml"
    broken.write_text("[models.x]\nsource = 3\n")

    assert judge_models(SharedSettings(data_dir=tmp_path)).verdict is OK
    assert judge_models(SharedSettings(data_dir=tmp_path, models_file=broken)).verdict is FAIL
    assert judge_models(SharedSettings(data_dir=tmp_path, default_model="none")).verdict is FAIL
    verdicts = [judge_disk(tmp_path, free).verdict for free in (NO_BYTES - 1, FEW_BYTES - 1, FEW_BYTES)]
    assert verdicts == [FAIL, WARN, OK]


@pytest.mark.parametrize(
    ("url", "count"),
    [
        ("redis://127.0.0.1/0", 0),
        ("redis://localhost/0", 0),
        ("redis+socket:///run/redis.sock", 0),
        ("rediss://redis.example/0", 0),
        ("redis://redis.example/0", 1),
        ("redis://10.0.0.7/0", 1),
    ],
)
def test_a_password_must_not_cross_a_network_in_the_open(url: str, count: int, tmp_path: Path) -> None:
    found = list(judge_encryption(SharedSettings(data_dir=tmp_path, broker_url=Url(url))))

    assert [finding.verdict for finding in found] == [WARN] * count
    assert [is_local(host) for host in (None, "/run/pg", "::1", "db.example")] == [True, True, True, False]


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


@pytest.fixture
def doctor(command_line: CommandLine) -> Callable[..., dict[str, list[dict[str, Any]]]]:
    """Runs the command; gives the findings by part."""

    def run(*options: str) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for finding in command_line("doctor", "--json", "--answer-s", "0.1", *options).document["findings"]:
            found.setdefault(finding["part"], []).append(finding)
        return found

    return run


Doctor = Callable[..., dict[str, list[dict[str, Any]]]]


def test_everything_is_well_on_a_machine_that_is(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, broker_url: str
) -> None:
    monkeypatch.setenv("CODEHERD_BROKER_URL", broker_url)

    found = doctor()

    doubtful = {part for part, ones in found.items() for one in ones if one["verdict"] != "OK"}
    assert doubtful <= {"user", "workers", "disk"}
    assert set(found) >= {
        "user", "models", "disk", "database", "clock", "database version", "durability", "schema", "writes",
        "broker", "eviction", "append-only file", "key prefix", "workers", "dispatcher",
    }  # fmt: skip


def test_a_database_file_that_is_not_there_is_not_made(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CODEHERD_DATABASE_URL", f"sqlite:///{tmp_path / 'none.db'}")

    [found] = doctor("--timeout", "2")["database"]

    assert (found["verdict"], "codeherd db upgrade" in found["hint"]) == ("FAIL", True)
    assert not (tmp_path / "none.db").exists()


class CarefulPostgres(PostgresServer):
    """One that keeps what it has committed."""

    def command(self) -> Sequence[str]:
        return [*super().command(), "-c", "fsync=on", "-c", "full_page_writes=on"]


@pytest.fixture(scope="module")
def careful_postgres() -> Iterator[CarefulPostgres]:
    with CarefulPostgres() as server:
        upgrade(server.url)
        yield server


def test_postgresql_tells_what_it_would_lose(
    careful_postgres: CarefulPostgres, postgres_url: str, tmp_path: Path
) -> None:
    def durability(url: str) -> list[tuple[Verdict, str]]:
        settings = SharedSettings(data_dir=tmp_path, database_url=Url(url))
        found = [f for f in examine_database(settings, time.time) if isinstance(f, Finding)]
        assert {f.part: f.verdict for f in found}["database version"] is OK
        return [(f.verdict, f.message.partition(" ")[0]) for f in found if f.part == "durability"]

    assert durability(careful_postgres.url) == [(OK, "every")]
    assert durability(postgres_url) == [(WARN, "fsync"), (WARN, "full_page_writes")]
    with psycopg.connect(careful_postgres.url, autocommit=True) as connection:
        connection.execute("ALTER DATABASE postgres SET synchronous_commit = off")
        assert durability(careful_postgres.url) == [(WARN, "synchronous_commit")]
        connection.execute("ALTER DATABASE postgres RESET synchronous_commit")


def test_a_database_that_takes_no_writes_is_found(careful_postgres: CarefulPostgres) -> None:
    database = Database.open(careful_postgres.url, pool_size=1)
    read_only = Database.open(f"{careful_postgres.url}?options=-c default_transaction_read_only=on")
    with psycopg.connect(careful_postgres.url, autocommit=True) as connection:
        connection.execute("CREATE ROLE reader LOGIN")
        connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    reader = Database.open(careful_postgres.url.replace("postgres@", "reader@"))
    try:
        check_writes(database)
        with pytest.raises(DatabaseUnavailable, match="read-only transaction"):
            check_writes(read_only)
        with pytest.raises(DatabaseUnavailable, match="takes no writes: permission denied"):
            check_writes(reader)
    finally:
        for one in (database, read_only, reader):
            one.close()


def test_a_paused_job_is_not_due_and_blames_no_dispatcher(store: Store, sqlite_url: str) -> None:
    [job] = store.submit([GenerateRequest(prompt="x")], tenant="default", queue_of=lambda _: "codeherd.tiny")
    rewrite(sqlite_url, job.job_id, run_at=time.time() - 60)
    database = Database.open(sqlite_url)

    try:
        [(queue, backlog)] = backlogs(database).items()
        store.pause(PauseScope.QUEUE, "codeherd.tiny")
        paused = backlogs(database)
        store.resume(PauseScope.QUEUE, "codeherd.tiny")
        store.mark_published([job.job_id])
        hinted = backlogs(database)["codeherd.tiny"].hinted_s
    finally:
        database.close()

    assert (queue, backlog.hinted_s, paused) == ("codeherd.tiny", None, {})
    assert backlog.due_s >= 59
    assert hinted is not None


def test_a_replica_is_found(doctor: Doctor, monkeypatch: pytest.MonkeyPatch, own_redis: RedisServer) -> None:
    monkeypatch.setenv("CODEHERD_BROKER_URL", own_redis.url)
    with redis.Redis(port=own_redis.port) as client:
        client.replicaof("127.0.0.1", str(free_port()))

    found = doctor()

    assert [one["verdict"] for one in found["role"]] == ["FAIL"]


def test_a_redis_that_is_nearly_full_is_found(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, own_redis: RedisServer
) -> None:
    monkeypatch.setenv("CODEHERD_BROKER_URL", own_redis.url)
    with redis.Redis(port=own_redis.port) as client:
        used: Any = client.info("memory")["used_memory"]
        client.config_set("maxmemory", int(used * 1.1))

    found = doctor()

    assert found["memory"][0]["verdict"] in {"WARN", "FAIL"}


def test_another_herd_and_another_app_under_our_prefix_are_found(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, own_redis: RedisServer, store: Store
) -> None:
    monkeypatch.setenv("CODEHERD_BROKER_URL", own_redis.url)
    broker = Broker(SharedSettings(broker_url=Url(own_redis.url)))
    stranger = celery.Celery("other", broker=own_redis.url, set_as_current=False)
    intruder = celery.Celery("other", broker=own_redis.url, set_as_current=False)
    intruder.conf.broker_transport_options = {"global_keyprefix": "codeherd:"}
    [job] = store.submit([GenerateRequest(prompt="x")], tenant="default", queue_of=lambda _: "codeherd.tiny")
    [hint] = store.mark_published([job.job_id])
    try:
        broker.publish([hint])
        stranger.send_task("theirs")
        assert [one["verdict"] for one in doctor()["key prefix"]] == ["OK"]

        intruder.send_task("theirs")
        broker.publish([type(hint)("0199-other", "codeherd.tiny", hint.kind, 3, 1)])
        app, herd = doctor()["key prefix"]
    finally:
        broker.close()
        for one in (stranger, intruder):
            one.pool.force_close_all()
            one.close()

    assert (app["verdict"], herd["verdict"]) == ("WARN", "WARN")
    assert "`celery`" in app["message"]
    assert herd["message"].startswith("1 of 2 messages")


def test_a_frozen_database_is_told_from_one_that_is_away(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, broker_url: str
) -> None:
    monkeypatch.setenv("CODEHERD_BROKER_URL", broker_url)
    with PostgresServer() as server:
        monkeypatch.setenv("CODEHERD_DATABASE_URL", server.url)
        server.pause()
        found = doctor("--timeout", "1")
        server.resume()

    assert found["database"][0]["verdict"] == "FAIL"
    assert "no answer within 1 s" in found["database"][0]["message"]
    assert found["broker"][0]["verdict"] == "OK"


def test_a_password_in_a_file_for_all_is_found_and_not_told(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(os.environ["XDG_CONFIG_HOME"]) / "codeherd" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(f'broker_url = "redis://:secret@127.0.0.1:{free_port()}/0"\n')
    file.chmod(0o644)

    done = command_line("doctor", "--json")

    found = {finding["part"]: finding for finding in done.document["findings"]}
    assert found["settings file"]["hint"] == f"`chmod 600 {file}`"
    assert "secret" not in json.dumps(done.document)
