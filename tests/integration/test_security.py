"""Redis over TLS with the rights of docker/compose.yaml, PostgreSQL over TLS, passwords that show nowhere."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import redis

from codeherd_producer.monitor import monitor_app
from codeherd_schema.broker import Broker
from codeherd_schema.errors import BrokerUnavailable, DatabaseUnavailable
from codeherd_schema.requests import GenerateRequest
from codeherd_schema.settings import SharedSettings
from codeherd_schema.states import JobState
from codeherd_schema.store import Store
from tests.chaos.null_herd import JOBS_TIMEOUT_S, NullHerd
from tests.integration.redis_variants import Authority, Certificate, TlsDoor, allow
from tests.services import PostgresServer, RedisServer, free_port, wait_until

ROOT = Path(__file__).parents[2]
#: No other word of any output looks like these.
REDIS_PASSWORD, FLOWER_PASSWORD, SQL_PASSWORD = "r3d1s0secret", "fl0wer0secret", "p0stgres0secret"


def shipped_rights() -> list[str]:
    """Return what docker/compose.yaml allows to codeherd's user in Redis."""
    text = (ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8")
    [rights] = re.findall(r"user codeherd on >\S+ (.+)", text)
    return str(rights).split()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture(scope="module")
def certificate(authority: Authority) -> Certificate:
    return authority.sign("server")


@pytest.fixture(scope="module")
def own_redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        allow(server, "codeherd", REDIS_PASSWORD, *shipped_rights())
        allow(server, "nobody", REDIS_PASSWORD, "~*", "&*", "+ping")
        yield server


@pytest.fixture(scope="module")
def door(own_redis: RedisServer, certificate: Certificate) -> Iterator[TlsDoor]:
    with TlsDoor(own_redis, certificate) as door:
        yield door


def broker_at(url: str, ca_file: Path | None = None) -> Broker:
    values = {"broker_url": url, "connect_timeout_s": 5.0, "broker_ca_file": ca_file}
    return Broker(SharedSettings.model_validate(values))


def refusal(broker: Broker) -> BrokerUnavailable:
    try:
        with pytest.raises(BrokerUnavailable) as told:
            broker.check()
    finally:
        broker.close()
    assert REDIS_PASSWORD not in str(told.value) + repr(told.value) + str(told.value.hint)
    return told.value


def test_redis_over_tls_needs_the_right_authority(door: TlsDoor, authority: Authority) -> None:
    broker = broker_at(door.url("codeherd", REDIS_PASSWORD), authority.file)

    assert broker.check()["maxmemory_policy"] == "noeviction"
    broker.close()


def test_another_authority_is_refused_with_the_setting_to_look_at(door: TlsDoor, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")

    error = refusal(broker_at(door.url("codeherd", REDIS_PASSWORD), other.file))

    assert "SSLCertVerificationError" in str(error)
    assert "CODEHERD_BROKER_CA_FILE" in str(error.hint)


def test_the_systems_authorities_do_not_stand_in_for_a_private_one(door: TlsDoor) -> None:
    assert "SSLCertVerificationError" in str(refusal(broker_at(door.url("codeherd", REDIS_PASSWORD))))


@pytest.mark.parametrize(
    ("days", "hosts", "reason"),
    [(-1, "IP:127.0.0.1", "certificate has expired"), (2, "DNS:elsewhere.example", "IP address mismatch")],
)
def test_a_certificate_out_of_force_or_of_another_host_is_refused(
    own_redis: RedisServer, authority: Authority, days: int, hosts: str, reason: str
) -> None:
    bad = authority.sign(f"bad{days}", days=days, hosts=hosts)

    with TlsDoor(own_redis, bad) as door:
        error = refusal(broker_at(door.url("codeherd", REDIS_PASSWORD), authority.file))

    assert reason in str(error)


def test_tls_to_a_plain_port_is_refused(own_redis: RedisServer, authority: Authority) -> None:
    url = own_redis.url.replace("redis://", f"rediss://codeherd:{REDIS_PASSWORD}@")

    assert "did not answer" in str(refusal(broker_at(url, authority.file)))


def test_a_plain_address_of_a_tls_port_is_refused(door: TlsDoor) -> None:
    url = door.url("codeherd", REDIS_PASSWORD).replace("rediss://", "redis://")

    assert "did not answer" in str(refusal(broker_at(url)))


@pytest.mark.parametrize(
    ("user", "password", "reason", "hint"),
    [
        ("codeherd", "wrong0password", "AuthenticationError", "password"),
        ("stranger", REDIS_PASSWORD, "AuthenticationError", "user"),
        ("nobody", REDIS_PASSWORD, "NoPermissionError", "docs/security.md"),
    ],
)
def test_a_login_that_may_not_is_told_what_it_lacks(
    own_redis: RedisServer, user: str, password: str, reason: str, hint: str
) -> None:
    error = refusal(broker_at(own_redis.url.replace("://", f"://{user}:{password}@")))

    assert reason in str(error)
    assert hint in str(error.hint)
    assert password not in str(error)


@dataclass(frozen=True)
class SecureHerd:
    """A herd behind TLS with Flower beside it, and everything they said."""

    herd: NullHerd
    flower_port: int

    def flower(self, path: str, method: str = "GET") -> Any:
        user = b64encode(f"codeherd:{FLOWER_PASSWORD}".encode()).decode()
        url = f"http://127.0.0.1:{self.flower_port}{path}"
        with urlopen(Request(url, headers={"Authorization": f"Basic {user}"}, method=method)) as reply:
            return json.load(reply)

    def sees_worker(self) -> bool:
        try:
            workers = self.flower("/api/workers?refresh=true")
        except OSError:
            return False
        return any(workers.values())

    def cli(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "codeherd_producer.cli", *arguments],
            env=self.herd.environment,
            capture_output=True,
            text=True,
            timeout=JOBS_TIMEOUT_S,
            check=False,
        )
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def secure(
    tmp_path_factory: pytest.TempPathFactory,
    migrated_sqlite: Path,
    own_redis: RedisServer,
    door: TlsDoor,
    authority: Authority,
) -> Iterator[SecureHerd]:
    folder = tmp_path_factory.mktemp("secure")
    database = shutil.copy(migrated_sqlite, folder / "codeherd.db")
    with redis.Redis(port=own_redis.port) as client:
        client.acl_log_reset()
    port = free_port()
    herd = NullHerd(
        database_url=f"sqlite:///{database}",
        broker_url=door.url("codeherd", REDIS_PASSWORD),
        folder=folder,
        variables={
            "CODEHERD_BROKER_CA_FILE": str(authority.file),
            "CODEHERD_CONNECT_TIMEOUT_S": "10",
            "CODEHERD_FLOWER_PASSWORD": FLOWER_PASSWORD,
            "CODEHERD_FLOWER_PORT": str(port),
            "CODEHERD_LOG_LEVEL": "debug",
        },
    )
    with herd, (folder / "flower.log").open("wb") as log:
        flower = subprocess.Popen(
            [sys.executable, "-m", "codeherd_producer.cli", "flower"],
            env=herd.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            secure = SecureHerd(herd, port)
            wait_until(secure.sees_worker, "Flower to see the worker", timeout_s=JOBS_TIMEOUT_S)
            yield secure
        finally:
            flower.terminate()
            flower.wait(60)


def test_the_shipped_rights_over_tls_suffice_for_the_whole_herd(
    secure: SecureHerd, own_redis: RedisServer
) -> None:
    herd = secure.herd

    with herd.broker.endings() as heard:
        job = herd.client.submit(GenerateRequest(prompt="def fib(n):"))
        assert job.result(JOBS_TIMEOUT_S).text
        assert job.id in heard.wait(60)
    hold = herd.hold()
    held = herd.client.submit(GenerateRequest(prompt=f"#! hold {hold}\nx"))
    wait_until(
        lambda: secure.flower("/api/tasks").get(f"{held.id}.1", {}).get("state") == "STARTED", "Flower"
    )
    secure.flower(f"/api/task/revoke/{held.id}.1?terminate=true", method="POST")
    held.wait(JOBS_TIMEOUT_S)
    assert held.refresh().state is JobState.CANCELLED
    hold.unlink()
    queues = {q["name"]: q["messages"] for q in secure.flower("/api/queues/length")["active_queues"]}
    assert queues["codeherd.tiny"] == 0
    assert "one@" in secure.cli("inspect", "--json") + secure.cli("doctor")

    with redis.Redis(port=own_redis.port, protocol=2) as client:
        log: Any = client.acl_log()
    # redis-py tells its name in a command that Redis has from 7.2 on, and does not mind the answer.
    refused = {(e["username"], e["reason"], e["object"]) for e in log if e["username"] == "codeherd"}
    assert refused <= {("codeherd", "command", "client")}


def test_the_documented_rights_are_the_shipped_ones() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")

    assert " ".join(shipped_rights()) in text


@pytest.mark.parametrize(
    "command",
    [
        ("FLUSHALL",), ("FLUSHDB",), ("KEYS", "*"), ("CONFIG", "GET", "*"), ("SHUTDOWN",), ("SAVE",),
        ("DEBUG", "SLEEP", "0"), ("SCRIPT", "FLUSH"), ("CLIENT", "LIST"),
        ("CLIENT", "KILL", "TYPE", "normal"),
        ("ACL", "LIST"), ("ACL", "WHOAMI"), ("MONITOR",), ("REPLICAOF", "NO", "ONE"),
        ("EVAL", "return 1", "0"),
        ("GET", "codeherd:memory"), ("SET", "theirs", "1"), ("LPUSH", "theirs", "1"), ("DEL", "theirs"),
        ("PUBLISH", "theirs", "1"), ("SUBSCRIBE", "theirs"), ("PSUBSCRIBE", "*"),
        ("MIGRATE", "h", "1", "k", "0", "1"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_shipped_rights_allow_nothing_else(own_redis: RedisServer, command: Sequence[str]) -> None:
    with (
        redis.Redis(port=own_redis.port, username="codeherd", password=REDIS_PASSWORD) as client,
        pytest.raises(redis.exceptions.NoPermissionError),
    ):
        client.execute_command(*command)


def test_no_password_is_in_a_log_an_answer_or_a_process_table(secure: SecureHerd) -> None:
    herd = secure.herd
    secrets = (REDIS_PASSWORD, FLOWER_PASSWORD)
    herd.client.submit(GenerateRequest(prompt="x")).result(JOBS_TIMEOUT_S)

    said = {
        "settings": repr(herd.settings) + str(herd.settings) + repr(Broker(herd.settings)),
        "config show": secure.cli("config", "show"),
        "config show as JSON": secure.cli("config", "show", "--json"),
        "doctor": secure.cli("doctor"),
        "inspect": secure.cli("inspect"),
        "worker": herd.log("one"),
        "dispatcher": herd.log("dispatcher"),
        "Flower": (herd.folder / "flower.log").read_text(),
        "Flower's workers": json.dumps(secure.flower("/api/workers?refresh=true")),
        "Flower's tasks": json.dumps(secure.flower("/api/tasks")),
        "processes": arguments_of_all(),
        "Flower's app": repr(monitor_app(herd.settings).connection()),
    }

    assert "***" in said["config show"]
    assert {place for place, text in said.items() for secret in secrets if secret in text} == set()


def arguments_of_all() -> str:
    """Return every command line of this machine, but not those of this process."""
    mine = {str(os.getpid())}
    lines = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and folder.name not in mine:
            try:
                lines.append((folder / "cmdline").read_bytes().decode(errors="replace"))
            except OSError:
                continue
    return "\n".join(lines)


class TlsPostgresServer(PostgresServer):
    """A PostgreSQL server that speaks TLS to whoever asks."""

    def __init__(self, certificate: Certificate) -> None:
        super().__init__()
        owner = pwd.getpwnam("nobody" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name)
        for name, file in (("server.crt", certificate.certificate), ("server.key", certificate.key)):
            copied = Path(shutil.copy(file, self.folder / name))
            copied.chmod(0o600)
            os.chown(copied, owner.pw_uid, owner.pw_gid)

    def command(self) -> Sequence[str]:
        settings = {
            "ssl": "on",
            "ssl_cert_file": str(self.folder / "server.crt"),
            "ssl_key_file": str(self.folder / "server.key"),
        }
        return [*super().command(), *(word for k, v in settings.items() for word in ("-c", f"{k}={v}"))]


@pytest.fixture(scope="module")
def tls_postgres(certificate: Certificate) -> Iterator[TlsPostgresServer]:
    with TlsPostgresServer(certificate) as server:
        yield server


def sql_url(server: PostgresServer, ca_file: Path) -> str:
    url = server.url.replace("postgres@", f"postgres:{SQL_PASSWORD}@")
    return f"{url}?sslmode=verify-full&sslrootcert={ca_file}"


def test_postgresql_over_tls_needs_the_right_authority(
    tls_postgres: TlsPostgresServer, authority: Authority
) -> None:
    store = Store.open(sql_url(tls_postgres, authority.file))

    assert store.clock() > 0
    store.close()


def test_another_authority_of_postgresql_is_refused(tls_postgres: TlsPostgresServer, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")

    with pytest.raises(DatabaseUnavailable, match="certificate verify failed") as told:
        Store.open(sql_url(tls_postgres, other.file)).clock()

    assert SQL_PASSWORD not in str(told.value) + repr(told.value)


def test_a_postgresql_without_tls_is_refused_when_tls_is_asked_for(
    postgres_server: PostgresServer, authority: Authority
) -> None:
    with pytest.raises(DatabaseUnavailable, match="SSL") as told:
        Store.open(sql_url(postgres_server, authority.file)).clock()

    assert SQL_PASSWORD not in str(told.value) + repr(told.value)
