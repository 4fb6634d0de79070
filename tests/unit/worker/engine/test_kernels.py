from __future__ import annotations

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from codeherd_worker.engine import kernels
from codeherd_worker.engine.cpu_attention import QUERIES
from codeherd_worker.engine.kernels import _STRETCH, LANES
from tests.unit.worker.engine.attending import (
    attend,
    expected,
    key_at,
    keys_of,
    make_cache,
    make_joined,
    values_of,
)

#: Heads, key heads, head size: multi-head, grouped and multi-query, more query heads than a group holds too.
SHAPES = [
    (1, 1, 4),
    (4, 4, 4),
    (3, 3, 128),
    (6, 2, 16),
    (9, 3, 64),
    (8, 2, 20),
    (5, 1, 12),
    (QUERIES, 1, 8),
    (QUERIES + 3, 1, 8),
    (2, 2, 100),
]
#: How many tokens are attended: around whole lanes, blocks of keys and stretches of values.
ENDS = [1, 2, LANES - 1, LANES, LANES + 1, 31, 32, 33, 63, _STRETCH, _STRETCH + 1, 511, 512]


def assert_near(output: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(output.double(), wanted, rtol=tolerance, atol=tolerance)


@numba.njit
def _exp_of_all(values, output):  # type: ignore[no-untyped-def]
    for place in range(values.shape[0]):
        output[place] = kernels.exp(values[place])


def exp(values: NDArray[np.float32]) -> NDArray[np.float64]:
    output = np.empty_like(values)
    _exp_of_all(values, output)
    return output.astype(np.float64)


def test_exp_is_right_to_the_last_places() -> None:
    values = np.linspace(-87, 0, 300_001).astype(np.float32)

    error = np.abs(exp(values) / np.exp(values.astype(np.float64)) - 1)

    assert error.max() < 3e-7


def test_exp_of_special_numbers() -> None:
    smallest = np.exp(np.float64(-87))
    values = np.array([0.0, -0.0, -87.5, -1e30, -np.inf, np.nan], np.float32)

    output = exp(values)

    assert output[:2].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(output[2:5], smallest, rtol=3e-7)
    assert np.isnan(output[5])


@pytest.mark.parametrize(("heads", "key_heads", "size"), SHAPES)
def test_a_token_attends_all_that_came_before(heads: int, key_heads: int, size: int) -> None:
    cache = make_cache(key_heads=key_heads, head_size=size)
    slots = [slot % 6 for slot in range(len(ENDS))]
    joined = make_joined(len(ENDS), heads, key_heads, size)

    for row, end in enumerate(ENDS):
        one = joined[row : row + 1]
        output = attend(cache, one, [slots[row]], [end - 1])
        assert_near(output, expected(cache, one, [slots[row]], [end - 1]))


@pytest.mark.parametrize(("heads", "key_heads", "size"), SHAPES)
def test_slots_of_all_lengths_are_attended_in_one_pass(heads: int, key_heads: int, size: int) -> None:
    cache = make_cache(key_heads=key_heads, head_size=size)
    slots, positions = [5, 0, 3, 4, 1], [1023, 511, 0, 700, 32]
    joined = make_joined(5, heads, key_heads, size)

    output = attend(cache, joined, slots, positions)

    assert output.shape == (5, heads * size)
    assert_near(output, expected(cache, joined, slots, positions))


@pytest.mark.parametrize("tokens", [2, 3, 31, 32, 33, 45])
@pytest.mark.parametrize("start", [0, 17, _STRETCH - 3, 480])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 4, 8), (6, 2, 16), (5, 1, 12)])
def test_the_tokens_of_a_prompt_see_each_other_in_order(
    tokens: int, start: int, heads: int, key_heads: int, size: int
) -> None:
    cache = make_cache(key_heads=key_heads, head_size=size)
    joined = make_joined(2 * tokens, heads, key_heads, size)
    slots = [4] * tokens + [2] * tokens
    positions = [*range(start, start + tokens), *range(tokens)]

    output = attend(cache, joined, slots, positions)

    assert_near(output, expected(cache, joined, slots, positions))


#: Where all numbers of a score are exact, whatever its size: one dimension counts, in powers of two.
_SIZE = 16


def attend_scores(scores: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a token attends whose scores are these, and the values, (T, D)."""
    cache = make_cache(key_heads=1, head_size=_SIZE)
    last = len(scores) - 1
    joined = make_joined(1, 1, 1, _SIZE)
    queries, keys, _ = cache.split(joined)
    queries.zero_()
    keys.zero_()
    keys_of(cache, 0).zero_()
    queries[0, 0, 5] = 4.0
    for place, score in enumerate(scores):
        key_at(cache, 0, place)[0, 5] = score
    keys[0, 0, 5] = scores[last]
    output = attend(cache, joined, [0], [last])
    return output[0], values_of(cache, 0)[0, : len(scores)]


@pytest.mark.parametrize("score", [0.0, 1e4, -1e4, 1e30, -1e30, 2.9e38, -2.9e38])
@pytest.mark.parametrize("length", [1, 37, 300])
def test_equal_scores_weigh_alike_however_large(score: float, length: int) -> None:
    output, values = attend_scores([score] * length)

    assert_near(output, values.double().mean(0))


@pytest.mark.parametrize("low", [-100.0, -1e4, -1e30, -2.9e38])
@pytest.mark.parametrize("place", [0, 15, 16, 40])
def test_a_score_that_dominates_takes_everything(low: float, place: int) -> None:
    scores = [low] * 41
    scores[place] = 50.0

    output, values = attend_scores(scores)

    assert_near(output, values[place].double(), 1e-6)


@pytest.mark.parametrize(
    "scores", [[1e4, 1e4 - 1, -1e4, 1e4 - 3, 0.0], [-1e4, -1e4 - 1, -1e4 - 3], [-200.0, -202.0] * 20]
)
def test_large_scores_are_weighed_by_their_difference(scores: list[float]) -> None:
    output, values = attend_scores(scores)

    weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
    assert_near(output, weights @ values.double())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 31, 32, 250, 299])
def test_bad_values_that_are_attended_are_not_hidden(bad: float, place: int) -> None:
    heads, key_heads, size = 4, 2, 8
    cache = make_cache(key_heads=key_heads, head_size=size)
    joined = make_joined(1, heads, key_heads, size)
    before = attend(cache, joined, [1], [300])
    values_of(cache, 1)[1, place, 3] = bad

    output = attend(cache, joined, [1], [300])

    is_bad = ~output.view(heads, size).isfinite()
    assert is_bad.nonzero().tolist() == [[2, 3], [3, 3]]
    assert torch.equal(output.view(heads, size)[~is_bad], before.view(heads, size)[~is_bad])


@pytest.mark.parametrize("place", [0, 15, 16, 31, 32, 250, 299])
def test_a_key_that_is_no_number_is_not_hidden(place: int) -> None:
    heads, key_heads, size = 4, 2, 8
    cache = make_cache(key_heads=key_heads, head_size=size)
    joined = make_joined(1, heads, key_heads, size)
    before = attend(cache, joined, [1], [299])
    key_at(cache, 1, place)[1, 3] = torch.nan
    if place == 299:
        # The token's own key: stored first, then attended.
        cache.split(joined)[1][0, 1, 3] = torch.nan

    output = attend(cache, joined, [1], [299])

    assert output[0, 2 * size :].isnan().all()
    assert torch.equal(output[0, : 2 * size], before[0, : 2 * size])


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
def test_an_infinite_key_is_bad_for_every_query_that_it_suits(bad: float) -> None:
    heads, size = 8, 8
    cache = make_cache(key_heads=1, head_size=size)
    joined = make_joined(1, heads, 1, size)
    key_at(cache, 1, 77)[0, 3] = bad

    output = attend(cache, joined, [1], [299]).view(heads, size)

    suits = cache.split(joined)[0][0, :, 3] * bad > 0
    assert 0 < suits.sum() < heads
    assert not output[suits].isfinite().any()
    # To all others it is infinitely far: its weight is nothing, as in torch.
    assert_near(output[~suits], expected(cache, joined, [1], [299]).view(heads, size)[~suits])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_query_that_is_not_finite_is_not_hidden(bad: float) -> None:
    heads, key_heads, size = 4, 2, 8
    cache = make_cache(key_heads=key_heads, head_size=size)
    joined = make_joined(1, heads, key_heads, size)
    before = attend(cache, joined, [1], [299])
    joined[0, size + 3] = bad

    output = attend(cache, joined, [1], [299]).view(heads, size)

    assert not output[1].isfinite().any()
    assert torch.equal(output[[0, 2, 3]], before.view(heads, size)[[0, 2, 3]])


def test_where_all_scores_are_infinitely_low_nothing_is_made_up() -> None:
    output, _ = attend_scores([-torch.inf] * 3)

    assert not output.isfinite().any()
