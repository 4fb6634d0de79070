"""Judge this machine and this user's files: who runs codeherd, what it reads, where it writes.

Owns: what is asked of the operating system, and what counts as well. Knows no server.
"""

from __future__ import annotations

import ipaddress
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from codeherd_producer.findings import Finding, Verdict
from codeherd_schema.errors import CodeherdError
from codeherd_schema.models import ModelTable
from codeherd_schema.settings import Secret, SharedSettings, Url

#: Bytes that are left on a disk when a person should look, and when writes are about to fail.
FEW_BYTES, NO_BYTES = 1 << 30, 64 << 20
#: Whose permission to read a file counts: the group's and everybody's.
_OTHERS: Final = stat.S_IRGRP | stat.S_IROTH


def examine_machine(
    settings: SharedSettings, origins: Mapping[str, Path | None], user_id: int
) -> Iterator[Finding]:
    """Yield what is found.

    Args:
        settings: in force.
        origins: the file that each setting came from, None for another source.
        user_id: of this process.
    """
    yield judge_user(user_id)
    yield from judge_files(settings, origins)
    yield judge_models(settings)
    folder = next(path for path in (settings.data_dir, *settings.data_dir.parents) if path.exists())
    yield judge_disk(folder, shutil.disk_usage(folder).free)
    yield from judge_encryption(settings)


def judge_user(user_id: int) -> Finding:
    """Nothing of codeherd needs root, and Celery says why not to."""
    if user_id == 0:
        return Finding("user", Verdict.WARN, "running as root", "use an account of its own")
    return Finding("user", Verdict.OK, f"user id {user_id}")


def judge_files(settings: SharedSettings, origins: Mapping[str, Path | None]) -> Iterator[Finding]:
    """Yield the settings files that hold a password and that others may read; arguments as above."""
    holders = {
        path for name, path in origins.items() if path is not None and _is_secret(getattr(settings, name))
    }
    open_ones = sorted(path for path in holders if path.stat().st_mode & _OTHERS)
    for path in open_ones:
        message = f"`{path}` holds a password and others may read it"
        yield Finding("settings file", Verdict.WARN, message, f"`chmod 600 {path}`")
    if holders and not open_ones:
        yield Finding("settings file", Verdict.OK, "nobody else may read the passwords")


def judge_models(settings: SharedSettings) -> Finding:
    """Judge the models file and the default model."""
    try:
        table = ModelTable.from_file(settings.models_file)
        table.find(settings.default_model)
    except CodeherdError as err:
        return Finding("models", Verdict.FAIL, err.message, err.hint)
    return Finding(
        "models", Verdict.OK, f"{len(list(table))} known, the default is `{settings.default_model}`"
    )


def judge_disk(folder: Path, free: int) -> Finding:
    """Judge the room for the data folder.

    Args:
        folder: the data folder, or the nearest one above it that is there.
        free: bytes that are left for this user.
    """
    message = f"{free / 1e9:.1f} GB are left on the disk of `{folder}`"
    hint = "make room, or choose another disk with CODEHERD_DATA_DIR"
    if free < NO_BYTES:
        return Finding("disk", Verdict.FAIL, message, hint)
    if free < FEW_BYTES:
        return Finding("disk", Verdict.WARN, message, f"{hint}; `codeherd prune` deletes old jobs")
    return Finding("disk", Verdict.OK, message)


def judge_encryption(settings: SharedSettings) -> Iterator[Finding]:
    """Yield a warning if the broker's password would cross a network in the open."""
    parts = urlsplit(settings.broker)
    if parts.scheme == "redis" and not is_local(parts.hostname):
        yield Finding(
            "broker encryption",
            Verdict.WARN,
            f"the connection to {parts.hostname} is not encrypted: whoever reads it may send and take jobs",
            "use `rediss://` in CODEHERD_BROKER_URL, and CODEHERD_BROKER_CA_FILE for your own authority",
        )


def is_local(host: str | None) -> bool:
    """Whether a server's host is this machine; None and paths are its sockets."""
    if not host or host == "localhost" or host.startswith("/"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_secret(value: Any) -> bool:
    match value:
        case Secret():
            return bool(value)
        case Url():
            return urlsplit(value).password is not None
        case _:
            return False
