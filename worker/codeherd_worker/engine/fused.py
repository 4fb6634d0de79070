"""Compute decoder layers in one compiled call, or in two each, around their attention: float32, AVX-512.

Owns: those loops, and the packed matrices that they read. Does not know when to use them (`layers.py`). How
rows and matrices lie: `tiles.py`.

Threads share out blocks of rows, or panels of a matrix; what a row becomes does not depend on how.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import prange, types
from numba.extending import intrinsic
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from codeherd_worker.engine.cache import SlotCache
from codeherd_worker.engine.compiled import Kernel, part, usable_threads
from codeherd_worker.engine.cpu_attention import CpuPass
from codeherd_worker.engine.kernels import LANES, attend, gate_row, normalize_row, rotate_row
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
_before_attention, _attend, _after_attention = _run_before.compiled, attend.compiled, _run_after.compiled


def _pointer(_typing: Any, address: Any) -> Any:
    """Return a whole number as the address of float32 numbers."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), emit


# Numba's own first argument is not passed, which is more than mypy knows.
_as_pointer: Any = intrinsic(_pointer)


@part
def _vector(address, size):
    """Return the (size,) numbers at an address."""
    return carray(_as_pointer(address), (size,))


@part
def _matrix(address, outputs, terms):
    """Return the panels at an address."""
    return carray(_as_pointer(address), (outputs // BLOCK, terms, BLOCK))


def _all_layers(
    table, cached, hidden, delta, epsilon, heads, cosine, sine, threads, rows, joined, attended, both, gated,
    attention,
):  # fmt: skip
    """Compute all layers.

    Args:
        table: (L, 8) addresses, a line per layer, in the order of `FusedLayer.addresses`.
        cached: numbers in all keys of a layer, and in all values.
        hidden: (T, N), to which all but the last layer's second half is added.
        delta: (T, N) to be filled with that.
        epsilon: of the norms.
        heads: how many are rotated.
        cosine: (T, D).
        sine: (T, D), its first half negated.
        threads: that share the work.
        rows: (blocks, at least N and H D, 16) to work in, flat.
        joined: (T, (H + 2 K) D) to work in.
        attended: (T, H D) to work in.
        both: (T, 2 I) to work in.
        gated: (blocks, I, 16) to work in.
        attention: what else `kernels.attend` is told.
    """
    size, inner, width, blocks = hidden.shape[1], gated.shape[1], attended.shape[1], gated.shape[0]
    narrow = rows[: blocks * size * BLOCK].reshape(blocks, size, BLOCK)
    for layer in range(table.shape[0]):
        at = table[layer]
        _before_attention(
            hidden, delta, layer > 0, _vector(at[0], size), epsilon, _matrix(at[1], joined.shape[1], size),
            heads, cosine, sine, threads, narrow, joined,
        )  # fmt: skip
        _attend(joined, _vector(at[2], cached), _vector(at[3], cached), attended, *attention)
        _after_attention(
            hidden, attended, _matrix(at[4], size, width), _vector(at[5], size), epsilon,
            _matrix(at[6], 2 * inner, size), _matrix(at[7], size, inner), threads, rows, delta, both, gated,
        )  # fmt: skip


_run_all_layers = Kernel(_all_layers, parallel=False)


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
        self.scratch = scratch
        self.linears = (qkv, output, gate_up, down)
        self._qkv, self._output, self._gate_up, self._down = map(_panels, self.linears)
        self._attention_norm, self._mlp_norm = (weight.numpy() for weight in norms)
        self.epsilon = np.float32(epsilon)
        self.rotated_heads = rotated_heads

    def before(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add, normalize, multiply and rotate."""
        tokens, size = hidden.shape
        joined = torch.empty(tokens, self._qkv.shape[0] * BLOCK)
        _run_before(
            hidden.numpy(), (hidden if delta is None else delta).numpy(), delta is not None,
            self._attention_norm, self.epsilon, self._qkv, self.rotated_heads,
            cosine[:, 0].numpy(), sine[:, 0].numpy(), usable_threads(),
            self.scratch.take("rows", blocks_of(tokens), size, BLOCK), joined.numpy(),
        )  # fmt: skip
        return hidden, joined

    def after(self, hidden: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Multiply what was attended, add, normalize, and gate."""
        tokens, size = hidden.shape
        inner, blocks = self._down.shape[1], blocks_of(tokens)
        delta = torch.empty_like(hidden)
        _run_after(
            hidden.numpy(), attended.numpy(), self._output, self._mlp_norm, self.epsilon,
            self._gate_up, self._down, usable_threads(),
            self.scratch.take("rows", blocks * max(size, attended.shape[1]) * BLOCK), delta.numpy(),
            self.scratch.take("both", tokens, 2 * inner),
            self.scratch.take("gated", blocks, inner, BLOCK),
        )  # fmt: skip
        return hidden, delta

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of a token that are joined, attended and gated."""
        return self._qkv.shape[0] * BLOCK, self._output.shape[1], self._down.shape[1]

    def addresses(self, keys: NDArray[np.float32], values: NDArray[np.float32]) -> list[int]:
        """Return where everything lies that only this layer reads."""
        arrays = (
            self._attention_norm, self._qkv, keys, values, self._output, self._mlp_norm, self._gate_up,
            self._down,
        )  # fmt: skip
        return [array.ctypes.data for array in arrays]


class FusedStack:
    """All layers of a model, and their attention, as one call.

    Between calls a step waits for Python, whose own data the weights have driven from every cache.
    """

    def __init__(self, layers: Sequence[FusedLayer]) -> None:
        """Take layers of the same shape that work in the same memory."""
        self._layers = layers
        # Whose keys and values the addresses are of.
        self._cache: SlotCache | None = None
        self._table = np.empty(0, np.int64)

    def __call__(
        self, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, attention: CpuPass
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states and what the last layer adds to them yet, (T, N) each.

        Args:
            hidden: (T, N); is changed.
            cosine: (T, 1, D) of the tokens' angles.
            sine: as much, its first half negated.
            attention: of this pass.
        """
        cache = attention.cache
        if cache is not self._cache:
            lines = [layer.addresses(*cache.arrays(number)) for number, layer in enumerate(self._layers)]
            self._cache, self._table = cache, np.array(lines, np.int64)
        layer, (tokens, size) = self._layers[0], hidden.shape
        joined, attended, gated = layer.sizes
        delta, blocks, take = torch.empty_like(hidden), blocks_of(tokens), layer.scratch.take
        _run_all_layers(
            self._table, cache.arrays(0)[0].size, hidden.numpy(), delta.numpy(), layer.epsilon,
            layer.rotated_heads, cosine[:, 0].numpy(), sine[:, 0].numpy(), usable_threads(),
            take("rows", blocks * max(size, attended) * BLOCK), take("joined", tokens, joined),
            take("attended", tokens, attended), take("both", tokens, 2 * gated),
            take("gated", blocks, gated, BLOCK), attention.arguments,
        )  # fmt: skip
        return hidden, delta


def _panels(linear: Linear) -> NDArray[np.float32]:
    if not isinstance(linear, TiledLinear):
        raise TypeError(f"{type(linear).__name__} has no panels")
    return linear.panels
