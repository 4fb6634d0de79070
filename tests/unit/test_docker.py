"""The container files, held against the code that they run: settings, commands, packages, Redis."""

from __future__ import annotations

import ast
import contextlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import pytest
import yaml  # type: ignore[import-untyped]
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from codeherd_producer.cli import codeherd
from codeherd_producer.findings import Verdict
from codeherd_producer.redis_checks import judge_redis
from codeherd_schema.broker import Broker
from codeherd_schema.errors import BrokerUnavailable
from codeherd_schema.hints import Hint
from codeherd_schema.requests import JobKind
from codeherd_schema.settings import SharedSettings, load
from codeherd_worker.__main__ import _parser as worker_parser
from codeherd_worker.settings import WorkerSettings
from tests.services import find_redis_server, free_port, wait_until

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker"
DOCKERFILES = sorted(FOLDER.glob("*.Dockerfile"))
ENVIRONMENT = {
    "POSTGRES_PASSWORD": "postgres0secret",
    "REDIS_PASSWORD": "redis0secret",
    "CODEHERD_FLOWER_PASSWORD": "flower0secret",
}
#: `${NAME}`, `${NAME:-default}`, `${NAME:?message}`; `$$` is a dollar sign.
VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?::([-?])([^}]*))?\})")
#: Services that end by themselves.
ONE_SHOTS = {"migrate", "cli", "download"}


#: Imports modules where some packages are as good as not installed, and says which were missed.
IMPORT_WITHOUT = """
import importlib, sys
refused = set(sys.argv[1].split(","))
class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"{name} is not declared", name=name)
sys.meta_path.insert(0, Refusal())
for module in sys.argv[2:]:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as err:
        print(module, err, file=sys.stderr)
"""


class MissingVariable(Exception):
    """What Compose would refuse to start without."""


def interpolate(value: Any, environment: Mapping[str, str]) -> Any:
    """Fill in the variables of every text below `value`, as Compose does after parsing."""

    def replace(found: re.Match[str]) -> str:
        dollar, name, operator, rest = found.groups()
        if dollar:
            return "$"
        if environment.get(name):
            return environment[name]
        if operator == "-":
            return str(rest)
        raise MissingVariable(name)

    match value:
        case str():
            return VARIABLE.sub(replace, value)
        case dict():
            return {key: interpolate(item, environment) for key, item in value.items()}
        case list():
            return [interpolate(item, environment) for item in value]
    return value


def rendered(environment: Mapping[str, str]) -> dict[str, Any]:
    document = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
    return dict(interpolate(document, environment))


COMPOSE = rendered(ENVIRONMENT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: s for name, s in SERVICES.items() if s["image"].startswith("codeherd-")}


@dataclass(frozen=True)
class Dockerfile:
    """The instructions of one Dockerfile: (stage, keyword, rest)."""

    instructions: list[tuple[int, str, str]]

    @classmethod
    def read(cls, path: Path) -> Dockerfile:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        text = "\n".join(lines).replace("\\\n", " ")
        found, stage = [], -1
        for line in filter(str.strip, text.splitlines()):
            keyword, _, rest = line.partition(" ")
            stage += keyword == "FROM"
            found.append((stage, keyword, " ".join(rest.split())))
        return cls(found)

    def every(self, keyword: str) -> list[str]:
        return [rest for _, k, rest in self.instructions if k == keyword]

    def last(self, keyword: str) -> str:
        """The one instruction of this kind in the stage that is shipped."""
        final = max(stage for stage, _, _ in self.instructions)
        (rest,) = (rest for stage, k, rest in self.instructions if stage == final and k == keyword)
        return rest


def resolve(arguments: list[str]) -> click.Context:
    """Parse a command line as far as running it would, without running it."""
    context = codeherd.make_context("codeherd", list(arguments))
    command: click.Command = codeherd
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        context, command = found.make_context(name, rest, parent=context), found
    return context


@pytest.mark.parametrize("name", sorted(ENVIRONMENT))
@pytest.mark.parametrize("value", [None, ""])
def test_no_password_has_a_default(name: str, value: str | None) -> None:
    environment = {k: v for k, v in ENVIRONMENT.items() if k != name}
    if value is not None:
        environment[name] = value

    with pytest.raises(MissingVariable, match=name):
        rendered(environment)


def test_example_names_every_variable_and_fills_in_no_secret() -> None:
    text = (FOLDER / "compose.yaml").read_text()
    lines = (FOLDER / ".env.example").read_text().splitlines()
    example = dict(re.findall(r"(?m)^#?([A-Z_]+)=(.*)$", "\n".join(lines)))

    used = {name for _, name, _, _ in VARIABLE.findall(text) if name}

    assert used - set(example) <= {"IMAGE_TAG", "CODEHERD_FLOWER_USER"}
    assert not [name for name in ENVIRONMENT if example[name]]
    assert {name for name in example if "PASSWORD" in name} == set(ENVIRONMENT)


def test_passwords_appear_where_they_are_needed_only() -> None:
    holders = {
        name: {service for service, content in SERVICES.items() if secret in yaml.dump(content)}
        for name, secret in ENVIRONMENT.items()
    }

    assert holders["CODEHERD_FLOWER_PASSWORD"] == {"flower"}
    assert holders["REDIS_PASSWORD"] == set(SERVICES) - {"postgres", "migrate", "download"}
    assert holders["POSTGRES_PASSWORD"] == set(SERVICES) - {"redis", "flower", "download"}
    # Arguments of a process are for all to see.
    assert not any(
        secret in str(content.get("command")) + str(content["healthcheck"])
        for secret in ENVIRONMENT.values()
        for content in SERVICES.values()
    )


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_has_a_health_check(name: str) -> None:
    check = SERVICES[name]["healthcheck"]

    if name in ONE_SHOTS:
        assert check == {"disable": True}
        assert SERVICES[name]["restart"] == "no"
    else:
        assert check["test"][0] in {"CMD", "CMD-SHELL"}
        assert {"interval", "timeout", "retries", "start_period"} < set(check)
        assert SERVICES[name]["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_is_confined(name: str) -> None:
    service = SERVICES[name]

    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "5"}
    assert "privileged" not in service


def test_only_flower_is_published_and_only_on_loopback() -> None:
    ports = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}

    assert ports == {"flower": ["127.0.0.1:5555:5555"]}
    assert COMPOSE["networks"]["herd"] == {"internal": True}
    outside = {name for name, s in SERVICES.items() if "outside" in s["networks"]}
    assert outside == {"flower", "download"}


def test_dependencies_volumes_and_networks_exist() -> None:
    for service in SERVICES.values():
        assert set(service.get("depends_on", {})) <= set(SERVICES)
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        sources = {volume.partition(":")[0] for volume in service.get("volumes", [])}
        assert all((FOLDER / source).exists() for source in sources if source.startswith("."))
        assert {s for s in sources if not s.startswith(".")} <= set(COMPOSE["volumes"])
        if "build" in service:
            assert (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_nothing_runs_before_the_schema_is_there() -> None:
    users = {name for name, s in OURS.items() if "CODEHERD_DATABASE_URL" in s["environment"]} - {"migrate"}

    assert users == {"dispatcher", "cli", "worker-cpu", "worker-gpu0", "worker-gpu1"}
    for name in users:
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
        assert SERVICES[name]["depends_on"]["redis"] == {"condition": "service_healthy"}
    assert SERVICES["migrate"]["depends_on"]["postgres"] == {"condition": "service_healthy"}


@pytest.mark.parametrize("name", sorted(OURS))
def test_environment_is_accepted_by_the_settings(name: str) -> None:
    cls = WorkerSettings if name.startswith("worker") else SharedSettings
    environment = OURS[name]["environment"]
    assert all(isinstance(value, str) for value in environment.values())

    loaded = load(cls, environment=environment)

    given = {n.removeprefix("CODEHERD_").lower() for n in environment if n.startswith("CODEHERD_")}
    assert {field for field, origin in loaded.origins.items() if origin == "environment"} == given


def test_workers_drain_before_they_are_killed() -> None:
    for name in ("worker-cpu", "worker-gpu0", "worker-gpu1"):
        settings = load(WorkerSettings, environment=SERVICES[name]["environment"]).settings
        grace_s = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))

        assert grace_s >= settings.worker_drain_timeout_s + 10


def test_one_gpu_each() -> None:
    devices = {}
    for name in ("worker-gpu0", "worker-gpu1"):
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        (devices[name],) = device["device_ids"]

    assert devices == {"worker-gpu0": "0", "worker-gpu1": "1"}
    assert len({SERVICES[name]["environment"]["CODEHERD_WORKER_NAME"] for name in devices}) == 2


@pytest.mark.parametrize("name", sorted(set(OURS) - {"cli", "download"}))
def test_command_parses(name: str) -> None:
    assert resolve(OURS[name]["command"]).command_path.split()[1:] == [
        word for word in OURS[name]["command"] if not word.startswith("-")
    ]


@pytest.mark.parametrize("path", [FOLDER / "README.md", FOLDER / "compose.yaml"], ids=lambda path: path.name)
def test_documented_commands_parse(path: Path) -> None:
    lines = re.findall(r"run --rm cli (.+)$", path.read_text(), flags=re.MULTILINE)
    assert lines

    for line in lines:
        resolve([ast.literal_eval(w) if w[0] == '"' else w for w in re.findall(r'"[^"]*"|\S+', line)])


def test_worker_options_of_the_documentation_parse() -> None:
    lines = re.findall(r"codeherd-worker worker (.+)$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert lines

    for line in lines:
        worker_parser().parse_args(line.split())
        resolve(["worker", *line.split()])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_image_runs_as_somebody_and_stops_when_asked(path: Path) -> None:
    file = Dockerfile.read(path)

    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", file.last("USER"))
    assert file.last("STOPSIGNAL") == "SIGTERM"
    # Exec form: the process itself is number 1 and gets the signals.
    assert ast.literal_eval(file.last("ENTRYPOINT")) == ["codeherd"]
    assert ast.literal_eval(file.last("CMD")) in (["--help"], ["worker"])
    check = ast.literal_eval(file.last("HEALTHCHECK").partition(" CMD ")[2])
    # Whoever restarts what is unhealthy must not do so for a broker that is away.
    assert (check[0], check[-1]) == ("codeherd", "--live")
    resolve(check[1:])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_image_is_built_from_the_project(path: Path) -> None:
    file = Dockerfile.read(path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = path.read_text()

    assert "BASE=python:3.11-slim-bookworm" in file.every("ARG")
    assert {rest.split()[0] for rest in file.every("FROM")} == {"${BASE}", "dependencies"}
    assert f"VERSION={project['version']}" in file.every("ARG")
    (extra,) = re.findall(r"\['optional-dependencies'\]\['(\w+)'\]", text)
    assert extra in project["optional-dependencies"]
    assert text.count("pip --python") == text.count("--no-cache-dir") - 1 == 2
    environment = dict(re.findall(r"(CODEHERD_\w+)=(\S+)", file.last("ENV")))
    load(SharedSettings, environment=environment)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_build_sees_what_it_copies_and_nothing_else(path: Path) -> None:
    allowed = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]

    copied = [
        word
        for rest in Dockerfile.read(path).every("COPY")
        if not rest.startswith("--from")
        for word in rest.split()[:-1]
        if word != "."
    ]

    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"
    assert set(copied) <= set(allowed)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    assert {package.partition("/")[0] for package in packages["packages"]} <= set(allowed)
    assert all((ROOT / name).exists() for name in allowed)


@pytest.mark.parametrize("name", sorted(set(OURS) - ONE_SHOTS))
def test_health_check_asks_for_the_service_that_runs(name: str) -> None:
    check = SERVICES[name]["healthcheck"]["test"]

    assert check == ["CMD", "codeherd", "health", *SERVICES[name]["command"], "--ready"]
    timeout_s = resolve(check[2:]).params["timeout_s"]
    assert timeout_s < int(SERVICES[name]["healthcheck"]["timeout"].removesuffix("s"))


def declared(*extras: str) -> set[str]:
    """Return every distribution that `pip install codeherd[extras]` brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]
    found: set[tuple[str, frozenset[str]]] = set()
    todo = [Requirement(line) for line in lines]
    while todo:
        wanted = todo.pop()
        key = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if key in found:
            continue
        found.add(key)
        for line in metadata.requires(wanted.name) or ():
            further = Requirement(line)
            if further.marker is None or any(
                further.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)
            ):
                todo.append(further)
    return {name for name, _ in found}


def test_producer_image_has_every_package_that_it_imports() -> None:
    brought = declared("monitor")
    refused = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & {*brought, "codeherd"}
    }
    assert {"torch", "transformers", "pytest"} <= refused
    modules = ["kombu.transport.redis", "flower.command", "psycopg", "codeherd_schema.migrations"]
    modules += [
        ".".join(path.relative_to(ROOT / "producer").with_suffix("").parts)
        for path in sorted((ROOT / "producer").rglob("*.py"))
        if path.stem != "__init__"
    ]

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_WITHOUT, ",".join(sorted(refused)), *modules],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stderr == ""


@contextlib.contextmanager
def composed_redis(folder: Path) -> Iterator[int]:
    """Redis as Compose starts it, on a free port and with its data in `folder`."""
    port = free_port()
    configuration = (FOLDER / "redis" / "redis.conf").read_text()
    for before, after in (("port 6379", f"port {port}"), ("dir /data", f"dir {folder}")):
        assert before in configuration
        configuration = configuration.replace(before, after)
    (folder / "redis.conf").write_text(configuration)
    (folder / "bin").mkdir()
    (folder / "bin" / "redis-server").symlink_to(find_redis_server())
    shell, flags, script = SERVICES["redis"]["command"]
    process = subprocess.Popen(
        [
            shutil.which(shell) or shell,
            flags,
            script.replace("/etc/redis/redis.conf", str(folder / "redis.conf")),
        ],
        env={"PATH": f"{folder / 'bin'}:/usr/bin:/bin", **SERVICES["redis"]["environment"]},
        stdout=subprocess.DEVNULL,
    )
    try:
        yield port
    finally:
        process.terminate()
        # The shell must have become Redis: as process 1 it would swallow the signal.
        assert process.wait(10) == 0


def test_redis_serves_its_user_and_nobody_else(tmp_path: Path) -> None:
    with composed_redis(tmp_path) as port:
        url = OURS["dispatcher"]["environment"]["CODEHERD_BROKER_URL"].replace(
            "redis:6379", f"127.0.0.1:{port}"
        )
        broker = Broker(load(SharedSettings, environment={"CODEHERD_BROKER_URL": url}).settings)
        nobody = Broker(
            load(SharedSettings, environment={"CODEHERD_BROKER_URL": f"redis://127.0.0.1:{port}"}).settings
        )
        try:
            wait_until(lambda: answers(broker), "redis")

            assert {f.verdict for f in judge_redis(broker.check(), "here")} == {Verdict.OK}
            broker.publish(
                [Hint(job_id="0190", queue="codeherd.tiny", kind=JobKind.GENERATE, priority=3, publish_no=1)]
            )
            assert broker.waiting("codeherd.tiny") == 1
            assert broker.hinted("codeherd.tiny") == {"0190"}
            broker.announce("0190")
            broker.request_cancel("0190")
            assert broker.workers(0.1) == {}
            with pytest.raises(BrokerUnavailable, match="Auth"):
                nobody.check()
        finally:
            broker.close()
            nobody.close()


def answers(broker: Broker) -> bool:
    with contextlib.suppress(BrokerUnavailable):
        return bool(broker.check())
    return False
