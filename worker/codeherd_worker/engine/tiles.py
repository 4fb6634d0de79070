"""Multiply rows with a matrix on a CPU with AVX-512: a tile of both stays in registers from end to end.

Owns: how a matrix is packed for it, and the innermost loop, which numba's own vectorizer cannot write. Does
not know what is multiplied (`linears.py`, `fused.py`, `kernels.py`).

    matrix    panels of 16 outputs: (N / 16, K, 16), so that one is read from memory from front to back.
    rows      blocks of 16: (blocks, K, 16), of the last block as many as there are.
    tile      up to 16 rows of a block times up to 8 panels.

Rows and matrices that lie otherwise have looser tiles, which attention uses.

Every output is one chain of fused multiply-adds over K, from first to last, whatever rows, panels or
threads stand beside it: a row's bits depend on nothing else, by construction.

Measured on two Intel cores (AVX-512, 2.3 GHz), float32, all matrices of a 110M Llama, ms: at 16 rows 19 to 22
where oneDNN's packed product took 26 to 36 and reading them alone takes 12; at 1 row 14 to 16 where oneDNN
took 18 to 26.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from codeherd_worker.engine.compiled import Kernel, part, usable_threads

#: Outputs of a panel: a vector register of float32. Rows of a block: with as many accumulators, both of a
#: core's multipliers are busy, and half of the registers are left.
LANES = BLOCK = 16
#: Panels that all rows are multiplied with before the next: they stay in a core's own cache.
_PANELS = 24
#: Terms that many rows are multiplied with at a time: three panels of them stay in a core's own cache.
_TERMS = 1024
#: Vectors ahead of the one in use, of every panel, that are asked for.
_AHEAD = 32

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_FLOAT_BYTES = 4
_VECTOR_BYTES = LANES * _FLOAT_BYTES


def pack(weight: torch.Tensor) -> NDArray[np.float32]:
    """Return the panels of a matrix (N, K): (N / 16, K, 16)."""
    outputs, terms = weight.shape
    # torch aligns to 64 bytes, as the tiles' loads need it; numpy does not.
    panels: NDArray[np.float32] = (
        weight.view(outputs // LANES, LANES, terms).transpose(1, 2).contiguous().clone().numpy()
    )
    return panels


def blocks_of(rows: int) -> int:
    """Return how many blocks hold so many rows."""
    return -(-rows // BLOCK)


@dataclass(frozen=True, slots=True)
class _Places:
    """Where a tile's numbers lie: addresses, and bytes from one to the next, as LLVM's values."""

    rows: Any
    from_row_to_row: Any
    from_value_to_value: Any
    panels: Any
    from_panel_to_panel: Any
    from_term_to_term: Any
    outputs: Any
    from_output_to_output: Any
    #: That vectors of panels lie at multiples of.
    panel_align: int


def _whole(number: int) -> Any:
    return ir.Constant(_INT64, number)


def _tile(rows: int, panels: int) -> Any:
    """Return the product of so many rows of a block and panels, as an intrinsic of numba's.

    Its arguments: addresses of the rows' first term, the first panel's and the first output; terms; whether
    to go on from what the outputs hold; bytes from panel to panel; bytes from row to row of the outputs.
    """

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        rows_at, panels_at, outputs_at, terms, goes_on, panel_step, output_step = arguments
        float_step, vector_step = _whole(_FLOAT_BYTES), _whole(_VECTOR_BYTES)
        places = _Places(
            rows_at, float_step, vector_step, panels_at, panel_step, vector_step, outputs_at, output_step,
            _VECTOR_BYTES,
        )  # fmt: skip
        _emit(builder, rows, panels, places, terms, goes_on)
        return context.get_dummy_value()

    @intrinsic
    def tile(
        typing: Any, rows: Any, panel: Any, output: Any, terms: Any, goes_on: Any, step: Any, stride: Any
    ) -> Any:
        size = types.intp
        return types.void(size, size, size, size, types.boolean, size, size), emit

    return tile


def _loose_tile(rows: int, panels: int) -> Any:
    """Return the product of so many rows and panels that lie anywhere, as an intrinsic of numba's.

    A row's values are neighbours, and so are the vectors of a term. Its arguments: addresses of the rows'
    first term, the first panel's and the first output; terms; whether to go on from what the outputs hold;
    bytes from row to row, from term to term of the panels, and from row to row of the outputs.
    """

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        rows_at, panels_at, outputs_at, terms, goes_on, row_step, term_step, output_step = arguments
        float_step, vector_step = _whole(_FLOAT_BYTES), _whole(_VECTOR_BYTES)
        places = _Places(
            rows_at, row_step, float_step, panels_at, vector_step, term_step, outputs_at, output_step,
            _FLOAT_BYTES,
        )  # fmt: skip
        _emit(builder, rows, panels, places, terms, goes_on)
        return context.get_dummy_value()

    @intrinsic
    def tile(
        typing: Any,
        rows: Any,
        panel: Any,
        output: Any,
        terms: Any,
        goes_on: Any,
        row_step: Any,
        term_step: Any,
        output_step: Any,
    ) -> Any:
        size = types.intp
        return types.void(size, size, size, size, types.boolean, size, size, size), emit

    return tile


def _emit(builder: Any, rows: int, panels: int, at: _Places, terms: Any, goes_on: Any) -> None:
    """Write a tile's loop over at least one term."""

    def load(address: Any, kind: Any, align: int) -> Any:
        value = builder.load(builder.inttoptr(address, kind.as_pointer()))
        value.align = align
        return value

    def output(row: int, panel: int) -> Any:
        offset = builder.mul(at.from_output_to_output, _whole(row))
        return builder.add(at.outputs, builder.add(offset, _whole(_VECTOR_BYTES * panel)))

    places = [(row, panel) for row in range(rows) for panel in range(panels)]
    zero = ir.Constant(_VECTOR, [0.0] * LANES)
    begin = [builder.select(goes_on, load(output(*place), _VECTOR, _FLOAT_BYTES), zero) for place in places]
    before = builder.block
    loop, after = builder.append_basic_block("terms"), builder.append_basic_block("end")
    builder.branch(loop)
    builder.position_at_end(loop)
    term = builder.phi(_INT64)
    term.add_incoming(_whole(0), before)
    sums = {place: builder.phi(_VECTOR) for place in places}
    for place, start in zip(places, begin, strict=True):
        sums[place].add_incoming(start, before)
    vectors_at = builder.add(at.panels, builder.mul(term, at.from_term_to_term))
    weights = []
    for panel in range(panels):
        address = builder.add(vectors_at, builder.mul(at.from_panel_to_panel, _whole(panel)))
        weights.append(load(address, _VECTOR, at.panel_align))
        _prefetch(builder, builder.add(address, _whole(_AHEAD * _VECTOR_BYTES)))
    values_at = builder.add(at.rows, builder.mul(term, at.from_value_to_value))
    totals = {}
    for row in range(rows):
        value_at = builder.add(values_at, builder.mul(at.from_row_to_row, _whole(row)))
        value = _broadcast(builder, load(value_at, _FLOAT, _FLOAT_BYTES))
        for panel in range(panels):
            total = _multiply_add(builder, value, weights[panel], sums[row, panel])
            sums[row, panel].add_incoming(total, loop)
            totals[row, panel] = total
    following = builder.add(term, _whole(1))
    term.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, terms), loop, after)
    builder.position_at_end(after)
    for place, total in totals.items():
        target = builder.inttoptr(output(*place), _VECTOR.as_pointer())
        builder.store(total, target).align = _FLOAT_BYTES


def _multiply_add(builder: Any, one: Any, other: Any, total: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
    return builder.call(function, [one, other, total])


def _broadcast(builder: Any, value: Any) -> Any:
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES))


def _prefetch(builder: Any, address: Any) -> None:
    """Ask for a line of memory; one behind the end of it does no harm."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _INT32, _INT32, _INT32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # To be read, and soon again; data.
    options = [ir.Constant(_INT32, option) for option in (0, 3, 1)]
    builder.call(function, [builder.inttoptr(address, pointer), *options])


_tile_16_1 = _tile(16, 1)
_tile_8_3, _tile_8_2, _tile_8_1 = _tile(8, 3), _tile(8, 2), _tile(8, 1)
_tile_4_4, _tile_4_1 = _tile(4, 4), _tile(4, 1)
_tile_2_8, _tile_2_1 = _tile(2, 8), _tile(2, 1)
_tile_1_8, _tile_1_1 = _tile(1, 8), _tile(1, 1)
_loose_8_2, _loose_8_1 = _loose_tile(8, 2), _loose_tile(8, 1)
_loose_1_4, _loose_1_2, _loose_1_1 = _loose_tile(1, 4), _loose_tile(1, 2), _loose_tile(1, 1)


@part
def _multiply_few(rows, rows_at, panels_at, output_at, terms, goes_on, step, stride, first, last):
    """Multiply 8, 4, 2 or 1 rows of a block with panels [first, last), several at a time while there are."""
    panel = first
    while panel < last:
        at, out, left = panels_at + panel * step, output_at + panel * _VECTOR_BYTES, last - panel
        if rows == 8:
            if left >= 3:
                _tile_8_3(rows_at, at, out, terms, goes_on, step, stride)
                panel += 3
            elif left == 2:
                _tile_8_2(rows_at, at, out, terms, goes_on, step, stride)
                panel += 2
            else:
                _tile_8_1(rows_at, at, out, terms, goes_on, step, stride)
                panel += 1
        elif rows == 4:
            if left >= 4:
                _tile_4_4(rows_at, at, out, terms, goes_on, step, stride)
                panel += 4
            else:
                _tile_4_1(rows_at, at, out, terms, goes_on, step, stride)
                panel += 1
        elif rows == 2:
            if left >= 8:
                _tile_2_8(rows_at, at, out, terms, goes_on, step, stride)
                panel += 8
            else:
                _tile_2_1(rows_at, at, out, terms, goes_on, step, stride)
                panel += 1
        elif left >= 8:
            _tile_1_8(rows_at, at, out, terms, goes_on, step, stride)
            panel += 8
        else:
            _tile_1_1(rows_at, at, out, terms, goes_on, step, stride)
            panel += 1


@part
def multiply(rows, count, panels, first, last, output):
    """Multiply rows with panels [first, last).

    Args:
        rows: (blocks, K, 16).
        count: T, of rows.
        panels: (N / 16, K, 16).
        first: panel.
        last: one past the last panel.
        output: (T, N), of which [16 first, 16 last) are filled.
    """
    depth, stride = rows.shape[1], output.shape[1] * _FLOAT_BYTES
    rows_at, panels_at, output_at = rows.ctypes.data, panels.ctypes.data, output.ctypes.data
    step = depth * _VECTOR_BYTES
    whole = count // BLOCK
    rest = count - whole * BLOCK
    is_many = whole > 1
    terms = _TERMS if is_many else depth
    for group in range(first, last, _PANELS):
        end = min(group + _PANELS, last)
        for term in range(0, depth, terms):
            some, goes_on, begin = min(terms, depth - term), term > 0, term * _VECTOR_BYTES
            if is_many:
                for panel in range(group, end, 3):
                    for half in range(2 * whole):
                        _multiply_few(
                            8,
                            rows_at + half // 2 * step + half % 2 * 8 * _FLOAT_BYTES + begin,
                            panels_at + begin, output_at + half * 8 * stride,
                            some, goes_on, step, stride, panel, min(panel + 3, end),
                        )  # fmt: skip
            elif whole:
                for panel in range(group, end):
                    _tile_16_1(
                        rows_at + begin, panels_at + panel * step + begin,
                        output_at + panel * _VECTOR_BYTES, some, goes_on, step, stride,
                    )  # fmt: skip
            at, out = rows_at + whole * step + begin, output_at + whole * BLOCK * stride
            row = 0
            for few in (8, 4, 2, 1):
                if rest & few:
                    _multiply_few(
                        few, at + row * _FLOAT_BYTES, panels_at + begin, out + row * stride,
                        some, goes_on, step, stride, group, end,
                    )  # fmt: skip
                    row += few


@part
def multiply_loosely(rows, first, last, begin, end, matrix, goes_on, output):
    """Multiply terms [begin, end) of rows [first, last) with a matrix that lies term by term.

    Args:
        rows: (T, at least K).
        first: row.
        last: one past the last row.
        begin: term.
        end: one past the last term; nothing happens if there is none.
        matrix: (K, N), N a multiple of 16.
        goes_on: whether to add to what the output holds.
        output: (T, at least N), of which the first N of each row are filled.
    """
    terms = end - begin
    if terms <= 0:
        return
    row_step, term_step, output_step = rows.strides[0], matrix.strides[0], output.strides[0]
    panels = matrix.shape[1] // LANES
    matrix_at = matrix.ctypes.data + begin * term_step
    row = first
    while row < last:
        rows_at = rows.ctypes.data + row * row_step + begin * _FLOAT_BYTES
        output_at = output.ctypes.data + row * output_step
        is_eight = row + 8 <= last
        panel = 0
        while panel < panels:
            at, out = matrix_at + panel * _VECTOR_BYTES, output_at + panel * _VECTOR_BYTES
            left = panels - panel
            if is_eight and left >= 2:
                _loose_8_2(rows_at, at, out, terms, goes_on, row_step, term_step, output_step)
                panel += 2
            elif is_eight:
                _loose_8_1(rows_at, at, out, terms, goes_on, row_step, term_step, output_step)
                panel += 1
            elif left >= 4:
                _loose_1_4(rows_at, at, out, terms, goes_on, row_step, term_step, output_step)
                panel += 4
            elif left >= 2:
                _loose_1_2(rows_at, at, out, terms, goes_on, row_step, term_step, output_step)
                panel += 2
            else:
                _loose_1_1(rows_at, at, out, terms, goes_on, row_step, term_step, output_step)
                panel += 1
        row += 8 if is_eight else 1


@part
def put_in_block(row, values, rows):
    """Put a row's values, (K,), where its block has them."""
    block, place = row // BLOCK, row % BLOCK
    for c in range(values.shape[0]):
        rows[block, c, place] = values[c]


def _product(values, panels, threads, rows, output):
    """Multiply (T, K) with a matrix into (T, N); `rows`, (blocks, K, 16), is to work in."""
    for block in prange(rows.shape[0]):
        for row in range(block * BLOCK, min(values.shape[0], (block + 1) * BLOCK)):
            put_in_block(row, values[row], rows)
    many = panels.shape[0]
    for thread in prange(threads):
        first, last = many * thread // threads, many * (thread + 1) // threads
        multiply(rows, values.shape[0], panels, first, last, output)


_run_product = Kernel(_product)


def multiply_rows(values: NDArray[np.float32], panels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Multiply (T, K) with a packed matrix; return (T, N)."""
    tokens, terms = values.shape
    output = np.empty((tokens, panels.shape[0] * LANES), np.float32)
    rows = np.empty((blocks_of(tokens), terms, BLOCK), np.float32)
    _run_product(values, panels, usable_threads(), rows, output)
    return output
