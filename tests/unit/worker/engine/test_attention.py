from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from codeherd_worker.engine.attention import DecodeAttention, PrefillAttention, Run, Stretch
from codeherd_worker.engine.cache import SlotCache
from codeherd_worker.engine.slot_classes import SlotClass

KEY_HEADS, HEAD_SIZE, LAYERS = 2, 16, 2
SCALE = 0.25
GRANULE = 32
#: Slots 0 to 3 hold 128 tokens, slots 4 and 5 hold 640.
CLASSES = (SlotClass(128, 4), SlotClass(640, 2))

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    # With one thread, all rows round alike without our doing.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def make_cache(dtype: torch.dtype = torch.float32, key_heads: int = KEY_HEADS) -> SlotCache:
    """A cache whose slots all have another past."""
    cache = SlotCache(
        CLASSES,
        key_heads=key_heads,
        head_size=HEAD_SIZE,
        dtype=dtype,
        layer_devices=[torch.device("cpu")] * LAYERS,
    )
    generator = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        for room in cache.rooms:
            for part in cache.read(layer, room.start, room.end - room.start, room.capacity):
                part.copy_(torch.randn(part.shape, generator=generator).to(dtype))
    return cache


def make_tokens(
    count: int, group: int, dtype: torch.dtype = torch.float32, key_heads: int = KEY_HEADS, seed: int = 1
) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(count, key_heads * group, HEAD_SIZE, generator=generator)
    key, value = torch.randn(2, count, key_heads, HEAD_SIZE, generator=generator)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def decode(
    cache: SlotCache,
    tokens: Tokens,
    positions: Sequence[Sequence[int]],
    runs: Sequence[Run],
    *,
    rows: int = 1,
    layer: int = 1,
) -> torch.Tensor:
    placed = torch.tensor(positions)
    slots = torch.tensor([slot for run in runs for slot in range(run.start, run.start + run.count)])
    attention = DecodeAttention(
        cache,
        destination=cache.destinations(placed, slots),
        positions=placed,
        runs=runs,
        group=tokens[0].shape[1] // tokens[1].shape[1],
        rows=rows,
        scale=SCALE,
    )
    return attention(layer, torch.cat(tokens, dim=1).flatten(1))


def prefill(
    cache: SlotCache, tokens: Tokens, positions: Sequence[int], stretches: Sequence[Stretch], layer: int = 1
) -> torch.Tensor:
    placed = torch.tensor(positions)
    slots = torch.tensor([part.slot for part in stretches for _ in range(part.start, part.end)])
    attention = PrefillAttention(
        cache,
        destination=cache.destinations(placed[:, None], slots),
        positions=placed,
        stretches=stretches,
        granule=GRANULE,
        group=tokens[0].shape[1] // tokens[1].shape[1],
        scale=SCALE,
    )
    return attention(layer, torch.cat(tokens, dim=1).flatten(1))


def reference(
    cache: SlotCache, query: torch.Tensor, slot: int, position: int, layer: int = 1
) -> torch.Tensor:
    """What one (H, D) token attends, in float64, head by head, from what now lies in the cache."""
    keys, values = (part[0, :, : position + 1].double() for part in cache.read(layer, slot, 1, position + 1))
    group = query.shape[0] // keys.shape[0]
    heads = []
    for number, head in enumerate(query.double()):
        weights = (keys[number // group] @ head * SCALE).softmax(0)
        heads.append(weights @ values[number // group])
    return torch.cat(heads)


def assert_attended(
    cache: SlotCache, output: torch.Tensor, query: torch.Tensor, places: Sequence[tuple[int, int]], tol: float
) -> None:
    expected = torch.stack([reference(cache, q, *place) for q, place in zip(query, places, strict=True)])
    torch.testing.assert_close(output.double(), expected, rtol=tol, atol=tol)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)]
)
@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_a_decode_step_attends_all_that_came_before(group: int, dtype: torch.dtype, tolerance: float) -> None:
    cache = make_cache(dtype)
    tokens = make_tokens(5, group, dtype)
    positions = [0, 63, 100, 17, 600]
    slots = [0, 1, 3, 4, 5]
    runs = [Run(0, 2, 64), Run(3, 1, 128), Run(4, 2, 640)]

    output = decode(cache, tokens, [[place] for place in positions], runs)

    assert output.shape == (5, KEY_HEADS * group * HEAD_SIZE)
    assert_attended(cache, output, tokens[0], list(zip(slots, positions, strict=True)), tolerance)


@pytest.mark.parametrize("group", [1, 3, 4])
def test_a_draft_sees_the_drafts_before_it_and_none_after(group: int) -> None:
    cache = make_cache()
    drafted = 4
    tokens = make_tokens(3 * drafted, group)
    starts = [0, 60, 500]
    slots = [1, 2, 4]
    positions = [[start + step for step in range(drafted)] for start in starts]

    output = decode(cache, tokens, positions, [Run(1, 2, 64), Run(4, 1, 512)], rows=group * drafted)

    places = [(slot, place) for slot, row in zip(slots, positions, strict=True) for place in row]
    assert_attended(cache, output, tokens[0], places, 1e-5)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_a_prefill_pass_attends_each_slot_up_to_each_token(group: int) -> None:
    cache = make_cache()
    tokens = make_tokens(5 * GRANULE, group)
    # Three granules of slot 4 after 480 tokens, one at the start of slot 0, one of slot 2 after 32.
    positions = [*range(480, 576), *range(32), *range(32, 64)]
    stretches = [Stretch(4, 0, 96, 640), Stretch(0, 96, 128, 64), Stretch(2, 128, 160, 64)]

    output = prefill(cache, tokens, positions, stretches)

    slots = [4] * 96 + [0] * 32 + [2] * 32
    assert_attended(cache, output, tokens[0], list(zip(slots, positions, strict=True)), 1e-5)


def test_new_keys_and_values_go_to_their_layer_alone() -> None:
    cache = make_cache()
    before = [part.clone() for part in cache.read(0, 0, 4, cache.rooms[0].capacity)]
    tokens = make_tokens(2, 1)

    decode(cache, tokens, [[9], [11]], [Run(0, 2, 64)], layer=1)

    after = cache.read(0, 0, 4, cache.rooms[0].capacity)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    for row, (slot, place) in enumerate([(0, 9), (1, 11)]):
        keys, values = cache.read(1, slot, 1, 64)
        assert torch.equal(keys[0, :, place], tokens[1][row])
        assert torch.equal(values[0, :, place], tokens[2][row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("drafted", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("key_heads", [1, 3])
def test_equal_rows_give_equal_bits(key_heads: int, group: int, drafted: int, dtype: torch.dtype) -> None:
    cache = make_cache(dtype, key_heads)
    cache.fill_alike(torch.Generator().manual_seed(0))
    one = make_tokens(drafted, group, dtype, key_heads)
    slots = 4
    alike: Tokens = tuple(part.repeat(slots, 1, 1) for part in one)  # type: ignore[assignment]
    positions = [[100 + step for step in range(drafted)]] * slots

    output = decode(cache, alike, positions, [Run(0, slots, 128)]).view(slots, drafted, -1)

    assert torch.equal(output, output[:1].expand_as(output))


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("draft_tokens", [1, 2, 3])
def test_equal_rows_give_equal_bits_beside_room_for_drafts(group: int, draft_tokens: int) -> None:
    cache = make_cache()
    cache.fill_alike(torch.Generator().manual_seed(0))
    alike: Tokens = tuple(part.repeat(4, 1, 1) for part in make_tokens(1, group))  # type: ignore[assignment]

    output = decode(cache, alike, [[100]] * 4, [Run(0, 4, 128)], rows=group * (1 + draft_tokens))

    assert torch.equal(output, output[:1].expand_as(output))


@pytest.mark.parametrize("group", [1, 3, 4])
def test_a_tokens_bits_do_not_depend_on_which_runs_share_its_step(group: int) -> None:
    tokens = make_tokens(4, group)
    positions = [[40], [100], [3], [64]]

    def attended(slots: Sequence[int], runs: Sequence[Run]) -> dict[int, torch.Tensor]:
        index = torch.tensor(slots)
        own: Tokens = tuple(part[index] for part in tokens)  # type: ignore[assignment]
        output = decode(make_cache(), own, [positions[slot] for slot in slots], runs)
        return dict(zip(slots, output, strict=True))

    together = attended([0, 1, 2, 3], [Run(0, 4, 128)])
    alone = {slot: attended([slot], [Run(slot, 1, 128)])[slot] for slot in range(4)}
    split = attended([0, 2, 3], [Run(0, 1, 128), Run(2, 2, 128)])

    for slot in range(4):
        assert torch.equal(together[slot], alone[slot])
    for slot, output in split.items():
        assert torch.equal(output, together[slot])


@pytest.mark.parametrize("group", [1, 3, 4])
def test_room_for_drafts_changes_no_bit_of_a_token_without_them(group: int) -> None:
    rows = group * 4
    tokens = make_tokens(4, group)
    first: Tokens = tuple(part[:1] for part in tokens)  # type: ignore[assignment]

    alone = decode(make_cache(), first, [[50]], [Run(1, 1, 64)], rows=rows)
    drafted = decode(make_cache(), tokens, [[50, 51, 52, 53]], [Run(1, 1, 64)], rows=rows)

    assert torch.equal(alone[0], drafted[0])


@pytest.mark.parametrize("group", [1, 3, 4])
def test_a_granules_bits_do_not_depend_on_what_shares_its_pass(group: int) -> None:
    tokens = make_tokens(4 * GRANULE, group)

    def attended(parts: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Run granules (number, slot, position) together; neighbours of one slot are one stretch."""
        index = torch.cat([torch.arange(n * GRANULE, (n + 1) * GRANULE) for n, _, _ in parts])
        own: Tokens = tuple(part[index] for part in tokens)  # type: ignore[assignment]
        positions = [place for _, _, start in parts for place in range(start, start + GRANULE)]
        stretches: list[Stretch] = []
        for row, (_, slot, _) in enumerate(parts):
            begin, end = row * GRANULE, (row + 1) * GRANULE
            if stretches and stretches[-1].slot == slot:
                begin = stretches.pop().start
            stretches.append(Stretch(slot, begin, end, 128))
        return list(torch.split(prefill(make_cache(), own, positions, stretches), GRANULE))

    whole = attended([(0, 1, 0), (1, 1, 32), (2, 3, 0), (3, 0, 96)])

    assert torch.equal(attended([(0, 1, 0)])[0], whole[0])
    assert torch.equal(attended([(2, 3, 0)])[0], whole[2])
    assert torch.equal(attended([(3, 0, 96), (2, 3, 0)])[0], whole[3])
    assert torch.equal(attended([(2, 3, 0), (0, 1, 0), (1, 1, 32)])[2], whole[1])


def test_what_neighbours_hold_changes_no_bit() -> None:
    tokens = make_tokens(4, 3)
    changed = make_cache()
    for slot in (0, 1, 3):
        for part in changed.read(1, slot, 1, 128):
            part.fill_(torch.nan)

    expected = decode(make_cache(), tokens, [[9], [9], [77], [9]], [Run(0, 4, 128)])
    output = decode(changed, tokens, [[9], [9], [77], [9]], [Run(0, 4, 128)])

    assert torch.equal(output[2], expected[2])
    assert output[[0, 1, 3]].isnan().any()


def test_what_lies_after_a_token_is_not_attended() -> None:
    tokens = make_tokens(2, 2)
    changed = make_cache()
    for part in changed.read(1, 0, 2, 128):
        part[:, :, 41:] = 1e4

    expected = decode(make_cache(), tokens, [[40], [40]], [Run(0, 2, 128)])
    output = decode(changed, tokens, [[40], [40]], [Run(0, 2, 128)])

    assert torch.equal(output, expected)
