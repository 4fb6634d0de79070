"""A model that never ends by itself: random weights that cannot say EOS. For jobs that must still run.

It repeats itself, so drafts would be accepted all the time: they are off, and its window is long. A job of
`LONG` tokens then runs for longer than a few commands take.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from codeherd_worker.embedded import EMBEDDED_FOLDER

#: The name in the models file.
NAME = "endless"
WINDOW = 16384
#: Enough for a step that takes a while.
LAYERS = 8
#: New tokens of a job that no test wants to wait for.
LONG = 16000


def endless_model(folder: Path) -> dict[str, str]:
    """Write the model and its models file; return the settings that make a herd serve it."""
    model_folder = folder / NAME
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=WINDOW,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Logit 0 for every control id; of 4,000 random logits the largest is above that.
        model.lm_head.weight[:3] = 0
        model.lm_head.weight[-4:] = 0
    model.save_pretrained(model_folder)
    shutil.copy(EMBEDDED_FOLDER / "tokenizer.model", model_folder)
    entry = {
        "source": f'"{model_folder}"',
        "parameters": 1_000_000,
        "layers": LAYERS,
        "kv_heads": 1,
        "head_dim": 64,
        "vocab_size": 4096,
        "context_window": WINDOW,
    }
    models_file = folder / "models.toml"
    models_file.write_text(f"[models.{NAME}]\n" + "".join(f"{k} = {v}\n" for k, v in entry.items()))
    return {
        "CODEHERD_MODELS_FILE": str(models_file),
        "CODEHERD_WORKER_MODEL": NAME,
        "CODEHERD_WORKER_DRAFT_TOKENS": "0",
    }
