"""Attend the slots of the static cache with torch's kernels, each token what its sequence has up to it.

On GPUs, and on CPUs for heads that our own loops do not take (`cpu_attention.py`).

Owns: how queries meet the cache and what each may see, so that a token's bits depend neither on its
neighbours nor on which thread computes it. Does not know layers' weights or when a pass happens.

Every kernel call has one of two shapes, however many sequences take part:
    decode    neighbouring slots of a class, S tokens each (one, or a token and its drafts)
    prefill   the granules of one slot, G tokens each, every granule a row of its own batch

The query heads that share a key head become query rows: keys are neither repeated nor copied. Measured
with torch 2.13: its CPU attention rounds the rows of a batch differently when the number of query rows
per key head is odd (1 and 3; float32, float16; 2, 3 and 8 threads), never when it is even. The likely
cause is the alignment of each thread's stretch of one scratch buffer. A repeated query row makes every
number even; it reads no key twice. On a CPU all of it is float32, whatever the weights are: for 16-bit
numbers torch chooses between kernels by batch and length. `probes.py` tries whether all this holds here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from codeherd_worker.engine.cache import SlotCache


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring slots of one class within a decode step."""

    #: First slot.
    start: int
    count: int
    #: How far these slots are read.
    kv_len: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Whole granules of one slot within a prefill pass."""

    slot: int
    #: Index of the first token within the pass, and one past the last.
    start: int
    end: int
    #: How far the slot is read.
    kv_len: int


class DecodeAttention:
    """One decode step: every run of slots is attended in one kernel call per layer."""

    def __init__(
        self,
        cache: SlotCache,
        *,
        destination: torch.Tensor,
        positions: torch.Tensor,
        runs: Sequence[Run],
        group: int,
        rows: int,
        scale: float,
    ) -> None:
        """Prepare the masks.

        Args:
            cache: where keys and values are.
            destination: what `SlotCache.destinations` gave for the step's tokens, on the device.
            positions: (B, S) int64, each token's place: it attends this one and all before it.
            runs: which slots take part, B in all, in order.
            group: query heads per key head.
            rows: fewest query rows per key head; repeated rows fill up to an even number.
            scale: factor on the scores.
        """
        self._cache, self._destination, self._scale = cache, destination, scale
        self._group = group
        self._drafted = positions.shape[1]
        wanted = max(rows, group * self._drafted)
        self._rows = wanted + wanted % 2
        # Per run: its slots, its rows of the batch, its mask.
        self._parts: list[tuple[Run, slice, torch.Tensor]] = []
        start = 0
        for run in runs:
            batch = slice(start, start + run.count)
            start += run.count
            mask = _mask(positions[batch], run.kv_len, cache.dtype, group, self._rows)
            self._parts.append((run, batch, mask))
        self._moved = _Moved()

    def __call__(self, layer: int, joined: torch.Tensor) -> torch.Tensor:
        """Store and attend; see `forward.Attend`."""
        cache = self._cache
        query, key, value = cache.split(joined)
        cache.write(layer, self._moved.to(self._destination, key.device), key, value)
        _, heads, size = query.shape
        key_heads, group = key.shape[1], self._group
        drafted, outputs = self._drafted, []
        queries = query.view(-1, drafted, key_heads, group, size)
        for run, batch, mask in self._parts:
            # (B, S, K, group, D) -> (B, K, group * S, D)
            folded = queries[batch].permute(0, 2, 3, 1, 4).reshape(run.count, key_heads, -1, size)
            keys, values = cache.read(layer, run.start, run.count, run.kv_len)
            moved = self._moved.to(mask, key.device)
            output = _attend(folded, keys, values, moved, self._rows, self._scale)
            output = output.reshape(run.count, key_heads, group, drafted, size).permute(0, 3, 1, 2, 4)
            outputs.append(output.reshape(-1, heads * size))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class PrefillAttention:
    """One prefill pass: every stretch is attended in one kernel call per layer."""

    def __init__(
        self,
        cache: SlotCache,
        *,
        destination: torch.Tensor,
        positions: torch.Tensor,
        stretches: Sequence[Stretch],
        granule: int,
        group: int,
        scale: float,
    ) -> None:
        """Prepare the masks.

        Args:
            cache: where keys and values are.
            destination: as for `DecodeAttention`.
            positions: (T,) int64, each token's place in its sequence.
            stretches: which tokens belong to which slot, all T of them, in order.
            granule: G, tokens that are attended as one row of the batch; even.
            group: query heads per key head.
            scale: factor on the scores.
        """
        self._cache, self._destination, self._scale = cache, destination, scale
        self._stretches, self._granule, self._group = stretches, granule, group
        self._masks = [
            _mask(
                positions[part.start : part.end].view(-1, granule),
                part.kv_len,
                cache.dtype,
                group,
                group * granule,
            )
            for part in stretches
        ]
        self._moved = _Moved()

    def __call__(self, layer: int, joined: torch.Tensor) -> torch.Tensor:
        """Store and attend; see `forward.Attend`."""
        cache = self._cache
        query, key, value = cache.split(joined)
        cache.write(layer, self._moved.to(self._destination, key.device), key, value)
        _, heads, size = query.shape
        key_heads, group = key.shape[1], self._group
        outputs = []
        for stretch, mask in zip(self._stretches, self._masks, strict=True):
            part = query[stretch.start : stretch.end].view(-1, self._granule, key_heads, group, size)
            granules = part.shape[0]
            folded = part.permute(0, 2, 3, 1, 4).reshape(granules, key_heads, -1, size)
            keys, values = cache.read(layer, stretch.slot, 1, stretch.kv_len)
            shared = (granules, -1, -1, -1)
            output = _attend(
                folded, keys.expand(shared), values.expand(shared),
                self._moved.to(mask, key.device), group * self._granule, self._scale,
            )  # fmt: skip
            output = output.reshape(granules, key_heads, group, self._granule, size).permute(0, 3, 1, 2, 4)
            outputs.append(output.reshape(-1, heads * size))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _Moved:
    """Small tensors on whichever device a layer asks for; no copy on one device."""

    __slots__ = ("_copies",)

    def __init__(self) -> None:
        self._copies: dict[tuple[int, torch.device], torch.Tensor] = {}

    def to(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if tensor.device == device:
            return tensor
        name = (id(tensor), device)
        if name not in self._copies:
            self._copies[name] = tensor.to(device)
        return self._copies[name]


def _mask(positions: torch.Tensor, kv_len: int, dtype: torch.dtype, group: int, rows: int) -> torch.Tensor:
    """Return what is added to the scores of tokens at (B, S) positions.

    Returns:
        (B, 1, rows, kv_len): row `g * S + s` is for token s, rows beyond `group * S` repeat the last; or
        (B, 1, 1, kv_len) where all rows are alike.
    """
    is_hidden = torch.arange(kv_len, device=positions.device) > positions[:, None, :, None]
    # Additive, because SDPA would turn a bool mask into this in every layer.
    mask = torch.zeros(is_hidden.shape, dtype=dtype, device=positions.device)
    mask.masked_fill_(is_hidden, -torch.inf)
    drafted = positions.shape[1]
    if drafted == 1:
        return mask
    mask = mask.repeat(1, 1, group, 1)
    return _fill_up(mask, rows)


def _fill_up(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Repeat the last row of a (B, K, n, D) tensor until there are `rows`."""
    missing = rows - tensor.shape[2]
    if missing == 0:
        return tensor
    return torch.cat([tensor, tensor[:, :, -1:].expand(-1, -1, missing, -1)], dim=2)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    rows: int,
    scale: float,
) -> torch.Tensor:
    """Attend (B, K, n, D) queries with at least `rows` query rows per key head."""
    present, dtype = query.shape[2], query.dtype
    query = _fill_up(query, rows).to(keys.dtype)
    attended = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    return attended[:, :, :present].to(dtype)
