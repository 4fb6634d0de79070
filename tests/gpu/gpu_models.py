"""A checkpoint for GPU tests, engines over it, and what they are asked.

Needs nothing of the other tests' servers: `pytest --noconftest tests/gpu` runs where only the worker's
packages and pytest are installed.
"""

from __future__ import annotations

import functools
import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from codeherd_worker.engine.engine import Engine, EngineSettings
from codeherd_worker.engine.loading import AppliedQuantization, LoadedModel, load_model
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.sequences import SequenceOutcome, SequenceRequest
from codeherd_worker.engine.stopping import CancelToken, Stopper
from tests.unit.worker.engine.tiny_llama import random_prompt, tiny_config

QUANTIZATIONS: tuple[AppliedQuantization, ...] = ("none", "int8", "nf4")
SLOTS = 8
MAX_LEN = 768
#: Seconds.
PATIENCE = 120

MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@functools.cache
def checkpoint(key_heads: int = 8) -> Path:
    """A random model of layers large enough for every kernel, small enough to load in a second."""
    folder = Path(tempfile.mkdtemp(prefix="codeherd-gpu-"))
    torch.manual_seed(0)
    config = tiny_config(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=key_heads,
        vocab_size=4096,
        # Wide layers need less than narrow ones to say varied things.
        initializer_range=0.05,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(quantization: AppliedQuantization = "none", *, key_heads: int = 8) -> LoadedModel:
    return load_model(str(checkpoint(key_heads)), quantization=quantization, device="cuda", slots=SLOTS)


def make_engine(model: LlamaForCausalLM, **changes: Any) -> Engine:
    """Return a warm engine that is not started."""
    fields = {"slots": SLOTS, "max_len": MAX_LEN, "prefill_chunk": 128} | changes
    engine = Engine(model, EngineSettings.uniform(**fields))
    engine.warm_up()
    return engine


@contextmanager
def running(engine: Engine) -> Iterator[Engine]:
    """Start an engine, and close it whatever happens."""
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def forget() -> None:
    """Give back the memory of engines that are gone; an engine and its graphs refer to each other."""
    gc.collect()
    torch.cuda.empty_cache()


def sequence(number: int, new_tokens: int = 24, **sampling: Any) -> SequenceRequest:
    """Return one of several very different sequences; every other one is drawn, not greedy."""
    fields = {"temperature": 0.8 * (number % 2), "top_p": 0.95, "seed": number}
    return SequenceRequest(
        prompt_ids=random_prompt(5 + 37 * number),
        sampling=SamplingParams(**(fields | sampling)),
        stopper=Stopper(stop_ids=frozenset(), stop_strings=(), max_new_tokens=new_tokens, detokenizer=None),
        cancel=CancelToken(),
    )


def outcomes(engine: Engine, requests: Sequence[SequenceRequest]) -> list[SequenceOutcome]:
    futures = [engine.submit(request) for request in requests]
    return [future.result(PATIENCE) for future in futures]


def answers(engine: Engine, numbers: Sequence[int], new_tokens: int = 24) -> dict[int, tuple[int, ...]]:
    """Return each numbered sequence's tokens; all are submitted at once, in this order."""
    found = outcomes(engine, [sequence(number, new_tokens) for number in numbers])
    return {number: outcome.token_ids for number, outcome in zip(numbers, found, strict=True)}
