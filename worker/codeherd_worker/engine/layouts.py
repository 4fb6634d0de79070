"""Decide which tokens of which slots are the rows of a pass.

Owns: the shape of a prefill pass with its padding, which slots' rows a decode step has, and how far slots
may be read. Does not compute anything with them (`decode.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

from codeherd_worker.engine.attention import Stretch
from codeherd_worker.engine.cache import KV_BLOCK, SlotCache
from codeherd_worker.engine.uploads import upload


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one prompt, to be prefilled."""

    slot: int
    token_ids: Sequence[int]
    #: Position of the first of them, a multiple of the granule.
    start: int
    #: Whether the prompt ends with this piece: then its first new token is chosen.
    ends: bool

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.token_ids)


@dataclass(slots=True)
class PassLayout:
    """The T tokens of one prefill pass."""

    #: (T) each: what goes in, its place in its sequence, where it is written, and in which slot.
    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)
    #: Index of the last token of each piece that ends.
    last: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StepLayout:
    """The slots that are the B rows of a decode step."""

    #: (B); -1 for idle rows.
    slots: list[int]
    #: Neighbouring slots of one class: first slot, and how many.
    runs: list[tuple[int, int]]
    #: (B,) int64 on the device: the slots, idle ones too.
    rows: torch.Tensor
    #: (B,) bool.
    is_live: torch.Tensor
    #: (B,) int64: 1 for live rows.
    advance: torch.Tensor
    #: (B,) int64: where idle rows write.
    spares: torch.Tensor


def lay_out_pass(
    pieces: Sequence[Piece],
    cache: SlotCache,
    *,
    granule: int,
    pass_lengths: Sequence[int],
    kv_len_for: Callable[[int, int], int],
) -> PassLayout:
    """Put pieces of prompts side by side, each padded to whole granules.

    Args:
        pieces: of different slots.
        cache: says where padding is written.
        granule: tokens.
        pass_lengths: tokens that a pass may have, ascending; the last holds all pieces.
        kv_len_for: from (tokens, slot) to how far the slot is read.
    """
    lengths = [-(-len(piece.token_ids) // granule) * granule for piece in pieces]
    total = sum(lengths)
    # What is missing to the next pass length belongs to the last piece: more padding.
    lengths[-1] += next(length for length in pass_lengths if length >= total) - total
    layout = PassLayout()
    for piece, length in zip(pieces, lengths, strict=True):
        count, begin = len(piece.token_ids), len(layout.token_ids)
        missing = length - count
        layout.token_ids += [*piece.token_ids, *[0] * missing]
        # Padding sits at the position of the last token: it may attend what that may, so no row of the
        # mask is empty, and its place stays inside the model's range.
        layout.positions += [*range(piece.start, piece.end), *[piece.end - 1] * missing]
        layout.written += [*range(piece.start, piece.end), *[cache.spare_of(piece.slot)] * missing]
        layout.slots += [piece.slot] * length
        kv_len = kv_len_for(piece.end, piece.slot)
        layout.stretches.append(Stretch(piece.slot, begin, begin + length, kv_len))
        if piece.ends:
            layout.last.append(begin + count - 1)
    return layout


def lay_out_step(live: Collection[int], rows: int, cache: SlotCache, device: torch.device) -> StepLayout:
    """Choose the slots of a step: the live ones, and idle ones until there are `rows`."""
    chosen = set(live)
    # Idle rows stand beside live ones: neighbours are attended in one call.
    idle = sorted(
        (slot for slot in range(cache.slots) if slot not in chosen),
        key=lambda slot: min((abs(slot - other) for other in live), default=slot),
    )
    chosen |= set(idle[: max(0, rows - len(chosen))])
    slots = sorted(chosen)
    index = upload(slots, device)
    is_live = upload([slot in live for slot in slots], device)
    return StepLayout(
        slots=[slot if slot in live else -1 for slot in slots],
        runs=_neighbours(slots, cache),
        rows=index,
        is_live=is_live,
        advance=is_live.long(),
        spares=cache.spares.to(device)[index],
    )


def kv_lengths(readable_len: int) -> tuple[int, ...]:
    """Return how far slots of this length may be read, ascending.

    Each is a captured graph: few of them, and at most twice what is needed is read.
    """
    doubled = []
    length = KV_BLOCK
    while length < readable_len:
        doubled.append(length)
        length *= 2
    return (*doubled, readable_len)


def _neighbours(slots: Sequence[int], cache: SlotCache) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for slot in slots:
        start, count = runs[-1] if runs else (-1, 0)
        if start + count == slot and runs and cache.room_of(start) is cache.room_of(slot):
            runs[-1] = (start, count + 1)
        else:
            runs.append((slot, 1))
    return runs
