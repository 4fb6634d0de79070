from pathlib import Path

import pytest

from codeherd_schema.requests import GenerateRequest
from codeherd_schema.states import JobState
from codeherd_schema.store import Store
from codeherd_worker.rescuer import Rescuer


def test_a_lost_job_is_queued_again_and_buried_when_it_kills_too_many(store: Store) -> None:
    [submitted] = store.submit([GenerateRequest(prompt="x")])
    rescuer = Rescuer(store, max_crashes=2)

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


def test_a_database_that_is_away_is_left_for_the_next_look(
    tmp_path: Path, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store.open(sqlite_url)
    store.close()
    (tmp_path / "codeherd.db").unlink()
    (tmp_path / "codeherd.db").mkdir()

    Rescuer(store, max_crashes=3).look()

    assert "rescue_postponed" in caplog.text
