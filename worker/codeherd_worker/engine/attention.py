"""Attend a slot's keys so that a row's bits do not depend on which CPU thread computes it.

Owns: how one query token per row meets the cache, plugged into an unmodified Llama through transformers'
`AttentionInterface`. Longer queries (prefill) and masks are transformers' own SDPA path. Does not know
slots or positions: the mask says everything.

Measured with torch 2.13: its CPU attention rounds the rows of a batch differently when the number `n` of
query rows per key head is odd (n = 1 and 3, float32 and float16, 2, 3 and 8 threads), never when it is
even. The likely cause is the alignment of each thread's stretch of one scratch buffer. A repeated query
row makes every `n` even; it reads no key twice. `SlotDecoder.warm_up` measures whether it holds here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: The name under which transformers knows `attend`.
_NAME = "codeherd_slots"


def install(model: LlamaForCausalLM) -> None:
    """Let a model attend through `attend`; its other callers notice nothing but rounding."""
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention, called by every layer.

    Args:
        module: the layer's attention.
        query: (B, H, S, D), H query heads.
        key: (B, K, kv_len, D), K key heads; H is a multiple of K.
        value: as `key`.
        attention_mask: (B, 1, S, kv_len), added to the scores.
        scaling: factor on the scores.
        kwargs: what transformers passes besides; for its own function.

    Returns:
        (B, S, H, D), and no attention weights.
    """
    batch, heads, length, head_size = query.shape
    if length > 1:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output
    # The query heads that share a key head become query rows: keys are neither repeated nor copied.
    rows = heads // key.shape[1]
    query = query.reshape(batch, key.shape[1], rows, head_size)
    if rows % 2:
        query = torch.cat([query, query[:, :, -1:]], dim=2)
    attended = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling
    )
    return attended[:, :, :rows].reshape(batch, 1, heads, head_size), None
