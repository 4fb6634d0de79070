from __future__ import annotations

import pytest
import torch

from codeherd_worker.engine.cache import KV_BLOCK, SPARE_TOKENS, SlotCache
from codeherd_worker.engine.slot_classes import SlotClass

HEADS, HEAD_SIZE, LAYERS = 2, 8, 2
#: Slots 0 to 2 hold 40 tokens (512 readable), slots 3 and 4 hold 512, slot 5 holds 700 (1024 readable).
CLASSES = (SlotClass(40, 3), SlotClass(512, 2), SlotClass(700, 1))
SLOTS = 6


@pytest.fixture(params=[False, True], ids=["head-major", "token-major"])
def is_token_major(request: pytest.FixtureRequest) -> bool:
    answer: bool = request.param
    return answer


def make_cache(
    *, is_token_major: bool = False, classes: tuple[SlotClass, ...] = CLASSES, key_heads: int = HEADS
) -> SlotCache:
    return SlotCache(
        classes,
        key_heads=key_heads,
        head_size=HEAD_SIZE,
        dtype=torch.float32,
        layer_devices=[torch.device("cpu")] * LAYERS,
        is_token_major=is_token_major,
    )


def new_tokens(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, count, HEADS, HEAD_SIZE, generator=generator)
    return keys, values


def fill_differently(cache: SlotCache) -> None:
    """Give every number of every slot a value of its own."""
    for layer in range(LAYERS):
        for number, part in enumerate(cache.flat(layer)):
            count = part.numel()
            start = (2 * layer + number) * count
            part.copy_(torch.arange(start, start + count, dtype=part.dtype).view_as(part))


def snapshot(cache: SlotCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Everything that is kept, by slot and layer: (K, capacity, D) keys and values."""
    return [
        tuple(part[0].clone() for part in cache.read(layer, slot, 1, cache.room_of(slot).capacity))  # type: ignore[misc]
        for layer in range(LAYERS)
        for slot in range(cache.slots)
    ]


def assert_equal_but(
    cache: SlotCache,
    before: list[tuple[torch.Tensor, torch.Tensor]],
    places: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Compare everything bitwise; at (layer, slot, position) the given (K, D) keys and values stand."""
    for (layer, slot, position), pair in places.items():
        for part, new in zip(before[layer * SLOTS + slot], pair, strict=True):
            part[:, position] = new
    for old, now in zip(before, snapshot(cache), strict=True):
        assert torch.equal(old[0], now[0])
        assert torch.equal(old[1], now[1])


def test_a_decode_step_is_written_at_each_slots_own_position_and_nowhere_else(is_token_major: bool) -> None:
    cache = make_cache(is_token_major=is_token_major)
    fill_differently(cache)
    before = snapshot(cache)
    positions = [5, 0, 39, 511, 17, 699]
    keys, values = new_tokens(SLOTS)

    cache.write(1, cache.destinations(torch.tensor(positions)[:, None]), keys, values)

    places = {(1, slot, place): (keys[slot], values[slot]) for slot, place in enumerate(positions)}
    assert_equal_but(cache, before, places)


def test_a_pass_over_some_slots_is_written_in_those_alone(is_token_major: bool) -> None:
    cache = make_cache(is_token_major=is_token_major)
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


def test_a_slot_reads_back_what_was_written_whatever_lies_beside(is_token_major: bool) -> None:
    cache = make_cache(is_token_major=is_token_major)
    keys, values = new_tokens(2)

    cache.write(1, cache.destinations(torch.tensor([[3, 4]]), torch.tensor([5])), keys, values)
    read_keys, read_values = cache.read(1, 5, 1, 16)

    assert read_keys.shape == (1, HEADS, 16, HEAD_SIZE)
    assert torch.equal(read_keys[0, :, 3:5], keys.transpose(0, 1))
    assert torch.equal(read_values[0, :, 3:5], values.transpose(0, 1))
    assert read_keys.count_nonzero() == keys.numel()


def test_head_major_and_token_major_hold_the_same() -> None:
    caches = [make_cache(is_token_major=is_major) for is_major in (False, True)]
    positions = torch.randint(0, 500, (SLOTS, 7), generator=torch.Generator().manual_seed(1))
    # No place twice: which of two writes stays is nobody's promise.
    positions = positions.sort(-1).values + torch.arange(7)
    keys, values = new_tokens(7 * SLOTS)

    for cache in caches:
        cache.write(0, cache.destinations(positions), keys, values)
        cache.copy_prefix(0, 3, 400)
        cache.wipe(1)

    for head_major, token_major in zip(*map(snapshot, caches), strict=True):
        assert torch.equal(head_major[0], token_major[0])
        assert torch.equal(head_major[1], token_major[1])


def test_token_major_memory_has_a_tokens_heads_side_by_side() -> None:
    cache = make_cache(is_token_major=True)
    keys, values = new_tokens(1)

    cache.write(0, cache.destinations(torch.tensor([[2]]), torch.tensor([1])), keys, values)
    flat_keys, flat_values = cache.flat(0)

    row = 1 * (KV_BLOCK + SPARE_TOKENS) + 2
    assert torch.equal(flat_keys[row], keys.flatten())
    assert torch.equal(flat_values[row], values.flatten())


def test_neighbours_of_a_class_are_read_together_and_as_views(is_token_major: bool) -> None:
    cache = make_cache(is_token_major=is_token_major)
    fill_differently(cache)

    keys, values = cache.read(0, 1, 2, 32)

    assert keys.shape == values.shape == (2, HEADS, 32, HEAD_SIZE)
    for row, slot in enumerate((1, 2)):
        alone = cache.read(0, slot, 1, 32)
        assert torch.equal(keys[row], alone[0][0])
        assert torch.equal(values[row], alone[1][0])
    storages = {part.untyped_storage().data_ptr() for part in (keys, values, cache.flat(0)[0])}
    assert len(storages) == 1


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


def test_spare_positions_are_never_read(is_token_major: bool) -> None:
    cache = make_cache(is_token_major=is_token_major)
    bad = torch.full((SLOTS, HEADS, HEAD_SIZE), torch.nan)

    assert cache.spares.tolist() == [cache.spare_of(slot) for slot in range(SLOTS)]
    cache.write(0, cache.destinations(cache.spares[:, None]), bad, bad)

    for room in cache.rooms:
        for part in cache.read(0, room.start, room.end - room.start, room.readable_len):
            assert part.isfinite().all()
    assert sum(int(keys.isnan().sum()) for keys, _ in snapshot(cache)) == bad.numel()


@pytest.mark.parametrize(("source", "target"), [(0, 1), (0, 4), (5, 2), (3, 5)])
def test_a_prefix_is_copied_bit_by_bit_to_a_slot_of_any_class(
    source: int, target: int, is_token_major: bool
) -> None:
    cache = make_cache(is_token_major=is_token_major)
    fill_differently(cache)
    before = snapshot(cache)

    cache.copy_prefix(source, target, 32)

    places = {
        (layer, target, place): (
            before[layer * SLOTS + source][0][:, place],
            before[layer * SLOTS + source][1][:, place],
        )
        for layer in range(LAYERS)
        for place in range(32)
    }
    assert_equal_but(cache, before, places)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", [0, 1], ids=["keys", "values"])
# The first token, the last that is read, and a spare one.
@pytest.mark.parametrize("place", [0, KV_BLOCK - 1, KV_BLOCK])
def test_a_slot_is_not_finite_where_one_number_is_not(
    place: int, part: int, bad: float, is_token_major: bool
) -> None:
    cache = make_cache(is_token_major=is_token_major)
    fill_differently(cache)
    assert all(cache.is_finite(slot) for slot in range(SLOTS))

    cache.read(LAYERS - 1, 3, 1, cache.room_of(3).capacity)[part][0, HEADS - 1, place, 1] = bad

    assert [slot for slot in range(SLOTS) if not cache.is_finite(slot)] == [3]
    cache.wipe(3)
    assert cache.is_finite(3)


def test_wipe_empties_one_slot_with_its_spare_positions(is_token_major: bool) -> None:
    cache = make_cache(is_token_major=is_token_major)
    fill_differently(cache)
    before = snapshot(cache)
    empty = torch.zeros(HEADS, HEAD_SIZE)

    cache.wipe(3)

    places = {
        (layer, 3, place): (empty, empty)
        for layer in range(LAYERS)
        for place in range(cache.room_of(3).capacity)
    }
    assert_equal_but(cache, before, places)


def test_fill_alike_makes_slots_equal_and_clear_empties_them(is_token_major: bool) -> None:
    cache = make_cache(is_token_major=is_token_major)

    cache.fill_alike(torch.Generator().manual_seed(0))
    filled = snapshot(cache)
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
    assert not any(part.any() for pair in snapshot(cache) for part in pair)


def test_cache_bytes_are_what_is_allocated(is_token_major: bool) -> None:
    cache = make_cache(is_token_major=is_token_major)

    tokens = 5 * (512 + SPARE_TOKENS) + (1024 + SPARE_TOKENS)
    assert cache.cache_bytes == LAYERS * 2 * tokens * HEADS * HEAD_SIZE * 4


def test_addresses_never_change(is_token_major: bool) -> None:
    cache = make_cache(is_token_major=is_token_major)
    before = cache.addresses
    keys, values = new_tokens(SLOTS)

    cache.fill_alike(torch.Generator().manual_seed(0))
    cache.write(0, cache.destinations(torch.zeros(SLOTS, 1, dtype=torch.int64)), keys, values)
    cache.copy_prefix(0, 5, 16)
    cache.wipe(2)
    cache.clear()

    assert cache.addresses == before
    assert len(set(before)) == LAYERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_tokens_are_held_in_the_caches_own_dtype(dtype: torch.dtype, is_token_major: bool) -> None:
    cache = SlotCache(
        CLASSES,
        key_heads=HEADS,
        head_size=HEAD_SIZE,
        dtype=dtype,
        layer_devices=[torch.device("cpu")],
        is_token_major=is_token_major,
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

    assert [cache.flat(layer)[0].device for layer in range(2)] == devices
    assert cache.flat(0)[0].dtype == torch.bfloat16
    assert cache.spares.device == devices[0]
