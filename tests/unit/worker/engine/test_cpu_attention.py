from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from codeherd_worker.engine.cache import KEY_BLOCK, SPARE_TOKENS, SlotCache
from codeherd_worker.engine.cpu_attention import CpuAttention, _groups
from tests.unit.worker.engine.attending import (
    SLOTS,
    attend,
    expected,
    key_at,
    keys_of,
    make_cache,
    make_joined,
    values_of,
)

SIZE = 12
#: Query heads, key heads and head size: with whole vectors of a CPU and without.
HEADS = [(2, 2, 12), (2, 2, 64), (6, 2, 12), (6, 2, 64), (5, 1, 20), (5, 1, 4)]


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of threads; two unless a test says otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def one_by_one(joined: torch.Tensor, cache: SlotCache, slot: int, start: int = 0) -> torch.Tensor:
    """Attend neighbouring tokens of a slot in passes of their own."""
    return torch.cat(
        [attend(cache, joined[row : row + 1], [slot], [start + row]) for row in range(len(joined))]
    )


# Bits that depend on nothing


@pytest.mark.parametrize(("heads", "key_heads", "size"), HEADS)
@pytest.mark.parametrize("start", [0, 5, 250])
def test_a_prompt_has_the_bits_of_its_tokens_however_it_is_cut(
    heads: int, key_heads: int, size: int, start: int, threads: Callable[[int], None], rng: random.Random
) -> None:
    count = 75
    joined = make_joined(count, heads, key_heads, size)
    wanted = one_by_one(joined, make_cache(key_heads=key_heads, head_size=size), 1, start)

    for cuts in ([], [32, 64], [1], [31, 33], sorted(rng.sample(range(1, count), 6))):
        threads(rng.choice([1, 2]))
        cache = make_cache(key_heads=key_heads, head_size=size)
        edges = [0, *cuts, count]
        parts = [
            attend(cache, joined[first:last], [1] * (last - first), [*range(start + first, start + last)])
            for first, last in pairwise(edges)
        ]
        assert torch.equal(torch.cat(parts), wanted)


@pytest.mark.parametrize(("heads", "key_heads", "size"), HEADS)
def test_a_tokens_bits_do_not_depend_on_who_shares_its_pass(
    heads: int, key_heads: int, size: int, threads: Callable[[int], None], rng: random.Random
) -> None:
    joined = make_joined(100, heads, key_heads, size)
    # Per slot: which tokens, and where they begin.
    parts = {0: (range(40), 3), 1: (range(40, 41), 511), 3: (range(41, 44), 100), 4: (range(44, 100), 0)}
    wanted = {
        slot: one_by_one(joined[list(rows)], make_cache(key_heads=key_heads, head_size=size), slot, at)
        for slot, (rows, at) in parts.items()
    }

    for _ in range(8):
        threads(rng.choice([1, 2]))
        shared = rng.sample(sorted(parts), rng.randint(1, len(parts)))
        rows = [row for slot in shared for row in parts[slot][0]]
        slots = [slot for slot in shared for _ in parts[slot][0]]
        positions = [parts[slot][1] + place for slot in shared for place in range(len(parts[slot][0]))]
        counts = [len(parts[slot][0]) for slot in shared]

        cache = make_cache(key_heads=key_heads, head_size=size)
        output = attend(cache, joined[rows], slots, positions)

        for slot, own in zip(shared, torch.split(output, counts), strict=True):
            assert torch.equal(own, wanted[slot])


@pytest.mark.parametrize(("heads", "key_heads", "size"), HEADS)
def test_tokens_of_a_slot_may_come_in_any_order(
    heads: int, key_heads: int, size: int, rng: random.Random
) -> None:
    count = 51
    joined = make_joined(count, heads, key_heads, size)
    cache = make_cache(key_heads=key_heads, head_size=size)
    wanted = attend(make_cache(key_heads=key_heads, head_size=size), joined, [1] * count, range(count))

    for order in (rng.sample(range(count), count), [*reversed(range(count))]):
        output = attend(cache, joined[order], [1] * count, order)
        assert torch.equal(output, wanted[order])


@pytest.mark.parametrize(("heads", "key_heads", "size"), HEADS)
@pytest.mark.parametrize("end", [1, 31, 32, 33, 257, 300])
def test_the_same_past_gives_the_same_bits_in_every_slot(
    heads: int, key_heads: int, size: int, end: int
) -> None:
    cache = make_cache(key_heads=key_heads, head_size=size)
    for slot in range(SLOTS):
        cache.copy_prefix(5, slot, end)
    one = make_joined(1, heads, key_heads, size)

    alone = attend(cache, one, [2], [end - 1])
    together = attend(cache, one.repeat(SLOTS, 1), range(SLOTS), [end - 1] * SLOTS)

    assert torch.equal(together, alone.expand_as(together))
    assert torch.equal(attend(cache, one, [5], [end - 1]), alone)


@pytest.mark.parametrize(("heads", "key_heads", "size"), HEADS)
@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_drafts_change_no_bit_of_the_token_before_them(
    heads: int, key_heads: int, size: int, drafts: int
) -> None:
    width, starts = 1 + drafts, {0: 30, 2: 0, 3: 254, 5: 1000}
    joined = make_joined(4 * width, heads, key_heads, size)
    slots = [slot for slot in starts for _ in range(width)]
    positions = [start + step for start in starts.values() for step in range(width)]
    cache = make_cache(key_heads=key_heads, head_size=size)

    output = attend(cache, joined, slots, positions)

    wanted = [
        one_by_one(
            joined[row * width : (row + 1) * width],
            make_cache(key_heads=key_heads, head_size=size),
            slot,
            start,
        )
        for row, (slot, start) in enumerate(starts.items())
    ]
    assert torch.equal(output, torch.cat(wanted))
    torch.testing.assert_close(
        output.double(), expected(cache, joined, slots, positions), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_other_slots_hold_and_ask_changes_no_bit(bad: float) -> None:
    joined = make_joined(9, 6, 2, SIZE)
    slots, positions = [0, 0, 0, 4, 1, 1, 1, 1, 3], [7, 8, 9, 600, 40, 41, 42, 43, 9]
    wanted = attend(make_cache(key_heads=2, head_size=SIZE), joined, slots, positions)
    cache = make_cache(key_heads=2, head_size=SIZE)
    for slot in (0, 2, 3, 4, 5):
        keys_of(cache, slot).fill_(bad)
        values_of(cache, slot).fill_(bad)
    sick = joined.clone()
    sick[[0, 1, 2, 3, 8]] = bad

    output = attend(cache, sick, slots, positions)

    assert torch.equal(output[4:8], wanted[4:8])
    assert not output[[0, 1, 2, 3, 8]].isfinite().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("end", [1, 15, 16, 31, 32, 33, 256, 257])
def test_what_lies_beyond_a_token_in_its_own_slot_changes_no_bit(end: int, bad: float) -> None:
    cache = make_cache(key_heads=2, head_size=SIZE)
    one = make_joined(1, 6, 2, SIZE)
    wanted = attend(cache, one, [1], [end - 1])
    for place in range(end, 512 + SPARE_TOKENS):
        key_at(cache, 1, place).fill_(bad)
    values_of(cache, 1)[:, end:] = bad

    assert torch.equal(attend(cache, one, [1], [end - 1]), wanted)


def test_a_bad_token_reaches_those_after_it_in_its_prompt_and_none_before() -> None:
    joined = make_joined(70, 6, 2, SIZE)
    wanted = attend(make_cache(key_heads=2, head_size=SIZE), joined, [1] * 70, range(70))
    joined[41, -SIZE:] = torch.nan

    output = attend(make_cache(key_heads=2, head_size=SIZE), joined, [1] * 70, range(70))

    assert torch.equal(output[:41], wanted[:41])
    assert output.view(70, 6, SIZE)[41:, 3:].isnan().all()
    # The other key head knows nothing of it.
    assert torch.equal(output.view(70, 6, SIZE)[:, :3], wanted.view(70, 6, SIZE)[:, :3])


# Where things are stored


def memory(cache: SlotCache) -> list[torch.Tensor]:
    """Everything that is kept, per layer and slot: keys, then values, (K, capacity, D) copies."""
    return [
        part
        for layer in range(len(cache.addresses))
        for slot in range(cache.slots)
        for part in (keys_of(cache, slot, layer).flatten(1, 2), values_of(cache, slot, layer).clone())
    ]


@pytest.mark.parametrize(("heads", "key_heads", "size"), HEADS)
def test_a_pass_is_stored_where_it_says_and_nowhere_else(heads: int, key_heads: int, size: int) -> None:
    cache = make_cache(key_heads=key_heads, head_size=size, layers=2)
    before = memory(cache)
    slots = [4, 4, 4, 0, 1, 1, 2, 5]
    positions = [30, 31, 32, 511, 0, 1, 9, 1023]
    # The seventh is an idle row: its place is spare, wherever its sequence was. The eighth is the last spare.
    places = [30, 31, 32, 511, 0, 1, 512, 1024 + SPARE_TOKENS - 1]
    joined = make_joined(8, heads, key_heads, size)

    attend(cache, joined, slots, positions, places, layer=1)

    _, keys, values = cache.split(joined)
    for row, (slot, place) in enumerate(zip(slots, places, strict=True)):
        number = 2 * (SLOTS + slot)
        before[number][:, place] = keys[row]
        before[number + 1][:, place] = values[row]
    assert all(torch.equal(old, new) for old, new in zip(before, memory(cache), strict=True))


def test_padding_touches_nothing_but_its_spare_place() -> None:
    cache = make_cache(key_heads=2, head_size=SIZE)
    before = memory(cache)
    joined = make_joined(64, 6, 2, SIZE)
    joined[40:] = torch.nan
    wanted = attend(make_cache(key_heads=2, head_size=SIZE), joined[:40], [1] * 40, range(40))

    output = attend(cache, joined, [1] * 64, [*range(40), *[39] * 24], [*range(40), *[512] * 24])

    assert torch.equal(output[:40], wanted)
    _, keys, values = cache.split(joined)
    before[2][:, :40] = keys[:40].transpose(0, 1)
    before[3][:, :40] = values[:40].transpose(0, 1)
    before[2][:, 512] = before[3][:, 512] = torch.nan
    for old, new in zip(before, memory(cache), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


def test_a_token_without_a_place_attends_the_first_of_its_slot_alone() -> None:
    cache = make_cache(key_heads=2, head_size=SIZE)
    joined = make_joined(2, 6, 2, SIZE)

    output = attend(cache, joined, [1, 4], [500, 20], [512, 1024 + 5])

    for row, slot in enumerate((1, 4)):
        first = values_of(cache, slot)[:, :1].expand(2, 3, SIZE).flatten()
        torch.testing.assert_close(output[row], first, rtol=1e-6, atol=0)


def test_copied_prefixes_are_attended_in_slots_of_any_length() -> None:
    cache = make_cache(key_heads=2, head_size=SIZE)
    prompt = make_joined(100, 6, 2, SIZE)
    attend(cache, prompt, [0] * 100, range(100))
    after = make_joined(3, 6, 2, SIZE, seed=2)
    wanted = attend(cache, after, [0] * 3, [96, 97, 98])

    for target in (3, 5):
        before = memory(cache)
        cache.copy_prefix(0, target, 96)
        assert torch.equal(attend(cache, after, [target] * 3, [96, 97, 98]), wanted)
        others = [slot for slot in range(SLOTS) if slot != target]
        now = memory(cache)
        assert all(
            torch.equal(before[2 * slot + part], now[2 * slot + part]) for slot in others for part in (0, 1)
        )


def test_slots_that_are_filled_alike_attend_alike_and_wiped_ones_nothing() -> None:
    cache = make_cache(key_heads=2, head_size=SIZE)
    cache.fill_alike(torch.Generator().manual_seed(0))
    one = make_joined(1, 6, 2, SIZE).repeat(SLOTS, 1)
    output = attend(cache, one, range(SLOTS), [511] * SLOTS)
    assert torch.equal(output, output[:1].expand_as(output))
    assert output.any()

    cache.wipe(4)
    # Where it is stored is zero too.
    one[4, 6 * SIZE :] = 0
    after = attend(cache, one, range(SLOTS), [511] * SLOTS)

    assert not after[4].any()
    assert torch.equal(after[[0, 1, 2, 3, 5]], output[[0, 1, 2, 3, 5]])


# Groups


@pytest.mark.parametrize(
    ("slots", "most", "groups"),
    [
        ([3], 32, [(0, 1)]),
        ([0, 1, 2], 8, [(0, 1), (1, 1), (2, 1)]),
        ([2, 2, 2, 2, 2], 2, [(0, 2), (2, 2), (4, 1)]),
        ([5, 5, 5, 0, 1, 1], 2, [(0, 2), (2, 1), (3, 1), (4, 2)]),
        ([0, 0, 0], 1, [(0, 1), (1, 1), (2, 1)]),
    ],
)
def test_neighbours_of_a_slot_stand_together(
    slots: Sequence[int], most: int, groups: list[tuple[int, int]]
) -> None:
    assert [tuple(row) for row in _groups(np.array(slots), most)] == groups


@pytest.mark.parametrize(("heads", "key_heads", "tokens"), [(4, 4, 32), (9, 3, 10), (40, 1, 1), (32, 1, 1)])
def test_as_many_tokens_stand_together_as_there_is_room_for_their_heads(
    heads: int, key_heads: int, tokens: int
) -> None:
    attention = CpuAttention(make_cache(key_heads=key_heads, head_size=4), heads=heads, scale=0.5)

    assert attention.tokens == tokens
    assert attention.queries.shape[1] >= tokens * heads // key_heads
    assert attention.scores.shape[2] % KEY_BLOCK == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_in_and_comes_out_and_is_computed_in_float32(dtype: torch.dtype) -> None:
    joined = make_joined(3, 6, 2, SIZE).to(dtype)
    cache = make_cache(key_heads=2, head_size=SIZE)
    wanted = attend(make_cache(key_heads=2, head_size=SIZE), joined.float(), [1] * 3, [7, 8, 9])

    output = attend(cache, joined, [1] * 3, [7, 8, 9])

    assert output.dtype == dtype
    assert torch.equal(output, wanted.to(dtype))
