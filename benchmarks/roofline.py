"""The least time that a decode step or a prefill can take on a device: bytes over bandwidth, work over rate.

Owns: what must be read and computed, counted from a model's shape, and a device's two ceilings, measured.
Every weight is read once a step, the embedding's excepted, of which a step needs a few rows; every key and
value that is attended is read once; a token costs two operations a weight and four per attended number of a
head. Activations stay in caches and are not counted. Does not know which kernels run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from codeherd_worker.engine.loading import size_of

#: Bytes of the copied tensor, several times any cache, and the side of the multiplied matrices.
_COPIED_BYTES, _MATRIX_SIDE = {"cuda": 2**31, "cpu": 2**26}, {"cuda": 8192, "cpu": 512}
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a device can do at most."""

    #: Read and written.
    bytes_per_s: float
    #: Of a large product of bfloat16 matrices; multiplications and additions.
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """The floor under a model's time on a device."""

    config: LlamaConfig
    #: How the layers' weights are held: a name of `engine.quantization`.
    quantization: str
    ceilings: Ceilings

    def step_s(self, rows: int, context: float) -> float:
        """Return the least seconds of a decode step.

        Args:
            rows: sequences that decode together.
            context: tokens that each of them attends, on average.
        """
        size = size_of(self.config)
        embedding = int(self.config.vocab_size * self.config.hidden_size) * 2
        read = size.weight_bytes(self.quantization) - embedding
        read += int(rows * context * size.kv_bytes_per_token)
        work = rows * (2 * (size.linear_weights + embedding // 2) + self._attention(context))
        return max(read / self.ceilings.bytes_per_s, work / self.ceilings.flops_per_s)

    def prefill_s(self, tokens: int) -> float:
        """Return the least seconds in which the keys and values of one prompt can be computed."""
        work = tokens * (2 * size_of(self.config).linear_weights + self._attention(tokens / 2))
        return work / self.ceilings.flops_per_s

    def _attention(self, context: float) -> float:
        # kv_bytes_per_token counts 2 bytes each of K keys and values; every query head meets them all.
        config = self.config
        group = int(config.num_attention_heads // config.num_key_value_heads)
        return 2 * group * context * size_of(config).kv_bytes_per_token / 2


def measure_ceilings(device: torch.device) -> Ceilings:
    """Copy a large tensor and multiply two large matrices, a few times each; the best counts."""
    copied = torch.ones(2, _COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    copy_s = _best_s(lambda: copied[0].copy_(copied[1]), device)
    side = _MATRIX_SIDE[device.type]
    # Random: a product of zeros runs faster than one of data.
    left, right = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    multiply_s = _best_s(lambda: torch.mm(left, right), device)
    return Ceilings(copied.nbytes / copy_s, 2 * side**3 / multiply_s)


def _best_s(work: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(_TRIES + 1):
        _wait(device)
        started_at = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - started_at)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
