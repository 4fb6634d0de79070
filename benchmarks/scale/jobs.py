"""The jobs that the herd is given: how long they run and how large their texts are.

Owns: the distributions, all seeded. Does not know databases.

A 7B model on one GPU with 32 slots decodes for a few seconds per job; texts are those of code: prompts of
0.5 to 4 KB, results of 0.3 to 8 KB, small ones far more often than large ones.
"""

from __future__ import annotations

import functools
import random
from datetime import UTC, datetime
from typing import Any

from codeherd_schema.requests import GenerateRequest, Sampling
from codeherd_schema.results import Candidate, FinishReason, Result, Timings
from codeherd_schema.store import Claim

MODEL = "codellama-7b"
#: Bytes of a prompt and of a generated text: least, median, most.
PROMPT_BYTES, TEXT_BYTES = (500, 1200, 4000), (300, 900, 8000)
#: Standard deviation of the logarithm of a job's duration.
SPREAD = 0.5
#: Bytes of the words that texts are cut from; a line repeated would compress away in PostgreSQL.
_POOL_BYTES = 1 << 17


def duration_s(source: random.Random, mean_s: float) -> float:
    """Return how long a job runs: log-normal with this mean."""
    return mean_s * source.lognormvariate(-(SPREAD**2) / 2, SPREAD)


def size_bytes(source: random.Random, bounds: tuple[int, int, int]) -> int:
    """Return how large a text is: log-normal around the median, cut at both bounds."""
    least, median, most = bounds
    return round(min(most, max(least, median * source.lognormvariate(0.0, 0.8))))


def make_request(seed: int, **options: Any) -> GenerateRequest:
    """Return a request with a prompt of random size."""
    size = size_bytes(random.Random(f"prompt {seed}"), PROMPT_BYTES)
    return GenerateRequest(
        prompt=_text(seed, size), model=MODEL, sampling=Sampling(max_new_tokens=256, seed=seed), **options
    )


def make_result(claim: Claim, seed: int) -> Result:
    """Return what a worker would store for this claim, with a text of random size."""
    size = size_bytes(random.Random(f"text {seed}"), TEXT_BYTES)
    tokens = max(1, size // 4)
    return Result(
        job_id=claim.job.id,
        attempt=claim.attempt,
        candidates=(
            Candidate(
                index=0,
                text=_text(seed, size),
                finish_reason=FinishReason.EOS,
                completion_tokens=tokens,
                seed=seed,
            ),
        ),
        prompt_tokens=len(claim.job.payload) // 4,
        completion_tokens=tokens,
        model=claim.job.model,
        model_revision="6c284d1468fe6c413cf56183e69b194dcfa27fe6",
        quantization="nf4",
        engine_fingerprint="fe2d58018236fdd9",
        worker_id=claim.job.worker_id or "",
        timings=Timings(queue_s=0.1, admit_s=0.01, prefill_s=0.2, decode_s=3.7, total_s=4.0),
        created_at=datetime.now(UTC),
    )


def _text(seed: int, size: int) -> str:
    start = seed * 7919 % (_POOL_BYTES - size)
    return _pool()[start : start + size]


@functools.cache
def _pool() -> str:
    source = random.Random("pool")
    words = ["".join(source.choices("abcdefghijklmnopqrst_", k=source.randint(2, 9))) for _ in range(2000)]
    return " ".join(source.choices([*words, "return", "self.", "(", "):\n    "], k=_POOL_BYTES // 3))[
        :_POOL_BYTES
    ]
