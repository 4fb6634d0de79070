"""How far the loading of a model is: counted here, shown by whoever asked.

Owns: the counting hook in transformers and the log lines of a process without a terminal. Does not know
terminals (`codeherd_worker.model_command`) or what is loaded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from transformers.utils.logging import set_tqdm_hook

logger = logging.getLogger(__name__)

#: Takes the step's name and how much of it is done, [0, 1].
Progress = Callable[[str, float], None]

#: Seconds between two log lines.
LOG_EVERY_S: Final = 5.0
#: What transformers 5.23 calls its loops, and what we call them.
_LOOPS = {"Loading weights": "load", "Writing model shards": "save"}


class LogProgress:
    """Writes a line when a step ends and, if it takes long, every few seconds."""

    def __init__(self, total_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin.

        Args:
            total_bytes: of the weight files.
            clock: seconds, monotonic.
        """
        self._total_bytes = total_bytes
        self._clock = clock
        self._due_at = clock() + LOG_EVERY_S

    def __call__(self, step: str, share: float) -> None:
        """Take how much of a step is done."""
        if share < 1 and self._clock() < self._due_at:
            return
        self._due_at = self._clock() + LOG_EVERY_S
        logger.info(
            "model_progress step=%s percent=%d bytes=%d total_bytes=%d",
            step, int(100 * share), int(share * self._total_bytes), self._total_bytes,
        )  # fmt: skip


@contextmanager
def counted(progress: Progress) -> Iterator[None]:
    """Tell `progress` of the loops over tensors or files that transformers runs in this block.

    Takes the place of transformers' own bars, for the whole process: load one model at a time.
    """

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = _LOOPS.get(kwargs.get("desc", ""))
        return factory(*args, **kwargs) if step is None else _reported(list(args[0]), step, progress)

    previous = set_tqdm_hook(hook)
    try:
        yield
    finally:
        set_tqdm_hook(previous)


def _reported(items: list[Any], step: str, progress: Progress) -> Iterable[Any]:
    for done, item in enumerate(items, start=1):
        yield item
        progress(step, done / len(items))
