import threading

from codeherd_worker.engine.stopping import CancelReason
from codeherd_worker.running import Running


def test_a_stop_reaches_the_thread_that_is_busy_and_no_other() -> None:
    running = Running()
    entered, told = threading.Barrier(2), threading.Event()
    seen: list[CancelReason | None] = []

    def busy() -> None:
        running.enter()
        entered.wait(10)
        told.wait(10)
        seen.append(running.current().token.reason)
        running.leave()

    thread = threading.Thread(target=busy)
    thread.start()
    running.enter()
    entered.wait(10)

    assert running.cancel_thread(thread.ident or 0, CancelReason.OPERATOR)
    told.set()
    thread.join(10)
    assert seen == [CancelReason.OPERATOR]
    assert running.current().token.reason is None


def test_a_late_stop_does_not_hit_the_next_job_of_the_thread() -> None:
    running = Running()
    running.enter()
    running.leave()

    assert not running.cancel_thread(threading.get_ident(), CancelReason.OPERATOR)
    running.enter()

    assert running.current().token.reason is None


def test_the_first_reason_wins_and_all_are_told() -> None:
    running = Running()
    running.enter()

    assert running.cancel_all(CancelReason.USER) == 1
    assert running.cancel_all(CancelReason.DRAIN) == 1

    assert running.current().token.reason is CancelReason.USER


def test_only_claimed_jobs_can_be_cancelled_by_id() -> None:
    running = Running()
    running.enter()

    assert not running.cancel_job("some-id", CancelReason.USER)
    assert running.held() == []
