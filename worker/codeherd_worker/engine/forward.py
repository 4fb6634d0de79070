"""Run a loaded Llama over a flat list of tokens, whatever sequences they belong to.

Owns: the order of a Llama's operations, and on which device each layer computes. Uses the modules and
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
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from codeherd_schema.errors import ModelFilesInvalid
from codeherd_worker.engine.linears import Linear, join

#: RoPE types whose angles do not depend on how long a sequence is, so that one table serves all.
_FIXED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


class Attend(Protocol):
    """Store a layer's new keys and values, and attend."""

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Return what each token attends.

        Args:
            layer: its number.
            query: (T, H, D).
            key: (T, K, D).
            value: (T, K, D).

        Returns:
            (T, H * D).
        """
        ...


class _Layer:
    """One decoder layer's weights, ready to be called."""

    __slots__ = ("act", "attention_norm", "device", "down", "gate_up", "mlp_norm", "output", "qkv")

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.device: torch.device = layer.input_layernorm.weight.device
        self.qkv: Linear = join([attention.q_proj, attention.k_proj, attention.v_proj])
        self.output: Linear = join([attention.o_proj])
        self.gate_up: Linear = join([mlp.gate_proj, mlp.up_proj])
        self.down: Linear = join([mlp.down_proj])
        self.act = mlp.act_fn
        self.attention_norm = layer.input_layernorm.weight.data
        self.mlp_norm = layer.post_attention_layernorm.weight.data


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
        self._epsilon: float = config.rms_norm_eps
        self._layers = [_Layer(layer) for layer in model.model.layers]
        self._embedding = model.get_input_embeddings()
        self._final_norm = model.model.norm.weight.data
        self._head = join([model.lm_head])
        self.dtype: torch.dtype = model.lm_head.weight.dtype
        #: Where token ids go in and logits come out.
        self.device: torch.device = self._embedding.weight.device
        self.layer_devices = [layer.device for layer in self._layers]
        self._rotary = _rotary_table(model, positions)

    @property
    def linears(self) -> list[Linear]:
        """Every matrix, with repetitions of the same shape: for checks of how they round."""
        layers = self._layers
        return [linear for x in layers for linear in (x.qkv, x.output, x.gate_up, x.down)] + [self._head]

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
        cosine, sine = self._angles(positions, hidden.device)
        query_size = self.heads * self.head_size
        rotated_size = query_size + self.key_heads * self.head_size
        for number, layer in enumerate(self._layers):
            if layer.device != hidden.device:
                hidden = hidden.to(layer.device)
                cosine, sine = self._angles(positions, layer.device)
            joined = layer.qkv(self._norm(hidden, layer.attention_norm))
            tokens = joined.shape[0]
            rotated = joined[:, :rotated_size].view(tokens, -1, self.head_size)
            turned = rotated.roll(self.head_size // 2, -1)
            # In place: these are two thirds of a tensor that nobody else sees.
            rotated.mul_(cosine).addcmul_(turned, sine)
            attended = attend(
                number,
                rotated[:, : self.heads],
                rotated[:, self.heads :],
                joined[:, rotated_size:].view(tokens, self.key_heads, self.head_size),
            )
            hidden = hidden + layer.output(attended)
            gate_up = layer.gate_up(self._norm(hidden, layer.mlp_norm))
            gate, up = gate_up.chunk(2, dim=-1)
            hidden = hidden + layer.down(layer.act(gate).mul_(up))
        if wanted is not None:
            hidden = hidden.index_select(0, wanted.to(hidden.device))
        hidden = self._norm(hidden.to(self._final_norm.device), self._final_norm)
        logits = self._head(hidden)
        return logits.to(self.device)

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self._epsilon)

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
