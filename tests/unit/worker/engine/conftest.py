"""Fixtures that let an engine on a CPU compute in the ways that it has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from codeherd_worker.engine import forward, linears, operations, passes


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def one_or_two_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let torch and a CPU's own kernels compute with one thread, then with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def torch_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let decoders that are made from here on attend as on a GPU: torch's kernels, reads of set lengths."""
    monkeypatch.setattr(passes, "has_kernels", lambda _device, _head_size: False)


@pytest.fixture(params=["compiled", "torch"])
def each_attention(request: pytest.FixtureRequest) -> None:
    """Once with a CPU's own kernels, once with those of `torch_attention`."""
    if request.param == "torch":
        request.getfixturevalue("torch_attention")


@pytest.fixture
def torch_operators(torch_attention: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let decoders compute with torch's operators alone, which a graph can record."""

    def operations_for(
        _device: torch.device, _dtype: torch.dtype, activation: nn.Module, epsilon: float
    ) -> operations.Operations:
        return operations._Torch(activation, epsilon)

    monkeypatch.setattr(forward, "operations_for", operations_for)
    monkeypatch.setattr(linears, "can_tile", lambda _weight: False)
