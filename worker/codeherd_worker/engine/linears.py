"""Call a model's weight matrices in the fastest form that this device has.

Owns: which matrices are multiplied together and how each is stored for it. Does not know what a layer
computes with them (`layers.py`) or how weights were loaded and quantized (`loading.py`).

    dense, GPU    matrices that read the same input become one; the modules keep views of it.
    float32, CPU  the same, then packed once for tiles of our own (`tiles.py`), where the CPU has AVX-512.
    dense, CPU    the same, then packed once for oneDNN: at 16 rows its kernel did 66 to 149 GFLOP/s
                  where torch's own choice (MKL) did 28 to 34 on the same two AMD cores, float32.
    quantized     each module is called as it is: bitsandbytes, torchao and others own their kernels.

A packed copy costs the memory of the weights a second time, on a CPU only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

#: Rows for which packed weights are laid out; any other number may be multiplied as well.
_PACKED_FOR_ROWS = 16
#: Outputs of a tile's panel, as `tiles.py` has them.
PANEL = 16


class Linear(Protocol):
    """From (T, in) to (T, out)."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        ...

    def kind(self) -> tuple[object, ...]:
        """Return what decides how it rounds: two of the same kind need one check."""
        ...

    def sample(self, tokens: int) -> torch.Tensor:
        """Return a reproducible random input, (tokens, in), of the right type and device."""
        ...


def join(modules: Sequence[nn.Linear]) -> Linear:
    """Return one call for matrices that read the same input; their outputs lie side by side.

    Args:
        modules: `nn.Linear`, or what a quantization library put in its place.
    """
    if not all(is_dense(module) for module in modules):
        return _Modules(modules)
    weight, bias = _joined_parameters(modules)
    if can_tile(weight):
        return TiledLinear(weight, bias)
    return _Packed(weight, bias) if can_pack(weight) else _Dense(weight, bias)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN multiplies this type on this CPU."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    operators = torch.ops.mkldnn
    match weight.dtype:
        case torch.float32:
            return True
        case torch.bfloat16:
            return bool(operators._is_mkldnn_bf16_supported())  # noqa: SLF001 -- see `_Packed`
        case torch.float16:
            return bool(operators._is_mkldnn_fp16_supported())  # noqa: SLF001
        case _:
            return False


def has_tiles() -> bool:
    """Whether this CPU has the registers for tiles of our own."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def can_tile(weight: torch.Tensor) -> bool:
    """Whether our own tiles multiply this matrix on this CPU."""
    is_ours = weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_ours and weight.shape[0] % PANEL == 0 and has_tiles()


def is_dense(module: nn.Module) -> bool:
    """Whether a module is a plain matrix, which may be joined with others and packed."""
    # Subclasses hold quantized weights, and so does a plain Linear whose weight is a tensor subclass.
    return type(module) is nn.Linear and type(module.weight.data) is torch.Tensor


def _joined_parameters(modules: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    if len(modules) == 1:
        bias = modules[0].bias
        return modules[0].weight.data, None if bias is None else bias.data
    weight = torch.cat([module.weight.data for module in modules])
    start = 0
    for module in modules:
        end = start + module.weight.shape[0]
        # The model itself keeps working, and no weight is held twice.
        module.weight.data = weight[start:end]
        start = end
    if all(module.bias is None for module in modules):
        return weight, None
    biases = [
        weight.new_zeros(module.weight.shape[0]) if module.bias is None else module.bias.data
        for module in modules
    ]
    return weight, torch.cat(biases)


def _random(tokens: int, weight: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, size, generator=generator).to(weight.device, dtype)


class _Dense:
    """One matrix, multiplied by torch."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.linear(rows, self._weight, self._bias)

    def kind(self) -> tuple[object, ...]:
        return (type(self), self._weight.shape, self._weight.device, self._bias is None)

    def sample(self, tokens: int) -> torch.Tensor:
        return _random(tokens, self._weight, self._weight.shape[1], self._weight.dtype)


class _Packed:
    """One matrix in oneDNN's own layout.

    The two operators are those with which torch's own compiler freezes CPU models; they have no public
    name, which is one reason why torch's minor version is pinned.
    """

    __slots__ = ("_bias", "_shape", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        reorder = torch.ops.mkldnn._reorder_linear_weight  # noqa: SLF001 -- see above
        self._shape = weight.shape
        self._weight = reorder(weight.contiguous(), _PACKED_FOR_ROWS)
        self._bias = bias

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _multiply_packed(rows, self._weight, self._bias, "none", [], "")
        return output

    def kind(self) -> tuple[object, ...]:
        return (type(self), self._shape, self._bias is None)

    def sample(self, tokens: int) -> torch.Tensor:
        return _random(tokens, self._weight, self._shape[1], self._weight.dtype)


class TiledLinear:
    """One matrix in panels."""

    __slots__ = ("_kernel", "bias", "panels")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Pack a matrix for which `can_tile` is true."""
        # Imported here: a GPU's worker needs no compiler.
        from codeherd_worker.engine import tiles

        self._kernel = tiles.multiply_rows
        self.panels: NDArray[np.float32] = tiles.pack(weight)
        self.bias = bias

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        output = torch.from_numpy(self._kernel(rows.contiguous().numpy(), self.panels))
        return output if self.bias is None else output.add_(self.bias)

    def kind(self) -> tuple[object, ...]:
        """Return its shape."""
        return (type(self), self.panels.shape, self.bias is None)

    def sample(self, tokens: int) -> torch.Tensor:
        """Return a reproducible random input."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(tokens, self.panels.shape[1], generator=generator)


class _Modules:
    """Quantized matrices as their library made them, called one after the other."""

    __slots__ = ("_modules",)

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self._modules = tuple(modules)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        # bitsandbytes 0.50.2 takes int8's input by its address alone.
        rows = rows.contiguous()
        if len(self._modules) == 1:
            output: torch.Tensor = self._modules[0](rows)
            return output
        return torch.cat([module(rows) for module in self._modules], dim=-1)

    def kind(self) -> tuple[object, ...]:
        return tuple((type(m), m.in_features, m.out_features) for m in self._modules)

    def sample(self, tokens: int) -> torch.Tensor:
        module = self._modules[0]
        weight = next(iter([*module.parameters(), *module.buffers()]))
        # Quantized weights are integers; what goes in has the dtype of what comes out of the layer before.
        dtype = getattr(module, "compute_dtype", None)
        if dtype is None:
            dtype = weight.dtype if weight.is_floating_point() else torch.float16
        return _random(tokens, weight, module.in_features, dtype)


_multiply_packed = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001 -- see `_Packed`
