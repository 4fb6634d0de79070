"""`generate` over left-padded batches of 16 in order of arrival: each batch runs until its last row ends.

Rows go on past the tokens they were asked for while the batch lasts; what is beyond is dropped.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from benchmarks.protocol import SLOTS
from benchmarks.records import JobRecord
from benchmarks.systems.checkpoint import TokenClock, load_float32
from benchmarks.workloads import Arrival, Job, Workload


class System:
    """Static batching with transformers' `generate`."""

    def prepare(self, folder: Path, converted: Path) -> None:
        pass

    def load(self, folder: Path, converted: Path, longest: int) -> None:
        self._model = load_float32(folder)

    def warm(self, workload: Workload) -> None:
        self.run(workload)

    def run(self, workload: Workload) -> list[JobRecord]:
        started_at = time.perf_counter()
        records: list[JobRecord] = []
        rows = SLOTS if workload.arrival is Arrival.AT_ONCE else 1
        for first in range(0, len(workload.jobs), rows):
            submitted_at = started_at if workload.arrival is Arrival.AT_ONCE else time.perf_counter()
            records += self._generate(workload.jobs[first : first + rows], submitted_at)
        return records

    def _generate(self, batch: tuple[Job, ...], submitted_at: float) -> list[JobRecord]:
        width = max(len(job.prompt_ids) for job in batch)
        padding = [width - len(job.prompt_ids) for job in batch]
        clock = TokenClock()
        output = self._model.generate(
            torch.tensor([(0,) * pad + job.prompt_ids for pad, job in zip(padding, batch, strict=True)]),
            attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding]),
            max_new_tokens=max(job.new_tokens for job in batch),
            do_sample=False,
            streamer=clock,
        )
        return [
            JobRecord(
                token_ids=tuple(row[width : width + job.new_tokens]),
                submitted_at=submitted_at,
                token_times=tuple(clock.times[: job.new_tokens]),
            )
            for row, job in zip(output.tolist(), batch, strict=True)
        ]
