from __future__ import annotations

import torch

from codeherd_worker.engine.cache import ROW_ALIGNMENT, SlotCache
from tests.unit.worker.engine.tiny_llama import tiny_config

ROWS, HEADS, HEAD_SIZE, LAYERS = 3, 2, 16, 2


def make_cache(max_len: int = 40, **changes: int) -> SlotCache:
    return SlotCache(
        tiny_config(**changes),
        rows=ROWS,
        max_len=max_len,
        dtype=torch.float32,
        layer_devices=[torch.device("cpu")] * LAYERS,
    )


def test_each_row_is_written_at_its_own_position() -> None:
    cache = make_cache()
    keys = torch.randn(ROWS, HEADS, 1, HEAD_SIZE)
    places = torch.tensor([[5], [0], [39]])

    cache.point(slice(0, ROWS), places, kv_len=40)
    read_keys, read_values = cache.update(keys, -keys, 1)

    for row, place in enumerate(places.flatten().tolist()):
        assert torch.equal(read_keys[row, :, place], keys[row, :, 0])
        assert torch.equal(read_values[row, :, place], -keys[row, :, 0])
    assert read_keys.count_nonzero() == keys.numel()


def test_a_chunk_lands_in_its_slot_and_nowhere_else() -> None:
    cache = make_cache()
    keys = torch.randn(1, HEADS, 4, HEAD_SIZE)

    cache.point(slice(1, 2), torch.tensor([[8, 9, 10, 11]]), kv_len=12)
    read_keys, _ = cache.update(keys, keys, 0)

    assert torch.equal(read_keys[0, :, 8:], keys[0])
    assert not cache.layers[0].keys[[0, 2]].any()
    assert not cache.layers[1].keys.any()


def test_the_spare_position_is_never_read() -> None:
    cache = make_cache()
    keys = torch.full((1, HEADS, 2, HEAD_SIZE), torch.nan)

    spare = torch.full((1, 2), cache.spare_position)
    cache.point(slice(0, 1), spare, kv_len=cache.readable_len)
    read_keys, _ = cache.update(keys, keys, 0)

    assert read_keys.isfinite().all()
    assert cache.layers[0].keys.isnan().any()


def test_reads_are_views_of_the_cache() -> None:
    cache = make_cache()
    keys = torch.randn(1, HEADS, 1, HEAD_SIZE)

    cache.point(slice(2, 3), torch.tensor([[0]]), kv_len=16)
    read_keys, _ = cache.update(keys, keys, 0)

    assert read_keys.untyped_storage().data_ptr() == cache.layers[0].keys.untyped_storage().data_ptr()


def test_rows_are_aligned_and_hold_max_len() -> None:
    cache = make_cache(max_len=41)

    assert cache.readable_len == 48
    assert cache.layers[0].get_max_length() % ROW_ALIGNMENT == 0


def test_an_explicit_head_size_counts() -> None:
    cache = make_cache(head_dim=32)

    assert cache.layers[0].keys.shape[-1] == 32


def test_cache_bytes_are_what_is_allocated() -> None:
    cache = make_cache(max_len=48)

    assert cache.cache_bytes == LAYERS * 2 * ROWS * HEADS * (48 + ROW_ALIGNMENT) * HEAD_SIZE * 4


def test_wipe_empties_one_row() -> None:
    cache = make_cache()
    cache.fill_alike(torch.Generator().manual_seed(0))

    cache.wipe(1)

    assert not cache.layers[0].values[1].any()
    assert cache.layers[0].values[0].any()


def test_fill_alike_makes_rows_equal_and_clear_empties_them() -> None:
    cache = make_cache()

    cache.fill_alike(torch.Generator().manual_seed(0))
    rows = cache.layers[1].keys.clone()
    cache.clear()

    assert torch.equal(rows[0], rows[2])
    assert rows.any()
    assert not cache.layers[1].keys.any()


def test_transformers_is_told_that_nothing_is_counted_here() -> None:
    cache = make_cache()
    cache.point(slice(0, 1), torch.tensor([[3]]), kv_len=16)

    assert cache.layers[0].get_mask_sizes(1) == (16, 0)
    assert cache.get_seq_length() == 0
    assert cache.is_compileable
