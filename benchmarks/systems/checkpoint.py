"""What the systems made of transformers share: the loaded model, and a clock for `generate`."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer


def load_float32(folder: Path) -> LlamaForCausalLM:
    """Load a checkpoint in float32, without a word in its own settings that would end a text early."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


class TokenClock(BaseStreamer):
    """Notes when `generate` shows each new token of its batch."""

    def __init__(self) -> None:
        self._has_seen_prompt = False
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if self._has_seen_prompt:
            self.times.append(time.perf_counter())
        self._has_seen_prompt = True

    def end(self) -> None:
        pass
