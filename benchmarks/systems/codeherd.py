"""codeherd's engine in this process: 16 slots, all jobs submitted, one thread decodes."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.protocol import SLOTS
from benchmarks.records import JobRecord
from benchmarks.workloads import Arrival, Job, Workload
from codeherd_worker.engine.compute_thread import ComputeThread
from codeherd_worker.engine.engine import Engine, EngineSettings
from codeherd_worker.engine.loading import load_model
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.sequences import SequenceOutcome, SequenceRequest
from codeherd_worker.engine.stopping import CancelToken, Stopper


class System:
    """Our engine, with or without its two options."""

    def __init__(self, *, reuse_prefixes: bool = True, draft_tokens: int = 0) -> None:
        self._reuse_prefixes = reuse_prefixes
        self._draft_tokens = draft_tokens

    def prepare(self, folder: Path, converted: Path) -> None:
        pass

    def load(self, folder: Path, converted: Path, longest: int) -> None:
        settings = engine_settings(
            max_len=longest, reuse_prefixes=self._reuse_prefixes, draft_tokens=self._draft_tokens
        )
        self._engine = start_engine(folder, settings)

    def warm(self, workload: Workload) -> None:
        self.run(workload)

    def run(self, workload: Workload) -> list[JobRecord]:
        if workload.arrival is Arrival.ONE_BY_ONE:
            return [self._submit(job).record() for job in workload.jobs]
        return [running.record() for running in [self._submit(job) for job in workload.jobs]]

    def _submit(self, job: Job) -> _Running:
        clock = _Clock()
        stopper = Stopper(
            stop_ids=frozenset(), stop_strings=(), max_new_tokens=job.new_tokens, detokenizer=clock
        )
        submitted_at = time.perf_counter()
        future = self._engine.submit(
            SequenceRequest(job.prompt_ids, SamplingParams(), stopper, CancelToken())
        )
        return _Running(submitted_at, clock, future)


def engine_settings(*, max_len: int, reuse_prefixes: bool, draft_tokens: int) -> EngineSettings:
    """Return the engine's settings for a CPU with 16 slots."""
    return EngineSettings.uniform(
        slots=SLOTS,
        max_len=max_len,
        prefill_chunk=256,
        reuse_prefixes=reuse_prefixes,
        draft_tokens=draft_tokens,
    )


def start_engine(folder: Path, settings: EngineSettings) -> Engine:
    """Return a warm engine over the model in `folder`; one thread does everything, as in a worker."""
    thread = ComputeThread()

    def load() -> Engine:
        loaded = load_model(str(folder), quantization="none", device="cpu", slots=settings.slots)
        engine = Engine(loaded.model, settings, thread=thread)
        engine.warm_up()
        return engine

    engine = thread.run(load)
    engine.start()
    return engine


@dataclass(slots=True)
class _Clock:
    """A detokenizer that makes no text and notes when each token came."""

    times: list[float] = field(default_factory=list)

    def push(self, token_id: int) -> str:
        self.times.append(time.perf_counter())
        return ""

    def finish(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class _Running:
    submitted_at: float
    clock: _Clock
    future: Future[SequenceOutcome]

    def record(self) -> JobRecord:
        """Wait for the end."""
        outcome = self.future.result()
        return JobRecord(outcome.token_ids, self.submitted_at, tuple(self.clock.times))
