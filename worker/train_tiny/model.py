"""The shape of the tiny model, a plain `LlamaForCausalLM`, and its first weights.

Knows the tokenizer's pieces; nothing of data or training.
"""

import re

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

#: Longest sequence, tokens; rotary base as in Code Llama (paper, section 2.4).
MAX_POSITIONS, ROPE_THETA = 2048, 1e6
#: Standard deviation of the first embedding.
EMBEDDING_STD = 0.03


def build_model(
    sp: sentencepiece.SentencePieceProcessor, width: int, layers: int, heads: int, inner: int
) -> LlamaForCausalLM:
    """Build an untrained model for this tokenizer."""
    config = LlamaConfig(
        vocab_size=sp.get_piece_size(),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=sp.bos_id(),
        eos_token_id=sp.eos_id(),
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            # Each layer starts as the identity: the loss falls faster in the first thousand steps.
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(related_embedding(sp, width))
    return model


def related_embedding(sp: sentencepiece.SentencePieceProcessor, width: int) -> torch.Tensor:
    """Return a random embedding in which spellings of one word start close together.

    `user`, `▁user`, `▁User` and `users` share parts of their vector. The words of a function's name are in
    its docstring more often than not; with this start, copying them is not learned piece by piece.

    Returns: (V, width) float32.
    """
    parts: dict[str, torch.Tensor] = {}
    rows = []
    for index in range(sp.get_piece_size()):
        word = re.sub("[^a-z]", "", sp.id_to_piece(index).lower()) if len(sp.id_to_piece(index)) > 2 else ""
        keys = [f"piece {index}", f"word {word}" if word else f"own {index}"]
        keys.append(f"stem {word[:5]}" if len(word) > 4 else keys[-1])
        rows.append(sum(parts.setdefault(key, torch.randn(width)) for key in keys))
    table = torch.stack([torch.as_tensor(row) for row in rows])
    return table / table.std(dim=1, keepdim=True) * EMBEDDING_STD
