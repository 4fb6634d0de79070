"""What breaks in the middle, and what a user sees of it: nothing but time."""

from __future__ import annotations

from pathlib import Path

from codeherd_producer.client import Client
from codeherd_schema.requests import GenerateRequest, Sampling
from codeherd_schema.states import JobState
from codeherd_schema.store import Store
from tests.acceptance.endless import LONG, NAME, endless_model
from tests.acceptance.herd import JOBS_TIMEOUT_S, QUICK, Herd
from tests.services import wait_until


def test_the_jobs_of_a_killed_worker_finish_on_the_other(
    tmp_path: Path, database_url: str, broker_url: str
) -> None:
    requests = [
        GenerateRequest(model=NAME, prompt=f"# {n}\ndef f{n}(", sampling=Sampling(max_new_tokens=400, seed=n))
        for n in range(12)
    ]
    launchers = {"alpha": "cpu", "beta": "cpu"}
    store = Store.open(database_url)

    with (
        Herd(
            database_url=database_url,
            broker_url=broker_url,
            folder=tmp_path,
            launchers=launchers,
            variables=QUICK | endless_model(tmp_path),
        ) as herd,
        Client(herd.settings) as client,
    ):
        jobs = client.submit_many(requests)

        def held_by(name: str) -> set[str]:
            running = store.list(state=JobState.RUNNING, limit=100)
            return {job.id for job in running if (job.worker_id or "").startswith(name)}

        wait_until(lambda: bool(held_by("alpha")) and bool(held_by("beta")), "both to be busy")
        herd.kill("alpha")
        orphans = held_by("alpha")
        assert orphans, "the killed worker held nothing: the test shows nothing"
        client.wait(jobs, timeout_s=JOBS_TIMEOUT_S)
        assert {job.refresh().state for job in jobs} == {JobState.SUCCEEDED}

    for job_id in orphans:
        assert [a.outcome for a in store.attempts(job_id)] == ["reap", "succeed"]
        result = store.result(job_id)
        assert result is not None
        assert (result.attempt, result.worker_id.partition("@")[0]) == (2, "beta")
    store.close()


def test_a_running_job_stops_soon_after_its_cancel_and_frees_its_slot(
    tmp_path: Path, sqlite_url: str, broker_url: str
) -> None:
    request = GenerateRequest(model=NAME, prompt="def f(", sampling=Sampling(max_new_tokens=LONG))
    # A heartbeat this slow cannot be what stops the job: the control message does.
    slow = QUICK | endless_model(tmp_path) | {"CODEHERD_LEASE_S": "3600", "CODEHERD_HEARTBEAT_S": "1000"}

    with (
        Herd(
            database_url=sqlite_url,
            broker_url=broker_url,
            folder=tmp_path,
            launchers={"one": "cpu"},
            variables=slow,
        ) as herd,
        Client(herd.settings) as client,
    ):
        job = client.submit(request)
        wait_until(lambda: any(f["active"] for f in herd.broker.workers(0.5).values()), "the job to decode")
        before = next(iter(herd.broker.workers(0.5).values()))["tokens"]
        assert job.cancel() is JobState.RUNNING
        client.wait([job], timeout_s=60)

        assert job.refresh().state is JobState.CANCELLED
        figures = next(iter(herd.broker.workers(0.5).values()))
        assert (figures["active"], figures["waiting"]) == (0, 0)
        assert figures["tokens"] - before < LONG, "it ran to its end"
        store = Store.open(sqlite_url)
        assert [a.outcome for a in store.attempts(job.id)] == ["cancel"]
        assert store.result(job.id) is None
        store.close()


def test_a_stopped_worker_gives_its_jobs_back_and_burns_no_attempt(
    tmp_path: Path, sqlite_url: str, broker_url: str
) -> None:
    request = GenerateRequest(model=NAME, prompt="def f(", sampling=Sampling(max_new_tokens=LONG))
    hasty = QUICK | endless_model(tmp_path) | {"CODEHERD_WORKER_DRAIN_TIMEOUT_S": "0"}
    store = Store.open(sqlite_url)

    herd = Herd(
        database_url=sqlite_url,
        broker_url=broker_url,
        folder=tmp_path,
        launchers={"one": "cpu"},
        variables=hasty,
    )
    with herd, Client(herd.settings) as client:
        job = client.submit(request)
        wait_until(lambda: job.refresh().state is JobState.RUNNING, "the job to run")

    row = store.get(job.id)
    assert row is not None
    assert (row.state, row.attempt) == (JobState.QUEUED, 0)
    assert [a.outcome for a in store.attempts(job.id)] == ["release"]
    store.close()
