"""Attend the slots of a CPU's cache: every token reads the keys that its sequence has, and no others.

Owns: which tokens are attended together, and the memory that the kernel works in. Does not know how the
kernel computes (`kernels.py`), layers' weights or when a pass happens. For GPUs see `attention.py`.

What a token gets does not depend on what shares its pass: tokens stand together only so that keys are read
from memory once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from codeherd_worker.engine.cache import SlotCache
from codeherd_worker.engine.linears import PANEL, has_tiles

#: Queries that read a stretch of keys while it is in a core's own cache.
QUERIES = 32


def workspace_bytes(*, threads: int, window: int) -> int:
    """Return what `CpuAttention` allocates for slots of up to `window` tokens, about."""
    return threads * QUERIES * window * 4


class CpuAttention:
    """What the kernel works in, allocated once; for one pass at a time."""

    def __init__(self, cache: SlotCache, *, heads: int, scale: float) -> None:
        """Allocate.

        Args:
            cache: with keys by dimension.
            heads: H, query heads.
            scale: factor on the scores.
        """
        # Imported here: a GPU's worker needs no compiler.
        from codeherd_worker.engine import compiled, kernels

        self.kernels, self.cache = kernels, cache
        self.heads, self.scale = heads, np.float32(scale)
        self.threads = compiled.usable_threads()
        self.in_tiles = has_tiles() and cache.head_size % PANEL == 0
        group = heads // cache.key_heads
        #: Neighbouring tokens of one slot that are attended together.
        self.tokens = max(1, QUERIES // group)
        shape = (self.threads, self.tokens * group)
        self.queries = np.empty((*shape, cache.head_size), np.float32)
        self.scores = np.empty((*shape, int(cache.capacities.max())), np.float32)
        self.mixed = np.empty((*shape, cache.head_size), np.float32)
        # Of the last pass whose slots came as a tensor: the tensor, and what follows from it.
        self._seated: tuple[torch.Tensor, tuple[NDArray[np.int64], ...]] | None = None

    def over(
        self,
        slots: Sequence[int] | torch.Tensor,
        positions: torch.Tensor,
        places: Sequence[int] | torch.Tensor,
    ) -> CpuPass:
        """Return the attention of one pass.

        Args:
            slots: (T,) int64, each token's slot; a slot's tokens are neighbours.
            positions: (T,) int64, each token's place in its sequence: it attends this one and all before it.
            places: (T,) int64, where in its slot a token is stored. Who is stored at a spare place belongs to
                no sequence, and attends next to nothing.
        """
        own_slots, spares, groups = self._seats(slots)
        own_places = np.asarray(places, np.int64)
        ends = np.where(own_places >= spares, 1, np.asarray(positions, np.int64) + 1)
        return CpuPass(self, own_slots, own_places, ends, groups)

    def _seats(self, slots: Sequence[int] | torch.Tensor) -> tuple[NDArray[np.int64], ...]:
        """Return the slots, where the spare places of each begin, (T,), and the groups."""
        # Decode steps pass the same tensor until a sequence comes or goes; nobody writes to it.
        if self._seated is not None and self._seated[0] is slots:
            return self._seated[1]
        own_slots = np.asarray(slots, np.int64)
        seats = own_slots, self.cache.spare_places[own_slots], _groups(own_slots, self.tokens)
        self._seated = (slots, seats) if isinstance(slots, torch.Tensor) else None
        return seats


class CpuPass:
    """The tokens of one pass; see `forward.Attend`."""

    __slots__ = ("_who", "_work")

    def __init__(self, work: CpuAttention, *who: NDArray[np.int64]) -> None:
        """Hold what `CpuAttention.over` found out."""
        self._work, self._who = work, who

    def __call__(self, layer: int, joined: torch.Tensor) -> torch.Tensor:
        """Store and attend; see `forward.Attend`."""
        work, cache = self._work, self._work.cache
        output = torch.empty(joined.shape[0], work.heads * cache.head_size)
        work.kernels.attend(joined.float().numpy(), *cache.arrays(layer), output.numpy(), *self.arguments)
        return output.to(joined.dtype)

    @property
    def cache(self) -> SlotCache:
        """Whose slots are attended."""
        return self._work.cache

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What `kernels.attend` is told in every layer, after a layer's own arrays."""
        work, cache = self._work, self._work.cache
        return (
            work.heads, cache.key_heads, cache.bases, cache.capacities, work.scale, work.in_tiles,
            work.queries, work.scores, work.mixed, *self._who,
        )  # fmt: skip


def _groups(slots: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return first token and count, (G, 2), of neighbours in one slot, at most so many each."""
    first = np.concatenate(([0], np.flatnonzero(slots[1:] != slots[:-1]) + 1))
    counts = np.diff(first, append=len(slots))
    if counts.max() <= most:
        return np.stack([first, counts], axis=1)
    parts = [
        (start + begin, min(most, count - begin))
        for start, count in zip(first.tolist(), counts.tolist(), strict=True)
        for begin in range(0, count, most)
    ]
    return np.array(parts, np.int64)
