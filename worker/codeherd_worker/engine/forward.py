"""Run a loaded Llama over a flat list of tokens, whatever sequences they belong to.

Owns: the order of a Llama's layers, and on which device each computes. Uses the modules and
weights of an unmodified `LlamaForCausalLM`, with as few calls as the mathematics needs: on small models
and on GPUs the calls are what a decode step waits for. Does not know slots, the cache or masks: whoever
calls says where keys and values go and what is attended (`Attend`).

Same mathematics as transformers' `modeling_llama.py` (5.23); results differ by rounding alone.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from codeherd_schema.errors import ModelFilesInvalid
from codeherd_worker.engine.cpu_attention import CpuPass
from codeherd_worker.engine.layers import layers_for, stack_of
from codeherd_worker.engine.linears import Linear, join
from codeherd_worker.engine.operations import operations_for

#: RoPE types whose angles do not depend on how long a sequence is, so that one table serves all.
_FIXED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


class Attend(Protocol):
    """Store a layer's new keys and values, and attend."""

    def __call__(self, layer: int, joined: torch.Tensor) -> torch.Tensor:
        """Return what each token attends.

        Args:
            layer: its number.
            joined: (T, (H + 2 K) * D): a token's rotated queries and keys, and its values, side by side.

        Returns:
            (T, H * D).
        """
        ...


class LlamaForward:
    """The forward pass of one model."""

    def __init__(self, model: LlamaForCausalLM, *, positions: int) -> None:
        """Prepare the weights and the rotary table.

        Args:
            model: in eval mode, on its device or devices. Dense weights that are multiplied together are
                joined; the model itself still works.
            positions: places that a token can have.

        Raises:
            ModelFilesInvalid: the model's rotary angles change with the length of a sequence.
        """
        config = model.config
        rope_type = config.rope_parameters.get("rope_type", "default")
        if rope_type not in _FIXED_ROPE_TYPES:
            raise ModelFilesInvalid(
                f"rope_type is `{rope_type}`, whose angles depend on the length of a sequence",
                hint=f"use a model with one of {', '.join(sorted(_FIXED_ROPE_TYPES))}",
            )
        self.heads: int = config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self._embedding = model.get_input_embeddings()
        self._final_norm = model.model.norm.weight.data
        self._head = join([model.lm_head])
        self.dtype: torch.dtype = model.lm_head.weight.dtype
        #: Where token ids go in and logits come out.
        self.device: torch.device = self._embedding.weight.device
        self.layer_devices = [layer.input_layernorm.weight.device for layer in model.model.layers]
        self._rotary = _rotary_table(model, positions)
        self._do = operations_for(
            self.device, self.dtype, model.model.layers[0].mlp.act_fn, config.rms_norm_eps
        )
        self._layers = layers_for(model.model.layers, self._do, rotated_heads=self.heads + self.key_heads)
        self._stack = stack_of(self._layers)

    @property
    def linears(self) -> list[Linear]:
        """Every matrix, with repetitions of the same shape: for checks of how they round."""
        return [linear for layer in self._layers for linear in layer.linears] + [self._head]

    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits of the token after each of the `wanted` ones.

        Args:
            token_ids: (T,) int64.
            positions: (T,) int64, each token's place in its sequence.
            attend: called once per layer, in order.
            wanted: (B,) int64, indices into the T tokens; None: all of them.

        Returns:
            (B, V), on `device`.
        """
        hidden = functional.embedding(token_ids, self._embedding.weight)
        delta: torch.Tensor | None
        if self._stack is not None and isinstance(attend, CpuPass):
            hidden, delta = self._stack(hidden, *self._angles(positions, hidden.device), attend)
        else:
            hidden, delta = self._one_by_one(hidden, positions, attend)
        if wanted is not None:
            wanted = wanted.to(hidden.device)
            hidden = hidden.index_select(0, wanted)
            delta = None if delta is None else delta.index_select(0, wanted)
        final_device = self._final_norm.device
        delta = None if delta is None else delta.to(final_device)
        hidden = hidden.to(final_device)
        if delta is None:  # a model without layers
            normed = self._do.norm(hidden, self._final_norm)
        else:
            _, normed = self._do.add_and_norm(hidden, delta, self._final_norm)
        logits = self._head(normed)
        return logits.to(self.device)

    def _one_by_one(
        self, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the hidden states and what the last layer adds to them yet, on the last layer's device."""
        cosine, sine = self._angles(positions, hidden.device)
        # What the layer before adds to its tokens, added where the next norm reads them anyway.
        delta: torch.Tensor | None = None
        for number, (layer, device) in enumerate(zip(self._layers, self.layer_devices, strict=True)):
            if device != hidden.device:
                hidden = hidden.to(device)
                delta = None if delta is None else delta.to(device)
                cosine, sine = self._angles(positions, device)
            hidden, joined = layer.before(hidden, delta, cosine, sine)
            hidden, delta = layer.after(hidden, attend(number, joined))
        return hidden, delta

    def _angles(self, positions: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and signed sine of the tokens' angles, (T, 1, D) each."""
        cosine, sine = self._rotary[device]
        places = positions.to(device)
        return cosine.index_select(0, places), sine.index_select(0, places)


def _rotary_table(
    model: LlamaForCausalLM, positions: int
) -> dict[torch.device, tuple[torch.Tensor, torch.Tensor]]:
    """Return cosine and sine of every position, (positions, 1, D), on each device that has layers.

    The first half of the sine is negated: a head's rotation is then `x * cos + roll(x) * sin`.
    """
    embedding = model.get_input_embeddings().weight
    rotary = model.model.rotary_emb
    places = torch.arange(positions, device=rotary.inv_freq.device)[None]
    with torch.inference_mode():
        cosine, sine = rotary(embedding.new_zeros(1, device=places.device), position_ids=places)
    cosine, sine = cosine[0, :, None], sine[0, :, None]
    half = sine.shape[-1] // 2
    sine = torch.cat([-sine[..., :half], sine[..., half:]], dim=-1)
    devices = {embedding.device} | {layer.input_layernorm.weight.device for layer in model.model.layers}
    return {device: (cosine.to(device), sine.to(device)) for device in devices}
