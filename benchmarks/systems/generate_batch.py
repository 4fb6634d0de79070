"""transformers' continuous batching: one manager that lives through all rounds."""

from __future__ import annotations

import math
import time
from pathlib import Path

from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.protocol import SLOTS
from benchmarks.records import JobRecord
from benchmarks.systems.checkpoint import load_float32
from benchmarks.workloads import Arrival, Job, Workload

#: Tokens of a page of its cache, its own default.
_PAGE = 256
#: Most tokens of one pass, its own default.
_PASS = 8192
#: Seconds for one answer.
_PATIENCE_S = 600.0


class System:
    """The manager behind `generate_batch`."""

    def __init__(self) -> None:
        self._numbers = iter(range(2**62))

    def prepare(self, folder: Path, converted: Path) -> None:
        pass

    def load(self, folder: Path, converted: Path, longest: int) -> None:
        model = load_float32(folder)
        pages = math.ceil((longest + 1) / _PAGE)
        settings = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=SLOTS * pages,
            max_requests_per_batch=SLOTS,
            max_batch_tokens=_PASS,
        )
        self._manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1), settings
        )

    def warm(self, workload: Workload) -> None:
        self._manager.start()
        self.run(workload)

    def run(self, workload: Workload) -> list[JobRecord]:
        if workload.arrival is Arrival.ONE_BY_ONE:
            return [self._generate([job])[0] for job in workload.jobs]
        return self._generate(list(workload.jobs))

    def _generate(self, jobs: list[Job]) -> list[JobRecord]:
        submitted_at = time.perf_counter()
        names = [
            self._manager.add_request(
                list(job.prompt_ids),
                request_id=f"job {next(self._numbers)}",
                max_new_tokens=job.new_tokens,
                record_timestamps=True,
                eos_token_id=-1,
            )
            for job in jobs
        ]
        records: dict[str, JobRecord] = {}
        while len(records) < len(jobs):
            output = self._manager.get_result(timeout=_PATIENCE_S)
            if output is None or output.error is not None:
                raise RuntimeError(f"no answer: {output.error if output is not None else 'timeout'}")
            if output.is_finished():
                records[output.request_id] = JobRecord(
                    tuple(output.generated_tokens), submitted_at, tuple(output.timestamps)
                )
        return [records[name] for name in names]
