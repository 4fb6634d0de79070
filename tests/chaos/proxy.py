"""A TCP proxy between our processes and a server, which loses an answer when it is told to.

Owns: passing bytes on, counting connections, cutting one at a chosen moment. Does not know a protocol:
what to cut after is given as bytes.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from dataclasses import dataclass, field
from typing import Self

#: Seconds until a look whether the proxy was closed.
LOOK_S = 0.1
#: Bytes that are passed on at a time.
CHUNK = 65_536


@dataclass(slots=True)
class Cut:
    """Lose the answer to `last`, on a connection that has said `first` before; once."""

    first: bytes
    last: bytes
    #: What the server says when it has done `last`.
    answer: bytes
    #: Set when the answer was lost.
    done: threading.Event = field(default_factory=threading.Event)


class Proxy:
    """Listens on a port of its own and passes everything on to `port`, both on loopback."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(LOOK_S)
        self.port: int = self._listener.getsockname()[1]
        #: Connections that were asked for.
        self.accepted = 0
        #: Hang up on whoever connects.
        self.refuses = False
        self._cut: Cut | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._listen, daemon=True)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def cut(self, *, first: bytes, last: bytes, answer: bytes) -> Cut:
        """Lose one answer from now on, and return how it goes."""
        with self._lock:
            self._cut = Cut(first, last, answer)
            return self._cut

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            self.accepted += 1
            try:
                server = None if self.refuses else socket.create_connection(self._target)
            except OSError:
                server = None
            if server is None:
                client.close()
                continue
            thread = threading.Thread(target=self._pass_on, args=(client, server), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        """Copy both ways until one side ends or an answer is lost."""
        said_first = said_last = False
        with client, server, contextlib.suppress(OSError):
            while not self._closed.is_set():
                ready, _, _ = select.select([client, server], [], [], LOOK_S)
                if client in ready:
                    asked = client.recv(CHUNK)
                    said_first |= (cut := self._cut) is not None and cut.first in asked
                    said_last |= said_first and cut is not None and cut.last in asked
                    server.sendall(asked)
                    if not asked:
                        return
                if server in ready:
                    answer = server.recv(CHUNK)
                    if said_last and self._lose(answer):
                        return
                    client.sendall(answer)
                    if not answer:
                        return

    def _lose(self, answer: bytes) -> bool:
        with self._lock:
            cut = self._cut
            if cut is None or cut.answer not in answer:
                return False
            self._cut = None
        cut.done.set()
        return True
