"""A loop's heartbeat, for whoever may look into the same `/proc`: the name of its thread.

Owns: how the beat is written and read. A thread's name (prctl(2), PR_SET_NAME) says when its loop last
turned, in seconds of the machine's monotonic clock, `beat 123456`. Why not

    a file          a container's file system is read-only, and a crash leaves a fresh-looking one behind
    a key in Redis  an outage of Redis would look like a dead loop, and is no reason to restart it
    a port          has to be chosen, guarded and published; two dispatchers would fight for it

The name needs none of these: it is there as long as the thread is, it is one per process, and only the loop
itself writes it. Where there is no `/proc` (macOS) nothing is written.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

#: prctl option: the calling thread's name, at most 15 bytes (linux/prctl.h).
_PR_SET_NAME: Final = 15


class BeatingFlag(threading.Event):
    """A stop flag that leaves a heartbeat each time that a loop looks at it."""

    def __init__(self) -> None:
        """Not set, and not looked at yet."""
        super().__init__()
        self._beat = _beat_of_thread()

    def is_set(self) -> bool:
        """Whether to stop; the calling thread's loop turns."""
        self._beat()
        return super().is_set()


def last_beat(process: Path) -> float | None:
    """Return when the loop of a process last turned, in seconds of `time.monotonic`; None if it never did.

    Args:
        process: its folder in `/proc`.
    """
    names = (path.read_text(errors="replace") for path in process.glob("task/*/comm"))
    beats = [float(found[1]) for name in names if (found := re.fullmatch(r"beat (\d+)\n", name))]
    return max(beats, default=None)


def _beat_of_thread() -> Callable[[], object]:
    if sys.platform != "linux":
        return lambda: None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_NAME, f"beat {time.monotonic():.0f}".encode(), 0, 0, 0)
