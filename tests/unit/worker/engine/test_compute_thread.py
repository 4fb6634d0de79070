from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from functools import partial

import pytest

from codeherd_worker.engine.compute_thread import ComputeThread

#: Seconds.
PATIENCE = 30


class Model:
    """Something that a function may hold."""

    def answer(self) -> int:
        return 42


@pytest.fixture
def thread() -> Iterator[ComputeThread]:
    thread = ComputeThread()
    yield thread
    thread.close()


def test_a_function_gives_back_what_it_returns(thread: ComputeThread) -> None:
    assert thread.run(Model().answer) == 42
    assert thread.submit(lambda: "later").result(PATIENCE) == "later"


def test_functions_run_in_the_order_in_which_they_came(thread: ComputeThread) -> None:
    first_may_end, order = threading.Event(), list[int]()
    waiting = thread.submit(lambda: first_may_end.wait(PATIENCE))
    futures = [thread.submit(partial(order.append, number)) for number in range(50)]
    assert not any(future.done() for future in futures)

    first_may_end.set()

    futures[-1].result(PATIENCE)
    assert waiting.result(PATIENCE)
    assert order == [*range(50)]


def test_everything_runs_on_one_thread_whoever_asks(thread: ComputeThread) -> None:
    idents = list[int]()

    def ask() -> None:
        for _ in range(20):
            idents.append(thread.run(threading.get_ident))

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENCE)

    assert len(idents) == 80
    assert len(set(idents)) == 1
    assert idents[0] != threading.get_ident()


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_reaches_the_caller_and_the_thread_goes_on(
    thread: ComputeThread, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        thread.run(fail)

    assert caught.value is error
    assert thread.run(Model().answer) == 42


def test_close_waits_for_what_is_in_line() -> None:
    thread = ComputeThread()
    may_end, done = threading.Event(), list[int]()
    thread.submit(lambda: may_end.wait(PATIENCE))
    for number in range(5):
        thread.submit(partial(done.append, number))
    closer = threading.Thread(target=thread.close)
    closer.start()
    assert done == []

    may_end.set()
    closer.join(PATIENCE)

    assert not closer.is_alive()
    assert done == [0, 1, 2, 3, 4]
    assert not thread._thread.is_alive()


def test_a_process_can_end_though_a_function_never_does(thread: ComputeThread) -> None:
    assert thread._thread.daemon


def test_what_a_function_held_is_released_after_it_ran(thread: ComputeThread) -> None:
    model = Model()
    held = weakref.ref(model)
    thread.run(model.answer)
    del model

    # Its turn comes when the one before is forgotten.
    thread.run(lambda: None)

    assert held() is None


def test_a_future_that_was_given_up_does_not_end_the_thread(thread: ComputeThread) -> None:
    first_may_end = threading.Event()
    thread.submit(lambda: first_may_end.wait(PATIENCE))
    given_up = thread.submit(Model().answer)
    assert given_up.cancel()

    first_may_end.set()

    assert thread.submit(Model().answer).result(PATIENCE) == 42


def test_nothing_can_be_put_in_line_behind_the_end() -> None:
    thread = ComputeThread()
    thread.close()

    with pytest.raises(RuntimeError, match="closed"):
        thread.run(lambda: 1)
