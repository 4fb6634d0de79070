"""Say so when a backfill asks a model that no worker serves: its jobs would wait however long.

Owns: that one look at the workers, beside the run, which waits for nobody: a broker that is away or frozen
costs nothing and is not told of. Does not know how workers are asked (`codeherd_schema.broker`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from typing import Final

from codeherd_producer.bounded import Answers
from codeherd_schema.backfills import Progress
from codeherd_schema.queues import queue_name
from codeherd_schema.settings import SharedSettings

logger = logging.getLogger(__name__)

#: Seconds that workers get to answer.
ANSWER_S: Final = 2.0

#: Yields once: the queues that workers take from.
Ask = Callable[[], Iterator[Collection[str]]]


class Lookout:
    """Is told how far a run is, asks for workers when its first questions wait, and tells of none once."""

    def __init__(self, model: str, ask: Ask, tell: Callable[[str], None]) -> None:
        """Ask nobody yet.

        Args:
            model: of the run.
            ask: may take long, or fail: it runs on a thread of its own.
            tell: gets the line, if there is one to say.
        """
        self._model = model
        self._ask = ask
        self._tell = tell
        self._answers: Answers[Collection[str]] | None = None
        #: Answers that the run had when workers were asked.
        self._ended = 0
        self._is_over = False

    def show(self, progress: Progress) -> None:
        """Take how far the run is; call often. Returns at once."""
        if self._is_over:
            return
        if self._answers is None:
            if progress.asked > progress.ended:
                self._answers, self._ended = Answers(self._ask), progress.ended
            return
        try:
            queues = next(self._answers.until(time.monotonic()))
        except TimeoutError:
            return
        except Exception:
            # The broker is away, most likely. Nothing that goes wrong with a hint may end a run.
            logger.debug("workers_not_asked", exc_info=True)
            self._is_over = True
            return
        is_served = queue_name(self._model) in queues
        if not is_served and progress.ended > self._ended:
            # From a worker that is too busy to say so, or from an earlier run: ask again.
            self._answers = None
            return
        self._is_over = True
        if not is_served:
            start = f"start one with `codeherd worker --model {self._model}`"
            self._tell(f"no worker serves {self._model}: {start}; the run waits until then")


def served_queues(settings: SharedSettings) -> Iterator[Collection[str]]:
    """Yield the queues that workers take from now: those who answer within `ANSWER_S`.

    Raises:
        BrokerUnavailable: Redis did not answer in time.
    """
    # Celery: too much for a command line that only counts docstrings.
    from codeherd_schema.broker import Broker

    broker = Broker(settings)
    try:
        yield frozenset(str(figures.get("queue")) for figures in broker.workers(ANSWER_S).values())
    finally:
        broker.close()
