from collections.abc import Iterator
from pathlib import Path

import pytest

from codeherd_schema.broker import Broker
from codeherd_schema.requests import GenerateRequest
from codeherd_schema.settings import SharedSettings, Url
from codeherd_schema.states import JobState
from codeherd_schema.store import Store
from codeherd_worker.rescuer import Rescuer
from tests.samples import rewrite
from tests.services import free_port


@pytest.fixture
def broker(broker_url: str) -> Iterator[Broker]:
    broker = Broker(SharedSettings(broker_url=Url(broker_url)))
    yield broker
    broker.close()


@pytest.fixture
def nobody() -> Iterator[Broker]:
    """A broker that is away."""
    url = Url(f"redis://127.0.0.1:{free_port()}/0")
    broker = Broker(SharedSettings(broker_url=url, connect_timeout_s=0.2))
    yield broker
    broker.close()


def test_a_lost_job_is_queued_again_and_buried_when_it_kills_too_many(store: Store, broker: Broker) -> None:
    [submitted] = store.submit([GenerateRequest(prompt="x")])
    rescuer = Rescuer(store, broker, max_crashes=2)

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


def test_whoever_waits_hears_of_what_was_ended_and_of_nothing_else(
    store: Store, broker: Broker, database_url: str
) -> None:
    answers = store.submit([GenerateRequest(prompt="x")] * 4)
    buried, queued_again, expired, waiting = (answer.job_id for answer in answers)
    for job_id in (buried, queued_again):
        assert store.claim(job_id, worker_id="w", lease_s=-1.0) is not None
    rewrite(database_url, buried, crash_count=1)
    rewrite(database_url, expired, expires_at=1.0)

    with broker.endings() as heard:
        Rescuer(store, broker, max_crashes=2).look()

        # Heard after all that was said before.
        broker.announce("last")
        news: set[str] = set()
        while "last" not in news:
            news |= heard.wait(30)

    assert news == {buried, expired, "last"}
    assert store.pending([queued_again, waiting]) == {queued_again, waiting}


def test_a_broker_that_is_away_keeps_no_job_from_its_end(
    store: Store, nobody: Broker, database_url: str
) -> None:
    lost, late = (answer.job_id for answer in store.submit([GenerateRequest(prompt="x")] * 2))
    assert store.claim(lost, worker_id="w", lease_s=-1.0) is not None
    rewrite(database_url, late, expires_at=1.0)

    Rescuer(store, nobody, max_crashes=1).look()

    assert store.pending([lost, late]) == set()


def test_a_database_that_is_away_is_left_for_the_next_look(
    tmp_path: Path, sqlite_url: str, nobody: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store.open(sqlite_url)
    store.close()
    (tmp_path / "codeherd.db").unlink()
    (tmp_path / "codeherd.db").mkdir()

    Rescuer(store, nobody, max_crashes=3).look()

    assert "rescue_postponed" in caplog.text
