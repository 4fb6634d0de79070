from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from codeherd_schema.errors import (
    EngineFailed,
    GenerationError,
    InvalidRequest,
    InvalidSetting,
    OutOfMemory,
    PromptTooLong,
)
from codeherd_worker.engine.engine import Engine, EngineSettings, SequenceOutcome, SequenceRequest
from codeherd_worker.engine.loading import load_model
from codeherd_worker.engine.sampling import SamplingParams
from codeherd_worker.engine.stopping import CancelReason, CancelToken, FinishReason, Stopper
from tests.unit.worker.engine.tiny_llama import VOCAB_SIZE, generate_alone, random_prompt, tiny_llama

#: Seconds until a test gives up; nothing is measured against it.
PATIENCE_S = 60
CHUNK = 64
MAX_LEN = 700


class Spelling:
    """A detokenizer that spells each id as `<id>` and can do something at each token."""

    def __init__(self, at_token: Callable[[int], None] | None = None) -> None:
        self._at_token = at_token
        self._count = 0

    def push(self, token_id: int) -> str:
        self._count += 1
        if self._at_token is not None:
            self._at_token(self._count)
        return f"<{token_id}>"

    def finish(self) -> str:
        return ""


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Threads that wait for each other are slow on a busy machine; `test_decode.py` uses two.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


def make_engine(model: LlamaForCausalLM, slots: int = 3, **options: Any) -> Engine:
    return Engine(model, EngineSettings(slots=slots, max_len=MAX_LEN, prefill_chunk=CHUNK), **options)


@contextmanager
def running(model: LlamaForCausalLM, slots: int = 3, **options: Any) -> Iterator[Engine]:
    engine = make_engine(model, slots, **options)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def make_request(
    prompt_ids: tuple[int, ...],
    count: int = 10,
    *,
    sampling: SamplingParams | None = None,
    stop_ids: frozenset[int] = frozenset(),
    stop_strings: tuple[str, ...] = (),
    at_token: Callable[[int], None] | None = None,
    **fields: Any,
) -> SequenceRequest:
    stopper = Stopper(
        stop_ids=stop_ids,
        stop_strings=stop_strings,
        max_new_tokens=count,
        detokenizer=Spelling(at_token),
    )
    fields.setdefault("cancel", CancelToken())
    return SequenceRequest(prompt_ids, sampling or SamplingParams(), stopper, **fields)


def wait(future: Future[SequenceOutcome]) -> SequenceOutcome:
    return future.result(timeout=PATIENCE_S)


def fail_at_pass(model: LlamaForCausalLM, number: int, error: BaseException) -> Any:
    """Let the model raise in its n-th pass; returns the hook's handle."""
    passes = 0

    def hook(*_args: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == number:
            raise error

    return model.register_forward_pre_hook(hook)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_greedy_answers_equal_generate_whatever_runs_beside(kv_heads: int) -> None:
    model = tiny_llama(num_key_value_heads=kv_heads)
    lengths = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 192, 300, 511, 512, 513, 600]
    prompts = [random_prompt(length) for length in lengths]
    counts = [4 + index % 5 * 5 for index in range(len(prompts))]
    expected = [generate_alone(model, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    order = list(range(len(prompts)))

    for slots, seed in ((3, 0), (8, 1)):
        random.Random(seed).shuffle(order)
        with running(model, slots) as engine:
            futures = {index: engine.submit(make_request(prompts[index], counts[index])) for index in order}
            answers = [list(wait(futures[index]).token_ids) for index in range(len(prompts))]

        assert answers == expected


def varied_requests(at_token: Callable[[int], None] | None = None) -> list[SequenceRequest]:
    samplings = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.8, top_p=0.95, seed=2),
        SamplingParams(temperature=1.2, top_k=20, seed=-3),
        SamplingParams(temperature=0.7, top_k=40, top_p=0.9, repetition_penalty=1.3, seed=2**63 - 1),
        SamplingParams(repetition_penalty=1.2),
    ]
    lengths = [3, 64, 65, 130, 200, 31, 500, 8, 90, 33, 260, 1]
    return [
        make_request(random_prompt(length), 6 + index, sampling=samplings[index % 6], at_token=at_token)
        for index, length in enumerate(lengths)
    ]


def quantized(folder: Any, quantization: Any) -> LlamaForCausalLM:
    tiny_llama().save_pretrained(folder)
    return load_model(str(folder), quantization=quantization, device="cpu", slots=5).model


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4", "int8"])
def test_an_answer_is_the_same_bits_alone_and_in_any_mix(kind: str, tmp_path: Any) -> None:
    is_quantized = kind in ("nf4", "int8")
    model = quantized(tmp_path, kind) if is_quantized else tiny_llama().to(getattr(torch, kind))
    with running(model, slots=5) as engine:
        alone = [wait(engine.submit(request)).token_ids for request in varied_requests()]

        for seed in range(2):
            order = list(enumerate(varied_requests()))
            random.Random(seed).shuffle(order)
            futures = {index: engine.submit(request) for index, request in order}
            mixed = [wait(futures[index]).token_ids for index in range(len(order))]

            assert mixed == alone


def test_another_engine_of_the_same_settings_gives_the_same_bits(model: LlamaForCausalLM) -> None:
    answers = []
    for _ in range(2):
        with running(model) as engine:
            futures = [engine.submit(request) for request in varied_requests()]
            answers.append([wait(future).token_ids for future in futures])

    assert answers[0] == answers[1]


def test_nf4_answers_resemble_generate(tmp_path: Any) -> None:
    # Equality is not to be had: generate multiplies one row, we several, and kernels round by shape.
    model = quantized(tmp_path, "nf4")
    prompts = [random_prompt(length) for length in (1, 20, 64, 100)]

    with running(model) as engine:
        futures = [engine.submit(make_request(prompt, 1)) for prompt in prompts]
        answers = [list(wait(future).token_ids) for future in futures]

    same = [answer == generate_alone(model, p, 1) for answer, p in zip(answers, prompts, strict=True)]
    assert sum(same) >= 3


def test_a_freed_slot_is_filled_while_others_decode(model: LlamaForCausalLM) -> None:
    with running(model, slots=2) as engine:
        futures = [engine.submit(make_request(random_prompt(9), count)) for count in (40, 5, 5, 5, 5, 5)]
        for future in futures:
            wait(future)

        # In batches of two that wait for their longest, it would be 39 + 4 + 4.
        assert engine.stats().steps == 39


def test_one_chunk_is_the_most_that_decoding_waits_for(model: LlamaForCausalLM) -> None:
    shapes: list[tuple[int, ...]] = []
    engine = make_engine(model, slots=2)
    handle = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    decode_shape = (int(engine.facts["rows"]), 1)
    futures = [
        engine.submit(make_request(random_prompt(5), 30)),
        engine.submit(make_request(random_prompt(6 * CHUNK), 2)),
    ]

    engine.start()
    for future in futures:
        wait(future)
    engine.close()
    handle.remove()

    chunks = [index for index, shape in enumerate(shapes) if shape == (1, CHUNK)]
    assert len(chunks) == 6
    assert all(shapes[index + 1] == decode_shape for index in chunks)


def test_priority_then_arrival_decides_who_gets_the_slot(model: LlamaForCausalLM) -> None:
    engine = make_engine(model, slots=1)
    finished: list[str] = []
    futures = []
    for name, priority in (("late", 9), ("first", 5), ("second", 5), ("urgent", 0)):
        future = engine.submit(make_request(random_prompt(4), 2, priority=priority))
        future.add_done_callback(lambda _future, name=name: finished.append(name))  # type: ignore[misc]
        futures.append(future)

    engine.start()
    for future in futures:
        wait(future)
    engine.close()

    assert finished == ["urgent", "first", "second", "late"]


def test_a_stop_id_ends_a_sequence(model: LlamaForCausalLM) -> None:
    prompt = random_prompt(12)
    expected = generate_alone(model, prompt, 10)
    place = next(i for i in range(2, 10) if expected[i] not in expected[:i])

    with running(model) as engine:
        outcome = wait(engine.submit(make_request(prompt, 10, stop_ids=frozenset({expected[place]}))))

    assert outcome.finish_reason is FinishReason.EOS
    assert list(outcome.token_ids) == expected[:place]
    assert outcome.completion_tokens == place


def test_a_stop_string_across_tokens_ends_a_sequence(model: LlamaForCausalLM) -> None:
    prompt = random_prompt(12)
    expected = generate_alone(model, prompt, 10)
    stop = f"{expected[4]}><{expected[5]}>"

    with running(model) as engine:
        outcome = wait(engine.submit(make_request(prompt, 10, stop_strings=(stop,))))

    assert outcome.finish_reason is FinishReason.STOP
    assert outcome.stop_string == stop
    assert outcome.text == "".join(f"<{token}>" for token in expected[:4]) + "<"


def test_an_outcome_tells_its_figures(model: LlamaForCausalLM) -> None:
    clock = Clock()
    engine = make_engine(model, clock=clock)

    def pass_time(_count: int) -> None:
        clock.now_s += 2

    future = engine.submit(make_request(random_prompt(70), 3, at_token=pass_time))
    clock.now_s += 5
    engine.start()
    outcome = wait(future)
    engine.close()

    assert (outcome.finish_reason, outcome.cancelled) == (FinishReason.LENGTH, None)
    assert (outcome.prompt_tokens, outcome.completion_tokens) == (70, 3)
    assert (outcome.queue_s, outcome.prefill_s, outcome.decode_s) == (5, 0, 6)


def test_cancel_while_decoding_ends_before_the_next_token(model: LlamaForCausalLM) -> None:
    token = CancelToken()

    def cancel_at_third(count: int) -> None:
        if count == 3:
            token.cancel(CancelReason.USER)

    with running(model) as engine:
        outcome = wait(
            engine.submit(make_request(random_prompt(9), 100, cancel=token, at_token=cancel_at_third))
        )

    assert (outcome.cancelled, outcome.finish_reason) == (CancelReason.USER, None)
    assert outcome.completion_tokens == 3
    assert outcome.text.count("<") == 3


def test_cancel_while_prefilling_frees_the_slot(model: LlamaForCausalLM) -> None:
    token = CancelToken()
    passes: list[int] = []
    engine = make_engine(model, slots=2)
    handle = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )

    def cancel_at_third(count: int) -> None:
        if count == 3:
            token.cancel(CancelReason.LEASE_LOST)

    decoding = engine.submit(make_request(random_prompt(5), 20, at_token=cancel_at_third))
    prefilling = engine.submit(make_request(random_prompt(9 * CHUNK), 20, cancel=token))
    engine.start()
    outcome = wait(prefilling)
    wait(decoding)
    engine.close()
    handle.remove()

    assert outcome.cancelled is CancelReason.LEASE_LOST
    assert outcome.completion_tokens == 0
    assert passes.count(CHUNK) < 9
    assert engine.stats().active == 0


def test_cancel_while_waiting_needs_no_slot(model: LlamaForCausalLM) -> None:
    token = CancelToken()

    def cancel(_count: int) -> None:
        token.cancel(CancelReason.OPERATOR)

    with running(model, slots=1) as engine:
        busy = engine.submit(make_request(random_prompt(5), 30, at_token=cancel))
        outcome = wait(engine.submit(make_request(random_prompt(5), 30, cancel=token)))

        assert not busy.done()
        assert outcome.cancelled is CancelReason.OPERATOR
        assert outcome.prefill_s == 0


def test_a_deadline_ends_a_sequence_with_what_it_has(model: LlamaForCausalLM) -> None:
    clock = Clock()

    def pass_time(_count: int) -> None:
        clock.now_s += 1

    with running(model, clock=clock) as engine:
        outcome = wait(
            engine.submit(make_request(random_prompt(5), 100, deadline=clock.now_s + 4, at_token=pass_time))
        )

    assert outcome.cancelled is CancelReason.DEADLINE
    assert outcome.completion_tokens == 4


def test_a_broken_detokenizer_fails_its_sequence_alone(model: LlamaForCausalLM) -> None:
    def break_at_second(count: int) -> None:
        if count == 2:
            raise ValueError("no such piece")

    with running(model) as engine:
        good = engine.submit(make_request(random_prompt(9)))
        bad = engine.submit(make_request(random_prompt(10), at_token=break_at_second))

        with pytest.raises(GenerationError) as caught:
            wait(bad)
        assert isinstance(caught.value.__cause__, ValueError)
        assert list(wait(good).token_ids) == generate_alone(model, random_prompt(9), 10)
        assert not engine.broken


def test_a_detokenizer_that_cannot_finish_fails_its_sequence_alone(model: LlamaForCausalLM) -> None:
    class Unfinished(Spelling):
        def finish(self) -> str:
            raise ValueError("half a character")

    token = CancelToken()
    token.cancel(CancelReason.USER)
    stopper = Stopper(stop_ids=frozenset(), stop_strings=(), max_new_tokens=2, detokenizer=Unfinished())

    with running(model) as engine:
        cancelled = engine.submit(SequenceRequest((5, 6), SamplingParams(), stopper, token))
        with pytest.raises(GenerationError):
            wait(cancelled)

        assert wait(engine.submit(make_request(random_prompt(9)))).completion_tokens == 10


def test_bad_numbers_fail_their_sequence_alone() -> None:
    bad_id = 9
    model = tiny_llama()
    model.model.embed_tokens.weight[bad_id] = torch.nan
    prompts = [tuple(token for token in random_prompt(40, seed) if token != bad_id) for seed in range(4)]

    with running(model, slots=2) as engine:
        bad = [engine.submit(make_request((*prompt, bad_id))) for prompt in prompts[:2]]
        good = [engine.submit(make_request(prompt, 3)) for prompt in prompts]
        for future in bad:
            with pytest.raises(GenerationError, match="not finite"):
                wait(future)
        answers = [list(wait(future).token_ids) for future in good]

    assert answers == [generate_alone(model, prompt, 3) for prompt in prompts]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), EngineFailed),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
        (MemoryError(), OutOfMemory),
        (SystemExit(1), EngineFailed),
    ],
)
@pytest.mark.parametrize("number", [1, 4])
def test_a_failed_step_completes_every_future(
    error: BaseException, expected: type[Exception], number: int
) -> None:
    model = tiny_llama()
    engine = make_engine(model, slots=2)
    futures = [engine.submit(make_request(random_prompt(5))) for _ in range(6)]
    fail_at_pass(model, number, error)

    engine.start()

    for future in futures:
        with pytest.raises(expected) as caught:
            wait(future)
        assert caught.value.__cause__ is error
    assert engine.broken
    with pytest.raises(EngineFailed, match="broke"):
        engine.submit(make_request(random_prompt(5)))
    engine.close()
    assert (engine.stats().active, engine.stats().waiting) == (0, 0)


def test_close_cancels_what_is_left(model: LlamaForCausalLM) -> None:
    started = threading.Event()
    engine = make_engine(model, slots=1)
    decoding = engine.submit(make_request(random_prompt(5), 600, at_token=lambda _count: started.set()))
    waiting = engine.submit(make_request(random_prompt(5)))
    engine.start()
    assert started.wait(PATIENCE_S)

    engine.close()

    assert wait(decoding).cancelled is CancelReason.DRAIN
    assert wait(waiting).cancelled is CancelReason.DRAIN
    with pytest.raises(EngineFailed, match="closed"):
        engine.submit(make_request(random_prompt(5)))
    assert not engine.broken


def test_close_completes_futures_of_an_engine_that_never_started(model: LlamaForCausalLM) -> None:
    engine = make_engine(model)
    future = engine.submit(make_request(random_prompt(5)))

    engine.close()
    engine.close()

    assert wait(future).cancelled is CancelReason.DRAIN


def test_many_threads_submit_and_wait(model: LlamaForCausalLM) -> None:
    answers: dict[int, tuple[int, ...]] = {}

    with running(model) as engine:

        def submit(seed: int) -> None:
            answers[seed] = wait(engine.submit(make_request(random_prompt(7, seed)))).token_ids

        threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=PATIENCE_S)

    assert answers.keys() == set(range(12))
    for seed, answer in answers.items():
        assert list(answer) == generate_alone(model, random_prompt(7, seed), 10)


def test_a_future_cannot_be_cancelled(model: LlamaForCausalLM) -> None:
    # Completing a cancelled future raises, which would break the engine for everybody.
    with running(model) as engine:
        future = engine.submit(make_request(random_prompt(5)))

        assert not future.cancel()
        assert wait(future).completion_tokens == 10


def test_what_cannot_run_is_refused(model: LlamaForCausalLM) -> None:
    engine = make_engine(model)

    with pytest.raises(PromptTooLong, match="prompt has 690 tokens and asks for 11 more"):
        engine.submit(make_request(random_prompt(690), 11))
    with pytest.raises(InvalidRequest, match="no tokens"):
        engine.submit(make_request(()))
    for token_id in (-1, VOCAB_SIZE):
        with pytest.raises(InvalidRequest, match="token id"):
            engine.submit(make_request((5, token_id)))
    engine.close()


def test_a_sequence_may_fill_its_slot(model: LlamaForCausalLM) -> None:
    prompt = random_prompt(MAX_LEN - 5)

    with running(model) as engine:
        outcome = wait(engine.submit(make_request(prompt, 5)))

    assert list(outcome.token_ids) == generate_alone(model, prompt, 5)


def test_impossible_settings_are_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(InvalidSetting, match="max_len is 2000, the model has 1024 positions"):
        Engine(model, EngineSettings(slots=1, max_len=2000))
    with pytest.raises(InvalidSetting, match="slots"):
        EngineSettings(slots=0, max_len=10)


def test_a_cache_that_does_not_fit_is_out_of_memory() -> None:
    model = tiny_llama(max_position_embeddings=2**40)

    with pytest.raises(OutOfMemory, match="no memory for 2 slots"):
        Engine(model, EngineSettings(slots=2, max_len=2**40))


def test_stats_count(model: LlamaForCausalLM) -> None:
    clock = Clock()
    engine = make_engine(model, slots=2, clock=clock)
    futures = [engine.submit(make_request(random_prompt(5), 4)) for _ in range(3)]
    before = engine.stats()
    clock.now_s += 7

    engine.start()
    for future in futures:
        wait(future)
    engine.close()

    after = engine.stats()
    assert (before.slots, before.active, before.waiting, before.steps) == (2, 0, 3, 0)
    assert (after.active, after.waiting, after.tokens) == (0, 0, 12)
    assert after.steps >= 6
    assert after.last_step_at == before.last_step_at + 7
    assert after.cache_bytes > 0


def test_the_fingerprint_names_what_the_bytes_depend_on(model: LlamaForCausalLM) -> None:
    engines = [make_engine(model, slots) for slots in (2, 2, 3)]

    assert engines[0].fingerprint == engines[1].fingerprint != engines[2].fingerprint
    assert engines[0].facts["quantization"] == "none"
    assert engines[0].facts["dtype"] == "float32"
    assert {"torch", "transformers", "bitsandbytes", "device", "max_len"} <= engines[0].facts.keys()


def test_warm_up_leaves_answers_as_they_are(model: LlamaForCausalLM) -> None:
    engine = make_engine(model)
    engine.warm_up()

    engine.start()
    outcome = wait(engine.submit(make_request(random_prompt(100))))
    engine.close()

    assert list(outcome.token_ids) == generate_alone(model, random_prompt(100), 10)
