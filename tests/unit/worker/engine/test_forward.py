from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from codeherd_schema.errors import ModelFilesInvalid
from codeherd_worker.engine.forward import LlamaForward
from codeherd_worker.engine.loading import load_model
from tests.unit.worker.engine.tiny_llama import random_prompt, tiny_llama

LENGTH = 70
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


class WholePrompt:
    """Attend one prompt, causally, with nothing cached; remembers what it was given."""

    def __init__(self, forward: LlamaForward) -> None:
        self._forward = forward
        self.layers: list[int] = []
        self.shapes: set[torch.Size] = set()

    def __call__(self, layer: int, joined: torch.Tensor) -> torch.Tensor:
        self.layers.append(layer)
        self.shapes.add(joined.shape)
        query, key, value = split(self._forward, joined)
        group = query.shape[1] // key.shape[1]
        heads = (
            query.transpose(0, 1),
            key.repeat_interleave(group, 1).transpose(0, 1),
            value.repeat_interleave(group, 1).transpose(0, 1),
        )
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        return attended.transpose(0, 1).flatten(1)


def split(forward: LlamaForward, joined: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return (T, H, D) queries, (T, K, D) keys and values."""
    counts = [forward.heads, forward.key_heads, forward.key_heads]
    return torch.split(joined.view(len(joined), sum(counts), forward.head_size), counts, dim=1)


@torch.inference_mode()
def logits_of(
    forward: LlamaForward, prompt: tuple[int, ...], wanted: list[int] | None = None
) -> torch.Tensor:
    ids = torch.tensor(prompt)
    rows = None if wanted is None else torch.tensor(wanted)
    return forward(ids, torch.arange(len(ids)), WholePrompt(forward), rows)


def randomise_biases(model: torch.nn.Module) -> None:
    # transformers starts them at zero, which would hide a forgotten one.
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def randomise_norms(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "own head size": {"head_dim": 32},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "other epsilon": {"rms_norm_eps": 1e-2},
    "gelu": {"hidden_act": "gelu"},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    # Scales the angles' cosine and sine too, not only the angles.
    "yarn rope": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
}


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_logits_are_those_of_transformers(changes: dict[str, Any]) -> None:
    model = tiny_llama(**changes)
    randomise_biases(model)
    randomise_norms(model)
    prompt = random_prompt(LENGTH)
    expected = model(torch.tensor([prompt])).logits[0]

    logits = logits_of(LlamaForward(model, positions=LENGTH), prompt)

    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_other_dtypes_agree_within_their_rounding(dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_llama(num_hidden_layers=1, initializer_range=0.1).to(dtype)
    prompt = random_prompt(LENGTH)
    expected = model(torch.tensor([prompt])).logits[0]

    forward = LlamaForward(model, positions=LENGTH)
    logits = logits_of(forward, prompt)

    assert (logits.dtype, forward.dtype) == (dtype, dtype)
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)


def test_a_quantized_model_answers_as_transformers_has_it(tmp_path: Any) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), quantization="nf4", device="cpu", slots=1).model
    prompt = random_prompt(LENGTH)
    expected = model(torch.tensor([prompt])).logits[0].float()

    logits = logits_of(LlamaForward(model, positions=LENGTH), prompt).float()

    # The same matrices in half precision or better: the likeliest tokens are the same nearly everywhere.
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9
    assert functional.cosine_similarity(logits, expected).min() > 0.99


def test_the_model_itself_still_answers_as_before() -> None:
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    randomise_biases(model)
    prompt = torch.tensor([random_prompt(LENGTH)])
    before = model(prompt).logits

    LlamaForward(model, positions=LENGTH)

    torch.testing.assert_close(model(prompt).logits, before, rtol=1e-5, atol=1e-5)


def test_joined_weights_are_held_once() -> None:
    model = tiny_llama()
    attention = model.model.layers[0].self_attn

    LlamaForward(model, positions=LENGTH)

    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    assert len({projection.weight.untyped_storage().data_ptr() for projection in projections}) == 1


def test_only_wanted_tokens_get_logits() -> None:
    model = tiny_llama()
    forward = LlamaForward(model, positions=LENGTH)
    prompt = random_prompt(LENGTH)

    some = logits_of(forward, prompt, [69, 3, 3])

    assert some.shape == (3, model.config.vocab_size)
    torch.testing.assert_close(some, logits_of(forward, prompt)[[69, 3, 3]], rtol=1e-5, atol=1e-5)


def test_a_token_turns_by_its_position_and_not_by_its_place_in_the_pass() -> None:
    model = tiny_llama()
    forward = LlamaForward(model, positions=1000)
    prompt = random_prompt(20)
    places = torch.arange(900, 920)
    expected = model(torch.tensor([prompt]), position_ids=places[None]).logits[0]

    with torch.inference_mode():
        logits = forward(torch.tensor(prompt), places, WholePrompt(forward))
        keys: list[torch.Tensor] = []

        def keep(layer: int, joined: torch.Tensor) -> torch.Tensor:
            query, key, _ = split(forward, joined)
            keys.append(key.clone())
            return query.flatten(1)

        for place in (0, 900):
            forward(torch.tensor(prompt[:1]), torch.tensor([place]), keep)

    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(keys[0], keys[2], atol=0.1)


def test_each_layer_attends_once_in_order() -> None:
    model = tiny_llama(num_hidden_layers=3)
    forward = LlamaForward(model, positions=LENGTH)
    attend = WholePrompt(forward)

    with torch.inference_mode():
        forward(torch.tensor(random_prompt(5)), torch.arange(5), attend)

    assert attend.layers == [0, 1, 2]
    assert attend.shapes == {(5, (4 + 2 * 2) * 16)}
    assert len(forward.linears) == 3 * 4 + 1


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 64,
            "factor": 2.0,
        },
    ],
    ids=["dynamic", "longrope"],
)
def test_angles_that_change_with_the_length_are_refused(parameters: dict[str, Any]) -> None:
    model = tiny_llama(rope_parameters=parameters)

    with pytest.raises(ModelFilesInvalid, match=f"rope_type is `{parameters['rope_type']}`") as caught:
        LlamaForward(model, positions=LENGTH)

    assert "llama3" in (caught.value.hint or "")
