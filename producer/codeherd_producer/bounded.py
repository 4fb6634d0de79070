"""Ask something that may never answer, and go on when the time is over.

Owns: the only sure bound. A server that is frozen keeps its connections open and answers nothing, and not
every driver can be told how long to wait for that; a thread that is left behind can. It is a daemon: it ends
with the process, and short commands end soon.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Ended:
    error: BaseException | None = None


class Answers(Generic[T]):
    """What a function yields, asked for on a thread of its own from now on."""

    def __init__(self, ask: Callable[[], Iterator[T]]) -> None:
        """Begin to ask."""
        self._found: SimpleQueue[T | _Ended] = SimpleQueue()
        threading.Thread(target=self._collect, args=(ask,), name="bounded", daemon=True).start()

    def until(self, ends_at: float) -> Iterator[T]:
        """Yield the answers as they come.

        Args:
            ends_at: when to give up, in seconds of `time.monotonic`.

        Raises:
            TimeoutError: the last answer has not come by then.
        """
        while True:
            try:
                found = self._found.get(timeout=max(0.0, ends_at - time.monotonic()))
            except Empty:
                raise TimeoutError("no answer in time") from None
            if isinstance(found, _Ended):
                if found.error is not None:
                    raise found.error
                return
            yield found

    def _collect(self, ask: Callable[[], Iterator[T]]) -> None:
        try:
            for found in ask():
                self._found.put(found)
        except BaseException as err:
            self._found.put(_Ended(err))
        else:
            self._found.put(_Ended())


class Answer(Generic[T]):
    """What a function returns, asked for on a thread of its own from now on."""

    def __init__(self, ask: Callable[[], T]) -> None:
        """Begin to ask."""
        self._answers = Answers(lambda: iter((ask(),)))

    def until(self, ends_at: float) -> T:
        """Return the answer.

        Args:
            ends_at: when to give up, in seconds of `time.monotonic`.

        Raises:
            TimeoutError: it has not come by then.
        """
        (answer,) = self._answers.until(ends_at)
        return answer
