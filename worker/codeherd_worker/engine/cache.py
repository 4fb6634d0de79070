"""Keep the keys and values of every slot in tensors that are allocated once.

Owns: where a token's keys and values lie, for slots of different lengths, and how a prefix is copied from
one slot to another. Does not know which slot is in use, what a position means to the model, or masks:
what must not be attended is never masked out here.

A slot is one row of its class. Its last positions are spare: padding and idle rows write there
(`spare_of`), and no read ever covers them, so whatever lies there cannot reach a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from codeherd_worker.engine.slot_classes import SlotClass

#: Tokens. Slots end at multiples of this many, and torch's attention reads up to them: its CPU kernel sums
#: blocks of 512 keys, and a block that is masked as a whole adds exactly nothing.
KV_BLOCK = 512
#: Keys that lie together, dimension by dimension, for a CPU's kernel: little is read in vain.
KEY_BLOCK = 32
#: Tokens per slot beyond what is read: a whole block of keys. As a multiple of 16 they also keep slots
#: aligned alike: kernels may round differently when the same numbers lie at another alignment.
SPARE_TOKENS = KEY_BLOCK


@dataclass(frozen=True, slots=True)
class Room:
    """Where the slots of one class lie."""

    #: First slot, and one past the last.
    start: int
    end: int
    #: Tokens that a read may cover: the class's length, rounded up to whole blocks.
    readable_len: int

    @property
    def capacity(self) -> int:
        """Tokens per slot with the spare ones."""
        return self.readable_len + SPARE_TOKENS


class SlotCache:
    """The keys and values of all layers and slots."""

    def __init__(
        self,
        classes: Sequence[SlotClass],
        *,
        key_heads: int,
        head_size: int,
        dtype: torch.dtype,
        layer_devices: Sequence[torch.device],
        blocked_keys: bool = False,
    ) -> None:
        """Allocate everything that will ever be needed.

        Args:
            classes: how many slots of which length, in slot order.
            key_heads: K, heads of keys and values.
            head_size: D.
            dtype: in which keys and values are held.
            layer_devices: where each layer computes, in layer order.
            blocked_keys: whether a head's keys lie in blocks of (D, KEY_BLOCK), as `kernels.py` reads and
                writes them, or as (tokens, D), for `write` and `read`.
        """
        self.rooms = tuple(_rooms(classes))
        self.slots = self.rooms[-1].end
        self._room_of = [room for room in self.rooms for _ in range(room.start, room.end)]
        self.key_heads, self.head_size = key_heads, head_size
        self.dtype = dtype
        capacities = torch.tensor([room.capacity for room in self._room_of])
        starts = capacities.cumsum(0) - capacities
        tokens = int(capacities.sum())
        rows = tokens * key_heads
        # (slots, K): the row in which the first token of each slot's head lies.
        bases = starts[:, None] * key_heads + capacities[:, None] * torch.arange(key_heads)
        self._bases = bases.to(layer_devices[0])
        #: (slots,) each: where a slot's numbers begin in `arrays`, its tokens with the spare ones, and the
        #: first spare place.
        self.bases = (starts * key_heads * head_size).numpy()
        self.capacities = capacities.numpy()
        self.spare_places = self.capacities - SPARE_TOKENS
        self._starts: list[int] = starts.tolist()
        #: (slots,) int64, on the first layer's device: `spare_of` each slot.
        self.spares = (capacities - SPARE_TOKENS).to(layer_devices[0])
        # (2, rows, D) per layer: keys and values.
        self._flat = [torch.zeros(2, rows, head_size, dtype=dtype, device=device) for device in layer_devices]
        # The same memory: per layer, for a CPU's kernels.
        self._arrays: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
        if blocked_keys:
            self._arrays = [(flat[0].flatten().numpy(), flat[1].flatten().numpy()) for flat in self._flat]
        # Per room and layer, as (2, slots, K, capacity, D), unless keys are blocked.
        self._tokens = [[self._view(flat, room) for flat in self._flat] for room in self.rooms]
        # Per room and layer, whatever a block of keys looks like: (2, slots, K, blocks, KEY_BLOCK * D).
        self._blocks = [
            [view.view(*view.shape[:3], -1, KEY_BLOCK * head_size) for view in views]
            for views in self._tokens
        ]

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(flat.nbytes for flat in self._flat)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where each layer's memory begins; never changes after the start."""
        return tuple(flat.data_ptr() for flat in self._flat)

    def room_of(self, slot: int) -> Room:
        """Return the class that a slot belongs to."""
        return self._room_of[slot]

    def spare_of(self, slot: int) -> int:
        """Return the position of a slot that no read covers."""
        return self._room_of[slot].readable_len

    def destinations(self, positions: torch.Tensor, slots: torch.Tensor | None = None) -> torch.Tensor:
        """Return where tokens go, for `write`.

        Args:
            positions: (B, S) int64, each token's position in its slot.
            slots: (B,) int64, the slots; None: all of them, in order.
        """
        bases = self._bases if slots is None else self._bases[slots]
        return (bases[:, None] + positions[..., None]).flatten()

    def split(self, joined: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a token's queries (T, H, D), keys and values (T, K, D), which lie side by side."""
        heads = joined.view(len(joined), -1, self.head_size)
        queries = heads.shape[1] - 2 * self.key_heads
        return heads[:, :queries], heads[:, queries : -self.key_heads], heads[:, -self.key_heads :]

    def write(self, layer: int, destination: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store new keys and values, (T, K, D) each, where `destinations` says; no other place changes."""
        keys, values = self._flat[layer]
        size = keys.shape[-1]
        keys.index_copy_(0, destination, key.reshape(-1, size).to(keys.dtype))
        values.index_copy_(0, destination, value.reshape(-1, size).to(values.dtype))

    def read(self, layer: int, start: int, count: int, kv_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of neighbouring slots of one class, (count, K, kv_len, D) each."""
        number, first = self._room_and_row(start)
        keys, values = self._tokens[number][layer][:, first : first + count, :, :kv_len]
        return keys, values

    def arrays(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return all keys and values as they lie, flat, on a CPU in float32."""
        return self._arrays[layer]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another, of whatever class; in whole blocks."""
        blocks = -(-length // KEY_BLOCK)
        for old, new in zip(self._blocks_of(source), self._blocks_of(target), strict=True):
            new[:, :, :blocks].copy_(old[:, :, :blocks])

    def is_finite(self, slot: int) -> bool:
        """Whether a slot holds numbers alone; waits for the device."""
        return all(bool(blocks.isfinite().all()) for blocks in self._blocks_of(slot))

    def wipe(self, slot: int) -> None:
        """Zero one slot. Needed after numbers that are not finite: masked NaN still spreads."""
        for blocks in self._blocks_of(slot):
            blocks.zero_()

    def fill_alike(self, generator: torch.Generator) -> None:
        """Give all slots the same random content, made on the generator's device."""
        longest = max(room.capacity for room in self.rooms) // KEY_BLOCK
        shape = (2, 1, self.key_heads, longest, KEY_BLOCK * self.head_size)
        for views in zip(*self._blocks, strict=True):
            content = torch.randn(shape, generator=generator, device=generator.device)
            for view in views:
                view.copy_(content[:, :, :, : view.shape[3]].expand_as(view))

    def clear(self) -> None:
        """Zero all slots."""
        for flat in self._flat:
            flat.zero_()

    def _view(self, flat: torch.Tensor, room: Room) -> torch.Tensor:
        slots, start = room.end - room.start, self._starts[room.start] * self.key_heads
        part = flat[:, start : start + slots * room.capacity * self.key_heads]
        return part.view(2, slots, self.key_heads, room.capacity, self.head_size)

    def _room_and_row(self, slot: int) -> tuple[int, int]:
        """Return the number of a slot's class, and the slot's number within it."""
        room = self._room_of[slot]
        return self.rooms.index(room), slot - room.start

    def _blocks_of(self, slot: int) -> list[torch.Tensor]:
        """Return a slot's blocks, (2, K, blocks, KEY_BLOCK * D) per layer."""
        number, row = self._room_and_row(slot)
        return [view[:, row] for view in self._blocks[number]]


def _rooms(classes: Sequence[SlotClass]) -> list[Room]:
    rooms, start = [], 0
    for part in classes:
        readable_len = -(-part.length // KV_BLOCK) * KV_BLOCK
        rooms.append(Room(start, start + part.slots, readable_len))
        start += part.slots
    return rooms
