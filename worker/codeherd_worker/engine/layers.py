"""Compute what a decoder layer does before and after its attention, in the fastest form that this device has.

Owns: the order of norms, products, rotation and gating in a layer. Does not know attention, the cache, what
comes between layers, or how weights were loaded (`loading.py`).

    plain      each matrix and each operation is a call (`linears.py`, `operations.py`): GPUs, 16-bit numbers,
               quantized weights, biases, CPUs without AVX-512.
    compiled   two calls a layer, float32 on a CPU with AVX-512, or one call for all where attention is
               compiled too (`fused.py`): on small models the calls are what a decode step waits for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from codeherd_worker.engine.linears import Linear, join
from codeherd_worker.engine.operations import Operations

if TYPE_CHECKING:
    from codeherd_worker.engine.fused import FusedStack


class Layer(Protocol):
    """A decoder layer without its attention."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its matrices, each as a call of its own: for checks of how they round."""
        ...

    def before(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states with `delta` added, and what is to be attended.

        Args:
            hidden: (T, N); may be changed.
            delta: (T, N), what the layer before adds.
            cosine: (T, 1, D) of the tokens' angles.
            sine: as much, its first half negated.

        Returns:
            (T, N), and (T, (H + 2 K) D): rotated queries and keys, and values, side by side.
        """
        ...

    def after(self, hidden: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states with the attention added, and what the layer adds to them yet.

        Args:
            hidden: (T, N); may be changed.
            attended: (T, H D).
        """
        ...


def layers_for(
    layers: Iterable[LlamaDecoderLayer], operations: Operations, *, rotated_heads: int
) -> list[Layer]:
    """Return each layer in its fastest form.

    Args:
        layers: of one model; dense matrices that read the same input are joined, and the layers still work.
        operations: of their device and type.
        rotated_heads: heads of queries and keys.
    """
    forms: list[Layer] = []
    # What compiled layers work in.
    scratch = None
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        matrices = (
            join([attention.q_proj, attention.k_proj, attention.v_proj]),
            join([attention.o_proj]),
            join([mlp.gate_proj, mlp.up_proj]),
            join([mlp.down_proj]),
        )
        norms = layer.input_layernorm.weight.data, layer.post_attention_layernorm.weight.data
        if operations.are_compiled:
            # Imported here: a GPU's worker needs no compiler.
            from codeherd_worker.engine.fused import FusedLayer, Scratch, can_fuse

            if can_fuse(*matrices):
                scratch = scratch or Scratch()
                forms.append(FusedLayer(*matrices, norms, operations.epsilon, rotated_heads, scratch))
                continue
        forms.append(_PlainLayer(*matrices, norms, operations, rotated_heads))
    return forms


def stack_of(layers: Sequence[Layer]) -> FusedStack | None:
    """Return all of these layers as one call, if each is compiled."""
    if not layers or isinstance(layers[0], _PlainLayer):
        return None
    from codeherd_worker.engine.fused import FusedLayer, FusedStack

    fused = [layer for layer in layers if isinstance(layer, FusedLayer)]
    return FusedStack(fused) if len(fused) == len(layers) else None


class _PlainLayer:
    """Any device, type and quantization."""

    def __init__(
        self,
        qkv: Linear,
        output: Linear,
        gate_up: Linear,
        down: Linear,
        norms: tuple[torch.Tensor, torch.Tensor],
        operations: Operations,
        rotated_heads: int,
    ) -> None:
        self._qkv, self._output, self._gate_up, self._down = qkv, output, gate_up, down
        self._attention_norm, self._mlp_norm = norms
        self._do, self._rotated_heads = operations, rotated_heads

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self._qkv, self._output, self._gate_up, self._down)

    def before(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if delta is None:
            normed = self._do.norm(hidden, self._attention_norm)
        else:
            hidden, normed = self._do.add_and_norm(hidden, delta, self._attention_norm)
        joined = self._qkv(normed)
        self._do.rotate(joined, self._rotated_heads, cosine, sine)
        return hidden, joined

    def after(self, hidden: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, normed = self._do.add_and_norm(hidden, self._output(attended), self._mlp_norm)
        return hidden, self._down(self._do.gate(self._gate_up(normed)))
