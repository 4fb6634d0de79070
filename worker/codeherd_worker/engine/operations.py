"""Do what a Llama layer does beside its matrix products, in the fastest form that this device has.

Owns: norms, rotation and gating of the hidden states. Does not know layers, weights or attention.

    float32 on a CPU   one compiled loop each (`kernels.py`)
    all others         torch's operators, which a GPU captures in a graph
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Operations(Protocol):
    """The operations of a layer on (T, ...) tensors; some work in place, and say so."""

    #: Of the norms.
    epsilon: float
    #: Whether they are loops of our own.
    are_compiled: bool

    def norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the RMS norm of every row."""
        ...

    def add_and_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `hidden + delta`, which may be `hidden` itself, and the norm of it."""
        ...

    def rotate(self, joined: torch.Tensor, heads: int, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        """Rotate the first `heads` heads of (T, W) in place; cosine and signed sine are (T, 1, D)."""
        ...

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return activation(gate) * up, (T, N), of (T, 2 N)."""
        ...


def operations_for(
    device: torch.device, dtype: torch.dtype, activation: nn.Module, epsilon: float
) -> Operations:
    """Return the fastest operations for hidden states of this type.

    Args:
        device: where they are.
        dtype: theirs.
        activation: the model's own, SiLU for every Llama known.
        epsilon: of the norms.
    """
    is_plain = type(activation).__name__ in {"SiLUActivation", "SiLU"}
    if device.type == "cpu" and dtype == torch.float32 and is_plain:
        return _Compiled(epsilon)
    return _Torch(activation, epsilon)


class _Torch:
    """Any device, type and activation."""

    are_compiled = False

    def __init__(self, activation: nn.Module, epsilon: float) -> None:
        self._activation, self.epsilon = activation, epsilon

    def norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self.epsilon)

    def add_and_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden + delta
        return hidden, self.norm(hidden, weight)

    def rotate(self, joined: torch.Tensor, heads: int, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        size = cosine.shape[-1]
        rotated = joined[:, : heads * size].view(len(joined), heads, size)
        turned = rotated.roll(size // 2, -1)
        rotated.mul_(cosine).addcmul_(turned, sine)

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated: torch.Tensor = self._activation(gate)
        return activated.mul_(up)


class _Compiled:
    """float32 on a CPU."""

    are_compiled = True

    def __init__(self, epsilon: float) -> None:
        # Imported here: a GPU's worker needs no compiler.
        from codeherd_worker.engine import kernels

        self._kernels = kernels
        self.epsilon = epsilon
        self._epsilon = np.float32(epsilon)

    def norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(hidden)
        self._kernels.norm(hidden.numpy(), weight.numpy(), self._epsilon, output.numpy())
        return output

    def add_and_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = torch.empty_like(hidden)
        self._kernels.add_and_norm(
            hidden.numpy(), delta.numpy(), weight.numpy(), self._epsilon, output.numpy()
        )
        return hidden, output

    def rotate(self, joined: torch.Tensor, heads: int, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        self._kernels.rotate(joined.numpy(), heads, cosine[:, 0].numpy(), sine[:, 0].numpy())

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        output = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        self._kernels.gate(gate_up.numpy(), output.numpy())
        return output
