"""The engine on a real CUDA device: pinning, loading, reproducibility, memory.

Skipped where there is no device; nothing here has a CPU stand-in.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from codeherd_worker.device import count_gpus, parse_gpus
from codeherd_worker.engine.loading import AppliedQuantization, load_model, quantization_of
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.sequences import SequenceRequest
from codeherd_worker.engine.stopping import CancelToken, Stopper
from codeherd_worker.footprint import idle_rows, measure_cards
from codeherd_worker.memory import plan_memory
from tests.gpu.gpu_models import (
    MARKS,
    MAX_LEN,
    QUANTIZATIONS,
    SLOTS,
    answers,
    checkpoint,
    forget,
    load,
    make_engine,
    outcomes,
    running,
    sequence,
)
from tests.unit.worker.engine.tiny_llama import random_prompt

pytestmark = MARKS

#: Nats by which two ways to compute one log-probability may differ, at most and on average. bfloat16 has 8
#: bits: logits of up to 8 are off by 1/64, and the layers add to that. A wrong row is off by several nats.
MOST_OFF, OFF_ON_AVERAGE = 0.6, 0.1


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
def test_a_model_is_loaded_onto_the_card_as_asked(quantization: AppliedQuantization) -> None:
    forget()
    before = torch.cuda.memory_allocated()

    loaded = load(quantization)

    assert loaded.quantization == quantization_of(loaded.model) == quantization
    assert {parameter.device for parameter in loaded.model.parameters()} == {torch.device("cuda:0")}
    taken = torch.cuda.memory_allocated() - before
    plain = sum(path.stat().st_size for path in checkpoint().glob("*.safetensors"))
    share = {"none": 1.0, "int8": 0.65, "nf4": 0.45}[quantization]
    assert taken < 1.1 * share * plain


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_answers_do_not_depend_on_neighbours_and_nothing_grows(quantization: AppliedQuantization) -> None:
    engine = make_engine(load(quantization).model)
    passes = engine._decoder.passes
    with running(engine):
        alone = {n: answers(engine, [n])[n] for n in range(12)}
        before = torch.cuda.memory_allocated(), passes.cache.addresses, passes.graphs.captures

        together = answers(engine, range(12))
        backwards = answers(engine, range(11, -1, -1))

        assert together == alone
        assert backwards == alone
        assert len(set(alone.values())) == 12
        assert (torch.cuda.memory_allocated(), passes.cache.addresses, passes.graphs.captures) == before


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("key_heads", [8, 2])
def test_log_probabilities_are_those_of_transformers(
    quantization: AppliedQuantization, key_heads: int
) -> None:
    # Catches rows that a kernel takes from the wrong place, which greedy texts of one slot would not.
    model = load(quantization, key_heads=key_heads).model
    requests = [sequence(number, logprobs=1) for number in range(SLOTS)]

    with running(make_engine(model)) as engine:
        found = outcomes(engine, requests)

    for request, outcome in zip(requests, found, strict=True):
        text = torch.tensor([[*request.prompt_ids, *outcome.token_ids]], device="cuda")
        with torch.inference_mode():
            logits = model(text).logits[0, len(request.prompt_ids) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, text[0, len(request.prompt_ids) :, None])[:, 0].cpu()
        off = (torch.tensor([entry.logprob for entry in outcome.logprobs]) - expected).abs()
        assert off.max() < MOST_OFF
        assert off.mean() < OFF_ON_AVERAGE


def test_greedy_answers_in_float32_are_those_of_transformers() -> None:
    model = load().model.float()
    with running(make_engine(model, slots=2)) as engine:
        for number in range(0, 12, 2):
            request = sequence(number)
            expected = model.generate(
                torch.tensor([request.prompt_ids], device="cuda"),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=None,
            )[0, len(request.prompt_ids) :]

            assert list(outcomes(engine, [request])[0].token_ids) == expected.tolist()


def test_tokens_that_are_read_one_step_late_are_the_same() -> None:
    model = load().model
    late, at_once = make_engine(model), make_engine(model)
    assert late._scheduler._lag == 1
    at_once._scheduler._lag = 0

    with running(late), running(at_once):
        assert answers(late, range(12)) == answers(at_once, range(12))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_drafts_change_nothing_that_neighbours_could_see(quantization: AppliedQuantization) -> None:
    engine = make_engine(load(quantization).model, draft_tokens=3)
    decoder = engine._decoder
    # Both shapes would be captured, for little: every step has room for drafts.
    assert not decoder.drafts_are_optional
    assert engine._scheduler._lag == 0
    # A prompt that repeats itself, so that there is something to guess.
    repeated = SequenceRequest(
        prompt_ids=random_prompt(20) * 6,
        sampling=SamplingParams(),
        stopper=Stopper(stop_ids=frozenset(), stop_strings=(), max_new_tokens=60, detokenizer=None),
        cancel=CancelToken(),
    )
    with running(engine):
        alone = {n: answers(engine, [n])[n] for n in range(9)}
        future = engine.submit(repeated)

        assert answers(engine, range(9)) == alone
        assert len(future.result(60).token_ids) == 60
        assert engine.stats().drafted > 0


def test_a_copied_prefix_gives_the_text_of_a_computed_one() -> None:
    model = load().model
    with running(make_engine(model, reuse_prefixes=False)) as engine:
        expected = answers(engine, [9, 9])
    with running(make_engine(model)) as engine:
        first, second = (outcomes(engine, [sequence(9)])[0] for _ in range(2))
        # Both at once: one of them has to copy to another slot.
        third, fourth = outcomes(engine, [sequence(9), sequence(9)])

    assert first.reused_tokens == 0
    assert second.reused_tokens > 0
    assert max(third.reused_tokens, fourth.reused_tokens) > 0
    assert {x.token_ids for x in (first, second, third, fourth)} == {expected[9]}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_memory_plan_covers_what_is_used(quantization: AppliedQuantization) -> None:
    forget()
    loaded = load(quantization)
    rows = SLOTS + idle_rows(loaded.model, SLOTS)
    (card,) = measure_cards(loaded, rows=rows, draft_tokens=0, prefill_chunk=128, window=MAX_LEN)
    plan = plan_memory([card], slots=SLOTS, window=MAX_LEN, idle_rows=rows - SLOTS)
    before = torch.cuda.memory_allocated() - card.weight_bytes
    torch.cuda.reset_peak_memory_stats()

    with running(make_engine(loaded.model)) as engine:
        answers(engine, range(16))
        used = torch.cuda.max_memory_allocated() - before

        assert engine.stats().cache_bytes == plan.cache_bytes
    assert used <= card.weight_bytes + plan.cache_bytes + card.activation_bytes
    assert torch.cuda.max_memory_reserved() <= card.available_bytes


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_two_gpus_says_what_it_says_on_one() -> None:
    with running(make_engine(load().model)) as engine:
        expected = answers(engine, range(6))
    loaded = load_model(str(checkpoint()), quantization="none", device="cuda-group", slots=SLOTS)
    devices = {layer.input_layernorm.weight.device for layer in loaded.model.model.layers}
    assert len(devices) >= 2

    engine = make_engine(loaded.model)

    # A graph records one device.
    assert engine._decoder.passes.graphs.captures == 0
    with running(engine):
        assert answers(engine, range(6)) == expected
