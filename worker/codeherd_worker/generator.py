"""What turns a request into text, as the rest of a worker sees it.

Owns: what a worker asks of an engine, and what belongs together once a model is loaded. Does not know
torch: `codeherd_worker.preparation` loads the real thing.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from codeherd_schema.models import ServedModel
from codeherd_worker.device import Device
from codeherd_worker.engine.sequences import SequenceOutcome, SequenceRequest
from codeherd_worker.engine.stats import EngineStats
from codeherd_worker.engine.vocabulary import Vocabulary
from codeherd_worker.settings import WorkerSettings


class TextEngine(Protocol):
    """Generates many sequences at once; every method may be called from any thread."""

    @property
    def fingerprint(self) -> str:
        """What must match for two engines to make the same bytes of the same request."""

    @property
    def broken(self) -> bool:
        """Whether it refuses all further work."""

    def submit(self, request: SequenceRequest) -> Future[SequenceOutcome]:
        """Begin; the future holds the outcome, or why there is none."""

    def stats(self) -> EngineStats:
        """Return the engine's counters as they are now."""


@dataclass(frozen=True, slots=True)
class Generator:
    """Everything that turns a request into text: loaded once, shared by all threads."""

    model: ServedModel
    vocabulary: Vocabulary
    engine: TextEngine
    #: The hub's commit, or a hash of the files.
    revision: str
    #: As in results: `none`, `nf4`, …
    quantization: str


class Observer(Protocol):
    """Looks at a generator for operators."""

    def sample(self) -> None:
        """Note the counters; to be called every second or so."""

    def figures(self) -> dict[str, Any]:
        """Return the answer to the `engine_stats` inspection: JSON types, no text of any job."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A generator that is warm, and what comes with it."""

    generator: Generator
    observer: Observer
    #: Stops the engine and frees its memory.
    close: Callable[[], None]


class Prepare(Protocol):
    """Loads and warms up a model."""

    def __call__(
        self, settings: WorkerSettings, model: ServedModel, *, device: Device, worker_id: str
    ) -> Prepared:
        """Return it ready, or raise: then the process must not take jobs."""
