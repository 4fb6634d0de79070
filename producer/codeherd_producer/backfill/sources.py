"""Read a planned file again, and tell whether it still is what was planned.

Owns: that comparison, and which interpreter has the word on a file; nothing is ever done to bytes that nobody
planned for. Does not know what for.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from codeherd_producer.backfill import planner
from codeherd_producer.backfill.editor import Reader
from codeherd_producer.backfill.interpreters import Interpreter
from codeherd_producer.backfill.options import Options
from codeherd_producer.backfill.scanner import Scan, Unreadable, scan
from codeherd_schema.backfills import File


@dataclass(frozen=True, slots=True)
class Source:
    """A file's bytes and what is in them."""

    raw: bytes
    scan: Scan


def read_planned(root: Path, file: File, options: Options) -> Source | None:
    """Return a file of a run; None if it is gone, or not the one that was planned."""
    source = read_source(root, file.path, options)
    if source is None or hashlib.sha256(source.raw).hexdigest() != file.sha256:
        return None
    return source


def read_source(root: Path, path: str, options: Options) -> Source | None:
    """Return a file as it is now; None if it cannot be read."""
    try:
        return Source(*planner.read(root, path, None if options.python is None else Path(options.python)))
    except (OSError, Unreadable):
        return None


@contextlib.contextmanager
def reader(of: Scan, options: Options) -> Iterator[Reader]:
    """Lend what scans other versions of a file as this one was scanned: here, or by the other interpreter."""
    if of.shape is None or options.python is None:
        yield scan
        return
    with Interpreter(Path(options.python)) as other:
        yield other.scan
