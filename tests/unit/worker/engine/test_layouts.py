from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from codeherd_worker.engine.attention import Stretch
from codeherd_worker.engine.cache import KV_BLOCK, SlotCache
from codeherd_worker.engine.layouts import PassLayout, Piece, kv_lengths, lay_out_pass, lay_out_step
from codeherd_worker.engine.slot_classes import SlotClass

CPU = torch.device("cpu")
GRANULE = 4


def make_cache() -> SlotCache:
    """Slots 0 to 2 have 512 readable tokens, slots 3 and 4 have 1024."""
    classes = (SlotClass(32, 3), SlotClass(600, 2))
    return SlotCache(classes, key_heads=1, head_size=2, dtype=torch.float32, layer_devices=[CPU])


def lay_out(*pieces: Piece, pass_lengths: tuple[int, ...] = (4, 8, 12, 16)) -> PassLayout:
    return lay_out_pass(
        pieces,
        make_cache(),
        granule=GRANULE,
        pass_lengths=pass_lengths,
        kv_len_for=lambda tokens, slot: 100 * slot + tokens,
    )


def test_a_piece_is_padded_to_whole_granules_with_tokens_that_nobody_reads() -> None:
    layout = lay_out(Piece(1, (7, 8, 9, 10, 11), 8, ends=True))

    assert layout.token_ids == [7, 8, 9, 10, 11, 0, 0, 0]
    assert layout.positions == [8, 9, 10, 11, 12, 12, 12, 12]
    assert layout.written == [8, 9, 10, 11, 12, 512, 512, 512]
    assert layout.slots == [1] * 8
    assert layout.stretches == [Stretch(1, 0, 8, 113)]
    assert layout.last == [4]


def test_pieces_lie_side_by_side_and_only_those_that_end_are_looked_at() -> None:
    layout = lay_out(
        Piece(3, (5, 6), 0, ends=True), Piece(0, (1, 2, 3, 4), 4, ends=False), Piece(2, (9,), 0, ends=True)
    )

    assert layout.token_ids == [5, 6, 0, 0, 1, 2, 3, 4, 9, 0, 0, 0]
    assert layout.positions == [0, 1, 1, 1, 4, 5, 6, 7, 0, 0, 0, 0]
    assert layout.written == [0, 1, 1024, 1024, 4, 5, 6, 7, 0, 512, 512, 512]
    assert layout.stretches == [Stretch(3, 0, 4, 302), Stretch(0, 4, 8, 8), Stretch(2, 8, 12, 201)]
    assert layout.last == [1, 8]


def test_a_pass_is_padded_to_a_sound_length() -> None:
    pieces = (Piece(0, (1, 2, 3, 4), 0, ends=True), Piece(1, (5,), 0, ends=True))

    layout = lay_out(*pieces, pass_lengths=(4, 16))

    assert len(layout.token_ids) == 16
    assert layout.stretches[1] == Stretch(1, 4, 16, 101)
    assert layout.written[5:] == [512] * 11
    assert layout.last == [3, 4]


@pytest.mark.parametrize(
    ("live", "rows", "slots", "runs"),
    [
        ([], 2, [-1, -1], [(0, 2)]),
        ([1], 1, [1], [(1, 1)]),
        ([0, 2], 2, [0, 2], [(0, 1), (2, 1)]),
        ([4], 2, [-1, 4], [(3, 2)]),
        ([1], 3, [-1, 1, -1], [(0, 3)]),
        ([2, 3], 2, [2, 3], [(2, 1), (3, 1)]),
        ([0, 1, 2, 3, 4], 5, [0, 1, 2, 3, 4], [(0, 3), (3, 2)]),
        ([0, 1, 2], 2, [0, 1, 2], [(0, 3)]),
    ],
)
def test_idle_rows_stand_beside_live_ones_and_runs_stay_within_a_class(
    live: list[int], rows: int, slots: list[int], runs: list[tuple[int, int]]
) -> None:
    layout = lay_out_step(live, rows, make_cache(), CPU)

    assert layout.slots == slots
    assert layout.runs == runs
    assert layout.is_live.tolist() == [slot >= 0 for slot in slots]
    assert layout.advance.tolist() == [int(slot >= 0) for slot in slots]
    covered = [start + place for start, count in runs for place in range(count)]
    assert layout.rows.tolist() == covered
    assert layout.spares.tolist() == [512 if slot < 3 else 1024 for slot in covered]


@pytest.mark.parametrize(
    ("readable_len", "lengths"),
    [(512, (512,)), (1024, (512, 1024)), (1536, (512, 1024, 1536)), (3072, (512, 1024, 2048, 3072))],
)
def test_read_lengths_double_up_to_the_whole_slot(readable_len: int, lengths: tuple[int, ...]) -> None:
    assert kv_lengths(readable_len) == lengths


@pytest.mark.parametrize("readable_len", [512, 4096, 16_384, 16_896, 100_352])
def test_read_lengths_are_few_and_at_most_twice_what_is_needed(readable_len: int) -> None:
    lengths = kv_lengths(readable_len)

    assert all(length % KV_BLOCK == 0 for length in lengths)
    assert lengths[-1] == readable_len
    assert all(length < following <= 2 * length for length, following in pairwise(lengths))
    assert len(lengths) <= 9
