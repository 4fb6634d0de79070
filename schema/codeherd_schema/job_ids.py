"""Make job ids: UUIDs of version 7 (RFC 9562), which sort by the time of submission.

Owns: the layout of an id, and that ids made by one process never step back. Does not know the clock:
the caller brings the database's.
"""

from __future__ import annotations

import secrets
import threading
from typing import Final

#: RFC 9562 6.2, method 3: the 12 bits after the milliseconds count parts of one.
_TICKS_PER_S: Final = 1000 * 4096
_RANDOM_BITS: Final = 62
_RANDOM_MASK: Final = (1 << _RANDOM_BITS) - 1


class JobIds:
    """Gives out ids in rising order; threads may share it."""

    def __init__(self) -> None:
        self._last = 0
        self._lock = threading.Lock()

    def take(self, count: int, *, now_s: float) -> list[str]:
        """Return `count` ids for this moment, each greater than every id given before."""
        with self._lock:
            first = max(self._last + 1, int(now_s * _TICKS_PER_S))
            self._last = first + count
        # One call for all: each costs as much as the rest of an id ten times over.
        chance = secrets.token_bytes(8 * count)
        return [_uuid7(first + i, int.from_bytes(chance[8 * i : 8 * i + 8])) for i in range(count)]


def _uuid7(ticks: int, chance: int) -> str:
    milliseconds, part = divmod(ticks, 4096)
    bits = (
        f"{milliseconds << 80 | 0x7 << 76 | part << 64 | 0b10 << _RANDOM_BITS | chance & _RANDOM_MASK:032x}"
    )
    return f"{bits[:8]}-{bits[8:12]}-{bits[12:16]}-{bits[16:20]}-{bits[20:]}"
