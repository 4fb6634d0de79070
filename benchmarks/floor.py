"""The least that a decode step can take, and the most tokens that this machine could make.

    python -m benchmarks.floor FOLDER ROWS

Prints JSON. No attention, no norms, no sampling, no cache:
    step_ms        of each of 50 steps: torch multiplies `ROWS` rows with every matrix, in order
    terms          multiply-adds of a token: numbers in all matrices but the head
    head_terms     those of the head
    weight_bytes   of all matrices: what a step reads
    bytes_per_s    at which torch sums them up, the best of several times
    flops_per_s    of a product of large square matrices, the best of several times
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional

from benchmarks.systems.checkpoint import load_float32

_WARM_UP_STEPS, _STEPS = 10, 50
#: Rows and columns of the large matrices, and how often each is tried.
_LARGE, _TRIES = 2048, 10
#: Bytes that no core's own cache holds; what a small model's matrices take fits there, and is read faster.
_FAR_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class MachineFloor:
    """See above."""

    step_ms: list[float]
    terms: int
    head_terms: int
    weight_bytes: int
    bytes_per_s: float
    flops_per_s: float


def measure(folder: Path, rows: int) -> MachineFloor:
    """Measure the model in `folder` on this machine."""
    model = load_float32(folder)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    weights = [module.weight for module in modules.values()]
    head = modules["lm_head"].weight
    with torch.inference_mode():
        return MachineFloor(
            step_ms=_step_times_ms(weights, rows),
            terms=sum(weight.numel() for weight in weights) - head.numel(),
            head_terms=head.numel(),
            weight_bytes=sum(weight.nbytes for weight in weights),
            bytes_per_s=_bytes_per_s(sum(weight.nbytes for weight in weights)),
            flops_per_s=_flops_per_s(),
        )


def _step_times_ms(weights: list[torch.Tensor], rows: int) -> list[float]:
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]) for weight in weights}
    times = []
    for _ in range(_WARM_UP_STEPS + _STEPS):
        started_at = time.perf_counter()
        for weight in weights:
            functional.linear(inputs[weight.shape[1]], weight)
        times.append((time.perf_counter() - started_at) * 1000)
    return times[_WARM_UP_STEPS:]


def _bytes_per_s(size: int) -> float:
    numbers = torch.ones(size // 4)
    # A small model is read from a cache, and a sum of it is over before it was measured.
    times = max(1, _FAR_BYTES // size)
    return times * numbers.nbytes / _fastest_s(lambda: [numbers.sum() for _ in range(times)])


def _flops_per_s() -> float:
    one, other = torch.randn(_LARGE, _LARGE), torch.randn(_LARGE, _LARGE)
    return 2 * _LARGE**3 / _fastest_s(lambda: torch.mm(one, other))


def _fastest_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_TRIES):
        started_at = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_at)
    return min(times)


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Path(sys.argv[1]), int(sys.argv[2])))))
