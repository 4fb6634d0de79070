"""Where the layers of a model go when several GPUs share it.

Owns: the share of each card. Does not know files, torch or hooks: transformers and accelerate place the
modules by the map that is made here, and move activations between cards. There is never a part of a model
on the CPU or on disk: one such layer would cost more than all others together.
"""

from __future__ import annotations

from collections.abc import Sequence

from codeherd_schema.errors import OutOfMemory
from codeherd_worker.engine.quantization import plannable_bytes

#: Stays together on the first card: where token ids go in, logits come out and tokens are chosen.
_ENDS = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")


def device_map(cards: Sequence[int]) -> dict[str, int]:
    """Return the card of each module of a Llama.

    Args:
        cards: the card of each layer, in the order of layers.
    """
    return dict.fromkeys(_ENDS, 0) | {f"model.layers.{n}": card for n, card in enumerate(cards)}


def spread_layers(
    layers: int, *, layer_bytes: int, ends_bytes: int, card_bytes: Sequence[int]
) -> tuple[int, ...]:
    """Return the card of each layer, neighbours together, so that the cache has most room.

    A layer's keys and values lie on its card, so the card with the least room per layer limits the length of
    every slot. Giving each layer in turn to the card that then has most room per layer makes that least room
    as large as it can be: a layer moved elsewhere would find less.

    Args:
        layers: how many there are.
        layer_bytes: weights of one.
        ends_bytes: weights of the embedding and the head, which lie on the first card.
        card_bytes: memory of each card.

    Raises:
        OutOfMemory: the weights leave no room for a cache.
    """
    free = [plannable_bytes(size) for size in card_bytes]
    free[0] -= ends_bytes
    counts = [0] * len(free)
    for _ in range(layers):
        room = [left / (count + 1) - layer_bytes for left, count in zip(free, counts, strict=True)]
        best = max(range(len(room)), key=room.__getitem__)
        if room[best] <= 0:
            raise OutOfMemory(
                f"weights of {(layers * layer_bytes + ends_bytes) / 1e9:.1f} GB do not fit "
                f"{len(card_bytes)} GPUs of {sum(card_bytes) / 1e9:.1f} GB together with a cache",
                hint="use a stronger quantization or more GPUs",
            )
        counts[best] += 1
    return tuple(card for card, count in enumerate(counts) for _ in range(count))
