"""What Flower hears of each task: everything, in order, also of tasks that end as the worker stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

import codeherd_schema.broker
from codeherd_schema.broker import make_app
from codeherd_schema.migrations import upgrade
from codeherd_schema.settings import SharedSettings, load
from tests.chaos.null_herd import NullHerd
from tests.samples import a_request
from tests.services import wait_until

JOBS = 40
STORY = ["task-received", "task-started", "task-succeeded"]


@pytest.fixture
def herd(tmp_path: Path, broker_url: str) -> Iterator[NullHerd]:
    database_url = f"sqlite:///{tmp_path / 'jobs.db'}"
    upgrade(database_url)
    with NullHerd(database_url=database_url, broker_url=broker_url, folder=tmp_path) as herd:
        yield herd


class Watch:
    """All task events since it began, by the job's id."""

    def __init__(self) -> None:
        self.told: dict[str, list[dict[str, Any]]] = {}
        self.is_heard = threading.Event()

    def hear(self, event: dict[str, Any]) -> None:
        if event["type"] == "worker-heartbeat":
            self.is_heard.set()
        if event["type"] in STORY:
            self.told.setdefault(event["uuid"].partition(".")[0], []).append(event)

    def stories(self) -> dict[str, list[str]]:
        return {job_id: [event["type"] for event in events] for job_id, events in self.told.items()}


@contextmanager
def watched(settings: SharedSettings) -> Iterator[Watch]:
    """Watch events as Flower does."""
    app, watch, stop = make_app(settings, []), Watch(), threading.Event()

    def listen() -> None:
        with app.connection() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": watch.hear})
            for _ in receiver.itercapture(limit=None, timeout=None, wakeup=False):
                if stop.is_set():
                    return

    thread = threading.Thread(target=listen)
    thread.start()
    # The worker has seen that somebody listens, and tells of tasks from now on.
    assert watch.is_heard.wait(60)
    try:
        yield watch
    finally:
        stop.set()
        with app.connection() as connection:
            # Something to hear, so that it looks whether to stop.
            app.events.Dispatcher(connection, hostname="end").send("worker-heartbeat")
        thread.join(60)
        app.close()


def test_every_task_is_told_from_its_start_to_its_end(herd: NullHerd) -> None:
    with watched(herd.settings) as watch:
        jobs = herd.client.submit_many([a_request(prompt=f"# {i}") for i in range(JOBS)])
        herd.client.wait(jobs, 120)

        wanted = {job.id: STORY for job in jobs}
        wait_until(lambda: watch.stories() == wanted, "all events")
    for events in watch.told.values():
        assert [e["clock"] for e in events] == sorted(e["clock"] for e in events)
        assert [e["timestamp"] for e in events] == sorted(e["timestamp"] for e in events)


def test_what_ends_while_the_worker_stops_is_told(herd: NullHerd) -> None:
    with watched(herd.settings) as watch:
        hold = herd.hold()
        jobs = [herd.client.submit(a_request(prompt=f"#! hold {hold}\n{i}")) for i in range(3)]
        wait_until(
            lambda: [watch.stories().get(job.id) for job in jobs] == [STORY[:2]] * 3, "all to have started"
        )

        herd.signal("one", signal.SIGTERM)
        wait_until(lambda: "draining" in herd.log("one"), "the worker to stop")
        hold.unlink()

        assert herd.wait_exit("one") == 0
        wait_until(lambda: [watch.stories()[job.id] for job in jobs] == [STORY] * 3, "the last events")


def test_while_nobody_listens_tasks_are_told_once_in_a_while(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(load(SharedSettings, environment={"CODEHERD_BROKER_URL": broker_url}).settings, [])
    woken: list[int] = []
    with app.connection() as connection, redis.Redis.from_url(broker_url) as client:

        def count() -> int:
            return int(client.info("commandstats").get("cmdstat_publish", {"calls": 0})["calls"])

        def published(*types: str) -> int:
            before = count()
            for one in types:
                events.send(one, uuid="1")
            events.flush()
            return count() - before

        events = app.events.Dispatcher(
            connection, hostname="w", buffer_group=["task"], on_send_buffered=lambda: woken.append(1)
        )
        # The first go out, since somebody may be about to listen.
        assert published("task-received", "task-started", "task-succeeded") == 1
        monkeypatch.setattr(codeherd_schema.broker, "QUIET_S", 0.0)
        # Nobody hears these.
        assert published("task-received", "task-started", "task-succeeded") == 1
        assert not events.has_some
        woken.clear()
        assert published("task-received", "task-started", "task-succeeded") == 0
        # The event loop is woken for the end alone.
        assert woken == [1]
        assert published("worker-heartbeat") == 1
        with client.pubsub() as anybody:
            anybody.psubscribe("*celeryev*")
            assert anybody.get_message(timeout=10) is not None
            assert published("task-started") == 0
            # Whoever has begun to listen hears that the worker lives; from then on it tells everything.
            assert published("worker-heartbeat") == 1
            assert published("task-received", "task-succeeded") == 1
    app.close()
