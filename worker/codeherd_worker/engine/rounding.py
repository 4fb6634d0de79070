"""Measure which shapes of a matrix product round a row alike, so that neighbours cannot change its bits.

Owns: the tries and what counts as alike: equal bits. Does not know why a kernel rounds as it does, or what
its rows mean.

Kernels split rows among threads and blocks, and may treat the rows at an edge with other instructions.
Measured with torch 2.13, two threads, float32: MKL rounds the last rows of 5, 6, 7, 9, 10 and 11
otherwise. No documentation promises anything, so every engine tries the shapes that it will use.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from codeherd_worker.engine.linears import Linear

logger = logging.getLogger(__name__)

#: Rows beyond the slots that `even_rows` tries.
_MOST_IDLE_ROWS = 16
#: Vectors per try: 16-bit outputs hide most of what differs inside.
_TRIES = 4


def even_rows(linears: Iterable[Linear], slots: int) -> int:
    """Return how many rows to decode so that every row rounds alike: `slots` or a few more.

    The further rows are idle. Returns `slots` if nothing helps.
    """
    kinds = _kinds(linears)
    for rows in range(slots, slots + _MOST_IDLE_ROWS + 1):
        if all(_rows_agree(linear, rows) for linear in kinds):
            if rows > slots:
                logger.info("idle_rows_added slots=%d rows=%d", slots, rows)
            return rows
    return slots


def pass_lengths(
    linears: Iterable[Linear], chunk: int, granules: Sequence[int]
) -> tuple[int, tuple[int, ...]]:
    """Return the smallest granule whose bits do not depend on its place in a prefill pass.

    Args:
        linears: the model's matrices.
        chunk: tokens of the longest pass.
        granules: tokens; candidates that divide `chunk`, smallest first.

    Returns:
        The granule, and the pass lengths (ascending, the last is `chunk`) at which a granule's bits are
        those it has in a whole chunk, wherever it stands. If no candidate holds: one granule, one length.
    """
    kinds = _kinds(linears)
    for granule in granules:
        lengths = [
            length
            for length in range(granule, chunk + 1, granule)
            if all(_granules_agree(linear, granule, length, chunk) for linear in kinds)
        ]
        if lengths and lengths[-1] == chunk:
            return granule, tuple(lengths)
    return chunk, (chunk,)


def agreeing_rows(linears: Iterable[Linear], rows: int, counts: Iterable[int]) -> list[int]:
    """Return those of `counts` at which a row has the bits that it has among `rows` rows."""
    kinds = _kinds(linears)
    return [count for count in counts if all(_same_bits(linear, count, rows) for linear in kinds)]


def _kinds(linears: Iterable[Linear]) -> list[Linear]:
    return list({linear.kind(): linear for linear in linears}.values())


@torch.inference_mode()
def _rows_agree(linear: Linear, rows: int) -> bool:
    return all(_is_uniform(linear, vector, rows) for vector in _vectors(linear))


def _vectors(linear: Linear) -> list[torch.Tensor]:
    """Return a few inputs of one row each."""
    sample = linear.sample(_TRIES)
    return [sample[row : row + 1] for row in range(_TRIES)]


def _is_uniform(linear: Linear, vector: torch.Tensor, rows: int) -> bool:
    output = linear(vector.expand(rows, -1).contiguous())
    return bool((output == output[:1]).all())


@torch.inference_mode()
def _granules_agree(linear: Linear, granule: int, length: int, chunk: int) -> bool:
    tokens = linear.sample(granule)
    whole = linear(tokens.repeat(chunk // granule, 1))
    part = linear(tokens.repeat(length // granule, 1))
    return all(
        bool((output.view(-1, granule, output.shape[-1]) == whole[:granule]).all())
        for output in (whole, part)
    )


@torch.inference_mode()
def _same_bits(linear: Linear, first: int, second: int) -> bool:
    for vector in _vectors(linear):
        one, other = (linear(vector.expand(rows, -1).contiguous()) for rows in (first, second))
        if not bool((one == one[:1]).all() and (other == one[:1]).all()):
            return False
    return True
