"""Workers that die or freeze in the middle of a job (F1, F3, F4, F13, F15, F19)."""

from __future__ import annotations

from pathlib import Path

from codeherd_schema.requests import GenerateRequest, Sampling
from codeherd_schema.states import JobState
from tests.chaos.null_herd import NullHerd, held


def test_f1_a_killed_workers_jobs_run_again_elsewhere_with_one_result_each(
    tmp_path: Path, database_url: str, broker_url: str
) -> None:
    with NullHerd(
        database_url=database_url, broker_url=broker_url, folder=tmp_path, workers=("one", "two")
    ) as herd:
        hold = herd.hold()
        jobs = herd.client.submit_many(
            GenerateRequest(prompt=held(hold, f"{n}"), sampling=Sampling(max_new_tokens=8)) for n in range(8)
        )
        herd.wait_state([job.id for job in jobs], JobState.RUNNING)
        lost = [job.id for job in jobs if (job.refresh().worker_id or "").startswith("one@")]
        assert lost

        herd.kill("one")
        hold.unlink()
        herd.wait_state([job.id for job in jobs], JobState.SUCCEEDED)

        herd.check([job.id for job in jobs])
        for job_id in lost:
            assert [a.outcome for a in herd.store.attempts(job_id)] == ["reap", "succeed"]
