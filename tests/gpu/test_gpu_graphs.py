"""Decode steps as CUDA graphs, and what the host waits for, on a real device."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch

from codeherd_worker.engine.decode import SlotDecoder
from codeherd_worker.engine.layouts import Piece, StepLayout, lay_out_step
from codeherd_worker.engine.loading import AppliedQuantization
from codeherd_worker.engine.passes import Passes
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.slot_classes import SlotClass
from tests.gpu.gpu_models import MARKS, QUANTIZATIONS, answers, load, make_engine, running
from tests.unit.worker.engine.tiny_llama import random_prompt

pytestmark = MARKS

CLASSES = (SlotClass(600, 3), SlotClass(1000, 2))
#: Token ids, positions and written positions, (B, S) int64 each.
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
GREEDY = SamplingParams()
DEMANDING = SamplingParams(
    temperature=0.7, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.2, seed=5, logprobs=5
)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def warm_decoder(quantization: AppliedQuantization = "none", *, draft_tokens: int = 0) -> SlotDecoder:
    model = load(quantization).model
    decoder = SlotDecoder(model, classes=CLASSES, prefill_chunk=128, draft_tokens=draft_tokens)
    decoder.warm_up()
    return decoder


def inputs_of(passes: Passes, layout: StepLayout, place: int, width: int) -> Inputs:
    ids = torch.randint(3, 4000, (passes.rows, width), device=passes.device)
    positions = torch.arange(place, place + width, device=passes.device).expand(passes.rows, -1).contiguous()
    return ids, positions, torch.minimum(positions, layout.spares[:, None])


def every_read(passes: Passes) -> list[int]:
    return sorted({length for lengths in passes.kv_lengths for length in lengths})


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_a_replay_gives_the_bits_of_the_step(quantization: AppliedQuantization, draft_tokens: int) -> None:
    passes = warm_decoder(quantization, draft_tokens=draft_tokens).passes
    layout = lay_out_step((), passes.rows, passes.cache, passes.device)
    passes.cache.fill_alike(torch.Generator().manual_seed(1))
    for length in every_read(passes):
        reads = passes.reads_of(layout, length)
        inputs = inputs_of(passes, layout, length - 40, 1 + draft_tokens)
        assert (inputs[0].shape, tuple(reads)) in passes.graphs

        replayed = passes.run(layout, *inputs, reads).clone()

        assert torch.equal(replayed, passes._compute(layout, reads, *inputs))


def test_a_graph_reads_nothing_that_was_given_back() -> None:
    passes = warm_decoder().passes
    layout = lay_out_step((), passes.rows, passes.cache, passes.device)
    length = every_read(passes)[0]
    reads, inputs = passes.reads_of(layout, length), inputs_of(passes, layout, 100, 1)
    expected = passes._compute(layout, reads, *inputs)

    gc.collect()
    # Whatever was freed since the capture is somebody else's now: small tensors first, then large ones.
    litter = [torch.full((size,), 2**40 + 7, device=passes.device) for size in (*[64] * 4000, *[2**16] * 200)]
    replayed = passes.run(layout, *inputs, reads)

    assert torch.equal(replayed, expected)
    assert len(litter) == 4200


def test_a_graph_of_one_thread_is_replayed_by_another() -> None:
    passes = warm_decoder().passes
    layout = lay_out_step((), passes.rows, passes.cache, passes.device)
    reads, inputs = passes.reads_of(layout, 512), inputs_of(passes, layout, 200, 1)
    expected, found = passes.run(layout, *inputs, reads).clone(), []

    def replay() -> None:
        with torch.inference_mode():
            found.append(passes.run(layout, *inputs, reads).clone())

    thread = threading.Thread(target=replay)
    thread.start()
    thread.join()

    assert torch.equal(found[0], expected)


def test_no_step_of_a_running_engine_is_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(load().model, slots=3)
    passes = engine._decoder.passes
    captures = passes.graphs.captures
    assert captures == len(every_read(passes))
    monkeypatch.setattr(passes, "_compute", None)  # a step without a graph would call it

    with running(engine):
        # To the very end of a slot.
        found = answers(engine, [0, 3, 7], new_tokens=768 - 264)

    assert {len(tokens) for tokens in found.values()} == {768 - 264}
    assert passes.graphs.captures == captures


@pytest.mark.parametrize("sampling", [GREEDY, DEMANDING], ids=["greedy", "demanding"])
def test_a_step_is_launched_without_waiting_for_the_device(sampling: SamplingParams) -> None:
    decoder = warm_decoder()
    for slot in range(3):
        prompt = random_prompt(60 + slot)
        decoder.assign(slot, sampling, prompt)
        decoder.prefill([Piece(slot, prompt, 0, ends=True)])
    pending = [decoder.step()]  # lays the rows out, which copies from the host

    torch.cuda.set_sync_debug_mode("error")
    try:
        pending += [decoder.step() for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert all(sorted(step.read()) == [0, 1, 2] for step in pending)


def test_a_row_with_bad_numbers_harms_no_other() -> None:
    decoder = warm_decoder()
    prompts = {slot: random_prompt(70 + slot) for slot in range(2)}

    def start() -> dict[int, list[int | None]]:
        for slot, prompt in prompts.items():
            decoder.assign(slot, GREEDY, prompt)
            decoder.prefill([Piece(slot, prompt, 0, ends=True)])
        return {slot: [] for slot in prompts}

    def decode(said: dict[int, list[int | None]]) -> dict[int, list[int | None]]:
        for _ in range(6):
            for slot, tokens in decoder.step().read().items():
                said[slot] += [token.id for token in tokens]
        for slot in prompts:
            decoder.release(slot)
        return said

    expected = decode(start())
    said = start()
    keys, _ = decoder.cache.read(0, 0, 1, 64)
    keys.fill_(float("nan"))
    poisoned = decode(said)
    decoder.wipe(0)

    assert poisoned[0] == [None] * 6
    assert poisoned[1] == expected[1]
    assert decode(start()) == expected
