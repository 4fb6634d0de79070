"""CTranslate2: batches of up to 16 jobs of similar prompt length, as its documentation advises.

`generate_batch` sorts the prompts by length and cuts them into batches itself. Within a batch, prompt tokens
past the shortest prompt go through the decoding loop one at a time. Its callback ends each job at its own
count, so no row runs longer than it was asked to. Tokens are named by their ids.
"""

from __future__ import annotations

import time
from pathlib import Path

import ctranslate2
from ctranslate2 import GenerationStepResult

from benchmarks.protocol import SLOTS, THREADS
from benchmarks.records import JobRecord
from benchmarks.workloads import Arrival, Job, Workload


class System:
    """`Generator.generate_batch` in float32."""

    def prepare(self, folder: Path, converted: Path) -> None:
        # Only the conversion needs transformers and torch; the measured process must not hold them.
        from ctranslate2.converters.transformers import LlamaLoader

        from benchmarks.systems.checkpoint import load_float32

        model = load_float32(folder)
        spec = LlamaLoader().get_model_spec(model)
        spec.register_vocabulary([str(i) for i in range(model.config.vocab_size)])
        spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "1", "2", "0"
        spec.config.layer_norm_epsilon = model.config.rms_norm_eps
        spec.validate()
        spec.optimize(quantization="float32")
        unfinished = converted.with_suffix(".unfinished")
        unfinished.mkdir()
        spec.save(str(unfinished))
        unfinished.rename(converted)

    def load(self, folder: Path, converted: Path, longest: int) -> None:
        self._generator = ctranslate2.Generator(
            str(converted), compute_type="float32", inter_threads=1, intra_threads=THREADS
        )

    def warm(self, workload: Workload) -> None:
        self.run(workload)

    def run(self, workload: Workload) -> list[JobRecord]:
        if workload.arrival is Arrival.ONE_BY_ONE:
            return [self._generate((job,))[0] for job in workload.jobs]
        return self._generate(workload.jobs)

    def _generate(self, jobs: tuple[Job, ...]) -> list[JobRecord]:
        submitted_at = time.perf_counter()
        times: list[list[float]] = [[] for _ in jobs]

        def has_enough(step: GenerationStepResult) -> bool:
            times[step.batch_id].append(time.perf_counter())
            return len(times[step.batch_id]) >= jobs[step.batch_id].new_tokens

        longest = max(job.new_tokens for job in jobs)
        results = self._generator.generate_batch(
            [list(map(str, job.prompt_ids)) for job in jobs],
            max_batch_size=SLOTS,
            beam_size=1,
            sampling_topk=1,
            max_length=longest,
            min_length=longest,
            # The unknown token: no job ends early, and the model's own end is a token like any other.
            end_token="0",
            include_prompt_in_result=False,
            callback=has_enough,
        )
        return [
            JobRecord(tuple(result.sequences_ids[0]), submitted_at, tuple(job_times))
            for result, job_times in zip(results, times, strict=True)
        ]
