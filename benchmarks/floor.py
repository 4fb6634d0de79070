"""The least that a decode step can take: its matrix multiplications and nothing else.

    python -m benchmarks.floor FOLDER ROWS

Reads every weight matrix of the model once per step, in the order of the forward pass, and multiplies it with
`ROWS` rows. No attention, no norms, no sampling, no cache. Prints the milliseconds of each step as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as functional

from benchmarks.systems.checkpoint import load_float32

_WARM_UP_STEPS, _STEPS = 10, 50


def step_times_ms(folder: Path, rows: int) -> list[float]:
    """Return the milliseconds of each of 50 steps over the model in `folder`."""
    model = load_float32(folder)
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]) for weight in weights}
    times = []
    with torch.inference_mode():
        for _ in range(_WARM_UP_STEPS + _STEPS):
            started_at = time.perf_counter()
            for weight in weights:
                functional.linear(inputs[weight.shape[1]], weight)
            times.append((time.perf_counter() - started_at) * 1000)
    return times[_WARM_UP_STEPS:]


if __name__ == "__main__":
    print(json.dumps(step_times_ms(Path(sys.argv[1]), int(sys.argv[2]))))
