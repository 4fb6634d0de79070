"""Attend with a CPU's kernel over small caches, and say in float64 what should have come out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from codeherd_worker.engine.cache import KEY_BLOCK, SlotCache
from codeherd_worker.engine.cpu_attention import CpuAttention
from codeherd_worker.engine.slot_classes import SlotClass

#: Slots 0 to 3 can be read 512 tokens far, slots 4 and 5 1024.
CLASSES = (SlotClass(300, 4), SlotClass(1000, 2))
SLOTS = 6


def make_cache(*, key_heads: int, head_size: int, layers: int = 1, seed: int = 0) -> SlotCache:
    """A cache that is full of random numbers, other ones in every place."""
    cache = SlotCache(
        CLASSES,
        key_heads=key_heads,
        head_size=head_size,
        dtype=torch.float32,
        layer_devices=[torch.device("cpu")] * layers,
        blocked_keys=True,
    )
    generator = torch.Generator().manual_seed(seed)
    for memory in cache._flat:
        memory.copy_(torch.randn(memory.shape, generator=generator))
    return cache


def keys_of(cache: SlotCache, slot: int, layer: int = 0) -> torch.Tensor:
    """A slot's keys as a view that can be written, (K, blocks, KEY_BLOCK, D); the middle two are tokens."""
    own = _own(cache, slot, layer, 0)
    return own.view(cache.key_heads, -1, cache.head_size, KEY_BLOCK).transpose(2, 3)


def key_at(cache: SlotCache, slot: int, place: int, layer: int = 0) -> torch.Tensor:
    """The keys of one place, (K, D), as a view that can be written."""
    return keys_of(cache, slot, layer)[:, place // KEY_BLOCK, place % KEY_BLOCK]


def values_of(cache: SlotCache, slot: int, layer: int = 0) -> torch.Tensor:
    """A slot's values as a view that can be written, (K, capacity, D)."""
    return _own(cache, slot, layer, 1).view(cache.key_heads, -1, cache.head_size)


def _own(cache: SlotCache, slot: int, layer: int, part: int) -> torch.Tensor:
    start = int(cache.bases[slot])
    count = int(cache.capacities[slot]) * cache.key_heads * cache.head_size
    return torch.from_numpy(cache.arrays(layer)[part])[start : start + count]


def make_joined(tokens: int, heads: int, key_heads: int, head_size: int, seed: int = 1) -> torch.Tensor:
    """Random queries, keys and values side by side, (T, (H + 2 K) * D)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, (heads + 2 * key_heads) * head_size, generator=generator)


def attend(
    cache: SlotCache,
    joined: torch.Tensor,
    slots: Sequence[int],
    positions: Sequence[int],
    places: Sequence[int] | None = None,
    layer: int = 0,
) -> torch.Tensor:
    """Store and attend one pass."""
    heads = joined.shape[1] // cache.head_size - 2 * cache.key_heads
    attention = CpuAttention(cache, heads=heads, scale=cache.head_size**-0.5)
    return attention.over(slots, torch.tensor(positions), places or positions)(layer, joined)


def expected(
    cache: SlotCache, joined: torch.Tensor, slots: Sequence[int], positions: Sequence[int], layer: int = 0
) -> torch.Tensor:
    """What each token attends of what now lies in the cache, (T, H * D) float64."""
    queries, _, _ = cache.split(joined.double())
    group = queries.shape[1] // cache.key_heads
    rows = []
    for query, slot, position in zip(queries, slots, positions, strict=True):
        keys = keys_of(cache, slot, layer).flatten(1, 2)[:, : position + 1].double()
        values = values_of(cache, slot, layer)[:, : position + 1].double()
        scores = torch.einsum("kgd,ktd->kgt", query.view(-1, group, cache.head_size), keys)
        weights = (scores * cache.head_size**-0.5).softmax(-1)
        rows.append(torch.einsum("kgt,ktd->kgd", weights, values).flatten())
    return torch.stack(rows)
