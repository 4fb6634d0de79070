"""Compute a decoder layer before and after its attention in one compiled call each: float32, AVX-512.

Owns: those loops, and the packed matrices that they read. Does not know attention, or when to use them
(`layers.py`). How rows and matrices lie: `tiles.py`.

Threads share out blocks of rows, or panels of a matrix; what a row becomes does not depend on how.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import prange
from numpy.typing import NDArray

from codeherd_worker.engine.compiled import Kernel, usable_threads
from codeherd_worker.engine.kernels import LANES, gate_row, normalize_row, rotate_row
from codeherd_worker.engine.linears import Linear, TiledLinear
from codeherd_worker.engine.tiles import BLOCK, blocks_of, multiply, put_in_block

_f32 = np.float32


def _before(hidden, delta, adds, weight, epsilon, panels, heads, cosine, sine, threads, rows, joined):
    """Add, normalize, multiply and rotate.

    Args:
        hidden: (T, N), to which `delta` is added.
        delta: (T, N).
        adds: whether it is.
        weight: (N,) of the norm.
        epsilon: of the norm.
        panels: queries', keys' and values' matrix.
        heads: how many are rotated.
        cosine: (T, D).
        sine: (T, D), its first half negated.
        threads: that share the work.
        rows: (blocks, N, 16) to work in.
        joined: (T, (H + 2 K) D) to be filled.
    """
    tokens, size = hidden.shape
    for block in prange(rows.shape[0]):
        normed, lanes = np.empty(size, _f32), np.empty(LANES, _f32)
        for row in range(block * BLOCK, min(tokens, (block + 1) * BLOCK)):
            if adds:
                for c in range(size):
                    hidden[row, c] = hidden[row, c] + delta[row, c]
            normalize_row(hidden[row], weight, epsilon, normed, lanes)
            put_in_block(row, normed, rows)
    many = panels.shape[0]
    for thread in prange(threads):
        first, last = many * thread // threads, many * (thread + 1) // threads
        multiply(rows, tokens, panels, first, last, joined)
    for row in prange(tokens):
        rotate_row(joined[row], heads, cosine[row], sine[row])


def _after(hidden, attended, output, weight, epsilon, gate_up, down, threads, rows, delta, both, gated):
    """Multiply what was attended, add, normalize, and gate.

    Args:
        hidden: (T, N), to which the attention's output is added.
        attended: (T, H D).
        output: the attention's matrix.
        weight: (N,) of the norm.
        epsilon: of the norm.
        gate_up: gates' and ups' matrix, one after the other.
        down: the last matrix.
        threads: that share the work.
        rows: (blocks, at least N and H D, 16) to work in, flat.
        delta: (T, N) to be filled.
        both: (T, 2 I) to work in.
        gated: (blocks, I, 16) to work in.
    """
    tokens, size = hidden.shape
    blocks, width, inner = gated.shape[0], attended.shape[1], gated.shape[1]
    wide = rows[: blocks * width * BLOCK].reshape(blocks, width, BLOCK)
    narrow = rows[: blocks * size * BLOCK].reshape(blocks, size, BLOCK)
    for block in prange(blocks):
        for row in range(block * BLOCK, min(tokens, (block + 1) * BLOCK)):
            put_in_block(row, attended[row], wide)
    many = size // BLOCK
    for thread in prange(threads):
        first, last = many * thread // threads, many * (thread + 1) // threads
        multiply(wide, tokens, output, first, last, delta)
    for block in prange(blocks):
        normed, lanes = np.empty(size, _f32), np.empty(LANES, _f32)
        for row in range(block * BLOCK, min(tokens, (block + 1) * BLOCK)):
            for c in range(size):
                hidden[row, c] = hidden[row, c] + delta[row, c]
            normalize_row(hidden[row], weight, epsilon, normed, lanes)
            put_in_block(row, normed, narrow)
    inners = inner // BLOCK
    for thread in prange(threads):
        first, last = inners * thread // threads, inners * (thread + 1) // threads
        # A thread makes the gates and the ups of the same places: it needs nobody else's.
        multiply(narrow, tokens, gate_up, first, last, both)
        multiply(narrow, tokens, gate_up, inners + first, inners + last, both)
        begin, end = first * BLOCK, last * BLOCK
        product = np.empty(end - begin, _f32)
        for row in range(tokens):
            gate_row(both[row, begin:end], both[row, inner + begin : inner + end], product)
            put_in_block(row, product, gated[:, begin:end])
    for thread in prange(threads):
        first, last = many * thread // threads, many * (thread + 1) // threads
        multiply(gated, tokens, down, first, last, delta)


_run_before, _run_after = Kernel(_before), Kernel(_after)


def can_fuse(qkv: Linear, output: Linear, gate_up: Linear, down: Linear) -> bool:
    """Whether a layer's matrices are packed for tiles, without biases, and gates end where a panel does."""
    tiled = [part for part in (qkv, output, gate_up, down) if isinstance(part, TiledLinear)]
    return len(tiled) == 4 and all(part.bias is None for part in tiled) and len(tiled[2].panels) % 2 == 0


class Scratch:
    """Memory that passes work in, kept from one to the next: new memory costs a fault per page.

    For one thread; nothing is kept in it between two calls.
    """

    def __init__(self) -> None:
        """Start with none."""
        self._held: dict[str, NDArray[np.float32]] = {}

    def take(self, name: str, *shape: int) -> NDArray[np.float32]:
        """Return an array of this shape with anything in it, the same memory for the same name."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.size < size:
            held = self._held[name] = np.empty(size, np.float32)
        return held[:size].reshape(shape)


class FusedLayer:
    """See `layers.Layer`; float32 on a CPU."""

    def __init__(
        self,
        qkv: Linear,
        output: Linear,
        gate_up: Linear,
        down: Linear,
        norms: tuple[torch.Tensor, torch.Tensor],
        epsilon: float,
        rotated_heads: int,
        scratch: Scratch,
    ) -> None:
        """Take the matrices, for which `can_fuse` is true, and memory that all layers share."""
        self._scratch = scratch
        self.linears = (qkv, output, gate_up, down)
        self._qkv, self._output, self._gate_up, self._down = map(_panels, self.linears)
        self._attention_norm, self._mlp_norm = (weight.numpy() for weight in norms)
        self._epsilon = np.float32(epsilon)
        self._heads = rotated_heads

    def before(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add, normalize, multiply and rotate."""
        tokens, size = hidden.shape
        joined = torch.empty(tokens, self._qkv.shape[0] * BLOCK)
        _run_before(
            hidden.numpy(), (hidden if delta is None else delta).numpy(), delta is not None,
            self._attention_norm, self._epsilon, self._qkv, self._heads,
            cosine[:, 0].numpy(), sine[:, 0].numpy(), usable_threads(),
            self._scratch.take("rows", blocks_of(tokens), size, BLOCK), joined.numpy(),
        )  # fmt: skip
        return hidden, joined

    def after(self, hidden: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Multiply what was attended, add, normalize, and gate."""
        tokens, size = hidden.shape
        inner, blocks = self._down.shape[1], blocks_of(tokens)
        delta = torch.empty_like(hidden)
        _run_after(
            hidden.numpy(), attended.numpy(), self._output, self._mlp_norm, self._epsilon,
            self._gate_up, self._down, usable_threads(),
            self._scratch.take("rows", blocks * max(size, attended.shape[1]) * BLOCK), delta.numpy(),
            self._scratch.take("both", tokens, 2 * inner),
            self._scratch.take("gated", blocks, inner, BLOCK),
        )  # fmt: skip
        return hidden, delta


def _panels(linear: Linear) -> NDArray[np.float32]:
    if not isinstance(linear, TiledLinear):
        raise TypeError(f"{type(linear).__name__} has no panels")
    return linear.panels
