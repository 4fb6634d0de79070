"""What a worker does to jobs, made by hand on a real store, and a clock that stands still.

Owns: results that say as little as possible. Does not know models, engines or brokers.
"""

from __future__ import annotations

from datetime import UTC, datetime

from codeherd_schema.requests import GenerateRequest
from codeherd_schema.results import Candidate, FinishReason, Result, Timings
from codeherd_schema.store import Claim, Commit, Store


class HandClock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def claim(store: Store, job_id: str, *, lease_s: float = 60.0) -> Claim:
    """Claim a job that is there to be had."""
    claimed = store.claim(job_id, worker_id="hand", lease_s=lease_s)
    assert claimed is not None
    return claimed


def finish(store: Store, job_id: str, text: str = "pass") -> Result:
    """Claim a job and store a result with this text."""
    claimed = claim(store, job_id)
    result = result_of(claimed, text)
    assert store.succeed(claimed, result) is Commit.STORED
    return result


def result_of(claimed: Claim, text: str) -> Result:
    """Return a result of this attempt."""
    candidate = Candidate(index=0, text=text, finish_reason=FinishReason.EOS, completion_tokens=1, seed=0)
    return Result(
        job_id=claimed.job.id,
        attempt=claimed.attempt,
        candidates=(candidate,),
        prompt_tokens=1,
        completion_tokens=1,
        model=claimed.job.model,
        model_revision="hand",
        quantization="none",
        engine_fingerprint="hand",
        worker_id="hand",
        timings=Timings(queue_s=0, admit_s=0, prefill_s=0, decode_s=0, total_s=0),
        created_at=datetime.now(UTC),
    )


def requests(count: int, **options: object) -> list[GenerateRequest]:
    """Return different requests that every model can serve."""
    return [GenerateRequest.model_validate({"prompt": f"x = {i}", **options}) for i in range(count)]
