from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeherd_schema.errors import InvalidSetting
from codeherd_worker.engine.drafts import PromptLookup

# Three tokens, so that n-grams occur again and again.
ids = st.lists(st.integers(0, 2), max_size=40)


def search(sequence: Sequence[int], count: int, longest: int, shortest: int) -> list[int]:
    """The same drafts without an index: try each n-gram size at each position."""
    for size in range(longest, shortest - 1, -1):
        for start in range(len(sequence) - size - 1, -1, -1):
            if sequence[start : start + size] == sequence[len(sequence) - size :]:
                return list(sequence[start + size : start + size + count])
    return []


@given(prompt=ids, generated=st.lists(ids, max_size=4), count=st.integers(0, 6), sizes=st.data())
def test_drafts_equal_a_search_through_the_whole_sequence(
    prompt: list[int], generated: list[list[int]], count: int, sizes: st.DataObject
) -> None:
    longest = sizes.draw(st.integers(1, 4))
    shortest = sizes.draw(st.integers(1, longest))
    lookup = PromptLookup(prompt, longest=longest, shortest=shortest)
    said = list(prompt)

    for token_ids in generated:
        lookup.extend(token_ids)
        said += token_ids
        assert lookup.propose(count) == search(said, count, longest, shortest)


@given(prompt=ids, generated=ids)
def test_a_draft_does_not_depend_on_when_drafts_were_asked_for(
    prompt: list[int], generated: list[int]
) -> None:
    asked_early, asked_late = PromptLookup(prompt), PromptLookup(prompt)

    asked_early.propose(3)
    for token_id in generated:
        asked_early.extend([token_id])
        asked_early.propose(1)
    asked_late.extend(generated)

    assert asked_early.propose(3) == asked_late.propose(3) == PromptLookup(prompt + generated).propose(3)


def test_the_longest_ngram_decides_before_a_later_short_one() -> None:
    lookup = PromptLookup([1, 2, 3, 40, 3, 50, 1, 2, 3])

    assert lookup.propose(1) == [40]


def test_of_two_occurrences_the_later_one_is_copied() -> None:
    lookup = PromptLookup([7, 8, 40, 7, 8, 50, 7, 8])

    assert lookup.propose(1) == [50]


def test_a_draft_ends_where_the_sequence_ends() -> None:
    assert PromptLookup([1, 2, 1, 2]).propose(5) == [1, 2]


@pytest.mark.parametrize("prompt", [[], [5], [1, 2, 3, 4]])
def test_without_a_repetition_there_is_no_draft(prompt: list[int]) -> None:
    assert PromptLookup(prompt).propose(3) == []


def test_the_prompt_of_the_caller_is_left_alone() -> None:
    prompt = [1, 2, 1]
    lookup = PromptLookup(prompt)

    lookup.extend([2])

    assert prompt == [1, 2, 1]


def test_an_index_has_at_most_one_entry_per_size_and_token() -> None:
    lookup = PromptLookup(range(100), longest=3, shortest=1)

    lookup.propose(1)
    lookup.extend(range(100, 200))

    assert sorted(lookup._ends) == [1, 2, 3]
    assert all(len(ends) <= 200 for ends in lookup._ends.values())


@pytest.mark.parametrize(("longest", "shortest"), [(0, 0), (3, 0), (1, 2)])
def test_impossible_ngram_sizes_are_refused(longest: int, shortest: int) -> None:
    with pytest.raises(InvalidSetting, match="n-grams"):
        PromptLookup([1], longest=longest, shortest=shortest)
