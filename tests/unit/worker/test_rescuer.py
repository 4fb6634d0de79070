from codeherd_schema.requests import GenerateRequest
from codeherd_schema.states import JobState
from codeherd_schema.store import Store
from codeherd_worker.rescuer import Rescuer
from tests.services import wait_until


def test_a_lost_job_is_queued_again_and_buried_when_it_kills_too_many(store: Store) -> None:
    [submitted] = store.submit([GenerateRequest(prompt="x")])
    rescuer = Rescuer(store, interval_s=5.0, max_crashes=2)

    assert store.claim(submitted.job_id, worker_id="w", lease_s=-1.0) is not None
    rescuer.look()
    once = store.get(submitted.job_id)
    assert store.claim(submitted.job_id, worker_id="w", lease_s=-1.0) is not None
    rescuer.look()
    twice = store.get(submitted.job_id)

    assert once is not None
    assert twice is not None
    assert (once.state, once.crash_count) == (JobState.QUEUED, 1)
    assert twice.state is JobState.DEAD


def test_the_thread_looks_again_and_again(store: Store) -> None:
    [submitted] = store.submit([GenerateRequest(prompt="x")])
    rescuer = Rescuer(store, interval_s=0.01, max_crashes=3)
    rescuer.start()
    assert store.claim(submitted.job_id, worker_id="w", lease_s=-1.0) is not None

    def rescued() -> bool:
        job = store.get(submitted.job_id)
        return job is not None and job.state is JobState.QUEUED

    wait_until(rescued, "the rescue")
    rescuer.close()
