"""Llamas of the sizes that people use, with random weights, made on the device that runs them.

Owns: the shapes, and how a model gets its weights without files: layer by layer, each quantized before the
next one is made, so that what is allocated never exceeds the quantized model by more than one matrix. Random
weights cost what trained ones cost; their texts mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

QUANTIZATIONS = ("bf16", "int8", "nf4")

#: Of config.json: layers, hidden size, inner size of an MLP, heads, key heads, vocabulary.
_NUMBERS: Mapping[str, tuple[int, int, int, int, int, int]] = MappingProxyType(
    {
        "7b": (32, 4096, 11008, 32, 32, 32016),
        "13b": (40, 5120, 13824, 40, 40, 32016),
        "34b": (48, 8192, 22016, 64, 8, 32000),
        "toy": (2, 128, 256, 4, 2, 512),
    }
)
SHAPES = tuple(_NUMBERS)

#: Spread of the weights: that of an untrained Llama.
_SPREAD = 0.02


def config_of(shape: str) -> LlamaConfig:
    """Return a Code Llama's configuration by its size."""
    layers, hidden, inner, heads, key_heads, vocabulary = _NUMBERS[shape]
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        max_position_embeddings=16_384,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=None,
    )


def dtype_of(quantization: str, device: torch.device) -> torch.dtype:
    """Return the dtype of activations and cache, as loading chooses it."""
    if quantization == "int8":
        return torch.float16
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build_model(shape: str, quantization: str, device: torch.device) -> LlamaForCausalLM:
    """Return a random model, quantized as a worker's would be."""
    torch.manual_seed(0)
    config, dtype = config_of(shape), dtype_of(quantization, device)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    settings = _settings(quantization, dtype)
    if settings is not None:
        model = replace_with_bnb_linear(
            model, modules_to_not_convert=["lm_head"], quantization_config=settings
        )
        model.config.quantization_config = settings
    for module in model.modules():
        _fill(module, dtype, device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config=config).to(device)
    return model.eval().requires_grad_(False)


def _settings(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    match quantization:
        case "nf4":
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        case "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        case _:
            return None


def _fill(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    if isinstance(module, LlamaRMSNorm):
        module.weight = _frozen(torch.ones(module.weight.shape, dtype=dtype, device=device))
    elif isinstance(module, nn.Embedding):
        module.weight = _frozen(_random(module.num_embeddings, module.embedding_dim, dtype, device))
    elif isinstance(module, nn.Linear):
        # Not by the weight's own shape: a quantized one is packed.
        weight = _random(module.out_features, module.in_features, dtype, device)
        module.weight = _quantized(module, weight, device)


def _random(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=dtype, device=device).mul_(_SPREAD)


def _quantized(module: nn.Module, weight: torch.Tensor, device: torch.device) -> Any:
    # Imported this late: with AVX512-BF16 it may look for kernels on the hub.
    import bitsandbytes

    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=module
        ).to(device)
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        rows, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.to(torch.float16))
        return bitsandbytes.nn.Int8Params(
            rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scales
        )
    return _frozen(weight)


def _frozen(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
