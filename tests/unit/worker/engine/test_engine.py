from __future__ import annotations

import platform
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from codeherd_schema.errors import (
    EngineFailed,
    GenerationError,
    InvalidRequest,
    InvalidSetting,
    ModelFilesInvalid,
    OutOfMemory,
    PromptTooLong,
)
from codeherd_worker.engine import engine as engine_module
from codeherd_worker.engine.compute_thread import ComputeThread
from codeherd_worker.engine.engine import Engine, EngineSettings
from codeherd_worker.engine.loading import load_model
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.sequences import SequenceOutcome, SequenceRequest
from codeherd_worker.engine.slot_classes import SlotClass
from codeherd_worker.engine.stats import SlotView
from codeherd_worker.engine.stopping import CancelReason, CancelToken, FinishReason, Stopper
from tests.unit.worker.engine.misrounding import NUDGE, disturb_attention
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


def uniform(slots: int = 3, **changes: Any) -> EngineSettings:
    fields: dict[str, Any] = {"slots": slots, "max_len": MAX_LEN, "prefill_chunk": CHUNK}
    return EngineSettings.uniform(**(fields | changes))


def make_engine(model: LlamaForCausalLM, settings: EngineSettings | None = None, **options: Any) -> Engine:
    return Engine(model, settings or uniform(), **options)


@contextmanager
def running(
    model: LlamaForCausalLM, settings: EngineSettings | None = None, **options: Any
) -> Iterator[Engine]:
    engine = make_engine(model, settings, **options)
    engine.warm_up()
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


def fail_at_pass(engine: Engine, number: int, error: BaseException) -> None:
    """Let the model raise in its n-th pass from here on."""
    passes = engine._decoder.passes
    forward, count = passes._forward, 0

    def failing(*args: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == number:
            raise error
        return forward(*args)

    passes._forward = failing  # type: ignore[assignment]


# Answers


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_greedy_answers_equal_generate_whatever_runs_beside(kv_heads: int) -> None:
    model = tiny_llama(num_key_value_heads=kv_heads)
    lengths = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 192, 300, 511, 512, 513, 600]
    prompts = [random_prompt(length) for length in lengths]
    counts = [4 + index % 5 * 5 for index in range(len(prompts))]
    expected = [generate_alone(model, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    order = list(range(len(prompts)))
    several = EngineSettings((SlotClass(192, 4), SlotClass(MAX_LEN, 3)), prefill_chunk=128, draft_tokens=3)

    for seed, settings in enumerate((uniform(3), uniform(8), several)):
        random.Random(seed).shuffle(order)
        with running(model, settings) as engine:
            futures = {index: engine.submit(make_request(prompts[index], counts[index])) for index in order}
            answers = [list(wait(futures[index]).token_ids) for index in range(len(prompts))]

        assert answers == expected


def varied_requests() -> list[SequenceRequest]:
    samplings = [
        SamplingParams(logprobs=5),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.8, top_p=0.95, seed=2, logprobs=1),
        SamplingParams(temperature=1.2, top_k=20, seed=-3),
        SamplingParams(temperature=0.7, top_k=40, top_p=0.9, repetition_penalty=1.3, seed=2**63 - 1),
        SamplingParams(repetition_penalty=1.2, logprobs=3),
    ]
    lengths = [3, 64, 65, 130, 200, 31, 500, 8, 90, 33, 260, 1]
    return [
        make_request(random_prompt(500)[:length], 6 + index, sampling=samplings[index % 6])
        for index, length in enumerate(lengths)
    ]


def quantized(folder: Any, quantization: Any) -> LlamaForCausalLM:
    tiny_llama().save_pretrained(folder)
    return load_model(str(folder), quantization=quantization, device="cpu", slots=5).model


def said(outcome: SequenceOutcome) -> tuple[Any, ...]:
    return outcome.token_ids, outcome.logprobs


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "nf4", "int8"])
def test_an_answer_is_the_same_bits_alone_and_in_any_mix(kind: str, tmp_path: Any) -> None:
    is_quantized = kind in ("nf4", "int8")
    model = quantized(tmp_path, kind) if is_quantized else tiny_llama().to(getattr(torch, kind))
    with running(model, uniform(5)) as engine:
        # Prefixes of one text: what is reused must not show.
        alone = [said(wait(engine.submit(request))) for request in varied_requests()]

        for seed in range(2):
            order = list(enumerate(varied_requests()))
            random.Random(seed).shuffle(order)
            futures = {index: engine.submit(request) for index, request in order}
            mixed = [said(wait(futures[index])) for index in range(len(order))]

            assert mixed == alone
        assert engine.stats().reused_tokens > 0


@pytest.mark.parametrize(
    "changes",
    [{}, {"reuse_prefixes": False}, {"draft_tokens": 1}, {"draft_tokens": 2}],
    ids=["the same", "no reuse", "one draft", "two drafts"],
)
def test_engines_of_one_fingerprint_give_the_same_bits(
    model: LlamaForCausalLM, changes: dict[str, Any]
) -> None:
    answers: dict[str, list[Any]] = {}
    for settings in (uniform(), uniform(**changes)):
        with running(model, settings) as engine:
            futures = [engine.submit(request) for request in varied_requests()]
            answers.setdefault(engine.fingerprint, []).append([said(wait(future)) for future in futures])

    # Room for drafts may change bits: then the fingerprint must differ.
    assert len(answers) == 1 or "draft_tokens" in changes
    for same in answers.values():
        assert all(answer == same[0] for answer in same)


def test_an_engine_decodes_on_the_thread_that_it_is_given_and_leaves_it_running(
    model: LlamaForCausalLM,
) -> None:
    thread, seen = ComputeThread(), set[int]()
    request = make_request(random_prompt(20), at_token=lambda _: seen.add(threading.get_ident()))

    with running(model, thread=thread) as engine:
        outcome = wait(engine.submit(request))

    assert list(outcome.token_ids) == generate_alone(model, random_prompt(20), 10)
    assert seen == {thread.run(threading.get_ident)}
    thread.close()


def test_nf4_answers_resemble_generate(tmp_path: Any) -> None:
    # Equality is not to be had: generate multiplies one row, we several, and kernels round by shape.
    model = quantized(tmp_path, "nf4")
    prompts = [random_prompt(length) for length in (1, 20, 64, 100)]

    with running(model) as engine:
        futures = [engine.submit(make_request(prompt, 1)) for prompt in prompts]
        answers = [list(wait(future).token_ids) for future in futures]

    same = [answer == generate_alone(model, p, 1) for answer, p in zip(answers, prompts, strict=True)]
    assert sum(same) >= 3


def test_a_stop_string_across_tokens_ends_a_sequence(model: LlamaForCausalLM) -> None:
    prompt = random_prompt(12)
    expected = generate_alone(model, prompt, 10)
    stop = f"{expected[4]}><{expected[5]}>"

    with running(model) as engine:
        outcome = wait(engine.submit(make_request(prompt, 10, stop_strings=(stop,))))

    assert outcome.finish_reason is FinishReason.STOP
    assert outcome.stop_string == stop
    assert outcome.text == "".join(f"<{token}>" for token in expected[:4]) + "<"


def test_a_sequence_may_fill_its_slot(model: LlamaForCausalLM) -> None:
    prompt = random_prompt(MAX_LEN - 5)

    with running(model) as engine:
        outcome = wait(engine.submit(make_request(prompt, 5)))

    assert list(outcome.token_ids) == generate_alone(model, prompt, 5)


def test_an_outcome_tells_its_figures(model: LlamaForCausalLM) -> None:
    clock = Clock()
    engine = make_engine(model, clock=clock)

    def pass_time(_count: int) -> None:
        clock.now_s += 2

    future = engine.submit(make_request(random_prompt(70), 3, at_token=pass_time))
    clock.now_s += 5
    engine.start()
    outcome = wait(future)
    again = wait(engine.submit(make_request(random_prompt(70), 3)))
    engine.close()

    assert (outcome.finish_reason, outcome.cancelled) == (FinishReason.LENGTH, None)
    assert (outcome.prompt_tokens, outcome.completion_tokens, outcome.reused_tokens) == (70, 3, 0)
    assert (outcome.queue_s, outcome.prefill_s, outcome.decode_s) == (5, 0, 6)
    assert again.reused_tokens == 64


def test_logprobs_come_with_their_tokens(model: LlamaForCausalLM) -> None:
    prompt = random_prompt(30)

    with running(model) as engine:
        outcome = wait(engine.submit(make_request(prompt, 4, sampling=SamplingParams(logprobs=2))))
        silent = wait(engine.submit(make_request(prompt, 4)))

    text = torch.tensor([[*prompt, *outcome.token_ids]])
    expected = model(text).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert [entry.token_id for entry in outcome.logprobs] == list(outcome.token_ids)
    for entry, row in zip(outcome.logprobs, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
        assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()
    assert silent.logprobs == ()


# Ends from outside


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


def test_cancel_while_waiting_needs_no_slot(model: LlamaForCausalLM) -> None:
    token = CancelToken()

    def cancel(_count: int) -> None:
        token.cancel(CancelReason.OPERATOR)

    with running(model, uniform(1)) as engine:
        busy = engine.submit(make_request(random_prompt(5), 300, at_token=cancel))
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


def test_close_cancels_what_is_left(model: LlamaForCausalLM) -> None:
    started = threading.Event()
    engine = make_engine(model, uniform(1))
    decoding = engine.submit(make_request(random_prompt(5), 600, at_token=lambda _count: started.set()))
    waiting = engine.submit(make_request(random_prompt(5)))
    engine.start()
    assert started.wait(PATIENCE_S)

    engine.close()

    assert wait(decoding).cancelled is CancelReason.DRAIN
    assert wait(decoding).completion_tokens >= 1
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


# Failures


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


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("no such shape"),
        SystemExit(1),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("number", [1, 4])
def test_a_failed_pass_completes_every_future(
    model: LlamaForCausalLM, error: BaseException, number: int
) -> None:
    engine = make_engine(model, uniform(2))
    futures = [engine.submit(make_request(random_prompt(5))) for _ in range(6)]
    fail_at_pass(engine, number, error)

    engine.start()

    causes = []
    for future in futures:
        with pytest.raises(EngineFailed, match=type(error).__name__) as caught:
            wait(future)
        assert caught.value.__cause__ is error
        causes.append(caught.value)
    # One error each: raising one adds to its traceback.
    assert len(set(map(id, causes))) == 6
    assert engine.broken
    with pytest.raises(EngineFailed, match="broke"):
        engine.submit(make_request(random_prompt(5)))
    engine.close()
    assert (engine.stats().active, engine.stats().waiting) == (0, 0)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=["device", "host"]
)
@pytest.mark.parametrize("number", [1, 4])
def test_a_pass_out_of_memory_does_not_break_the_engine(
    model: LlamaForCausalLM, error: BaseException, number: int
) -> None:
    engine = make_engine(model, uniform(2, reuse_prefixes=False))
    prompts = [random_prompt(5, seed) for seed in range(6)]
    futures = [engine.submit(make_request(prompt)) for prompt in prompts]
    fail_at_pass(engine, number, error)

    engine.start()
    failures = [future.exception(PATIENCE_S) for future in futures]

    assert [isinstance(failure, OutOfMemory) for failure in failures] == [True] * 2 + [False] * 4
    for prompt, future in list(zip(prompts, futures, strict=True))[2:]:
        assert list(wait(future).token_ids) == generate_alone(model, prompt, 10)
    assert not engine.broken
    engine.close()


def test_a_model_without_layers_breaks_the_engine_and_says_why() -> None:
    model = tiny_llama()
    engine = make_engine(model)
    engine._decoder.passes._forward = None  # type: ignore[assignment]

    engine.start()

    with pytest.raises(EngineFailed, match="TypeError"):
        wait(engine.submit(make_request(random_prompt(5))))
    engine.close()


# Other threads


def test_many_threads_submit_and_wait(model: LlamaForCausalLM) -> None:
    answers: dict[int, tuple[int, ...]] = {}

    with running(model) as engine:

        def submit(seed: int) -> None:
            answers[seed] = wait(engine.submit(make_request(random_prompt(7, seed)))).token_ids
            engine.stats()
            engine.views()

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


# What is refused


def test_what_cannot_run_is_refused(model: LlamaForCausalLM) -> None:
    engine = make_engine(model)

    with pytest.raises(PromptTooLong, match="prompt has 690 tokens and asks for 11 more"):
        engine.submit(make_request(random_prompt(690), 11))
    with pytest.raises(InvalidRequest, match="no tokens"):
        engine.submit(make_request(()))
    for token_id in (-1, VOCAB_SIZE):
        with pytest.raises(InvalidRequest, match="token id"):
            engine.submit(make_request((5, token_id)))
    assert engine.stats().waiting == 0
    engine.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: EngineSettings(()), "at least one slot"),
        (lambda: EngineSettings.uniform(slots=0, max_len=10), "slots"),
        (lambda: EngineSettings((SlotClass(200, 1), SlotClass(100, 1))), "must ascend"),
        (lambda: EngineSettings((SlotClass(100, 1), SlotClass(100, 2))), "must ascend"),
        (lambda: uniform(prefill_chunk=0), "prefill_chunk is 0"),
        (lambda: uniform(draft_tokens=-1), "draft_tokens is -1"),
    ],
)
def test_impossible_settings_are_refused(settings: Callable[[], EngineSettings], message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        settings()


def test_slots_longer_than_the_model_are_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(InvalidSetting, match="max_len is 2000, the model has 1024 positions"):
        make_engine(model, uniform(1, max_len=2000))


def test_angles_that_change_with_the_length_are_refused() -> None:
    model = tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})

    with pytest.raises(ModelFilesInvalid, match="dynamic"):
        make_engine(model)


def test_a_cache_that_does_not_fit_is_out_of_memory() -> None:
    model = tiny_llama(max_position_embeddings=2**40)

    with pytest.raises(OutOfMemory, match="no memory for 2 slots"):
        make_engine(model, uniform(2, max_len=2**40))


def test_settings_know_their_size() -> None:
    settings = EngineSettings((SlotClass(100, 5), SlotClass(400, 2)))

    assert (settings.slots, settings.max_len) == (7, 400)
    assert uniform(3) == EngineSettings((SlotClass(MAX_LEN, 3),), prefill_chunk=CHUNK)


# For people who look


def test_stats_count(model: LlamaForCausalLM) -> None:
    clock = Clock()
    engine = make_engine(model, uniform(2), clock=clock)
    futures = [engine.submit(make_request(random_prompt(40), 4)) for _ in range(3)]
    before = engine.stats()
    clock.now_s += 7

    engine.start()
    for future in futures:
        wait(future)
    engine.close()

    after = engine.stats()
    assert (before.slots, before.active, before.waiting, before.steps) == (2, 0, 3, 0)
    assert (after.active, after.waiting, after.tokens) == (0, 0, 12)
    assert (after.prompt_tokens, after.reused_tokens) == (120, 64)
    assert after.steps >= 6
    assert 2 <= after.passes <= 3
    assert after.last_step_at == before.last_step_at + 7
    assert after.busy_s == 0
    assert after.cache_bytes == before.cache_bytes > 0


def test_views_show_every_slot_and_what_it_does(model: LlamaForCausalLM) -> None:
    settings = EngineSettings((SlotClass(100, 2), SlotClass(400, 1)), prefill_chunk=CHUNK)
    seen: list[list[SlotView]] = []

    with running(model, settings) as engine:

        def look(count: int) -> None:
            if count == 3:
                seen.append(engine.views())

        wait(engine.submit(make_request(random_prompt(150), 9, name="job-1", at_token=look)))
        free = engine.views()

    assert [(view.length, view.name) for view in free] == [(100, None), (100, None), (400, None)]
    assert len({view.slot for view in free}) == 3
    (views,) = seen
    assert [view.name for view in views] == [None, None, "job-1"]
    # The third token is being spelled: it is among the ids already.
    assert (views[2].prompt_tokens, views[2].prefilled_tokens, views[2].new_tokens) == (150, 150, 3)
    assert views[2].reused_tokens == 0


def test_nothing_is_allocated_after_the_start(model: LlamaForCausalLM) -> None:
    engine = make_engine(model, uniform(3, draft_tokens=2))
    before = engine._decoder.cache.addresses
    engine.warm_up()

    engine.start()
    for future in [engine.submit(request) for request in varied_requests()]:
        wait(future)
    engine.close()

    assert engine._decoder.cache.addresses == before


def test_the_fingerprint_changes_with_what_the_bytes_depend_on(model: LlamaForCausalLM) -> None:
    def fingerprint(model: LlamaForCausalLM, settings: EngineSettings) -> str:
        engine = make_engine(model, settings)
        engine.warm_up()
        return engine.fingerprint

    same = fingerprint(model, uniform())
    classes = EngineSettings((SlotClass(100, 1), SlotClass(MAX_LEN, 2)), prefill_chunk=CHUNK)

    assert fingerprint(tiny_llama(), uniform()) == same
    assert fingerprint(model, uniform(reuse_prefixes=False)) == same
    others = [
        fingerprint(model, uniform(4)),
        fingerprint(model, uniform(prefill_chunk=128)),
        fingerprint(model, classes),
        fingerprint(tiny_llama().bfloat16(), uniform()),
    ]
    assert len({same, *others}) == 5


def test_the_fingerprint_knows_the_machine(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    same = make_engine(model).fingerprint
    torch.set_num_threads(2)

    assert make_engine(model).fingerprint != same
    torch.set_num_threads(1)
    assert make_engine(model).fingerprint == same


def test_the_device_is_the_processors_own_name(model: LlamaForCausalLM) -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("not Linux")
    said = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    if not said:
        pytest.skip("this processor does not tell its name")

    device = make_engine(model).facts["device"]

    assert device
    assert said[0].endswith(f": {device}")


@pytest.mark.parametrize(
    ("cpuinfo", "device"),
    [
        ("processor\t: 0\nmodel name\t: A 9000: Pro\n\nmodel name\t: B\n", "A 9000: Pro"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
    ids=["named", "nameless", "no such file"],
)
def test_another_processor_is_another_fingerprint(
    model: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cpuinfo: str | None,
    device: str,
) -> None:
    same = make_engine(model)
    elsewhere = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        elsewhere.write_text(cpuinfo)
    monkeypatch.setattr(engine_module, "Path", lambda _path: elsewhere)

    other = make_engine(model)

    assert other.facts == {**same.facts, "device": device}
    assert (other.fingerprint != same.fingerprint) == (device != same.facts["device"])


def test_the_facts_name_versions_quantization_and_shapes(model: LlamaForCausalLM, tmp_path: Any) -> None:
    facts = make_engine(model).facts

    assert (facts["quantization"], facts["dtype"], facts["slots"]) == ("none", "float32", "3x700")
    names = {"torch", "transformers", "bitsandbytes", "device", "threads", "granule", "rows", "query_rows"}
    assert names <= facts.keys()
    assert make_engine(quantized(tmp_path, "nf4")).facts["quantization"] == "nf4"


@pytest.mark.usefixtures("torch_attention")
def test_warm_up_settles_the_facts(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(model, uniform(draft_tokens=2))
    before = engine.fingerprint

    def disturb(output: torch.Tensor, _keys: torch.Tensor) -> None:
        # Two query heads share a key head; a token and its two drafts are six rows.
        if output.shape[2] == 6:
            output += NUDGE

    disturb_attention(monkeypatch, disturb)
    checks = engine.warm_up()

    assert not checks.drafts_agree
    assert engine.facts["draft_tokens"] == 2
    assert engine.fingerprint != before


def test_a_device_that_computes_otherwise_has_another_fingerprint(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warm(draft_tokens: int = 0) -> Engine:
        engine = make_engine(model, uniform(draft_tokens=draft_tokens))
        engine.warm_up()
        return engine

    same = warm()
    assert warm().facts == warm(draft_tokens=2).facts == same.facts
    embed = functional.embedding
    monkeypatch.setattr(functional, "embedding", lambda ids, weight: embed(ids, weight) * (1 + 2**-22))
    other = warm()

    assert {name for name, value in other.facts.items() if value != same.facts[name]} == {"bits"}
    assert other.fingerprint != same.fingerprint


def test_warm_up_leaves_answers_as_they_are(model: LlamaForCausalLM) -> None:
    engine = make_engine(model)
    engine.warm_up()

    engine.start()
    outcome = wait(engine.submit(make_request(random_prompt(100))))
    engine.close()

    assert list(outcome.token_ids) == generate_alone(model, random_prompt(100), 10)
