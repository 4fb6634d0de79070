"""What the half-hour soak calls growth."""

from __future__ import annotations

import pytest

from benchmarks.delivery_soak import BOUNDS, FEWEST_LOOKS, Track

#: A figure of each kind as a sound herd has it.
SOUND = {
    "memory, MB": 640.0,
    "file handles": 26.0,
    "threads": 12.0,
    "Redis memory, MB": 1.6,
    "Redis keys": 7.0,
    "Redis clients": 27.0,
    "rows a job": 2.94,
    "database, kB a job": 3.8,
}


def test_every_bound_has_a_figure_here() -> None:
    assert SOUND.keys() == BOUNDS.keys()


@pytest.mark.parametrize("name", BOUNDS)
def test_what_moves_up_and_down_does_not_grow(name: str) -> None:
    _, absolute = BOUNDS[name]

    assert not Track([SOUND[name] + (look % 2) * absolute for look in range(60)]).grew(name)


@pytest.mark.parametrize("name", BOUNDS)
def test_what_warms_up_does_not_grow(name: str) -> None:
    assert not Track([SOUND[name] / 2] * 20 + [SOUND[name]] * 40).grew(name)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_leak_grows(name: str) -> None:
    part, absolute = BOUNDS[name]
    # Twice the bound from one third to the next.
    rise = 2 * (SOUND[name] * part + absolute) / 20

    assert Track([SOUND[name] + look * rise for look in range(60)]).grew(name)


def test_a_short_life_is_not_judged() -> None:
    assert Track([1.0, 1000.0] * (FEWEST_LOOKS // 2 - 1)).growth() is None
