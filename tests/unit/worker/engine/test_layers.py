from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from codeherd_worker.engine import linears
from codeherd_worker.engine.cache import SlotCache
from codeherd_worker.engine.cpu_attention import CpuAttention, CpuPass
from codeherd_worker.engine.forward import LlamaForward
from codeherd_worker.engine.layers import Layer, _PlainLayer, layers_for, stack_of
from codeherd_worker.engine.operations import operations_for
from tests.unit.worker.engine.attending import make_cache
from tests.unit.worker.engine.tiny_llama import has_avx512, tiny_llama

#: The tests' Llama: 4 heads and 2 key heads of 16.
ROTATED, JOINED, SIZE, HEAD = 6, 8 * 16, 64, 16
EPSILON = 1e-5
COUNTS = [1, 2, 3, 7, 15, 16, 17, 33, 64, 100]

needs_avx512 = pytest.mark.skipif(not has_avx512(), reason="fused layers are for CPUs with AVX-512")


pytestmark = pytest.mark.usefixtures("one_or_two_threads")


def decoder_layer(**changes: Any) -> LlamaDecoderLayer:
    model = tiny_llama(num_hidden_layers=1, **changes)
    layer: LlamaDecoderLayer = model.model.layers[0]
    for seed, norm in enumerate((layer.input_layernorm, layer.post_attention_layernorm)):
        norm.weight.data.copy_(draw(SIZE, seed=seed) + 2)
    return layer


def make(layer: LlamaDecoderLayer, *, plain: bool = False) -> Layer:
    weight = layer.mlp.down_proj.weight
    operations = operations_for(weight.device, weight.dtype, layer.mlp.act_fn, EPSILON)
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(linears, "can_tile", lambda _weight: False)
        return layers_for([layer], operations, rotated_heads=ROTATED)[0]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def angles(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = draw(tokens, 1, HEAD // 2, seed=5) * 100
    return half.cos().repeat(1, 1, 2), torch.cat([-half.sin(), half.sin()], dim=-1)


def run(layer: Layer, rows: list[int], *, adds: bool = True) -> list[torch.Tensor]:
    """Return all that a layer makes of these rows of one hundred."""
    hidden, delta, attended = (
        draw(100, SIZE)[rows],
        draw(100, SIZE, seed=1)[rows],
        draw(100, SIZE, seed=2)[rows],
    )
    cosine, sine = (angle[rows] for angle in angles(100))
    with torch.inference_mode():
        entered, joined = layer.before(hidden, delta if adds else None, cosine, sine)
        entered = entered.clone()
        left, added = layer.after(entered.clone(), attended)
    return [entered, joined, left, added]


def wanted(layer: LlamaDecoderLayer, *, adds: bool = True) -> list[torch.Tensor]:
    """Return the same of all hundred rows, in float64, from the model's own weights."""
    attention, mlp = layer.self_attn, layer.mlp
    hidden, attended = draw(100, SIZE).double(), draw(100, SIZE, seed=2).double()
    if adds:
        hidden = hidden + draw(100, SIZE, seed=1).double()
    normed = norm(hidden, layer.input_layernorm.weight)
    query, key, value = (
        times(normed, part) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    heads = torch.cat([query, key], dim=-1).view(100, ROTATED, HEAD)
    cosine, sine = (angle.double() for angle in angles(100))
    rotated = heads * cosine + heads.roll(HEAD // 2, -1) * sine
    left = hidden + times(attended, attention.o_proj)
    inner = norm(left, layer.post_attention_layernorm.weight)
    gated = functional.silu(times(inner, mlp.gate_proj)) * times(inner, mlp.up_proj)
    return [hidden, torch.cat([rotated.flatten(1), value], dim=-1), left, times(gated, mlp.down_proj)]


def norm(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hidden * (hidden.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight.double()


def times(rows: torch.Tensor, module: torch.nn.Linear) -> torch.Tensor:
    product = rows @ module.weight.double().T
    return product if module.bias is None else product + module.bias.double()


@pytest.mark.parametrize("plain", [False, True], ids=["as here", "plain"])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_a_layer_is_what_float64_says(plain: bool, adds: bool, biases: bool) -> None:
    module = decoder_layer(attention_bias=biases, mlp_bias=biases)
    for seed, (name, parameter) in enumerate(module.named_parameters()):
        if name.endswith("bias"):
            parameter.data.copy_(draw(*parameter.shape, seed=seed))
    expected = wanted(module, adds=adds)
    layer = make(module, plain=plain)

    for count in COUNTS:
        for output, exact in zip(run(layer, [*range(count)], adds=adds), expected, strict=True):
            torch.testing.assert_close(output.double(), exact[:count], rtol=1e-4, atol=1e-4)


@needs_avx512
def test_a_rows_bits_depend_neither_on_its_neighbours_nor_on_threads() -> None:
    layer = make(decoder_layer())
    alone = [run(layer, [row]) for row in range(40)]

    for count in COUNTS:
        if count <= 40:
            together = run(layer, [*range(count)])
            for row in range(count):
                for own, others in zip(alone[row], together, strict=True):
                    assert torch.equal(own[0], others[row])
    backwards = run(layer, [*reversed(range(40))])
    torch.set_num_threads(1)
    on_one = run(layer, [*range(40)])
    for row in range(40):
        for own, turned, single in zip(alone[row], backwards, on_one, strict=True):
            assert torch.equal(own[0], turned[39 - row])
            assert torch.equal(own[0], single[row])


@needs_avx512
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_in_its_row(bad: float) -> None:
    layer = make(decoder_layer())
    hidden, attended = draw(20, SIZE), draw(20, SIZE, seed=2)
    hidden[4, 9], attended[11, 3] = bad, bad

    with torch.inference_mode():
        _, joined = layer.before(hidden.clone(), None, *angles(20))
        _, added = layer.after(hidden.clone(), attended)

    assert [row for row in range(20) if not joined[row].isfinite().all()] == [4]
    assert [row for row in range(20) if not added[row].isfinite().all()] == [4, 11]


@pytest.mark.parametrize(
    "changes",
    [{"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}, {"intermediate_size": 72}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_cannot_be_fused_is_plain(changes: dict[str, Any]) -> None:
    assert type(make(decoder_layer(**changes))) is _PlainLayer


def test_16_bit_weights_are_plain() -> None:
    assert type(make(decoder_layer().to(torch.bfloat16))) is _PlainLayer


@needs_avx512
def test_a_plain_float32_layer_is_fused() -> None:
    layer = make(decoder_layer())

    assert type(layer) is not _PlainLayer
    assert len(layer.linears) == 4
    assert layer.linears[0](draw(3, SIZE)).shape == (3, JOINED)


class OneByOne:
    """An attention that no stack knows, so that each layer is called in its turn."""

    def __init__(self, attention: CpuPass) -> None:
        self._attention = attention

    def __call__(self, layer: int, joined: torch.Tensor) -> torch.Tensor:
        return self._attention(layer, joined)


def attention_over(cache: SlotCache, slots: list[int], places: list[int]) -> CpuPass:
    return CpuAttention(cache, heads=4, scale=HEAD**-0.5).over(slots, torch.tensor(places), places)


@needs_avx512
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_all_layers_in_one_call_have_the_bits_of_each_in_its_turn(key_heads: int) -> None:
    model = tiny_llama(num_hidden_layers=3, num_key_value_heads=key_heads)
    forward = LlamaForward(model, positions=1000)
    assert stack_of(forward._layers) is not None
    caches = [make_cache(key_heads=key_heads, head_size=HEAD, layers=3) for _ in range(3)]
    two_prompts = [0] * 40 + [4] * 30, [*range(40), *range(500, 530)]

    for slots, places in [two_prompts, ([0, 4, 1, 5], [40, 530, 0, 999]), ([3], [7])]:
        ids, positions = torch.arange(len(slots)) + 5, torch.tensor(places)
        first, second, third = (attention_over(cache, slots, places) for cache in caches)
        with torch.inference_mode():
            together = forward(ids, positions, first)
            again = forward(ids, positions, second)
            apart = forward(ids, positions, OneByOne(third))

        assert together.shape == (len(slots), model.config.vocab_size)
        assert torch.equal(together, apart)
        assert torch.equal(again, apart)
        for memories in zip(*(cache._flat for cache in caches), strict=True):
            assert all(torch.equal(memory, memories[0]) for memory in memories)


def test_layers_that_are_not_all_compiled_are_no_stack() -> None:
    plain, other = make(decoder_layer(mlp_bias=True)), make(decoder_layer())

    assert stack_of([]) is None
    assert stack_of([plain]) is None
    assert stack_of([other, plain]) is None
