"""Build random Llamas that run in milliseconds and still say varied things. No weights, no tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

#: Ids of the vocabulary.
VOCAB_SIZE = 320
#: Tokens a sequence may have.
MAX_POSITIONS = 1024


def tiny_config(**changes: Any) -> LlamaConfig:
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_theta": 1e6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        # Ten times the usual: with less, a random Llama repeats one token for ever.
        "initializer_range": 0.2,
    }
    return LlamaConfig(**(fields | changes))


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(**changes)).eval().requires_grad_(False)


def random_prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist())


def generate_alone(model: LlamaForCausalLM, prompt_ids: tuple[int, ...], count: int) -> list[int]:
    """What transformers' own greedy decoding and attention answer."""
    output = model.generate(
        torch.tensor([prompt_ids]), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    answer: list[int] = output[0, len(prompt_ids) :].tolist()
    return answer


def has_avx512() -> bool:
    """Whether this CPU has what tiles and fused layers are for."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
