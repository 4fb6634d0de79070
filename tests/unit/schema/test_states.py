from __future__ import annotations

import re

import pytest

from codeherd_schema import states
from codeherd_schema.states import FINAL_STATES, MOVES, JobState, Move, sources, target


def test_every_move_leads_to_one_state() -> None:
    for move in Move:
        assert {to for (name, _), to in MOVES.items() if name is move} == {target(move)}
        assert sources(move)


def test_every_state_can_be_reached_from_queued() -> None:
    reached = {JobState.QUEUED}
    for _ in JobState:
        reached |= {to for (_, source), to in MOVES.items() if source in reached}

    assert reached == set(JobState)


def test_final_states_are_left_by_requeue_alone() -> None:
    assert {
        state for state in JobState if all(move is Move.REQUEUE for move in leaving(state))
    } == FINAL_STATES


def test_succeeded_is_never_left() -> None:
    assert leaving(JobState.SUCCEEDED) == set()


def leaving(state: JobState) -> set[Move]:
    return {move for move, source in MOVES if source is state}


def test_only_a_claim_makes_a_job_run() -> None:
    assert [key for key, to in MOVES.items() if to is JobState.RUNNING] == [(Move.CLAIM, JobState.QUEUED)]


@pytest.mark.parametrize(("move", "source"), MOVES)
def test_drawing_in_the_docstring_shows_the_move(move: Move, source: JobState) -> None:
    assert states.__doc__ is not None
    arrows = re.findall(rf"\b{move}\b ─+> (\w+)", states.__doc__)

    assert MOVES[move, source] in arrows


def test_drawing_shows_no_other_move() -> None:
    assert states.__doc__ is not None
    drawn = set(re.findall(r"\b(\w+) ─+> (\w+)", states.__doc__))

    assert drawn == {(str(move), str(to)) for (move, _), to in MOVES.items()}
