"""A wall clock that is wrong: a process with this folder in PYTHONPATH is early or late by what a file says.

Owns: `time.time` and the present moment of `datetime`, in processes that tests start. The file, named by
CODEHERD_TEST_CLOCK, holds seconds to add, and may change at any time. The monotonic clock stays right.
"""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from typing import Any

_FILE = Path(os.environ["CODEHERD_TEST_CLOCK"])
_right_time = time.time
_datetime = datetime.datetime


def _wrong_time() -> float:
    return _right_time() + float(_FILE.read_text())


class _Kind(type):
    def __instancecheck__(cls, value: object) -> bool:
        # What arithmetic and parsers return is of the original type.
        return isinstance(value, _datetime)


class _WrongDatetime(_datetime, metaclass=_Kind):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return _datetime.fromtimestamp(_wrong_time(), tz)

    @classmethod
    def utcnow(cls) -> Any:
        return _datetime.fromtimestamp(_wrong_time(), datetime.UTC).replace(tzinfo=None)


time.time = _wrong_time
time.time_ns = lambda: int(_wrong_time() * 1e9)
datetime.datetime = _WrongDatetime  # type: ignore[misc]
