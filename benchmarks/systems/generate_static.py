"""The model page's recipe: `generate` with a static cache, one job at a time."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from benchmarks.protocol import run_each
from benchmarks.records import JobRecord
from benchmarks.systems.checkpoint import TokenClock, load_float32
from benchmarks.workloads import Job, Workload


class System:
    """transformers' `generate(cache_implementation="static")`."""

    def prepare(self, folder: Path, converted: Path) -> None:
        pass

    def load(self, folder: Path, converted: Path, longest: int) -> None:
        self._model = load_float32(folder)

    def warm(self, workload: Workload) -> None:
        self.run(workload)

    def run(self, workload: Workload) -> list[JobRecord]:
        return run_each(workload, self._generate)

    def _generate(self, job: Job) -> JobRecord:
        clock = TokenClock()
        submitted_at = time.perf_counter()
        output = self._model.generate(
            torch.tensor([job.prompt_ids]),
            attention_mask=torch.ones(1, len(job.prompt_ids), dtype=torch.long),
            max_new_tokens=job.new_tokens,
            do_sample=False,
            cache_implementation="static",
            streamer=clock,
        )
        new_ids = output[0, len(job.prompt_ids) :].tolist()
        return JobRecord(tuple(new_ids), submitted_at, tuple(clock.times))
