from __future__ import annotations

import pytest

from codeherd_producer.dispatcher import (
    LONGEST_REST_S,
    MOST_PATIENCE,
    Rest,
    half_empty_in_s,
    patience,
    room_for,
)


def test_rests_double_up_to_a_limit_and_start_again_after_a_success() -> None:
    rest = Rest(first_s=0.5)

    assert [rest.longer(now=0) for _ in range(6)] == [0.5, 1, 2, 4, LONGEST_REST_S, LONGEST_REST_S]
    assert rest.end()
    assert rest.longer(now=0) == 0.5


def test_a_rest_is_over_after_its_seconds() -> None:
    rest = Rest(first_s=0.5)
    assert rest.is_over(now=0)

    rest.longer(now=10)

    assert not rest.is_over(now=10.4)
    assert rest.is_over(now=10.5)


def test_success_after_success_is_no_news() -> None:
    rest = Rest(first_s=0.5)

    assert not rest.end()
    rest.longer(now=0)
    assert rest.is_on
    assert [rest.end(), rest.end(), rest.is_on] == [True, False, False]


@pytest.mark.parametrize(
    ("waiting", "room"),
    [
        ((0, 0, 0, 0), (10, 9)),
        ((1, 2, 3, 0), (4, 9)),
        # Full of what is not urgent: the rest may still come, the most of it first.
        ((0, 0, 0, 10), (10, 8)),
        ((0, 1, 0, 15), (9, 8)),
        ((0, 4, 6, 0), (6, 5)),
        ((3, 9, 0, 0), (7, 2)),
        ((10, 0, 0, 0), (0, 0)),
        ((12, 9, 9, 9), (0, 0)),
    ],
)
def test_what_fills_the_window_holds_up_nothing_more_urgent(
    waiting: tuple[int, ...], room: tuple[int, int]
) -> None:
    assert room_for(waiting, 10) == room


def test_patience_doubles_with_each_lost_hint_up_to_a_limit() -> None:
    assert [patience(losses) for losses in (0, 1, 2, 3, 4, 10_000)] == [1, 2, 4, 8, 8, MOST_PATIENCE]


@pytest.mark.parametrize(
    ("taken", "since_s", "half_empty_after_s"),
    [
        # Of a window of 64: 32 in as long as it took; all of it: at least twice as fast.
        (32, 0.5, 0.5),
        (64, 0.5, 0.25),
        (1, 0.5, 16),
        # Filled for the first time.
        (64, 0, 0),
    ],
)
def test_the_next_look_comes_when_half_of_the_window_is_taken(
    taken: int, since_s: float, half_empty_after_s: float
) -> None:
    assert half_empty_in_s(taken, since_s, 64) == half_empty_after_s
