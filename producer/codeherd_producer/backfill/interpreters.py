"""Scan files whose syntax this interpreter does not know, with another one.

Owns: the other interpreter's process, which runs `scanner` alone, and what becomes of a file that ends it.
Does not know which files there are.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from codeherd_producer.backfill import scanner
from codeherd_producer.backfill.scanner import Scan, Unreadable, scan
from codeherd_schema.errors import InvalidRequest

#: Seconds for one file; ordinary ones take milliseconds.
TIMEOUT_S: Final = 60.0


class InterpreterFailed(InvalidRequest):
    """The other interpreter cannot run the scanner; the message has its own last words."""

    code = "interpreter_failed"


class Interpreter:
    """Another Python; its process starts with the first file and goes on until `close`."""

    def __init__(self, python: Path, *, timeout_s: float = TIMEOUT_S) -> None:
        """Take an interpreter; nothing is started yet.

        Args:
            python: its executable.
            timeout_s: a file that takes longer is unreadable.
        """
        self._command = [str(python), "-I", "-S", scanner.__file__, "--many"]
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            # Waits for the end, and closes both pipes.
            self._process.communicate()
            self._process = None

    def check(self) -> None:
        """See that the scanner runs.

        Raises:
            InterpreterFailed: it does not; name another interpreter.
        """
        try:
            done = subprocess.run(  # noqa: S603 -- the interpreter that the user named
                self._command, input=b"0\n", capture_output=True, timeout=self._timeout_s, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as err:
            raise self._failed(str(err)) from err
        if done.returncode != 0 or not done.stdout.startswith(b"{"):
            said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise self._failed(said or (f"status {done.returncode}" if done.returncode else "no answer"))

    def scan(self, raw: bytes) -> Scan:
        """Find the symbols of a file.

        Raises:
            Unreadable: as `scanner.scan` does, or the file ended the interpreter.
            InterpreterFailed: it does not start.
        """
        answer = self._asked(raw)
        if not answer.endswith(b"\n"):
            # The next file gets a new one.
            self.close()
            raise Unreadable("the other interpreter ended, or took too long")
        document = json.loads(answer)
        if "error" in document:
            raise Unreadable(document["error"])
        return scanner.from_json(document)

    def _asked(self, raw: bytes) -> bytes:
        process = self._started()
        assert process.stdin is not None  # noqa: S101 -- a pipe, as is the other
        assert process.stdout is not None  # noqa: S101
        timer = threading.Timer(self._timeout_s, process.kill)
        timer.start()
        try:
            process.stdin.write(b"%d\n" % len(raw) + raw)
            process.stdin.flush()
            return process.stdout.readline()
        except OSError:
            return b""
        finally:
            timer.cancel()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            try:
                self._process = subprocess.Popen(  # noqa: S603 -- the interpreter that the user named
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
            except OSError as err:
                raise self._failed(str(err)) from err
        return self._process

    def _failed(self, why: str) -> InterpreterFailed:
        return InterpreterFailed(
            f"{self._command[0]} does not run the scanner: {why}",
            hint="name a Python of version 3.9 or later",
        )


@contextlib.contextmanager
def borrowed(python: str | Path | None) -> Iterator[Interpreter | None]:
    """Lend an interpreter that was seen to run the scanner; None where none is named.

    Raises:
        InterpreterFailed: it does not run it; name another interpreter.
    """
    if python is None:
        yield None
        return
    with Interpreter(Path(python)) as other:
        other.check()
        yield other


def scanned(raw: bytes, other: Interpreter | None) -> Scan:
    """Find the symbols of a file: here, and if that fails with the other interpreter.

    Raises:
        Unreadable: neither reads it; the other one's reason.
    """
    try:
        return scan(raw)
    except Unreadable:
        if other is None:
            raise
        return other.scan(raw)
