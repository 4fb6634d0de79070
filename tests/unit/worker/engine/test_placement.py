from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model

from codeherd_schema.errors import OutOfMemory
from codeherd_worker.engine.loading import _places, size_of
from codeherd_worker.engine.placement import device_map, spread_layers
from codeherd_worker.engine.quantization import plannable_bytes
from tests.unit.worker.engine.tiny_llama import tiny_config, tiny_llama

GB = 10**9


def room_per_layer(cards: tuple[int, ...], layer: int, ends: int, sizes: list[int]) -> float:
    """Bytes of cache per layer on the card that has least; fewer than none if weights do not fit."""
    free = [plannable_bytes(size) - (ends if card == 0 else 0) for card, size in enumerate(sizes)]
    return min(free[c] / cards.count(c) - layer for c in set(cards))


@pytest.mark.parametrize(
    ("layers", "layer", "ends", "sizes"),
    [
        (48, int(1.39 * GB), GB, [80 * GB, 80 * GB]),
        (80, int(0.85 * GB), GB, [80 * GB, 80 * GB]),
        (80, int(0.44 * GB), GB, [24 * GB, 24 * GB, 24 * GB, 24 * GB]),
        (40, int(0.63 * GB), GB, [24 * GB, 80 * GB]),
        (7, GB, 3 * GB, [12 * GB, 16 * GB, 24 * GB]),
    ],
)
def test_no_other_split_leaves_more_cache(layers: int, layer: int, ends: int, sizes: list[int]) -> None:
    cards = spread_layers(layers, layer_bytes=layer, ends_bytes=ends, card_bytes=sizes)

    room = room_per_layer(cards, layer, ends, sizes)
    assert len(cards) == layers
    assert list(cards) == sorted(cards)
    assert room > 0
    for source in set(cards):
        for target in set(range(len(sizes))) - {source}:
            moved = list(cards)
            moved[moved.index(source)] = target
            assert room_per_layer(tuple(moved), layer, ends, sizes) <= room


def test_equal_cards_share_equally_but_for_the_ends() -> None:
    cards = spread_layers(80, layer_bytes=GB // 2, ends_bytes=GB, card_bytes=[80 * GB, 80 * GB])

    assert cards.count(0) == cards.count(1) == 40


@pytest.mark.parametrize("sizes", [[24 * GB], [24 * GB, 24 * GB], [2 * GB, 40 * GB]])
def test_weights_without_room_for_a_cache_are_refused(sizes: list[int]) -> None:
    with pytest.raises(OutOfMemory, match=r"45\.0 GB do not fit") as caught:
        spread_layers(44, layer_bytes=GB, ends_bytes=GB, card_bytes=sizes)

    assert caught.value.hint


def test_each_device_has_its_map() -> None:
    size = size_of(tiny_config())
    cards = [8 * GB, 8 * GB]

    assert _places("cpu", size, 10**6, torch.float32, cards) == {"": "cpu"}
    assert _places("cuda", size, 10**6, torch.bfloat16, cards) == {"": 0}
    assert _places("cuda-group", size, 10**6, torch.bfloat16, cards) == device_map((0, 1))


def test_the_map_names_every_part_of_a_model_once() -> None:
    model = tiny_llama()
    places = device_map((0, 1))

    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        assert sum(name == place or name.startswith(place + ".") for place in places) == 1
    assert {places["model.embed_tokens"], places["lm_head"], places["model.norm"]} == {0}
    assert (places["model.layers.0"], places["model.layers.1"]) == (0, 1)


def test_the_modules_of_a_spread_model_can_be_called_one_by_one() -> None:
    plain, spread = tiny_llama(), tiny_llama()
    dispatch_model(spread, dict.fromkeys(device_map((0, 1)), "cpu"), main_device="cpu", force_hooks=True)
    ids = torch.tensor([[5, 6, 7]])

    hidden = spread.model.embed_tokens(ids)
    for layer, reference in zip(spread.model.layers, plain.model.layers, strict=True):
        assert hasattr(layer.self_attn.q_proj, "_hf_hook")
        assert torch.equal(layer.self_attn.q_proj(hidden), reference.self_attn.q_proj(hidden))
        assert torch.equal(layer.mlp.down_proj(layer.mlp.up_proj(hidden)),
                           reference.mlp.down_proj(reference.mlp.up_proj(hidden)))  # fmt: skip
    assert torch.equal(spread.lm_head(hidden), plain.lm_head(hidden))
    assert torch.equal(spread(ids).logits, plain(ids).logits)
