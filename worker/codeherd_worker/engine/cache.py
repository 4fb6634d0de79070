"""Keep the keys and values of every slot in tensors that are allocated once.

Owns: where a token's keys and values are written and which of them a forward pass reads. Plugs into
an unmodified `LlamaForCausalLM` as its `past_key_values`. Does not know which slot is in use, what a
position means to the model, or masks: what must not be attended is never masked out here.

A slot is one row. Its last positions are spare: padding and idle rows write there (`spare_position`),
and no read ever covers them, so whatever lies there cannot reach a sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig
from transformers.cache_utils import Cache, CacheLayerMixin

#: Tokens. Rows start at multiples of this many tokens: CPU kernels may round differently when the
#: same numbers lie at another alignment, and CUDA kernels want masks in multiples of 8.
ROW_ALIGNMENT = 16


class Aim:
    """Say where the next forward pass writes and what it reads; shared by all layers."""

    __slots__ = ("destination", "kv_len", "rows")

    def __init__(self, rows: slice, kv_len: int, destination: torch.Tensor) -> None:
        self.rows = rows
        self.kv_len = kv_len
        #: (B*H*S,) int64: index of each new key in the cache seen as (rows*H*capacity, D).
        self.destination = destination


class SlotLayer(CacheLayerMixin):
    """One decoder layer's share: keys and values of shape (rows, H, capacity, D)."""

    is_compileable = True
    is_sliding = False

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.is_initialized = True
        self.aim: Aim
        self._flat_keys = self.keys.view(-1, shape[-1])
        self._flat_values = self.values.view(-1, shape[-1])

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the tensors exist since the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values of shape (B, H, S, D); return those to attend, (B, H, kv_len, D)."""
        aim = self.aim
        # No copy on one device; with a group of GPUs each layer keeps its share where it computes.
        destination = aim.destination.to(self.keys.device)
        head_size = key_states.shape[-1]
        self._flat_keys.index_copy_(0, destination, key_states.reshape(-1, head_size))
        self._flat_values.index_copy_(0, destination, value_states.reshape(-1, head_size))
        return self.keys[aim.rows, :, : aim.kv_len], self.values[aim.rows, :, : aim.kv_len]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tell transformers how long the attended part is, and that it starts at 0."""
        return self.aim.kv_len, 0

    def get_seq_length(self) -> int:
        """Return 0: positions come with every call, this layer counts nothing."""
        return 0

    def get_max_length(self) -> int:
        """Return how many tokens one row can hold."""
        return int(self.keys.shape[2])


class SlotCache(Cache):
    """The cache of all layers, `rows` sequences of up to `max_len` tokens each."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rows: int,
        max_len: int,
        dtype: torch.dtype,
        layer_devices: list[torch.device],
    ) -> None:
        """Allocate everything that will ever be needed.

        Args:
            config: the model's; `head_dim` is taken as written when it is explicit.
            rows: sequences that are held at the same time.
            max_len: tokens per row that can be attended.
            dtype: of the keys and values the model produces.
            layer_devices: where each layer computes, in layer order.
        """
        heads = config.num_key_value_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        #: Tokens per row that a read may cover: `max_len` rounded up.
        self.readable_len = _round_up(max_len, ROW_ALIGNMENT)
        self.spare_position = self.readable_len
        capacity = self.readable_len + ROW_ALIGNMENT
        shape = (rows, heads, capacity, head_size)
        layers = [SlotLayer(shape, dtype, device) for device in layer_devices]
        super().__init__(layers=layers)
        self._slot_layers = layers
        # (rows, H, 1): where each row's and head's stretch begins in the flat view.
        self._starts = torch.arange(rows * heads, device=layer_devices[0]).mul_(capacity).view(rows, heads, 1)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._slot_layers)

    def point(self, rows: slice, positions: torch.Tensor, kv_len: int) -> None:
        """Prepare the next forward pass.

        Args:
            rows: the rows it computes, B of them.
            positions: (B, S) int64, where each new token is written in its row.
            kv_len: how many positions of those rows it may attend, at most `readable_len`.
        """
        destination = (self._starts[rows] + positions[:, None, :]).flatten()
        aim = Aim(rows, kv_len, destination)
        for layer in self._slot_layers:
            layer.aim = aim

    def wipe(self, row: int) -> None:
        """Zero one row. Needed after numbers that are not finite: masked NaN still spreads."""
        for layer in self._slot_layers:
            layer.keys[row].zero_()
            layer.values[row].zero_()

    def fill_alike(self, generator: torch.Generator) -> None:
        """Give all rows the same random content, for checks that compare rows."""
        for layer in self._slot_layers:
            for tensor in (layer.keys, layer.values):
                row = torch.randn(tensor.shape[1:], generator=generator)
                tensor.copy_(row.to(tensor.device, tensor.dtype).expand_as(tensor))

    def clear(self) -> None:
        """Zero all rows."""
        for row in range(len(self._starts)):
            self.wipe(row)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
