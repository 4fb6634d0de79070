"""The engine on a real CUDA device: pinning, quantized loading, a static cache, reproducibility.

Skipped where there is no device; nothing here has a CPU stand-in.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from codeherd_worker.device import count_gpus, parse_gpus
from codeherd_worker.engine.engine import Engine, EngineSettings, SequenceOutcome, SequenceRequest
from codeherd_worker.engine.loading import AppliedQuantization, load_model
from codeherd_worker.engine.sampling import SamplingParams
from codeherd_worker.engine.stopping import CancelToken, Stopper
from tests.unit.worker.engine.tiny_llama import random_prompt, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
QUANTIZATIONS: tuple[AppliedQuantization, ...] = ("none", "int8", "nf4")
SLOTS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of layers large enough for every kernel, small enough to load in a second."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = tiny_config(
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4096,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def sequence(number: int, length: int = 24) -> SequenceRequest:
    return SequenceRequest(
        prompt_ids=random_prompt(5 + 37 * number),
        sampling=SamplingParams(temperature=0.8 * (number % 2), top_p=0.95, seed=number),
        stopper=Stopper(stop_ids=frozenset(), stop_strings=(), max_new_tokens=length, detokenizer=None),
        cancel=CancelToken(),
        deadline=None,
        priority=5,
    )


def texts(engine: Engine, numbers: range) -> dict[int, tuple[int, ...]]:
    futures = {n: engine.submit(sequence(n)) for n in numbers}
    outcomes: dict[int, SequenceOutcome] = {n: future.result(120) for n, future in futures.items()}
    return {n: outcome.token_ids for n, outcome in outcomes.items()}


def test_a_pinned_process_sees_its_gpu_alone() -> None:
    group = parse_gpus("0", available=count_gpus(), visible=os.environ.get("CUDA_VISIBLE_DEVICES"))[0]

    done = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        env=os.environ | group.environment(),
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.strip() == "1"


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_answers_do_not_depend_on_neighbours_and_the_cache_never_grows(
    checkpoint: Path, quantization: AppliedQuantization
) -> None:
    loaded = load_model(str(checkpoint), quantization=quantization, device="cuda", slots=SLOTS)
    engine = Engine(loaded.model, EngineSettings(slots=SLOTS, max_len=768, prefill_chunk=128))
    engine.warm_up()
    engine.start()
    alone = {n: texts(engine, range(n, n + 1))[n] for n in range(12)}
    before = torch.cuda.memory_allocated()

    together = texts(engine, range(12))
    backwards = texts(engine, range(11, -1, -1))

    assert loaded.quantization == quantization
    assert together == alone
    assert backwards == alone
    assert torch.cuda.memory_allocated() == before
    engine.close()


def test_greedy_answers_are_those_of_transformers(checkpoint: Path) -> None:
    loaded = load_model(str(checkpoint), quantization="none", device="cuda", slots=1)
    model = loaded.model.float()
    engine = Engine(model, EngineSettings(slots=1, max_len=768, prefill_chunk=128))
    engine.start()

    for number in range(0, 12, 2):
        request = sequence(number)
        answer = engine.submit(request).result(120).token_ids
        expected = model.generate(
            torch.tensor([request.prompt_ids], device="cuda"),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
        )[0, len(request.prompt_ids) :]
        assert list(answer) == expected.tolist()
    engine.close()
