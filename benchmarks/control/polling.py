"""Wait for a peer's results by asking for them, in the way that costs its client least.

Owns: how often they are looked for. Does not know where they are kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

#: Results that are asked for in one question; jobs end about in order, so the first ones are asked first.
CHUNK = 100
#: Seconds between two looks while very many, or few, jobs are waited for.
LONG_PAUSE_S, SHORT_PAUSE_S = 0.05, 0.005


class Polled:
    """A system whose client is not told that jobs have ended."""

    def ready(self, handles: Sequence[Any]) -> list[bool]:
        """Return for each job whether its result can be read."""
        raise NotImplementedError

    def runs(self, handle: Any) -> int | None:
        """Return None: it does not count how often a job was started."""
        return None

    def wait(self, handles: Sequence[Any], timeout_s: float) -> None:
        """Return as soon as every result can be read.

        Raises:
            TimeoutError: some could not be after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        pause_s = LONG_PAUSE_S if len(handles) > CHUNK else SHORT_PAUSE_S
        missing = list(handles)
        while missing:
            first = missing[:CHUNK]
            known = self.ready(first)
            missing[:CHUNK] = [handle for handle, is_ready in zip(first, known, strict=True) if not is_ready]
            if all(known):
                continue
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(missing)} results are missing after {timeout_s:.0f} s")
            time.sleep(pause_s)
