"""Replay a decode step as one captured CUDA graph, so that the GPU never waits for Python.

Owns: the captured graphs, one per shape, and the buffers they read. Does not know what a step computes: it
is given a function. On other devices there are no graphs, and steps run as they are.

A graph replays the same kernels on the same addresses: everything that a step reads lives in tensors that
are never replaced, and everything that changes is copied into them first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch

logger = logging.getLogger(__name__)

#: Runs before a capture: libraries allocate their workspaces and choose their kernels in the first ones.
_RUNS_BEFORE_CAPTURE = 3

#: From token ids, positions and written positions, (B, S) int64 each, to logits.
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class StepGraphs:
    """The captured steps of one decoder; used by one thread."""

    def __init__(self, device: torch.device) -> None:
        """Hold no graph yet."""
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._inputs: dict[Hashable, tuple[torch.Tensor, ...]] = {}
        self._logits: dict[Hashable, torch.Tensor] = {}
        # Shared: only one graph runs at a time.
        self._pool: Any = None
        #: Captures since the start; stays as it is once the engine is warm.
        self.captures = 0

    def __contains__(self, shape: Hashable) -> bool:
        """Whether a shape was captured."""
        return shape in self._graphs

    def capture(self, shape: Hashable, step: Step, inputs: tuple[torch.Tensor, ...]) -> None:
        """Record a step; it runs a few times with `inputs`, which must do no harm."""
        buffers = tuple(tensor.clone() for tensor in inputs)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_RUNS_BEFORE_CAPTURE):
                step(*buffers)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = step(*buffers)
        self._pool = self._pool or graph.pool()
        self._graphs[shape], self._inputs[shape], self._logits[shape] = graph, buffers, logits
        self.captures += 1
        logger.info("graph_captured shape=%s", shape)

    def replay(self, shape: Hashable, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Run a captured step; the logits are overwritten by the next one."""
        for buffer, tensor in zip(self._inputs[shape], inputs, strict=True):
            buffer.copy_(tensor)
        self._graphs[shape].replay()
        return self._logits[shape]
