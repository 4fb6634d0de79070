from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from codeherd_schema.errors import InvalidSetting
from codeherd_worker.engine.prefixes import Match, PrefixIndex, _Node

GRANULE = 2
# Two tokens and short sequences, so that slots share prefixes most of the time.
ids = st.lists(st.integers(0, 1), max_size=12)
slots = st.integers(0, 3)


def whole(length: int) -> int:
    return length // GRANULE * GRANULE


def common(a: Sequence[int], b: Sequence[int]) -> int:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return whole(length)


def count_nodes(node: _Node) -> int:
    return sum(1 + count_nodes(child) for child in node.children.values())


class SlotsWithPrefixes(RuleBasedStateMachine):
    """The index against a plain table of what each slot holds."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(GRANULE)
        self.table: dict[int, tuple[int, ...]] = {}

    @rule(slot=slots, token_ids=ids)
    def hold(self, slot: int, token_ids: list[int]) -> None:
        self.index.hold(slot, token_ids)
        self.table[slot] = tuple(token_ids[: whole(len(token_ids))])

    @rule(slot=slots, token_ids=ids, chunk=st.integers(1, 5), until=st.integers(0, 12))
    def prefill(self, slot: int, token_ids: list[int], chunk: int, until: int) -> None:
        prompt = tuple(token_ids)
        for length in range(chunk, until + 1, chunk):
            self.index.hold(slot, prompt, length=length)
            self.table[slot] = prompt[: whole(min(length, len(prompt)))]

    @rule(slot=slots)
    def drop(self, slot: int) -> None:
        self.index.drop(slot)
        self.table.pop(slot, None)

    @invariant()
    def each_slot_holds_what_it_was_told(self) -> None:
        for slot in range(4):
            assert self.index.held(slot) == len(self.table.get(slot, ()))

    @invariant()
    def there_is_one_node_for_each_prefix_that_a_slot_holds(self) -> None:
        prefixes = {
            held[:end] for held in self.table.values() for end in range(GRANULE, len(held) + 1, GRANULE)
        }
        assert count_nodes(self.index._root) == len(prefixes)


SlotsWithPrefixes.TestCase.settings = settings(max_examples=50, deadline=None)
test_the_index_agrees_with_a_table = SlotsWithPrefixes.TestCase


@given(
    table=st.dictionaries(slots, ids, min_size=2),
    token_ids=ids,
    limit=st.none() | st.integers(0, 12),
    among=st.none() | st.sets(slots, min_size=1),
)
def test_the_longest_shared_prefix_is_found_in_the_lowest_slot_that_has_it(
    table: dict[int, list[int]], token_ids: list[int], limit: int | None, among: set[int] | None
) -> None:
    index = PrefixIndex(GRANULE)
    for slot, held in table.items():
        index.hold(slot, held)

    lengths = {
        slot: common(token_ids[:limit], held)
        for slot, held in table.items()
        if among is None or slot in among
    }
    length = max(lengths.values(), default=0)
    lowest = min((slot for slot in lengths if lengths[slot] == length), default=0)

    assert index.longest(token_ids, limit=limit, among=among) == (Match(lowest, length) if length else None)


def test_slots_that_are_not_asked_for_are_not_found() -> None:
    index = PrefixIndex(GRANULE)
    index.hold(0, [1, 2, 3, 4])
    index.hold(1, [1, 2, 3, 4])
    index.hold(2, [1, 2])

    assert index.longest([1, 2, 3, 4], among=[1, 2]) == Match(slot=1, length=4)
    assert index.longest([1, 2, 3, 4], among=[2]) == Match(slot=2, length=2)
    assert index.longest([1, 2, 3, 4], among=[]) is None


@given(granule=st.integers(1, 4), a=st.lists(st.integers(0, 1), max_size=40), b=st.data())
def test_shared_counts_the_whole_granules_before_the_first_difference(
    granule: int, a: list[int], b: st.DataObject
) -> None:
    kept = b.draw(st.integers(0, len(a)))
    other = (*a[:kept], *b.draw(st.lists(st.integers(0, 1), max_size=10)))
    index = PrefixIndex(granule)

    lengths = range(0, min(len(a), len(other)) + 1, granule)
    expected = max(length for length in lengths if tuple(a[:length]) == other[:length])

    assert index.shared(a, other) == index.shared(other, a) == expected


def test_a_growing_prefill_costs_its_new_tokens_alone() -> None:
    hashed = 0

    class Token(int):
        def __hash__(self) -> int:
            nonlocal hashed
            hashed += 1
            return int.__hash__(self)

    index = PrefixIndex(GRANULE)
    prompt = tuple(map(Token, range(200)))

    for length in range(GRANULE, len(prompt) + 1, GRANULE):
        index.hold(0, prompt, length=length)

    # Once to look for the node and once to put it there.
    assert hashed == 2 * len(prompt)
    assert index.held(0) == len(prompt)


def test_a_prefix_is_computed_in_chunks_and_can_be_reused_at_once() -> None:
    index = PrefixIndex(32)
    prompt = tuple(range(100))

    index.hold(5, prompt, length=40)
    assert index.longest(prompt) == Match(slot=5, length=32)

    index.hold(5, prompt, length=100)
    assert index.longest(prompt) == Match(slot=5, length=96)
    assert index.longest(prompt, limit=95) == Match(slot=5, length=64)


def test_ids_with_equal_hashes_are_told_apart() -> None:
    # In CPython -1 and -2 have the same hash, and so have tuples of them.
    assert hash((-1, -1)) == hash((-2, -2))
    index = PrefixIndex(2)

    index.hold(0, (-1, -1))

    assert index.longest((-2, -2)) is None


def test_nothing_is_left_of_slots_that_hold_nothing_any_more() -> None:
    index = PrefixIndex(GRANULE)
    for slot in range(4):
        index.hold(slot, [1, 2, 3, 4, slot, slot])

    for slot in range(3):
        index.drop(slot)
    index.hold(3, [1])  # less than a granule is nothing, too

    assert count_nodes(index._root) == 0
    assert index._held == {}


def test_dropping_an_empty_slot_is_nothing() -> None:
    index = PrefixIndex(GRANULE)

    index.drop(3)

    assert index.held(3) == 0


def test_a_granule_without_tokens_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="granule"):
        PrefixIndex(0)
