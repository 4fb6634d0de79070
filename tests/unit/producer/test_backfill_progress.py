from __future__ import annotations

import pytest

from codeherd_producer.commands.backfill_progress import Meter
from codeherd_producer.commands.talk import LINE_EVERY_S
from codeherd_schema.backfills import FileState, Progress, TargetState
from tests.by_hand import HandClock


def progress(*, accepted: int, still_open: int, tokens: int, rejected: int = 0, jobs: int = 0) -> Progress:
    """Return how a run stands that has `jobs` under way."""
    return Progress(
        files=dict.fromkeys(FileState, 0),
        targets={
            TargetState.OPEN: still_open,
            TargetState.ACCEPTED: accepted,
            TargetState.REJECTED: rejected,
        },
        documented=0,
        asked=accepted + jobs,
        ended=accepted,
        tokens=tokens,
    )


def test_speed_and_time_left_are_those_since_the_run_was_taken_up(capsys: pytest.CaptureFixture[str]) -> None:
    clock = HandClock()
    meter = Meter(is_terminal=True, clock=clock)

    # A run that was resumed: what came before says nothing of now.
    meter.show(progress(accepted=100, still_open=300, tokens=50_000))
    clock.now += 60
    meter.show(progress(accepted=120, rejected=10, still_open=270, tokens=53_000, jobs=7))

    first, last = capsys.readouterr().err.split("\r\x1b[K")[1:]
    assert first == "100 of 400 symbols, 100 docstrings, 0 jobs under way, 0 tokens/s"
    # 30 symbols a minute: nine minutes for 270.
    assert last == "130 of 400 symbols, 120 docstrings, 7 jobs under way, 50 tokens/s, 9m0s left"


def test_no_time_is_told_before_anything_is_done_and_when_nothing_is_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = HandClock()
    meter = Meter(is_terminal=True, clock=clock)

    meter.show(progress(accepted=0, still_open=4, tokens=0, jobs=4))
    clock.now += 5
    meter.show(progress(accepted=0, still_open=4, tokens=0, jobs=4))
    clock.now += 5
    meter.show(progress(accepted=4, still_open=0, tokens=80))

    lines = capsys.readouterr().err.split("\r\x1b[K")[1:]
    assert [" left" in line for line in lines] == [False, False, False]
    assert lines[2] == "4 of 4 symbols, 4 docstrings, 0 jobs under way, 8 tokens/s"


def test_without_a_terminal_a_line_comes_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = HandClock()
    meter = Meter(is_terminal=False, clock=clock)

    meter.planned(50)
    meter.show(progress(accepted=0, still_open=10, tokens=0))
    assert capsys.readouterr().err == ""
    clock.now += LINE_EVERY_S
    meter.show(progress(accepted=5, still_open=5, tokens=100))
    meter.show(progress(accepted=6, still_open=4, tokens=120))
    meter.close()

    assert (
        capsys.readouterr().err == "5 of 10 symbols, 5 docstrings, 0 jobs under way, 10 tokens/s, 10s left\n"
    )


def test_a_terminal_is_told_how_many_files_are_planned_and_left_with_an_empty_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    meter = Meter(is_terminal=True, clock=HandClock())

    meter.planned(50)
    meter.planned(80)
    meter.close()

    assert capsys.readouterr().err == "\r\x1b[Kplanned 50 files\r\x1b[Kplanned 80 files\r\x1b[K"


@pytest.mark.parametrize(("is_terminal", "expected"), [(True, "\r\x1b[Kbeside\n"), (False, "beside\n")])
def test_what_is_told_beside_the_progress_stays(
    is_terminal: bool, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Meter(is_terminal=is_terminal, clock=HandClock()).tell("beside")

    assert capsys.readouterr().err == expected
