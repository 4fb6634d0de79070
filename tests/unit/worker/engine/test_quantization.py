from __future__ import annotations

from typing import get_args

import pytest
from transformers import LlamaConfig

from codeherd_worker.engine.loading import count_parameters, size_of
from codeherd_worker.engine.quantization import (
    AppliedQuantization,
    Device,
    ModelSize,
    Quantization,
    choose_quantization,
    plannable_bytes,
)
from tests.unit.worker.engine.tiny_llama import tiny_config

GIB = 2**30
#: The published configurations: hidden, intermediate, layers, heads, key heads, vocabulary.
SHAPES = {
    "7B": (4096, 11_008, 32, 32, 32, 32_016),
    "13B": (5120, 13_824, 40, 40, 40, 32_016),
    "34B": (8192, 22_016, 48, 64, 8, 32_000),
    "70B": (8192, 28_672, 80, 64, 8, 32_016),
}


def published(name: str) -> LlamaConfig:
    hidden, intermediate, layers, heads, key_heads, vocabulary = SHAPES[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
    )


def scaled(parameters: float) -> ModelSize:
    """A model of another size, shaped like 7B."""
    return ModelSize(
        linear_weights=int(parameters * 0.95),
        kept_weights=int(parameters * 0.05),
        kv_bytes_per_token=int(512 * 1024 * parameters / 6.7e9),
        layers=32,
    )


@pytest.mark.parametrize(
    ("name", "billions", "none", "int8", "nf4", "kv_kib"),
    [
        ("7B", 6.739, 13.48, 7.01, 3.87, 512),
        ("13B", 13.016, 26.03, 13.35, 7.20, 800),
        ("34B", 33.744, 67.49, 34.28, 18.19, 192),
        ("70B", 68.977, 137.95, 69.53, 36.36, 320),
    ],
)
def test_memory_of_the_published_models_is_known(
    name: str, billions: float, none: float, int8: float, nf4: float, kv_kib: int
) -> None:
    size = size_of(published(name))

    assert count_parameters(published(name)) / 1e9 == pytest.approx(billions, abs=2e-3)
    assert size.weight_bytes("none") / 1e9 == pytest.approx(none, rel=2e-3)
    assert size.weight_bytes("int8") / 1e9 == pytest.approx(int8, rel=2e-3)
    assert size.weight_bytes("nf4") / 1e9 == pytest.approx(nf4, rel=2e-3)
    assert size.kv_bytes_per_token == kv_kib * 1024


@pytest.mark.parametrize(
    ("name", "slots", "device", "memory_gb", "expected"),
    [
        # Few slots: fused NF4 kernels.
        ("7B", 1, "cuda", 80, "nf4"),
        ("7B", 4, "cuda", 80, "nf4"),
        ("7B", 7, "cuda", 80, "nf4"),
        ("13B", 4, "cuda", 80, "nf4"),
        ("13B", 5, "cuda", 80, "nf4"),
        ("34B", 8, "cuda", 80, "nf4"),
        ("34B", 16, "cuda", 80, "nf4"),
        ("70B", 8, "cuda", 80, "nf4"),
        ("70B", 16, "cuda", 80, "nf4"),
        # More: 16 bits where they leave a useful cache, ...
        ("7B", 8, "cuda", 80, "none"),
        ("7B", 32, "cuda", 80, "none"),
        ("7B", 64, "cuda", 80, "none"),
        ("7B", 128, "cuda", 80, "none"),
        ("7B", 8, "cuda", 40, "none"),
        ("13B", 6, "cuda", 80, "none"),
        ("13B", 8, "cuda", 80, "none"),
        ("13B", 16, "cuda", 80, "none"),
        ("13B", 32, "cuda-group", 160, "none"),
        # ... else 8 bits, ...
        ("7B", 8, "cuda", 24, "int8"),
        ("13B", 32, "cuda", 80, "int8"),
        ("13B", 64, "cuda", 80, "int8"),
        ("34B", 17, "cuda", 80, "int8"),
        ("34B", 32, "cuda", 80, "int8"),
        ("34B", 32, "cuda", 141, "int8"),
        ("70B", 32, "cuda-group", 160, "int8"),
        # ... else NF4.
        ("7B", 8, "cuda", 12, "nf4"),
        ("13B", 8, "cuda", 24, "nf4"),
        ("34B", 32, "cuda", 48, "nf4"),
        ("70B", 32, "cuda", 80, "nf4"),
        # Too big for any: what comes nearest.
        ("70B", 32, "cuda", 24, "nf4"),
        # A CPU.
        ("7B", 4, "cpu", 64, "nf4"),
        ("7B", 32, "cpu", 512, "nf4"),
    ],
)
def test_auto_follows_size_slots_and_memory(
    name: str, slots: int, device: Device, memory_gb: int, expected: AppliedQuantization
) -> None:
    assert choose_quantization(size_of(published(name)), slots, device, memory_gb * 10**9) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_small_model_stays_as_it_is(device: Device) -> None:
    assert choose_quantization(scaled(50e6), 4, device, 8 * GIB) == "none"
    assert choose_quantization(scaled(600e6), 4, device, 8 * GIB) == "nf4"


@pytest.mark.parametrize(("parameters", "slots"), [(9.9e9, 7), (10.1e9, 5), (19.9e9, 5), (20.1e9, 16)])
def test_each_class_of_size_has_its_border(parameters: float, slots: int) -> None:
    size = scaled(parameters)

    assert choose_quantization(size, slots, "cuda", 10**12) == "nf4"
    assert choose_quantization(size, slots + 1, "cuda", 10**12) != "nf4"


def test_more_memory_never_asks_for_fewer_bits() -> None:
    bits = {"nf4": 4, "int8": 8, "none": 16}
    for name in SHAPES:
        chosen = [
            bits[choose_quantization(size_of(published(name)), 24, "cuda", gb * 10**9)]
            for gb in range(8, 400, 4)
        ]
        assert chosen == sorted(chosen)


def test_what_auto_chooses_can_be_asked_for() -> None:
    assert set(get_args(Quantization)) == {"auto", *get_args(AppliedQuantization)}


def test_activations_are_left_out_of_the_plan() -> None:
    assert plannable_bytes(80 * 10**9) == int(73.6e9) - 2 * GIB


def test_tied_embeddings_count_once() -> None:
    tied, untied = (size_of(tiny_config(tie_word_embeddings=tied)) for tied in (True, False))

    assert untied.kept_weights == 2 * tied.kept_weights
    assert untied.linear_weights == tied.linear_weights
