import threading

import pytest

from codeherd_worker.periodic import Periodic


def test_it_acts_again_and_again_even_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []
    enough = threading.Event()

    def act() -> None:
        calls.append(len(calls))
        if len(calls) == 1:
            raise RuntimeError("the first call fails")
        if len(calls) == 3:
            enough.set()

    periodic = Periodic("tick", act, pause_s=lambda: 0.0)
    periodic.start()
    assert enough.wait(30)
    periodic.close()

    assert "periodic_call_failed name=tick" in caplog.text


def test_nothing_is_called_after_it_is_closed() -> None:
    calls: list[int] = []
    periodic = Periodic("tick", lambda: calls.append(1), pause_s=lambda: 3600.0)

    periodic.start()
    periodic.close()

    assert calls == []
