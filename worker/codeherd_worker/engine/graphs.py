"""Replay a decode step as one captured CUDA graph, so that the GPU never waits for Python.

Owns: the captured graphs, one per shape, the buffers they read, and everything that must stay alive for
them. Does not know what a step computes: it is given a function. On other devices there are no graphs, and
steps run as they are.

A graph replays the same kernels on the same addresses: everything that a step reads lives in tensors that
are never replaced, and everything that changes is copied into them first. What a step may not do while it is
recorded (torch 2.13, notes on CUDA semantics): wait for the device, read a tensor on the host, copy from
ordinary host memory, or compute on a second device, whose kernels would run once and never again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

#: Runs before a capture: libraries allocate their workspaces and choose their kernels in the first ones.
_RUNS_BEFORE_CAPTURE = 3

#: From token ids, positions and written positions, (B, S) int64 each, to logits.
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Captured:
    """One recorded step."""

    graph: torch.cuda.CUDAGraph
    #: What a replay reads and writes.
    inputs: tuple[torch.Tensor, ...]
    logits: torch.Tensor
    #: Never called again. Kernels were recorded with the addresses of tensors that only this function holds:
    #: without it their memory would be given to others, and a replay would read what those put there.
    step: Step


class StepGraphs:
    """The captured steps of one decoder; captured and replayed by one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        """Hold no graph yet.

        Args:
            device: of everything that the steps read.
        """
        self._device = device
        self._captured: dict[Hashable, _Captured] = {}
        # One stream for all: memory and workspaces of one stream are of no use to another. And one pool,
        # because only one graph runs at a time.
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    @property
    def captures(self) -> int:
        """Captures since the start; stays as it is once the engine is warm."""
        return len(self._captured)

    def __contains__(self, shape: Hashable) -> bool:
        """Whether a shape was captured."""
        return shape in self._captured

    def capture(self, shape: Hashable, step: Step, inputs: tuple[torch.Tensor, ...]) -> None:
        """Record a step; it runs a few times with `inputs`, which must do no harm.

        Args:
            shape: what `replay` will call it; not captured before.
            step: kept alive with everything it refers to.
            inputs: of the shapes that every replay will have, on the device.
        """
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        buffers = tuple(tensor.clone() for tensor in inputs)
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_RUNS_BEFORE_CAPTURE):
                    step(*buffers)
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                logits = step(*buffers)
        self._pool = self._pool or graph.pool()
        self._captured[shape] = _Captured(graph, buffers, logits, step)
        logger.info("graph_captured shape=%s", shape)

    def replay(self, shape: Hashable, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Run a captured step on the current stream; the logits are overwritten by the next one."""
        captured = self._captured[shape]
        for buffer, tensor in zip(captured.inputs, inputs, strict=True):
            buffer.copy_(tensor)
        captured.graph.replay()
        return captured.logits
