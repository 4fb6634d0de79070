"""CUDA graphs without a GPU: what a step does is recorded, and done again on the same memory.

Stands in for torch's part of `codeherd_worker.engine.graphs`, none of ours. As on a GPU, a replay runs no
Python of the step, sees no tensor that has taken another's place, and fails where a captured step reads a
tensor on the host, or reads one that nobody kept alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_HOST_READS = frozenset(
    {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
)


@dataclass(frozen=True, slots=True)
class _Outside:
    """A tensor that was there before the recording; who keeps it alive is not our business."""

    tensor: weakref.ref[torch.Tensor]

    def read(self) -> torch.Tensor:
        tensor = self.tensor()
        if tensor is None:
            raise RuntimeError("a replay read memory that was given back")
        return tensor


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._made: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HOST_READS:
            raise RuntimeError(f"{func} waits for the device, which a capture forbids")
        kept_args, kept_kwargs = self._kept(args), self._kept(kwargs or {})
        output = func(*args, **(kwargs or {}))
        given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        self._made |= {
            id(leaf): leaf
            for leaf in tree_leaves(output)
            if isinstance(leaf, torch.Tensor) and id(leaf) not in given
        }
        self._calls.append((func, kept_args, kept_kwargs, output))
        return output

    def run_again(self) -> None:
        for func, args, kwargs, output in self._calls:
            again = func(*_read(args), **_read(kwargs))
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                # Views and tensors that were changed in place are where they were.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def _kept(self, values: Any) -> Any:
        def keep(leaf: Any) -> Any:
            is_outside = isinstance(leaf, torch.Tensor) and id(leaf) not in self._made
            return _Outside(weakref.ref(leaf)) if is_outside else leaf

        return tree_map(keep, values)


def _read(values: Any) -> Any:
    return tree_map(lambda leaf: leaf.read() if isinstance(leaf, _Outside) else leaf, values)


class _RecordedGraph:
    recording: _Recording

    def pool(self) -> tuple[int, int]:
        return (0, id(self))

    def replay(self) -> None:
        self.recording.run_again()


class _Stream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    def wait_stream(self, stream: _Stream) -> None:
        pass


class FakeCuda:
    """What captures asked of CUDA."""

    def __init__(self) -> None:
        #: Pool and stream of each capture.
        self.captures: list[tuple[object, object]] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch.cuda, "CUDAGraph", _RecordedGraph)
        patch.setattr(torch.cuda, "graph", self._graph)
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "current_stream", _Stream)
        patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())

    @contextmanager
    def _graph(self, graph: _RecordedGraph, pool: object, stream: object) -> Iterator[None]:
        self.captures.append((pool, stream))
        graph.recording = _Recording()
        with graph.recording:
            yield
