from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from codeherd_schema.errors import GenerationError
from codeherd_worker.comparison import (
    NEW_TOKENS,
    Comparison,
    compare,
    cut_windows,
    same_start,
)
from codeherd_worker.engine.quantization import Quantization
from tests.unit.worker.engine.tiny_llama import random_prompt, tiny_llama

WINDOWS = cut_windows(random_prompt(200), bos=1, length=64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


def compared(folder: Path, a: Quantization, b: Quantization, **options: Any) -> Comparison:
    options = dict[str, Any](slots=2, prompts=3, progress=lambda step, share: None) | options
    return compare(str(folder), (a, b), WINDOWS, device="cpu", **options)


def test_windows_hold_the_text_once_and_begin_with_bos() -> None:
    windows = cut_windows(range(10, 20), bos=1, length=5)

    assert windows == [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17], [1, 18, 19]]


def test_a_setting_agrees_with_itself(folder: Path) -> None:
    comparison = compared(folder, "none", "none")

    assert comparison.a.nats_per_token == comparison.b.nats_per_token
    assert comparison.agreement == 1
    # Not all of them: on a CPU, a batch's rounding depends on where its memory lies.
    assert NEW_TOKENS / 2 < comparison.same_tokens <= NEW_TOKENS
    assert (comparison.tokens, comparison.prompts) == (200, 3)


def test_perplexity_is_that_of_the_plain_model(folder: Path) -> None:
    measured = compared(folder, "none", "none").a

    model, nats = tiny_llama(), 0.0
    for window in WINDOWS:
        logs = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        nats -= sum(float(logs[place, token]) for place, token in enumerate(window[1:]))
    assert measured.nats_per_token == pytest.approx(nats / 200, rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(nats / 200), rel=1e-4)


def test_fewer_bits_agree_less_and_weigh_less(folder: Path) -> None:
    comparison = compared(folder, "nf4", "int8")

    assert [comparison.a.quantization, comparison.b.quantization] == ["nf4", "int8"]
    assert comparison.b.dtype == "float16"
    assert comparison.a.weight_bytes < comparison.b.weight_bytes
    assert 0.2 < comparison.agreement < 1
    assert 0 <= comparison.same_tokens < NEW_TOKENS
    assert min(comparison.a.load_s, comparison.b.load_s) > 0


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 9, 3], 1), ([9, 2], [1, 2], 0), ([], [], 0)],
)
def test_the_same_tokens_are_counted_from_the_start(one: list[int], other: list[int], count: int) -> None:
    assert same_start(one, other) == count


def test_a_setting_weighs_what_its_dtype_and_bits_say(folder: Path) -> None:
    parameters = sum(p.numel() for p in tiny_llama().parameters())

    comparison = compared(folder, "none", "bf16")

    assert comparison.a.weight_bytes == pytest.approx(4 * parameters, rel=1e-3)
    assert comparison.b.weight_bytes == pytest.approx(2 * parameters, rel=1e-3)


def test_progress_names_the_setting_and_the_step(folder: Path) -> None:
    ended: list[str] = []

    compared(folder, "none", "bf16", progress=lambda step, share: ended.extend([step] * (share == 1)))

    steps = ("check", "load", "read", "continue")
    assert ended == [f"{setting}: {step}" for setting in ("none", "bf16") for step in steps]


def test_a_setting_whose_logits_overflow_is_an_error_and_no_figure(tmp_path: Path) -> None:
    model = tiny_llama()
    # Fine in float32, too large for float16 once two of them meet.
    model.model.layers[0].mlp.down_proj.weight *= 3e4
    model.model.layers[0].mlp.up_proj.weight *= 3e4
    model.save_pretrained(tmp_path)

    with pytest.raises(GenerationError, match="with fp16 the model's logits are not finite") as caught:
        compared(tmp_path, "none", "fp16")

    assert caught.value.hint
