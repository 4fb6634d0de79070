"""Which quantization a model gets: the names, what the weights then weigh, and the rule behind `auto`.

Owns: numbers. Does not know files, torch, or how a quantization is applied (`loading.py`).

Quantizations:
    nf4            4 bits, bitsandbytes NF4 with double quantization; for capacity and few slots.
    int8           8 bits, bitsandbytes without outlier decomposition.
    none           the device's own dtype: bfloat16 (float16 on GPUs without it), float32 on a CPU.
    bf16, fp16     that dtype, whatever the device.
    torchao-int8   8 bits, weights only; needs the package torchao.
    torchao-int4   4 bits, weights only, in groups of 64; needs torchao and a GPU.

The rule for a GPU (`RULES`). Fused NF4 kernels read a quarter of the bytes, but only for few rows; past
that, bitsandbytes 0.50.2 writes every weight out in 16 bits first, which is slower than having it so:

    parameters      nf4 up to    with more slots, the first that leaves a useful cache
    below 0.5B      no slots     none
    below 10B       7 slots      none, int8, nf4
    below 20B       5 slots      none, int8, nf4
    20B and more    16 slots     int8, nf4

The slot borders are those of bitsandbytes' dispatch on an H100 (132 multiprocessors): 7B keeps six of
seven layers fused up to 7 rows, 13B all up to 5, 34B and 70B most up to 16. `none` comes before int8
because it is exact and int8 takes three kernels a layer; from 20B on, reading the weights is the step, and
int8 halves it. All of this is computed from published kernels and memory bandwidth, not measured here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

AppliedQuantization = Literal["nf4", "int8", "none", "bf16", "fp16", "torchao-int8", "torchao-int4"]
Quantization = Literal["auto", "nf4", "int8", "none", "bf16", "fp16", "torchao-int8", "torchao-int4"]
#: What a copy can be kept in: formats that are read back bit for bit.
SavedQuantization = Literal["nf4", "int8"]
Device = Literal["cpu", "cuda", "cuda-group"]

#: Bytes per weight of a quantized layer. nf4: 4 bits, an 8-bit scale per 64 weights, a 32-bit scale per 256
#: of those. int8: a 32-bit scale per row, here of 4096 weights. torchao-int4: two 16-bit numbers per 64.
_BYTES_PER_WEIGHT: Final[dict[str, float]] = {
    "nf4": 0.5 + 1 / 64 + 4 / (64 * 256),
    "int8": 1 + 4 / 4096,
    "torchao-int8": 1 + 4 / 4096,
    "torchao-int4": 0.5 + 4 / 64,
}
#: Share of a device's memory that can be planned with, and bytes of it that activations take.
_PLANNED_SHARE, _ACTIVATION_BYTES = 0.92, 2 * 2**30
#: Tokens per slot from which a cache counts as useful.
_USEFUL_TOKENS = 2048
#: A smaller cache is useful too, if it is this share of what NF4 weights would leave.
_USEFUL_SHARE = 0.75
#: Parameters. Below, a CPU spends more on calling a 4-bit kernel than on the weights it saves
#: (128 x 128 layer, 8 rows: 98 us as NF4, 7 us as float32).
_CPU_NF4_FROM = 500e6


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What of a model takes memory; norms and biases are left out."""

    #: Weights of the layers' linear modules: what quantization shrinks.
    linear_weights: int
    #: Weights of the embedding and, unless it is the same, the head: always in 16 or 32 bits.
    kept_weights: int
    #: Of the cache, for one token of one sequence, in 16 bits.
    kv_bytes_per_token: int
    layers: int

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.linear_weights + self.kept_weights

    def weight_bytes(self, quantization: str, dtype_bytes: int = 2) -> int:
        """Return what the weights take on a device.

        Args:
            quantization: how they are held.
            dtype_bytes: of what is not quantized.
        """
        per_weight = _BYTES_PER_WEIGHT.get(quantization, dtype_bytes)
        return math.ceil(self.linear_weights * per_weight) + self.kept_weights * dtype_bytes


@dataclass(frozen=True, slots=True)
class Rule:
    """What `auto` means on a GPU for models of one class of size."""

    #: Parameters; the first rule with more than the model's holds.
    below: float
    #: Most slots at which NF4 comes first.
    nf4_slots: int
    #: With more slots: the first that leaves a useful cache, NF4 if none does.
    preferred: tuple[AppliedQuantization, ...]


#: In the order of sizes.
RULES: Final = (
    Rule(below=10e9, nf4_slots=7, preferred=("none", "int8")),
    Rule(below=20e9, nf4_slots=5, preferred=("none", "int8")),
    Rule(below=math.inf, nf4_slots=16, preferred=("int8",)),
)
#: Parameters. Smaller models stay as they are on a GPU: their weights are read in less time than a kernel
#: takes to start.
_GPU_QUANTIZED_FROM = 500e6


def choose_quantization(
    size: ModelSize, slots: int, device: Device, memory_bytes: int
) -> AppliedQuantization:
    """Choose what `auto` means.

    On a GPU: the table above. On a CPU: NF4 for models of 0.5B parameters and more, where it saves most of
    the memory and, with AVX512-BF16, is no slower at eight rows (2 to 3 times slower at one); "none" for
    small ones, which NF4 makes slower. The border is a judgement between two measured layer sizes.

    Args:
        size: of the model.
        slots: sequences that decode together.
        device: the kind of device.
        memory_bytes: of the device, or of all in the group.
    """
    if device == "cpu":
        return "nf4" if size.parameters >= _CPU_NF4_FROM else "none"
    if size.parameters < _GPU_QUANTIZED_FROM:
        return "none"
    rule = next(rule for rule in RULES if size.parameters < rule.below)
    if slots <= rule.nf4_slots:
        return "nf4"
    useful = min(
        slots * _USEFUL_TOKENS * size.kv_bytes_per_token,
        _USEFUL_SHARE * _cache_bytes(size, "nf4", memory_bytes),
    )
    return next((q for q in rule.preferred if _cache_bytes(size, q, memory_bytes) >= max(useful, 0)), "nf4")


def plannable_bytes(memory_bytes: int) -> int:
    """Return how much of one device's memory weights and cache can take together."""
    return int(memory_bytes * _PLANNED_SHARE) - _ACTIVATION_BYTES


def _cache_bytes(size: ModelSize, quantization: str, memory_bytes: int) -> int:
    """Return what weights of this quantization leave to the cache; negative if they do not fit."""
    return plannable_bytes(memory_bytes) - size.weight_bytes(quantization)
