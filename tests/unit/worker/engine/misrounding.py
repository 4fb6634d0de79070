"""Kernels that round otherwise where a test says so: real ones, whose output is disturbed afterwards.

No machine can be made to round as another one does; what the engine does about it must be tested anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from codeherd_worker.engine import attention, forward, layers
from codeherd_worker.engine.linears import Linear, join

#: Adds something to an output, (T, out), in place.
DisturbRows = Callable[[torch.Tensor], None]
#: The same for attention: output (B, K, n, D), then keys (B, K, kv_len, D).
DisturbAttention = Callable[[torch.Tensor, torch.Tensor], None]

#: Large against rounding, small against activations.
NUDGE = 1e-3


class Disturbed:
    """A matrix whose output is disturbed."""

    def __init__(self, inner: Linear, disturb: DisturbRows) -> None:
        self._inner, self._disturb = inner, disturb

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        output = self._inner(rows)
        self._disturb(output)
        return output

    def kind(self) -> tuple[object, ...]:
        return self._inner.kind()

    def sample(self, tokens: int) -> torch.Tensor:
        return self._inner.sample(tokens)


def disturb_linears(patch: pytest.MonkeyPatch, disturb: DisturbRows) -> None:
    """Let every matrix of models that are prepared from here on round as `disturb` says."""

    def disturbed(modules: Sequence[nn.Linear]) -> Linear:
        return Disturbed(join(modules), disturb)

    for module in (forward, layers):
        patch.setattr(module, "join", disturbed)


def disturb_attention(patch: pytest.MonkeyPatch, disturb: DisturbAttention) -> None:
    """Let attention round as `disturb` says from here on."""
    attend = attention._attend

    def disturbed(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *args: object
    ) -> torch.Tensor:
        output: torch.Tensor = attend(query, keys, values, *args)  # type: ignore[arg-type]
        disturb(output, keys)
        return output

    patch.setattr(attention, "_attend", disturbed)
