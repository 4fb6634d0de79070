"""Bring small lists of numbers to the device without waiting for what it is doing.

Owns: nothing but the copy. On a GPU, `torch.tensor(list, device=...)` waits for all earlier work; a copy from
pinned memory does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def upload(numbers: Sequence[int] | Sequence[bool], device: torch.device) -> torch.Tensor:
    """Return the numbers as a tensor on the device: int64, or bool; an empty list is int64."""
    dtype = torch.bool if numbers and isinstance(numbers[0], bool) else torch.int64
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
