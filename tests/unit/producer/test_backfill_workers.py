from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import pytest
import redis

from codeherd_producer.commands.backfill_workers import Lookout, served_queues
from codeherd_schema.broker import make_app
from codeherd_schema.errors import BrokerUnavailable
from codeherd_schema.settings import SharedSettings
from tests.services import RedisServer, free_port, wait_until
from tests.unit.producer.backfill.test_run import TARGETS, Bench
from tests.unit.producer.backfill.test_run import bench as bench
from tests.unit.producer.test_backfill_progress import progress

WAITING = progress(accepted=0, still_open=4, tokens=0, jobs=4)
NONE: Collection[str] = frozenset()


class Workers:
    """Answer when they are told to."""

    def __init__(self) -> None:
        self.asked = 0
        self._answers: SimpleQueue[Collection[str] | Exception] = SimpleQueue()

    def ask(self) -> Iterator[Collection[str]]:
        self.asked += 1
        answer = self._answers.get(timeout=60)
        if isinstance(answer, Exception):
            raise answer
        yield answer

    def answer(self, answer: Collection[str] | Exception) -> None:
        """Give an answer to the last question, and return when it has come."""
        before = set(_askers())
        self._answers.put(answer)
        wait_until(lambda: not before & set(_askers()), "the answer")


def _askers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "bounded"]


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def lookout(workers: Workers, said: list[str]) -> Lookout:
    return Lookout("codellama-7b", workers.ask, said.append)


def test_a_model_that_nobody_serves_is_told_once_with_the_command_that_does(
    lookout: Lookout, workers: Workers, said: list[str]
) -> None:
    for _ in range(3):
        # Nobody has answered yet, and nobody is waited for.
        lookout.show(WAITING)
    workers.answer({"codeherd.tiny"})

    for _ in range(3):
        lookout.show(WAITING)

    start = "start one with `codeherd worker --model codellama-7b`"
    assert said == [f"no worker serves codellama-7b: {start}; the run waits until then"]
    assert workers.asked == 1


def test_a_model_that_somebody_serves_is_not_told_of(
    lookout: Lookout, workers: Workers, said: list[str]
) -> None:
    lookout.show(WAITING)
    workers.answer({"codeherd.codellama-7b", "codeherd.tiny"})

    for _ in range(3):
        lookout.show(WAITING)

    assert (said, workers.asked) == ([], 1)


def test_workers_are_asked_when_the_first_questions_wait_and_not_before(
    lookout: Lookout, workers: Workers
) -> None:
    others = _askers()
    lookout.show(progress(accepted=0, still_open=4, tokens=0))
    # Texts of an earlier run: nothing to wait for.
    lookout.show(progress(accepted=2, still_open=2, tokens=40))
    assert set(_askers()) <= set(others)

    lookout.show(progress(accepted=2, still_open=2, tokens=40, jobs=2))
    workers.answer(NONE)

    assert workers.asked == 1


def test_who_answers_questions_and_no_calls_is_asked_again(
    lookout: Lookout, workers: Workers, said: list[str]
) -> None:
    lookout.show(WAITING)
    workers.answer(NONE)
    more = replace(WAITING, ended=WAITING.ended + 1)

    lookout.show(more)
    assert said == []
    lookout.show(more)
    workers.answer(NONE)
    lookout.show(more)

    assert workers.asked == 2
    assert len(said) == 1


@pytest.mark.parametrize("error", [BrokerUnavailable("away"), ValueError("garbage")])
def test_whatever_goes_wrong_ends_the_look_and_not_the_run(
    lookout: Lookout, workers: Workers, said: list[str], error: Exception
) -> None:
    lookout.show(WAITING)
    workers.answer(error)

    for _ in range(3):
        lookout.show(WAITING)

    assert (said, workers.asked) == ([], 1)


# With a real Redis.


@pytest.fixture
def worker(broker_url: str, redis_server: RedisServer) -> Iterator[None]:
    """Answers calls for a worker of the queue `codeherd.tiny`."""
    app = make_app(SharedSettings.model_validate({"broker_url": broker_url}), ["codeherd.tiny"])
    stop = threading.Event()

    def serve() -> None:
        with app.connection_for_read() as connection, connection.channel() as channel:
            handlers = {"engine_stats": lambda _: {"queue": "codeherd.tiny"}}
            node = app.control.mailbox.Node("one@here", handlers=handlers, channel=channel)
            with node.listen(callback=node.handle_message):
                while not stop.is_set():
                    with contextlib.suppress(TimeoutError):
                        connection.drain_events(timeout=0.05)

    thread = threading.Thread(target=serve)
    try:
        with redis.Redis(port=redis_server.port) as client:
            # kombu listens for calls by a pattern.
            patterns = client.pubsub_numpat()
            thread.start()
            wait_until(lambda: client.pubsub_numpat() > patterns, "a worker that listens")
        yield
    finally:
        stop.set()
        thread.join()
        app.close()


def look(settings: SharedSettings, said: list[str]) -> Callable[[], None]:
    """Return what shows a waiting run to a lookout that asks through this broker."""
    lookout = Lookout("tiny", lambda: served_queues(settings), said.append)
    return lambda: lookout.show(WAITING)


def connections(server: RedisServer) -> set[str]:
    """Ids of the connections of codeherd's processes."""
    with redis.Redis(port=server.port) as client:
        return {str(one["id"]) for one in client.client_list() if one["name"] == "codeherd"}


def test_a_redis_without_workers_is_told_of_and_left_without_a_connection(
    broker_url: str, redis_server: RedisServer
) -> None:
    before, said = connections(redis_server), list[str]()
    show = look(SharedSettings.model_validate({"broker_url": broker_url}), said)
    show()

    wait_until(lambda: not _askers(), "the answer")
    show()

    assert [line.partition(":")[0] for line in said] == ["no worker serves tiny"]
    assert connections(redis_server) <= before


def test_a_redis_that_is_away_is_not_told_of() -> None:
    said: list[str] = []
    url = f"redis://127.0.0.1:{free_port()}/0"
    settings = SharedSettings.model_validate({"broker_url": url, "connect_timeout_s": 0.3})
    show = look(settings, said)
    show()

    wait_until(lambda: not _askers(), "the answer")
    show()

    assert said == []
    with pytest.raises(BrokerUnavailable):
        next(served_queues(settings))


@pytest.mark.usefixtures("worker")
def test_a_worker_that_answers_is_not_told_of(broker_url: str) -> None:
    said: list[str] = []
    settings = SharedSettings.model_validate({"broker_url": broker_url})
    show = look(settings, said)
    show()

    wait_until(lambda: not _askers(), "the answer")
    show()

    assert said == []
    assert list(served_queues(settings)) == [{"codeherd.tiny"}]


def test_a_run_that_nobody_works_for_says_so_soon_and_goes_on_when_somebody_does(
    bench: Bench, database_url: str, broker_url: str, tmp_path: Path
) -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "codeherd_producer.cli", "backfill", "docstrings", str(bench.root)],
        cwd=tmp_path,
        env=os.environ | {"CODEHERD_DATABASE_URL": database_url, "CODEHERD_BROKER_URL": broker_url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert run.stderr is not None
        told = next((line for line in run.stderr if not line.startswith("0 of ")), "")
        assert bench.ran == []

        def is_over() -> bool:
            bench.work()
            return run.poll() is not None

        wait_until(is_over, "the run's end")
        patch, rest = run.communicate()
    finally:
        run.kill()

    assert told.startswith("no worker serves tiny: start one with `codeherd worker --model tiny`")
    assert (run.returncode, patch.count("diff --git")) == (0, 2)
    assert f"{TARGETS} docstrings" in rest
    assert "no worker" not in rest
