"""The pool alone: no exception may cost a slot, and a stop reaches the thread that it names."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from codeherd_schema.errors import EngineFailed
from codeherd_worker.engine.stopping import CancelReason
from codeherd_worker.pool import EnginePool
from codeherd_worker.running import Running


class Process:
    """What the pool needs of a worker process, and a record of what it was told."""

    def __init__(self) -> None:
        self.running = Running()
        self.told: list[str] = []

    def terminate(self, ident: int) -> None:
        self.running.cancel_thread(ident, CancelReason.OPERATOR)

    def drain(self) -> None:
        self.told.append("drain")

    def close(self) -> None:
        self.told.append("close")


@pytest.fixture
def process() -> Process:
    return Process()


@pytest.fixture
def pool(process: Process) -> Iterator[EnginePool]:
    pool = EnginePool(limit=1, app=SimpleNamespace(codeherd=process))
    pool.start()
    yield pool
    if pool.active:
        pool.stop()


def run(pool: EnginePool, target: Callable[[], Any]) -> Any:
    """Apply `target` and return what the callback got."""
    got: list[Any] = []
    done = threading.Event()

    def callback(value: Any) -> None:
        got.append(value)
        done.set()

    pool.apply_async(target, callback=callback, accept_callback=lambda pid, at: None)
    assert done.wait(30), "the callback never came: the slot is lost"
    return got[0]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError,
        SystemExit,
        KeyboardInterrupt,
        GeneratorExit,
        asyncio.CancelledError,
        RuntimeError,
        RecursionError,
    ],
)
def test_no_exception_costs_a_slot(pool: EnginePool, error: type[BaseException]) -> None:
    def broken() -> None:
        raise error("as bad as it gets")

    failed = run(pool, broken)
    worked = run(pool, lambda: "fine")

    # Celery reads (failed, ExceptionInfo, seconds), or its own WorkerLostError as bare ExceptionInfo.
    info = failed[1] if isinstance(failed, tuple) else failed
    assert isinstance(info.exception, EngineFailed) or "as bad as it gets" in str(info.exception)
    assert not isinstance(info.exception, SystemExit | KeyboardInterrupt | MemoryError)
    assert worked == "fine"


def test_terminate_stops_what_runs_on_the_named_thread(pool: EnginePool, process: Process) -> None:
    pids: list[int] = []
    started, told = threading.Event(), threading.Event()
    seen: list[CancelReason | None] = []

    def work() -> None:
        started.set()
        told.wait(30)
        seen.append(process.running.current().token.reason)

    done = threading.Event()
    handle = pool.apply_async(
        work, callback=lambda _: done.set(), accept_callback=lambda pid, at: pids.append(pid)
    )
    assert started.wait(30)
    pool.terminate_job(pids[0], 15)
    handle.terminate(15)
    told.set()

    assert done.wait(30)
    assert seen == [CancelReason.OPERATOR]


def test_a_stop_drains_first_and_closes_after_the_last_task(pool: EnginePool, process: Process) -> None:
    order: list[str] = process.told
    entered, free = threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        free.wait(30)
        order.append("task")

    pool.apply_async(work, callback=lambda _: None, accept_callback=lambda pid, at: None)
    assert entered.wait(30)
    pool.close()
    free.set()
    pool.stop()

    assert order == ["drain", "task", "close"]
