from pathlib import Path

import pytest

from codeherd_schema.errors import InvalidSetting
from codeherd_schema.settings import (
    Secret,
    SharedSettings,
    Url,
    default_data_dir,
    from_environment,
    load,
    user_file,
)


def test_flags_win_over_variables_over_project_over_user_over_defaults(tmp_path: Path) -> None:
    project, user = tmp_path / "pyproject.toml", tmp_path / "config.toml"
    project.write_text("[tool.codeherd]\nlease_s = 40\nmax_attempts = 4\ntenant = 'project'\n")
    user.write_text("lease_s = 50\nmax_attempts = 6\ntenant = 'user'\nmax_crashes = 7\n")

    loaded = load(
        SharedSettings,
        flags={"lease_s": 60, "data_dir": None},
        environment={"CODEHERD_LEASE_S": "70", "CODEHERD_MAX_ATTEMPTS": "8", "HOME": "/"},
        project_file=project,
        user_file=user,
    )

    settings, origins = loaded.settings, loaded.origins
    assert (settings.lease_s, origins["lease_s"]) == (60, "flag")
    assert (settings.max_attempts, origins["max_attempts"]) == (8, "environment")
    assert (settings.tenant, origins["tenant"]) == ("project", "project file")
    assert (settings.max_crashes, origins["max_crashes"]) == (7, "user file")
    assert origins["data_dir"] == "default"


@pytest.mark.parametrize(
    ("environment", "says", "hint"),
    [
        ({"CODEHERD_LEASES": "3"}, "unknown setting `leases` in the environment", "`lease_s`"),
        ({"CODEHERD_XYZZY": "3"}, "unknown setting `xyzzy`", "config show"),
        ({"CODEHERD_LEASE_S": "soon"}, "`lease_s`: input should be a valid number", "CODEHERD_LEASE_S"),
        ({"CODEHERD_LEASE_S": "nan"}, "`lease_s`: input should be a finite number", "CODEHERD_LEASE_S"),
        ({"CODEHERD_FLOWER_PORT": "99999"}, "`flower_port`", "CODEHERD_FLOWER_PORT"),
        ({"CODEHERD_LEASE_S": "20"}, "more than a third", "two heartbeats"),
    ],
)
def test_what_cannot_work_is_refused_with_its_source(
    environment: dict[str, str], says: str, hint: str
) -> None:
    with pytest.raises(InvalidSetting, match=says) as caught:
        load(SharedSettings, environment=environment)

    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_the_worker_s_settings_pass_other_processes_by() -> None:
    settings = load(SharedSettings, environment={"CODEHERD_WORKER_SLOTS": "4"}).settings

    assert not hasattr(settings, "worker_slots")


@pytest.mark.parametrize("text", ["lease_s = ", "\xff"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode("latin-1"))

    with pytest.raises(InvalidSetting, match=r"config\.toml` cannot be read"):
        load(SharedSettings, user_file=path)


def test_passwords_are_never_printed() -> None:
    settings = load(
        SharedSettings,
        environment={
            "CODEHERD_DATABASE_URL": "postgresql+psycopg://me:hunter2@db:5433/codeherd",
            "CODEHERD_BROKER_URL": "rediss://:hunter2@redis:6379/0",
            "CODEHERD_FLOWER_PASSWORD": "hunter2",
        },
    ).settings

    assert "hunter2" not in repr(settings)
    assert settings.database.masked() == "postgresql+psycopg://me:***@db:5433/codeherd"
    assert settings.broker.masked() == "rediss://:***@redis:6379/0"
    assert repr(Secret("hunter2")) == "'***'"
    assert Url("sqlite:///x.db").masked() == "sqlite:///x.db"


def test_the_defaults_are_the_embedded_stack(tmp_path: Path) -> None:
    settings = SharedSettings(data_dir=tmp_path)

    assert settings.database == f"sqlite:///{tmp_path}/codeherd.db"
    assert settings.broker == f"redis+socket://{tmp_path}/redis.sock?virtual_host=0"


def test_folders_follow_the_desktop_s_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert default_data_dir() == Path("/home/me/.local/share/codeherd")
    assert user_file() == Path("/home/me/.config/codeherd/config.toml")

    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_data_dir() == Path("/data/codeherd")
    (tmp_path / "codeherd").mkdir()
    user_file().write_text("tenant = 'from-file'\n")
    monkeypatch.chdir(tmp_path)
    assert from_environment().tenant == "from-file"
