from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeherd_producer.backfill.candidates import Score, best, length_score, likeness, scores


@given(st.text(max_size=80), st.text(max_size=80))
def test_likeness_is_between_none_and_all_and_the_same_from_both_sides(one: str, two: str) -> None:
    assert 0 <= likeness(one, two) <= 1
    assert likeness(one, two) == likeness(two, one)
    assert likeness(one, one) == pytest.approx(1)


def test_likeness_grows_with_what_is_shared() -> None:
    text = "Return the mean of all values."

    rising = [
        likeness(text, other) for other in ("xyz", "Say no.", "Return it all.", "Return the mean.", text)
    ]

    assert rising == sorted(rising)
    assert rising[0] == 0
    assert likeness("a b", "ab") == 1, "spaces do not count"


def test_what_several_samples_say_wins_over_what_one_does() -> None:
    texts = ["Return the mean of values.", "Connect to the server.", "Return the mean of all values."]

    found = scores(texts, [[], [], []], [])

    assert best(texts, found) in (0, 2)
    assert found[1].consensus < min(found[0].consensus, found[2].consensus)


def test_likelihood_is_that_of_a_token_whatever_their_number() -> None:
    short, long = scores(["a", "b"], [[math.log(0.5)] * 2, [math.log(0.5)] * 9], [])

    assert short.likelihood == pytest.approx(0.5)
    assert long.likelihood == pytest.approx(0.5)
    assert scores(["a"], [[]], [])[0] == Score(0.0, 0.0, 1.0)


def test_an_unusual_length_counts_against_a_text_by_doublings() -> None:
    usual = [40, 50, 60, 70, 80, 90, 100, 110]

    assert [length_score(n, usual) for n in (60, 80, 100)] == [1.0, 1.0, 1.0]
    assert length_score(200, usual) == pytest.approx(0.5)
    assert length_score(30, usual) == pytest.approx(0.5)
    assert length_score(0, usual) > 0
    assert length_score(5, []) == 1.0


def test_of_equal_texts_the_shortest_and_first_is_taken() -> None:
    same = Score(0.5, 0.5, 1.0)

    assert best(["bbbb", "bb", "aa"], [same, same, same]) == 1
    assert best(["b", "a"], [same, Score(0.6, 0.5, 1.0)]) == 1
