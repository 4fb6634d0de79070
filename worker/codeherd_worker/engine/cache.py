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

import torch

from codeherd_worker.engine.slot_classes import SlotClass

#: Tokens. Reads end at multiples of this many: CPU attention sums blocks of 512 keys, a block that is masked
#: as a whole adds exactly nothing, and a block of another size may round differently.
KV_BLOCK = 512
#: Tokens per slot beyond what is read. A multiple of 16 of them keeps slots aligned alike: CPU kernels may
#: round differently when the same numbers lie at another alignment.
SPARE_TOKENS = 16


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
        is_token_major: bool = False,
    ) -> None:
        """Allocate everything that will ever be needed.

        Args:
            classes: how many slots of which length, in slot order.
            key_heads: K, heads of keys and values.
            head_size: D.
            dtype: in which keys and values are held.
            layer_devices: where each layer computes, in layer order.
            is_token_major: whether a token's heads lie side by side, as CUDA's variable-length kernels
                want, or a head's tokens, which CPU kernels read faster.
        """
        self.rooms = tuple(_rooms(classes))
        self.slots = self.rooms[-1].end
        self._room_of = [room for room in self.rooms for _ in range(room.start, room.end)]
        self._is_token_major = is_token_major
        self._key_heads = key_heads
        self.dtype = dtype
        capacities = torch.tensor([room.capacity for room in self._room_of])
        starts = capacities.cumsum(0) - capacities
        tokens = int(capacities.sum())
        if is_token_major:
            bases, rows, width = starts[:, None], tokens, key_heads * head_size
        else:
            bases = starts[:, None] * key_heads + capacities[:, None] * torch.arange(key_heads)
            rows, width = tokens * key_heads, head_size
        # (slots, 1) or (slots, K): the row in which each slot's, or slot's head's, first token lies.
        self._bases = bases.to(layer_devices[0])
        self._starts: list[int] = starts.tolist()
        #: (slots,) int64, on the first layer's device: `spare_of` each slot.
        self.spares = (capacities - SPARE_TOKENS).to(layer_devices[0])
        # (2, rows, width) per layer: keys and values.
        self._flat = [torch.zeros(2, rows, width, dtype=dtype, device=device) for device in layer_devices]
        # Per room and layer, the same memory as (slots, K, capacity, D).
        self._keys = [[self._view(flat[0], room, head_size) for flat in self._flat] for room in self.rooms]
        self._values = [[self._view(flat[1], room, head_size) for flat in self._flat] for room in self.rooms]

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

    def write(self, layer: int, destination: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store new keys and values, (T, K, D) each, where `destinations` says; no other place changes."""
        keys, values = self._flat[layer]
        width = keys.shape[-1]
        keys.index_copy_(0, destination, key.reshape(-1, width).to(keys.dtype))
        values.index_copy_(0, destination, value.reshape(-1, width).to(values.dtype))

    def read(self, layer: int, start: int, count: int, kv_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of neighbouring slots of one class, (count, K, kv_len, D) each."""
        room = self._room_of[start]
        number, first = self.rooms.index(room), start - room.start
        return (
            self._keys[number][layer][first : first + count, :, :kv_len],
            self._values[number][layer][first : first + count, :, :kv_len],
        )

    def flat(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values as they lie; token-major: (tokens, K * D)."""
        keys, values = self._flat[layer]
        return keys, values

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another, of whatever class."""
        for layer in range(len(self._flat)):
            sources = self.read(layer, source, 1, length)
            for old, new in zip(sources, self.read(layer, target, 1, length), strict=True):
                new.copy_(old)

    def is_finite(self, slot: int) -> bool:
        """Whether a slot holds numbers alone; waits for the device."""
        capacity = self._room_of[slot].capacity
        return all(
            bool(part.isfinite().all())
            for layer in range(len(self._flat))
            for part in self.read(layer, slot, 1, capacity)
        )

    def wipe(self, slot: int) -> None:
        """Zero one slot. Needed after numbers that are not finite: masked NaN still spreads."""
        for layer in range(len(self._flat)):
            for part in self.read(layer, slot, 1, self._room_of[slot].capacity):
                part.zero_()

    def fill_alike(self, generator: torch.Generator) -> None:
        """Give all slots the same random content, made on the generator's device."""
        longest = max(room.capacity for room in self.rooms)
        for layer in range(len(self._flat)):
            pair = (self._keys, self._values)
            for views in pair:
                _, heads, _, size = views[0][layer].shape
                row = torch.randn(heads, longest, size, generator=generator, device=generator.device)
                for room, view in zip(self.rooms, views, strict=True):
                    part = row[:, : room.capacity].to(view[layer].device, view[layer].dtype)
                    view[layer].copy_(part.expand_as(view[layer]))

    def clear(self) -> None:
        """Zero all slots."""
        for flat in self._flat:
            flat.zero_()

    def _view(self, flat: torch.Tensor, room: Room, head_size: int) -> torch.Tensor:
        slots, heads = room.end - room.start, self._key_heads
        start = self._starts[room.start]
        tokens = slots * room.capacity
        if self._is_token_major:
            part = flat[start : start + tokens].view(slots, room.capacity, heads, head_size)
            return part.transpose(1, 2)
        part = flat[start * heads : (start + tokens) * heads]
        return part.view(slots, heads, room.capacity, head_size)


def _rooms(classes: Sequence[SlotClass]) -> list[Room]:
    rooms, start = [], 0
    for part in classes:
        readable_len = -(-part.length // KV_BLOCK) * KV_BLOCK
        rooms.append(Room(start, start + part.slots, readable_len))
        start += part.slots
    return rooms
