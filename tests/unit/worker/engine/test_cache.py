from __future__ import annotations

import pytest
import torch

from codeherd_worker.engine.cache import KEY_BLOCK, KV_BLOCK, SPARE_TOKENS, SlotCache
from codeherd_worker.engine.slot_classes import SlotClass

HEADS, HEAD_SIZE, LAYERS = 2, 8, 2
#: Slots 0 to 2 hold 40 tokens (512 readable), slots 3 and 4 hold 512, slot 5 holds 700 (1024 readable).
CLASSES = (SlotClass(40, 3), SlotClass(512, 2), SlotClass(700, 1))
SLOTS = 6


@pytest.fixture(params=[False, True], ids=["by token", "blocked"])
def blocked_keys(request: pytest.FixtureRequest) -> bool:
    answer: bool = request.param
    return answer


def make_cache(*, blocked_keys: bool = False, classes: tuple[SlotClass, ...] = CLASSES) -> SlotCache:
    return SlotCache(
        classes,
        key_heads=HEADS,
        head_size=HEAD_SIZE,
        dtype=torch.float32,
        layer_devices=[torch.device("cpu")] * LAYERS,
        blocked_keys=blocked_keys,
    )


def new_tokens(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, count, HEADS, HEAD_SIZE, generator=generator)
    return keys, values


def memory_of(cache: SlotCache, layer: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a slot's keys and values lie, (K, capacity, D) each, whatever a block of keys looks like."""
    keys, values = cache.read(layer, slot, 1, cache.room_of(slot).capacity)
    return keys[0], values[0]


def fill_differently(cache: SlotCache) -> None:
    """Give every number of every slot a value of its own."""
    start = 0
    for layer in range(LAYERS):
        for slot in range(cache.slots):
            for part in memory_of(cache, layer, slot):
                part.copy_(torch.arange(start, start + part.numel(), dtype=part.dtype).view_as(part))
                start += part.numel()


def snapshot(cache: SlotCache, *, blocked_keys: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Everything that is kept, by layer and slot: (K, capacity, D) keys and values."""
    parts = []
    for layer in range(LAYERS):
        for slot in range(cache.slots):
            keys, values = (part.clone() for part in memory_of(cache, layer, slot))
            if blocked_keys:
                blocks = keys.view(HEADS, -1, HEAD_SIZE, KEY_BLOCK)
                keys = blocks.transpose(2, 3).reshape(HEADS, -1, HEAD_SIZE)
            parts.append((keys, values))
    return parts


def assert_equal_but(
    cache: SlotCache,
    before: list[tuple[torch.Tensor, torch.Tensor]],
    places: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]],
    *,
    blocked_keys: bool = False,
) -> None:
    """Compare everything bitwise; at (layer, slot, position) the given (K, D) keys and values stand."""
    for (layer, slot, position), pair in places.items():
        for part, new in zip(before[layer * SLOTS + slot], pair, strict=True):
            part[:, position] = new
    for old, now in zip(before, snapshot(cache, blocked_keys=blocked_keys), strict=True):
        assert torch.equal(old[0], now[0])
        assert torch.equal(old[1], now[1])


def test_a_decode_step_is_written_at_each_slots_own_position_and_nowhere_else() -> None:
    cache = make_cache()
    fill_differently(cache)
    before = snapshot(cache)
    positions = [5, 0, 39, 511, 17, 699]
    keys, values = new_tokens(SLOTS)

    cache.write(1, cache.destinations(torch.tensor(positions)[:, None]), keys, values)

    places = {(1, slot, place): (keys[slot], values[slot]) for slot, place in enumerate(positions)}
    assert_equal_but(cache, before, places)


def test_a_pass_over_some_slots_is_written_in_those_alone() -> None:
    cache = make_cache()
    fill_differently(cache)
    before = snapshot(cache)
    slots, positions = [4, 1], [[8, 9, 10], [0, 1, 2]]
    keys, values = new_tokens(6)

    cache.write(0, cache.destinations(torch.tensor(positions), torch.tensor(slots)), keys, values)

    places = {
        (0, slot, place): (keys[3 * row + column], values[3 * row + column])
        for row, slot in enumerate(slots)
        for column, place in enumerate(positions[row])
    }
    assert_equal_but(cache, before, places)


def test_a_slot_reads_back_what_was_written_whatever_lies_beside() -> None:
    cache = make_cache()
    keys, values = new_tokens(2)

    cache.write(1, cache.destinations(torch.tensor([[3, 4]]), torch.tensor([5])), keys, values)
    read_keys, read_values = cache.read(1, 5, 1, 16)

    assert read_keys.shape == (1, HEADS, 16, HEAD_SIZE)
    assert torch.equal(read_keys[0, :, 3:5], keys.transpose(0, 1))
    assert torch.equal(read_values[0, :, 3:5], values.transpose(0, 1))
    assert read_keys.count_nonzero() == keys.numel()


def test_neighbours_of_a_class_are_read_together_and_as_views() -> None:
    cache = make_cache()
    fill_differently(cache)

    keys, values = cache.read(0, 1, 2, 32)

    assert keys.shape == values.shape == (2, HEADS, 32, HEAD_SIZE)
    for row, slot in enumerate((1, 2)):
        alone = cache.read(0, slot, 1, 32)
        assert torch.equal(keys[row], alone[0][0])
        assert torch.equal(values[row], alone[1][0])
    assert {part.untyped_storage().data_ptr() for part in (keys, values)} == {cache.addresses[0]}


def test_classes_have_the_lengths_that_they_were_given_in_whole_blocks() -> None:
    cache = make_cache()

    rooms = [(room.start, room.end, room.readable_len) for room in cache.rooms]

    assert rooms == [(0, 3, 512), (3, 5, 512), (5, 6, 1024)]
    assert [cache.room_of(slot).readable_len for slot in range(cache.slots)] == [512] * 5 + [1024]
    assert all(room.capacity % SPARE_TOKENS == 0 for room in cache.rooms)
    assert all(room.readable_len % KV_BLOCK == 0 for room in cache.rooms)


@pytest.mark.parametrize(
    ("length", "readable_len"), [(1, 512), (511, 512), (512, 512), (513, 1024), (1024, 1024), (1500, 1536)]
)
def test_a_slot_is_readable_to_the_end_of_its_last_block(length: int, readable_len: int) -> None:
    cache = make_cache(classes=(SlotClass(length, 1),))

    assert cache.rooms[0].readable_len == cache.spare_of(0) == readable_len
    assert cache.rooms[0].capacity == readable_len + SPARE_TOKENS


def test_spare_positions_are_never_read() -> None:
    cache = make_cache()
    bad = torch.full((SLOTS, HEADS, HEAD_SIZE), torch.nan)

    assert cache.spares.tolist() == [cache.spare_of(slot) for slot in range(SLOTS)]
    cache.write(0, cache.destinations(cache.spares[:, None]), bad, bad)

    for room in cache.rooms:
        for part in cache.read(0, room.start, room.end - room.start, room.readable_len):
            assert part.isfinite().all()
    assert sum(int(keys.isnan().sum()) for keys, _ in snapshot(cache)) == bad.numel()


@pytest.mark.parametrize(("source", "target"), [(0, 1), (0, 4), (5, 2), (3, 5), (5, 0)])
@pytest.mark.parametrize(("length", "copied"), [(0, 0), (1, 32), (32, 32), (33, 64), (512, 512)])
def test_a_prefix_is_copied_bit_by_bit_to_a_slot_of_any_class_in_whole_blocks(
    source: int, target: int, length: int, copied: int, blocked_keys: bool
) -> None:
    cache = make_cache(blocked_keys=blocked_keys)
    fill_differently(cache)
    before = snapshot(cache, blocked_keys=blocked_keys)

    cache.copy_prefix(source, target, length)

    places = {
        (layer, target, place): (
            before[layer * SLOTS + source][0][:, place],
            before[layer * SLOTS + source][1][:, place],
        )
        for layer in range(LAYERS)
        for place in range(copied)
    }
    assert_equal_but(cache, before, places, blocked_keys=blocked_keys)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", [0, 1], ids=["keys", "values"])
# The first token, the last that is read, and a spare one.
@pytest.mark.parametrize("place", [0, KV_BLOCK - 1, KV_BLOCK])
def test_a_slot_is_not_finite_where_one_number_is_not(
    place: int, part: int, bad: float, blocked_keys: bool
) -> None:
    cache = make_cache(blocked_keys=blocked_keys)
    fill_differently(cache)
    assert all(cache.is_finite(slot) for slot in range(SLOTS))

    memory_of(cache, LAYERS - 1, 3)[part][HEADS - 1, place, 1] = bad

    assert [slot for slot in range(SLOTS) if not cache.is_finite(slot)] == [3]
    cache.wipe(3)
    assert cache.is_finite(3)


def test_wipe_empties_one_slot_with_its_spare_positions(blocked_keys: bool) -> None:
    cache = make_cache(blocked_keys=blocked_keys)
    fill_differently(cache)
    before = snapshot(cache, blocked_keys=blocked_keys)
    empty = torch.zeros(HEADS, HEAD_SIZE)

    cache.wipe(3)

    places = {
        (layer, 3, place): (empty, empty)
        for layer in range(LAYERS)
        for place in range(cache.room_of(3).capacity)
    }
    assert_equal_but(cache, before, places, blocked_keys=blocked_keys)


def test_fill_alike_makes_slots_equal_and_clear_empties_them(blocked_keys: bool) -> None:
    cache = make_cache(blocked_keys=blocked_keys)

    cache.fill_alike(torch.Generator().manual_seed(0))
    filled = snapshot(cache, blocked_keys=blocked_keys)
    cache.clear()

    for layer in range(LAYERS):
        longest = filled[layer * SLOTS + 5]
        for slot in range(SLOTS):
            for part, other in zip(filled[layer * SLOTS + slot], longest, strict=True):
                assert torch.equal(part, other[:, : part.shape[1]])
                assert part.count_nonzero() == part.numel()
        # Keys and values, and the layers, are not alike: a mix-up must show.
        assert not torch.equal(*longest)
    assert not torch.equal(filled[0][0], filled[SLOTS][0])
    assert not any(part.any() for pair in snapshot(cache, blocked_keys=blocked_keys) for part in pair)


def test_arrays_are_the_same_memory_as_the_slots() -> None:
    cache = make_cache(blocked_keys=True)
    fill_differently(cache)

    for layer in range(LAYERS):
        keys, values = cache.arrays(layer)
        assert keys.size == values.size == cache.cache_bytes // (LAYERS * 2 * 4)
        for slot in range(SLOTS):
            start, capacity = int(cache.bases[slot]), int(cache.capacities[slot])
            assert capacity == cache.room_of(slot).capacity
            for flat, part in zip((keys, values), memory_of(cache, layer, slot), strict=True):
                own = torch.from_numpy(flat[start : start + HEADS * capacity * HEAD_SIZE])
                assert torch.equal(own.view_as(part), part)
    cache.arrays(1)[0][cache.bases[4] + 3] = torch.nan
    assert [slot for slot in range(SLOTS) if not cache.is_finite(slot)] == [4]


def test_spare_places_follow_what_is_read_and_fill_a_block_of_keys() -> None:
    cache = make_cache(blocked_keys=True)

    assert cache.spare_places.tolist() == cache.spares.tolist() == [512] * 5 + [1024]
    assert (cache.capacities - cache.spare_places).tolist() == [SPARE_TOKENS] * SLOTS
    assert SPARE_TOKENS % KEY_BLOCK == KV_BLOCK % KEY_BLOCK == 0


def test_cache_bytes_are_what_is_allocated(blocked_keys: bool) -> None:
    cache = make_cache(blocked_keys=blocked_keys)

    tokens = 5 * (512 + SPARE_TOKENS) + (1024 + SPARE_TOKENS)
    assert cache.cache_bytes == LAYERS * 2 * tokens * HEADS * HEAD_SIZE * 4


def test_addresses_never_change(blocked_keys: bool) -> None:
    cache = make_cache(blocked_keys=blocked_keys)
    before = cache.addresses

    cache.fill_alike(torch.Generator().manual_seed(0))
    cache.copy_prefix(0, 5, 16)
    cache.wipe(2)
    cache.clear()

    assert cache.addresses == before
    assert len(set(before)) == LAYERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_tokens_are_held_in_the_caches_own_dtype(dtype: torch.dtype) -> None:
    cache = SlotCache(
        CLASSES,
        key_heads=HEADS,
        head_size=HEAD_SIZE,
        dtype=dtype,
        layer_devices=[torch.device("cpu")],
    )
    keys, values = (part.bfloat16() for part in new_tokens(1))

    cache.write(0, cache.destinations(torch.tensor([[7]]), torch.tensor([4])), keys, values)

    for part, new in zip(cache.read(0, 4, 1, 8), (keys, values), strict=True):
        assert part.dtype == cache.dtype == dtype
        assert torch.equal(part[0, :, 7], new[0].to(dtype))


def test_each_layer_lies_on_its_own_device() -> None:
    devices = [torch.device("cpu"), torch.device("meta")]
    cache = SlotCache(
        CLASSES, key_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16, layer_devices=devices
    )

    assert [cache.read(layer, 0, 1, 8)[0].device for layer in range(2)] == devices
    assert cache.read(0, 0, 1, 8)[0].dtype == torch.bfloat16
    assert cache.spares.device == devices[0]
