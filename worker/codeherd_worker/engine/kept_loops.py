"""Keep compiled loops on disk between starts: a file for each loop and kind of arguments.

Owns: what the files are called, and that none is read that holds anything else. Does not know how loops are
compiled (`compiled.py`), or what numba puts into a file.

In the place of numba's own index and numbered files, which two faults can turn into another loop's code: it
goes by the source file of the function alone, so that yesterday's tile would run in today's loop; and index
and file are written one after the other, so that what lies between them when a process is killed, or when two
workers start at once, is a name in the index and an older file under it. Here a name says all that the code
depends on, and a file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import uuid
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.serialize import dumps

logger = logging.getLogger(__name__)

#: Hexadecimal digits in a file's name: of the sources, and of the kind of arguments.
_DIGITS = 16


class KeptLoops:
    """The files of one loop; takes the place of numba's `IndexDataCacheFile`."""

    def __init__(self, folder: Path, name: str, sources: str) -> None:
        """Name the loop.

        Args:
            folder: where its files are.
            name: of the loop, its file and Python's version.
            sources: a digest of all code that becomes part of it.
        """
        self._folder, self._name = folder, name
        compilers = f"{numba.__version__} {llvmlite.__version__}"
        self._sources = hashlib.sha256(f"{compilers} {sources}".encode()).hexdigest()[:_DIGITS]

    def load(self, key: object) -> Any:
        """Return what was kept for a kind of arguments, or None.

        Args:
            key: numba's: the types of the arguments, the processor and the function's own code.
        """
        try:
            kept, data = pickle.loads(self._path(key).read_bytes())  # noqa: S301 -- as safe as the code beside it
        except OSError:
            return None
        except Exception as err:
            logger.warning("loop_unreadable name=%s error=%s", self._name, type(err).__name__)
            return None
        return data if kept == key else None

    def save(self, key: object, data: object) -> None:
        """Keep a compiled loop if there is room; loops of other sources have had their day."""
        unfinished = self._folder / f"{self._name}.{uuid.uuid4().hex}.unfinished"
        try:
            for path in self._folder.glob(f"{self._name}.*.nbc"):
                if not path.name.startswith(f"{self._name}.{self._sources}."):
                    path.unlink(missing_ok=True)
            unfinished.write_bytes(dumps((key, data)))  # type: ignore[no-untyped-call]
            unfinished.replace(self._path(key))
        except OSError as err:
            # It is compiled; the next start compiles it again.
            logger.warning("loop_not_kept name=%s error=%s", self._name, err)
            unfinished.unlink(missing_ok=True)

    def flush(self) -> None:
        """Forget the loop, all kinds."""
        for path in self._folder.glob(f"{self._name}.*.nbc"):
            path.unlink(missing_ok=True)

    def _path(self, key: object) -> Path:
        kind = hashlib.sha256(repr(key).encode()).hexdigest()[:_DIGITS]
        return self._folder / f"{self._name}.{self._sources}.{kind}.nbc"
