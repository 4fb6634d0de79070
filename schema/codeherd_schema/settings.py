"""The settings that every process shares, and how any settings class is filled.

Owns: names, defaults, units and ranges of the shared settings; the order flag > environment >
project file > user file > default; where each value came from. Does not know what a worker needs
beside these (`codeherd_worker.settings`). The environment is read here, in `load`, and nowhere else.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit, urlunsplit

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, ValidationError, field_validator
from pydantic_core import CoreSchema, core_schema

from codeherd_schema.errors import InvalidSetting
from codeherd_schema.requests import Frozen, first_fault

S = TypeVar("S", bound="SharedSettings")

#: Every environment variable of codeherd starts with this.
PREFIX = "CODEHERD_"
#: Settings whose names start with this are the worker's; other processes pass over them.
WORKER_PREFIX = "worker_"
#: Variables that start with this are switches of the tests, not settings.
TEST_PREFIX = "CODEHERD_TEST_"


class Url(str):
    """An address that may hold a password: prints without it."""

    __slots__ = ()

    def masked(self) -> str:
        """Return the address with `***` in place of the password."""
        parts = urlsplit(self)
        if parts.password is None:
            return str.__str__(self)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))

    def __repr__(self) -> str:
        return repr(self.masked())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema(min_length=1))


class Secret(str):
    """A password: prints as `***`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


def default_data_dir() -> Path:
    """Return the folder for the embedded stack's data: `$XDG_DATA_HOME/codeherd`."""
    base = os.environ.get("XDG_DATA_HOME")
    return Path(base) / "codeherd" if base else Path.home() / ".local" / "share" / "codeherd"


def user_file() -> Path:
    """Return the user's settings file: `$XDG_CONFIG_HOME/codeherd/config.toml`."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "codeherd" / "config.toml"


class SharedSettings(Frozen):
    """What producers, dispatchers and workers must agree on."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    #: Folder of the embedded stack: database file, Redis socket and append-only file.
    data_dir: Path = Field(default_factory=default_data_dir)
    #: `sqlite:///FILE` or `postgresql+psycopg://…`; empty is a SQLite file in `data_dir`.
    database_url: Url | None = None
    #: Most connections to the database that one process keeps.
    database_connections: int = Field(default=8, ge=2, le=200)
    #: A pooler in transaction mode (pgbouncer) stands before PostgreSQL: nothing is kept in a connection, and
    #: statements have the time limits of the role.
    database_pooler: bool = False
    #: `redis://`, `rediss://`, `redis+socket://` or `sentinel://`; empty is the embedded Redis.
    broker_url: Url | None = None
    #: Sentinel's name for the Redis master.
    sentinel_master: str | None = None
    #: Certificate authority file for `rediss://`; empty is the system's.
    broker_ca_file: Path | None = None
    #: Prefix of every key in Redis, so that one Redis can serve several herds.
    key_prefix: str = Field(default="codeherd:", max_length=64)
    #: TOML file with a `[models.NAME]` table for each model of your own.
    models_file: Path | None = None
    #: Whose jobs these are; idempotency keys are unique within one tenant.
    tenant: str = Field(default="default", min_length=1, max_length=64)
    #: Model of requests that name none.
    default_model: str = "tiny"
    #: Seconds a claim lasts without a heartbeat.
    lease_s: float = Field(default=30.0, gt=0, le=3600)
    #: Seconds between heartbeats; at most a third of `lease_s`.
    heartbeat_s: float = Field(default=10.0, gt=0, le=1200)
    #: Seconds between two looks for expired leases, jobs and deadlines.
    reap_interval_s: float = Field(default=5.0, gt=0, le=600)
    #: Seconds between two looks for jobs to publish.
    dispatch_interval_s: float = Field(default=0.5, gt=0, le=60)
    #: Seconds after which a published job is published again that nobody claimed and Redis no longer holds.
    republish_after_s: float = Field(default=3.0, gt=0, le=86_400)
    #: Most messages per queue in Redis that are as urgent as another or more; the rest waits in SQL, where
    #: priority is decided.
    publish_window: int = Field(default=64, ge=1, le=100_000)
    #: Most attempts of one job.
    max_attempts: int = Field(default=5, ge=1, le=100)
    #: Most workers that one job may lose before it is buried.
    max_crashes: int = Field(default=3, ge=1, le=100)
    #: Days after which the dispatcher deletes ended jobs with their results; 0 keeps them for ever.
    retention_days: float = Field(default=0.0, ge=0, le=36_500)
    #: Seconds between two looks at SQL while waiting for a result.
    poll_interval_s: float = Field(default=0.5, gt=0, le=60)
    #: Seconds to wait for the broker before going on without it.
    connect_timeout_s: float = Field(default=2.0, gt=0, le=60)
    #: Address that Flower listens on.
    flower_address: str = "127.0.0.1"
    #: Port that Flower listens on.
    flower_port: int = Field(default=5555, ge=0, le=65_535)
    #: Name to log in to Flower with.
    flower_user: str = "codeherd"
    #: Password to log in to Flower with; empty makes one and prints it.
    flower_password: Secret | None = None
    #: `debug`, `info`, `warning` or `error`.
    log_level: str = Field(default="info", pattern=r"^(debug|info|warning|error)$")

    @property
    def database(self) -> Url:
        """The database in force."""
        return self.database_url or Url(f"sqlite:///{self.data_dir / 'codeherd.db'}")

    @property
    def database_options(self) -> dict[str, Any]:
        """How the database is opened: arguments of `Store.open`."""
        return {"pool_size": self.database_connections, "pooled": self.database_pooler}

    @property
    def broker(self) -> Url:
        """The broker in force."""
        return self.broker_url or Url(f"redis+socket://{self.data_dir / 'redis.sock'}?virtual_host=0")

    @field_validator("data_dir", "broker_ca_file", "models_file")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        # A socket's or a database's address must not depend on the folder a process starts in.
        return None if path is None else path.expanduser().absolute()

    def model_post_init(self, _: Any) -> None:
        """Refuse values that only make sense together."""
        if self.heartbeat_s * 3 > self.lease_s:
            raise InvalidSetting(
                f"heartbeat_s={self.heartbeat_s:g} is more than a third of lease_s={self.lease_s:g}",
                hint="a worker must be able to miss two heartbeats before it loses its jobs",
            )


@dataclass(frozen=True, slots=True)
class Loaded(Generic[S]):
    """Settings and, for each field, where its value came from."""

    settings: S
    origins: Mapping[str, str]


def load(
    cls: type[S],
    *,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    project_file: Path | None = None,
    user_file: Path | None = None,
) -> Loaded[S]:
    """Build settings of class `cls`; the first source that names a field wins.

    Args:
        cls: which settings to build.
        flags: values from the command line; None values count as not given.
        environment: variables; those that start with `CODEHERD_` are settings.
        project_file: a `pyproject.toml` with a `[tool.codeherd]` table.
        user_file: a TOML file with settings at its top level.

    Raises:
        InvalidSetting: an unknown variable or key, or an impossible value; names its source.
    """
    sources: list[tuple[str, Mapping[str, Any]]] = [
        ("flag", {k: v for k, v in (flags or {}).items() if v is not None}),
        ("environment", _from_environment(environment or {})),
        ("project file", _from_file(project_file, table=("tool", "codeherd"))),
        ("user file", _from_file(user_file, table=())),
    ]
    values: dict[str, Any] = {}
    origins = dict.fromkeys(cls.model_fields, "default")
    for origin, source in sources:
        for name, value in source.items():
            if name not in cls.model_fields:
                if name.startswith(WORKER_PREFIX) and cls is SharedSettings:
                    continue
                raise _unknown(cls, name, origin)
            if name not in values:
                values[name] = value
                origins[name] = origin
    try:
        return Loaded(cls(**values), origins)
    except ValidationError as err:
        name = str(err.errors(include_input=False)[0]["loc"][0])
        raise InvalidSetting(
            f"{first_fault(err)} (from the {origins.get(name, 'configuration')})",
            hint=f"`codeherd config show` lists every setting; the variable is {PREFIX}{name.upper()}",
        ) from err


def from_environment() -> SharedSettings:
    """Load the shared settings as every entry point does: variables, `./pyproject.toml`, user file.

    Raises:
        InvalidSetting: an unknown variable or key, or an impossible value; names its source.
    """
    loaded = load(
        SharedSettings,
        environment=os.environ,
        project_file=Path("pyproject.toml"),
        user_file=user_file(),
    )
    return loaded.settings


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    return {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(PREFIX) and not name.startswith(TEST_PREFIX)
    }


def _from_file(path: Path | None, *, table: tuple[str, ...]) -> dict[str, Any]:
    if path is None or not path.is_file():
        return {}
    try:
        data: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise InvalidSetting(f"`{path}` cannot be read: {err}") from err
    for key in table:
        data = data.get(key, {})
    return dict(data)


def _unknown(cls: type[SharedSettings], name: str, origin: str) -> InvalidSetting:
    near = difflib.get_close_matches(name, cls.model_fields, n=1)
    return InvalidSetting(
        f"unknown setting `{name}` in the {origin}",
        hint=f"did you mean `{near[0]}`?" if near else "`codeherd config show` lists every setting",
    )
