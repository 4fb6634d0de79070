from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from codeherd_worker.engine.attention import attend, install
from tests.unit.worker.engine.tiny_llama import generate_alone, random_prompt, tiny_llama

KV_LEN, HEAD_SIZE = 512, 16


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 3])
def test_it_is_attention(key_heads: int, length: int) -> None:
    module = (
        tiny_llama(hidden_size=96, num_attention_heads=6, num_key_value_heads=key_heads)
        .model.layers[0]
        .self_attn
    )
    query = torch.randn(2, 6, length, HEAD_SIZE)
    key, value = torch.randn(2, 2, key_heads, KV_LEN, HEAD_SIZE)
    mask = torch.zeros(2, 1, length, KV_LEN)
    mask[0, ..., 100:] = -torch.inf

    output, _ = attend(module, query, key, value, mask, scaling=0.25)

    group = 6 // key_heads
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * 0.25 + mask
    expected = (scores.softmax(-1) @ value.repeat_interleave(group, 1)).transpose(1, 2)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_equal_rows_give_equal_bits(group: int, dtype: torch.dtype) -> None:
    rows, key_heads = 5, 3
    query = torch.randn(1, key_heads * group, 1, HEAD_SIZE).to(dtype).repeat(rows, 1, 1, 1)
    key = torch.randn(1, key_heads, KV_LEN, HEAD_SIZE).to(dtype).repeat(rows, 1, 1, 1)
    mask = torch.zeros(rows, 1, 1, KV_LEN, dtype=dtype)
    mask[..., 300:] = -torch.inf

    output, _ = attend(torch.nn.Module(), query, key, key, mask)

    assert torch.equal(output, output[:1].expand_as(output))


def test_generate_still_works_with_it() -> None:
    model = tiny_llama()
    expected = generate_alone(model, random_prompt(20), 8)

    install(model)
    output = model.generate(
        torch.tensor([random_prompt(20)]), max_new_tokens=8, do_sample=False, eos_token_id=None
    )

    assert output[0, 20:].tolist() == expected
