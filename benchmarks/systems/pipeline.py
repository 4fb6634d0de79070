"""transformers' text-generation pipeline, one job per call: what a plain task function would do.

A pipeline takes text. It is given a tokenizer whose text for a token is the token's number, so that it
computes on exactly the ids that everybody else gets.
"""

from __future__ import annotations

import time
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, pipeline

from benchmarks.protocol import run_each
from benchmarks.records import JobRecord
from benchmarks.systems.checkpoint import TokenClock, load_float32
from benchmarks.workloads import Job, Workload

#: The text of id 0, which no prompt holds. Not a number: special tokens are also found inside of words.
_UNKNOWN = "<unk>"


class System:
    """`pipeline("text-generation")`."""

    def prepare(self, folder: Path, converted: Path) -> None:
        pass

    def load(self, folder: Path, converted: Path, longest: int) -> None:
        model = load_float32(folder)
        numbers = {str(i): i for i in range(1, model.config.vocab_size)}
        words = Tokenizer(WordLevel({_UNKNOWN: 0} | numbers, unk_token=_UNKNOWN))
        words.pre_tokenizer = WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=_UNKNOWN, unk_token=_UNKNOWN)
        self._pipeline = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")

    def warm(self, workload: Workload) -> None:
        self.run(workload)

    def run(self, workload: Workload) -> list[JobRecord]:
        return run_each(workload, self._generate)

    def _generate(self, job: Job) -> JobRecord:
        clock = TokenClock()
        submitted_at = time.perf_counter()
        [output] = self._pipeline(
            " ".join(map(str, job.prompt_ids)),
            max_new_tokens=job.new_tokens,
            do_sample=False,
            return_tensors=True,
            streamer=clock,
        )
        new_ids = output["generated_token_ids"][len(job.prompt_ids) :]
        return JobRecord(tuple(new_ids), submitted_at, tuple(clock.times))
