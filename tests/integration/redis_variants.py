"""Redis servers that are not as usual: with a password, on a Unix socket, without a command.

Owns: their options and a plain look at what they hold. Does not know Celery.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import redis

from tests.services import RedisServer


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
