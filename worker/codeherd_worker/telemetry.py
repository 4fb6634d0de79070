"""What operators see of a worker that they ask: its engine's figures.

Owns: their words and units, and rates over the last seconds. Never holds prompt or completion text: the
figures are numbers and job ids.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from codeherd_worker.engine.engine import Engine
from codeherd_worker.engine.slot_classes import SlotClass
from codeherd_worker.footprint import held_bytes
from codeherd_worker.memory import MemoryPlan

#: Seconds over which rates are taken.
WINDOW_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who answers; does not change while a process lives."""

    worker: str
    model: str
    queue: str
    #: The hub's commit, or a hash of the files.
    revision: str
    quantization: str


@dataclass(frozen=True, slots=True)
class Rates:
    """What an engine did lately."""

    #: New tokens a second, of all sequences together.
    tokens_per_s: float
    #: Share of the time in which it had something to do, [0, 1].
    busy_share: float
    #: Seconds that both are about.
    window_s: float


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    tokens: int
    busy_s: float


class RateMeter:
    """Turns counters that only grow into rates; samples may come at any times, from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, window_s: float = WINDOW_S) -> None:
        """Start without samples.

        Args:
            clock: seconds, monotonic.
            window_s: how far rates reach back, at least; further if samples are rarer.
        """
        self._clock = clock
        self._window_s = window_s
        self._samples: deque[_Sample] = deque()
        self._lock = threading.Lock()

    def sample(self, tokens: int, busy_s: float) -> None:
        """Take the counters as they are now."""
        now = self._clock()
        with self._lock:
            self._samples.append(_Sample(now, tokens, busy_s))
            # The first one stays the newest that is old enough.
            while len(self._samples) > 2 and now - self._samples[1].at >= self._window_s:
                self._samples.popleft()

    def rates(self) -> Rates:
        """Return the rates between the first sample that is kept and the last."""
        with self._lock:
            if not self._samples:
                return Rates(0.0, 0.0, 0.0)
            first, last = self._samples[0], self._samples[-1]
        passed = last.at - first.at
        if passed <= 0:
            return Rates(0.0, 0.0, 0.0)
        # An engine that broke counts from 0 again.
        tokens = max(0, last.tokens - first.tokens)
        busy = min(1.0, max(0.0, last.busy_s - first.busy_s) / passed)
        return Rates(tokens / passed, busy, passed)


class Telemetry:
    """The figures of one process."""

    def __init__(
        self,
        engine: Engine,
        plan: MemoryPlan,
        identity: Identity,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to count.

        Args:
            engine: warmed up.
            plan: what it was given.
            identity: who answers.
            clock: seconds, monotonic.
        """
        self._engine = engine
        self._plan = plan
        self._identity = identity
        self._clock = clock
        self._started_at = clock()
        self._meter = RateMeter(clock)
        # Settled by the warm-up, and dear to find out.
        self._facts = engine.facts
        self._fingerprint = engine.fingerprint
        self._shapes = _shapes(engine, plan.classes)
        self.sample()

    def sample(self) -> None:
        """Note the counters; to be called every second or so."""
        stats = self._engine.stats()
        self._meter.sample(stats.tokens, stats.busy_s)

    def figures(self) -> dict[str, Any]:
        """Return the answer to the `engine_stats` inspection: numbers, names and job ids, JSON types."""
        self.sample()
        stats, rates = self._engine.stats(), self._meter.rates()
        now_bytes, peak_bytes = held_bytes(card.name for card in self._plan.cards)
        return asdict(self._identity) | {
            "dtype": self._facts["dtype"],
            "device": self._facts["device"],
            "fingerprint": self._fingerprint,
            "uptime_s": round(self._clock() - self._started_at, 1),
            "slots": stats.slots,
            "active": stats.active,
            "waiting": stats.waiting,
            "steps": stats.steps,
            "passes": stats.passes,
            # Old while `active` is not 0 means that the device hangs.
            "last_step_age_s": round(self._clock() - stats.last_step_at, 3),
            "tokens": stats.tokens,
            "tokens_per_s": round(rates.tokens_per_s, 1),
            "busy_share": round(rates.busy_share, 3),
            "window_s": round(rates.window_s, 1),
            "prompt_tokens": stats.prompt_tokens,
            "reused_tokens": stats.reused_tokens,
            "reuse_rate": _share(stats.reused_tokens, stats.prompt_tokens),
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "acceptance_rate": _share(stats.accepted, stats.drafted),
            "cache_bytes": stats.cache_bytes,
            "weight_bytes": sum(card.weight_bytes for card in self._plan.cards),
            "memory_bytes": now_bytes,
            "memory_peak_bytes": peak_bytes,
            "plan": self._plan.document(),
            **self._shapes,
            "slot_views": [asdict(view) for view in self._engine.views()],
        }


def _shapes(engine: Engine, classes: Sequence[SlotClass]) -> dict[str, Any]:
    """Return what decides which places of the cache a token may attend to."""
    shapes = engine.shapes
    return {
        "granule": shapes.granule,
        "prefill_chunk": shapes.prefill_chunk,
        "draft_tokens": shapes.draft_tokens,
        "drafts_are_optional": shapes.drafts_are_optional,
        "classes": [
            # The spare places of a slot begin where no read goes. Idle rows come last, and are no class.
            asdict(part) | {"spare": spare, "kv_lengths": list(reads)}
            for part, spare, reads in zip(classes, shapes.spares, shapes.kv_lengths, strict=False)
        ],
    }


def _share(part: int, whole: int) -> float | None:
    """Return a share, [0, 1]; None of nothing."""
    return round(part / whole, 3) if whole else None
