from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Many
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from codeherd_schema.errors import GenerationError, OutOfMemory
from codeherd_worker.engine.decode import SlotDecoder
from codeherd_worker.engine.drafts import PromptLookup
from codeherd_worker.engine.layouts import Piece
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.scheduler import Ended, Scheduler
from codeherd_worker.engine.sequences import Sequence, SequenceRequest
from codeherd_worker.engine.slot_classes import SlotClass
from codeherd_worker.engine.stopping import CancelReason, CancelToken, FinishReason, Stopper
from codeherd_worker.engine.tokens import Pending
from tests.unit.worker.engine.decoding import CHUNK, LOGGED, make_decoder, say
from tests.unit.worker.engine.tiny_llama import generate_alone, random_prompt, tiny_llama

GRANULE = 32
#: More turns than any test needs.
MANY_TURNS = 2000


class RecordingDecoder(SlotDecoder):
    """A decoder that remembers what it was asked, and fails when a test says so."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passes_of: list[list[Piece]] = []
        #: "prefill" and "step", in order.
        self.order: list[str] = []
        self.copies: list[tuple[int, int, int]] = []
        self.drafts: list[Mapping[int, Many[int]]] = []
        self.before_pass: Callable[[str], None] = lambda _kind: None

    def prefill(self, pieces: Many[Piece]) -> Pending | None:
        self.passes_of.append(list(pieces))
        self.order.append("prefill")
        self.before_pass("prefill")
        return super().prefill(pieces)

    def step(self, drafts: Mapping[int, Many[int]] | None = None) -> Pending:
        self.order.append("step")
        self.drafts.append(dict(drafts or {}))
        self.before_pass("step")
        return super().step(drafts)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self.copies.append((source, target, length))
        super().copy_prefix(source, target, length)


class Bench:
    """A scheduler on a real decoder, turned by hand on a clock that stands still."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        *classes: SlotClass,
        reuse_prefixes: bool = False,
        lag: int = 0,
        draft_tokens: int = 0,
        chunk: int = CHUNK,
    ) -> None:
        self.classes = classes or (SlotClass(700, 3),)
        self.decoder = RecordingDecoder(
            model, classes=self.classes, prefill_chunk=chunk, draft_tokens=draft_tokens
        )
        self.decoder.warm_up()
        self.now_s = 100.0
        self.moments: list[float] = []
        self.scheduler = Scheduler(
            self.decoder,
            self.classes,
            reuse_prefixes=reuse_prefixes,
            clock=lambda: self.now_s,
            on_pass=lambda: self.moments.append(self.now_s),
        )
        # As on a GPU: the host reads tokens one step late.
        self.scheduler._lag = lag
        self.ended: dict[Sequence, Ended] = {}

    def add(
        self,
        prompt_ids: tuple[int, ...],
        count: int = 4,
        *,
        sampling: SamplingParams = LOGGED,
        stop_ids: frozenset[int] = frozenset(),
        **fields: Any,
    ) -> Sequence:
        stopper = Stopper(stop_ids=stop_ids, stop_strings=(), max_new_tokens=count, detokenizer=None)
        fields.setdefault("cancel", CancelToken())
        lookup = PromptLookup(prompt_ids) if self.decoder.draft_tokens else None
        request = SequenceRequest(prompt_ids, sampling, stopper, **fields)
        sequence = Sequence(request, submitted_at=self.now_s, lookup=lookup)
        self.scheduler.add(sequence)
        return sequence

    def turn(self, count: int = 1) -> list[Sequence]:
        """Take some turns; return whose sequences ended in them."""
        ended = [end for _ in range(count) for end in self.scheduler.turn()]
        self.ended |= {end.sequence: end for end in ended}
        return [end.sequence for end in ended]

    def run(self) -> list[Sequence]:
        """Turn until nothing is left to do; return the sequences in the order in which they ended."""
        order: list[Sequence] = []
        for _ in range(MANY_TURNS):
            if not self.scheduler.has_work:
                return order
            order += self.turn()
        raise AssertionError("the scheduler never comes to an end")

    def cancelled(self, sequence: Sequence) -> CancelReason | None:
        end = self.ended[sequence]
        return sequence.outcome(end.reason, self.now_s).cancelled


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def ids_of(sequence: Sequence) -> list[int]:
    return sequence.request.stopper.token_ids


# Who gets a slot


def test_a_sequence_gets_a_slot_of_the_smallest_class_that_holds_it(model: LlamaForCausalLM) -> None:
    bench = Bench(model, SlotClass(64, 2), SlotClass(200, 1), SlotClass(400, 1))
    classes = bench.decoder.slots_of_class
    lengths = [60, 190, 61, 390]

    sequences = [bench.add(random_prompt(length - 4), 4) for length in lengths]
    bench.turn()

    places = [next(n for n, part in enumerate(classes) if s.slot in part) for s in sequences]
    assert places == [0, 1, 0, 2]


def test_a_short_sequence_takes_a_long_slot_only_when_no_short_one_is_free(model: LlamaForCausalLM) -> None:
    bench = Bench(model, SlotClass(64, 1), SlotClass(400, 1))
    (short_slot,), (long_slot,) = bench.decoder.slots_of_class

    first, second = bench.add(random_prompt(10), 3), bench.add(random_prompt(11), 9)
    bench.turn()
    assert (first.slot, second.slot) == (short_slot, long_slot)
    waiting = bench.add(random_prompt(300), 3)
    third = bench.add(random_prompt(12), 3)
    bench.run()

    # The short slot was free first, and the long sequence cannot use it.
    assert (third.slot, waiting.slot) == (short_slot, long_slot)
    assert all(bench.ended[s].reason is FinishReason.LENGTH for s in (first, second, waiting, third))


def test_priority_then_arrival_decides_who_gets_the_slot(model: LlamaForCausalLM) -> None:
    bench = Bench(model, SlotClass(100, 1))
    late, first, second, urgent = (
        bench.add(random_prompt(4), 2, priority=priority) for priority in (9, 5, 5, 0)
    )

    assert bench.run() == [urgent, first, second, late]


def test_the_best_priority_is_prefilled_first(model: LlamaForCausalLM) -> None:
    bench = Bench(model)
    slow = bench.add(random_prompt(3 * CHUNK), 2, priority=5)
    bench.turn()

    urgent = bench.add(random_prompt(CHUNK), 2, priority=0)
    bench.turn()

    assert [piece.slot for piece in bench.decoder.passes_of[-1]] == [urgent.slot]
    assert slow.prefilled == CHUNK


def test_a_freed_slot_is_filled_while_others_decode(model: LlamaForCausalLM) -> None:
    bench = Bench(model, SlotClass(700, 2))
    for count in (40, 5, 5, 5, 5, 5):
        bench.add(random_prompt(9), count)

    bench.run()

    # In batches of two that wait for their longest, it would be 39 + 4 + 4.
    assert bench.scheduler.counters.steps == 39


# What runs next


def test_a_long_prompt_holds_decoding_up_by_one_chunk_per_step(model: LlamaForCausalLM) -> None:
    bench = Bench(model, SlotClass(1000, 3))
    bench.add(random_prompt(5), 40)
    bench.turn(2)
    bench.add(random_prompt(7 * CHUNK), 2)
    bench.add(random_prompt(CHUNK + 9), 2)

    bench.run()

    order = bench.decoder.order
    assert order.count("prefill") >= 9
    assert all(pair != ("prefill", "prefill") for pair in pairwise(order))
    for pieces in bench.decoder.passes_of:
        assert sum(-(-len(piece.token_ids) // GRANULE) * GRANULE for piece in pieces) <= CHUNK


def test_several_waiting_prompts_share_a_pass(model: LlamaForCausalLM) -> None:
    bench = Bench(model, SlotClass(300, 5))
    prompts = [random_prompt(length) for length in (20, 32, 33, 10, 150)]
    sequences = [bench.add(prompt) for prompt in prompts]

    bench.turn()

    # One granule, one, two: then the pass is full.
    assert bench.decoder.can_share_passes
    assert [(piece.slot, len(piece.token_ids)) for piece in bench.decoder.passes_of[0]] == [
        (sequence.slot, length) for sequence, length in zip(sequences[:3], (20, 32, 33), strict=True)
    ]
    bench.run()
    assert [ids_of(sequence) for sequence in sequences] == [generate_alone(model, p, 4) for p in prompts]


def test_what_is_left_of_a_pass_goes_to_the_beginning_of_the_next_prompt(model: LlamaForCausalLM) -> None:
    bench = Bench(model)
    bench.add(random_prompt(40))
    bench.add(random_prompt(200))

    bench.turn(2)

    pieces = [
        [(piece.start, len(piece.token_ids), piece.ends) for piece in p] for p in bench.decoder.passes_of
    ]
    assert pieces == [[(0, 40, True), (0, 64, False)], [(64, 128, False)]]


def test_where_granules_disagree_a_pass_has_one_prompt(model: LlamaForCausalLM) -> None:
    bench = Bench(model)
    bench.decoder.passes.granule, bench.decoder.passes.pass_lengths = CHUNK, (CHUNK,)
    prompts = [random_prompt(length) for length in (20, 150, 10)]
    sequences = [bench.add(prompt) for prompt in prompts]

    bench.run()

    assert [len(pieces) for pieces in bench.decoder.passes_of] == [1, 1, 1, 1]
    assert [ids_of(sequence) for sequence in sequences] == [generate_alone(model, p, 4) for p in prompts]


def test_the_watchdog_is_told_before_and_after_every_pass(model: LlamaForCausalLM) -> None:
    bench = Bench(model)
    told: list[int] = []
    bench.decoder.before_pass = lambda _kind: told.append(len(bench.moments))
    bench.add(random_prompt(CHUNK + 1), 3)

    bench.run()

    assert len(told) == len(bench.decoder.order) == 4
    # Two for the pass itself, and two for the reading of its tokens, if it has any.
    assert told == [1, 3, 7, 11]


# Prefixes


def test_a_finished_prompt_is_copied_and_not_computed_again(model: LlamaForCausalLM) -> None:
    bench = Bench(model, reuse_prefixes=True)
    prompt = random_prompt(200)
    bench.add(prompt)
    bench.run()

    # Both at once, or the second would go to the first one's slot.
    longer = bench.add((*prompt[:170], *random_prompt(90)))
    other = bench.add((*prompt[:100], *random_prompt(80)))
    bench.run()

    assert (longer.reused, other.reused) == (160, 96)
    computed = sum(len(piece.token_ids) for pieces in bench.decoder.passes_of for piece in pieces)
    assert computed == 200 + (260 - 160) + (180 - 96)
    assert bench.scheduler.counters.prompt_tokens == 200 + 260 + 180
    assert bench.scheduler.counters.reused_tokens == 160 + 96
    for sequence in (longer, other):
        assert ids_of(sequence) == generate_alone(model, sequence.request.prompt_ids, 4)


def test_the_last_token_of_a_prompt_is_computed_in_any_case(model: LlamaForCausalLM) -> None:
    bench = Bench(model, reuse_prefixes=True)
    prompt = random_prompt(2 * GRANULE)
    first = bench.add(prompt)
    bench.run()

    second = bench.add(prompt)
    bench.run()

    assert second.reused == GRANULE
    assert ids_of(second) == ids_of(first) == generate_alone(model, prompt, 4)


def test_a_sequence_goes_to_the_slot_that_holds_its_prefix_if_that_is_free(model: LlamaForCausalLM) -> None:
    bench = Bench(model, reuse_prefixes=True)
    prompts = [random_prompt(100, seed) for seed in range(3)]
    first = [bench.add(prompt) for prompt in prompts]
    bench.run()

    again = [bench.add(prompts[number]) for number in (2, 0, 1)]
    bench.run()

    assert [sequence.slot for sequence in again] == [first[number].slot for number in (2, 0, 1)]
    assert [sequence.reused for sequence in again] == [96] * 3
    # To itself: nothing moves.
    assert all(source == target for source, target, _ in bench.decoder.copies)


def test_a_prefix_is_copied_from_a_slot_of_another_class(model: LlamaForCausalLM) -> None:
    bench = Bench(model, SlotClass(128, 1), SlotClass(600, 1), reuse_prefixes=True)
    prompt = random_prompt(110)
    short = bench.add(prompt, 10)
    bench.turn()

    long = bench.add((*prompt, *random_prompt(300)), 10)
    bench.run()

    assert bench.decoder.copies == [(short.slot, long.slot, 96)]
    for sequence in (short, long):
        assert ids_of(sequence) == generate_alone(model, sequence.request.prompt_ids, 10)


def test_a_sequence_waits_for_a_prefix_that_is_being_computed(model: LlamaForCausalLM) -> None:
    bench = Bench(model, reuse_prefixes=True)
    prompt = random_prompt(4 * CHUNK)
    first = bench.add((*prompt, 5))
    second = bench.add((*prompt, 6, 7))
    stranger = bench.add(random_prompt(50))

    bench.turn()
    assert (first.slot, second.slot, stranger.slot is None) == (first.slot, None, False)
    bench.run()

    assert second.reused == 4 * CHUNK
    assert sum(len(piece.token_ids) for p in bench.decoder.passes_of for piece in p) == 4 * CHUNK + 1 + 50 + 2
    assert ids_of(second) == generate_alone(model, second.request.prompt_ids, 4)


def test_without_reuse_nobody_waits_and_nothing_is_copied(model: LlamaForCausalLM) -> None:
    bench = Bench(model, reuse_prefixes=False)
    prompt = random_prompt(4 * CHUNK)
    sequences = [bench.add((*prompt, token)) for token in (5, 6, 7)]

    bench.turn()
    assert all(sequence.slot is not None for sequence in sequences)
    bench.run()

    assert bench.decoder.copies == []
    assert bench.scheduler.counters.reused_tokens == 0
    assert ids_of(sequences[2]) == generate_alone(model, sequences[2].request.prompt_ids, 4)


def test_whoever_waited_for_a_prefix_goes_on_when_its_computation_is_cancelled(
    model: LlamaForCausalLM,
) -> None:
    bench = Bench(model, reuse_prefixes=True)
    prompt = random_prompt(4 * CHUNK)
    first, second = bench.add((*prompt, 5)), bench.add((*prompt, 6))
    bench.turn(2)
    assert second.slot is None

    first.request.cancel.cancel(CancelReason.USER)
    bench.run()

    assert second.reused == 2 * CHUNK
    assert ids_of(second) == generate_alone(model, second.request.prompt_ids, 4)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_any_traffic_gives_the_bits_of_each_sequence_alone(
    model: LlamaForCausalLM, draft_tokens: int, lag: int, rng: random.Random
) -> None:
    if lag and draft_tokens:
        pytest.skip("drafts are made from the last token, so there is no lag")
    classes = (SlotClass(192, 2), SlotClass(600, 2))
    samplings = [
        LOGGED,
        SamplingParams(temperature=1.0, seed=5, logprobs=5),
        SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.4, seed=-1, logprobs=5),
        SamplingParams(repetition_penalty=1.3, logprobs=5),
    ]
    trunk = random_prompt(400)
    jobs = []
    for number in range(14):
        shared, own = rng.choice((0, 40, 96, 130, 300)), rng.randint(1, 60)
        prompt = (*trunk[:shared], *random_prompt(own, number))
        jobs.append((prompt, rng.randint(1, 12), samplings[number % 4]))
    alone = make_decoder(model, classes=classes, draft_tokens=draft_tokens)
    alone.warm_up()
    expected = [say(alone, 2, prompt, count, sampling) for prompt, count, sampling in jobs]

    for reuse_prefixes in (True, False):
        bench = Bench(model, *classes, reuse_prefixes=reuse_prefixes, lag=lag, draft_tokens=draft_tokens)
        sequences = []
        for prompt, count, sampling in jobs:
            sequences.append(bench.add(prompt, count, sampling=sampling, priority=rng.choice((4, 5))))
            bench.turn(rng.randint(0, 3))
        bench.run()

        for sequence, tokens in zip(sequences, expected, strict=True):
            assert ids_of(sequence) == [token.id for token in tokens]
            assert sequence.request.stopper.logprobs == [token.logprobs for token in tokens]
        assert (bench.scheduler.counters.reused_tokens > 0) == reuse_prefixes
        assert bench.scheduler.counters.tokens == sum(count for _, count, _ in jobs)


# How a sequence ends


def test_a_stop_id_ends_a_sequence(model: LlamaForCausalLM) -> None:
    prompt = random_prompt(12)
    expected = generate_alone(model, prompt, 10)
    place = next(i for i in range(2, 10) if expected[i] not in expected[:i])
    bench = Bench(model)

    sequence = bench.add(prompt, 10, stop_ids=frozenset({expected[place]}))
    bench.run()

    assert bench.ended[sequence].reason is FinishReason.EOS
    assert ids_of(sequence) == expected[:place]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding"])
@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_sequence_can_be_ended_in_every_state(
    model: LlamaForCausalLM, state: str, how: str, lag: int
) -> None:
    bench = Bench(model, SlotClass(700, 2), lag=lag)
    others = [bench.add(random_prompt(5, seed), 12) for seed in range(2 if state == "waiting" else 1)]
    turns = {"waiting": 2, "prefilling": 2, "decoding": 5}[state]
    prompt = random_prompt(5 if state == "waiting" else 3 * CHUNK)
    bench.turn()
    sequence = bench.add(prompt, 30, deadline=110.0)
    bench.turn(turns)
    assert (sequence.slot is None) == (state == "waiting")
    assert sequence.is_prefilled == (state == "decoding")
    said = len(ids_of(sequence))
    steps_before = len(bench.decoder.order)

    if how == "cancel":
        sequence.request.cancel.cancel(CancelReason.LEASE_LOST)
    else:
        bench.now_s = 110.0
    ended = bench.turn()

    assert ended == [sequence]
    assert bench.cancelled(sequence) is (
        CancelReason.LEASE_LOST if how == "cancel" else CancelReason.DEADLINE
    )
    assert len(ids_of(sequence)) == said
    assert (said > 0) == (state == "decoding")
    assert sequence not in bench.scheduler.running.values()
    # Nothing more is computed for it, and its slot serves the next one.
    replacement = bench.add(random_prompt(9), 4)
    bench.run()
    pieces = [p for passes in bench.decoder.passes_of[steps_before:] for p in passes]
    assert all(piece.token_ids != prompt[-CHUNK:] for piece in pieces)
    assert ids_of(replacement) == generate_alone(model, random_prompt(9), 4)
    for seed, other in enumerate(others):
        assert ids_of(other) == generate_alone(model, random_prompt(5, seed), 12)


def test_a_deadline_that_has_not_come_ends_nothing(model: LlamaForCausalLM) -> None:
    bench = Bench(model)
    sequence = bench.add(random_prompt(5), 3, deadline=110.0)
    bench.now_s = 109.9

    bench.run()

    assert bench.ended[sequence].reason is FinishReason.LENGTH


def test_in_a_long_line_the_cancelled_are_found_as_well(model: LlamaForCausalLM) -> None:
    bench = Bench(model, SlotClass(700, 1))
    running = bench.add(random_prompt(5), 200)
    line = [bench.add(random_prompt(5), 3) for _ in range(60)]
    bench.turn()

    line[59].request.cancel.cancel(CancelReason.USER)
    ended = bench.turn(40)

    assert ended == [line[59]]
    assert running.slot is not None
    assert bench.scheduler.waiting == 59


def test_end_all_leaves_nobody(model: LlamaForCausalLM) -> None:
    bench = Bench(model, SlotClass(700, 2))
    sequences = [bench.add(random_prompt(5 + 100 * n), 50) for n in range(2)]
    sequences += [bench.add(random_prompt(5), 50) for _ in range(50)]
    bench.turn(3)

    ended = bench.scheduler.end_all(CancelReason.DRAIN)

    assert {end.sequence for end in ended} == set(sequences)
    assert {s.request.cancel.reason for s in sequences} == {CancelReason.DRAIN}
    assert not bench.scheduler.has_work


# Late results


def test_with_lag_the_host_reads_one_step_late_and_says_the_same(model: LlamaForCausalLM) -> None:
    prompts = [random_prompt(length) for length in (5, 90, 300)]
    answers = []
    for lag in (0, 1):
        bench = Bench(model, lag=lag)
        sequences = [bench.add(prompt, 8) for prompt in prompts]
        bench.turn()
        assert len(ids_of(sequences[0])) == 2 - lag
        bench.run()
        answers.append([ids_of(sequence) for sequence in sequences])

    assert answers[0] == answers[1] == [generate_alone(model, prompt, 8) for prompt in prompts]


def test_with_lag_no_step_is_taken_for_a_sequence_whose_last_token_is_on_its_way(
    model: LlamaForCausalLM,
) -> None:
    bench = Bench(model, lag=1)
    bench.add(random_prompt(5), 6)

    bench.run()

    assert bench.decoder.order == ["prefill"] + ["step"] * 5


def test_late_tokens_of_an_ended_sequence_reach_nobody(model: LlamaForCausalLM) -> None:
    prompt, other = random_prompt(12), random_prompt(13)
    expected = generate_alone(model, prompt, 10)
    place = next(i for i in range(2, 10) if expected[i] not in expected[:i])
    bench = Bench(model, SlotClass(700, 1), lag=1)

    stopped = bench.add(prompt, 10, stop_ids=frozenset({expected[place]}))
    next_one = bench.add(other, 6)
    bench.run()

    # One step too many was launched for the first: its token came when the slot was the second's.
    assert bench.ended[stopped].reason is FinishReason.EOS
    assert ids_of(stopped) == expected[:place]
    assert ids_of(next_one) == generate_alone(model, other, 6)
    assert bench.scheduler.counters.tokens == place + 1 + 6


# What goes wrong


def fail_at(bench: Bench, kind: str, number: int, error: BaseException) -> None:
    """Let the n-th pass of a kind raise."""
    seen = 0

    def before_pass(this: str) -> None:
        nonlocal seen
        seen += this == kind
        if this == kind and seen == number:
            raise error

    bench.decoder.before_pass = before_pass


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_prefill_out_of_memory_fails_the_prompts_in_it_alone(
    model: LlamaForCausalLM, error: BaseException, lag: int
) -> None:
    bench = Bench(model, SlotClass(700, 4), lag=lag, reuse_prefixes=True)
    decoding = bench.add(random_prompt(5), 12)
    bench.turn(2)
    fail_at(bench, "prefill", 1, error)
    involved = [bench.add(random_prompt(60, seed)) for seed in range(2)]
    later = bench.add(random_prompt(70))

    bench.run()

    for sequence in involved:
        failure = bench.ended[sequence].error
        assert isinstance(failure, OutOfMemory)
        assert failure.__cause__ is error
        assert failure.retryable
    assert bench.ended[involved[0]].error is not bench.ended[involved[1]].error
    assert ids_of(decoding) == generate_alone(model, random_prompt(5), 12)
    assert ids_of(later) == generate_alone(model, random_prompt(70), 4)
    again = [bench.add(random_prompt(60, seed)) for seed in range(2)]
    bench.run()
    assert [ids_of(s) for s in again] == [generate_alone(model, random_prompt(60, n), 4) for n in range(2)]


@pytest.mark.parametrize("lag", [0, 1])
def test_a_step_out_of_memory_fails_those_that_decode_alone(model: LlamaForCausalLM, lag: int) -> None:
    bench = Bench(model, SlotClass(700, 3), lag=lag)
    decoding = [bench.add(random_prompt(5, seed), 12) for seed in range(2)]
    bench.turn(2)
    prefilling = bench.add(random_prompt(3 * CHUNK), 5)
    waiting = bench.add(random_prompt(20), 5)
    bench.turn()
    fail_at(bench, "step", 1, OUT_OF_MEMORY[0])

    bench.run()

    assert all(isinstance(bench.ended[sequence].error, OutOfMemory) for sequence in decoding)
    assert ids_of(prefilling) == generate_alone(model, random_prompt(3 * CHUNK), 5)
    assert ids_of(waiting) == generate_alone(model, random_prompt(20), 5)


def test_any_other_error_is_for_the_engine(model: LlamaForCausalLM) -> None:
    bench = Bench(model)
    bench.add(random_prompt(5))
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    fail_at(bench, "step", 1, error)

    with pytest.raises(RuntimeError) as caught:
        bench.run()

    assert caught.value is error


def bad_model(bad_id: int = 9) -> LlamaForCausalLM:
    model = tiny_llama()
    model.model.embed_tokens.weight[bad_id] = torch.nan
    return model


def good_prompt(length: int, seed: int = 0, bad_id: int = 9) -> tuple[int, ...]:
    return tuple(bad_id + 1 if token == bad_id else token for token in random_prompt(length, seed))


@pytest.mark.parametrize("lag", [0, 1])
def test_bad_numbers_fail_their_sequence_alone_and_are_not_reused(lag: int) -> None:
    model = bad_model()
    bench = Bench(model, SlotClass(700, 2), lag=lag, reuse_prefixes=True)
    good = [good_prompt(40, seed) for seed in range(3)]
    trunk = good_prompt(70)

    bad = bench.add((*trunk[:50], 9, *trunk), 4)
    sequences = [bench.add(prompt, 3) for prompt in good]
    bench.run()
    related = bench.add(trunk, 3)
    bench.run()

    failure = bench.ended[bad].error
    assert isinstance(failure, GenerationError)
    assert "not finite" in str(failure)
    assert [ids_of(s) for s in sequences] == [generate_alone(model, prompt, 3) for prompt in good]
    assert ids_of(related) == generate_alone(model, trunk, 3)


def test_bad_numbers_of_a_cancelled_prompt_do_not_reach_the_next_sequence() -> None:
    # They are known only when the first token is chosen, which never happens here.
    model = bad_model()
    bench = Bench(model, SlotClass(700, 1))
    cancelled = bench.add((*good_prompt(50), 9, *good_prompt(300)), 4)
    bench.turn()
    cancelled.request.cancel.cancel(CancelReason.USER)

    innocent = bench.add(good_prompt(20), 3)
    bench.run()

    assert bench.ended[innocent].error is None
    assert ids_of(innocent) == generate_alone(model, good_prompt(20), 3)


# Drafts


def test_drafts_save_steps_where_a_text_repeats_itself(model: LlamaForCausalLM) -> None:
    # What the model goes on to say was said in the prompt before.
    seed_prompt = random_prompt(30)
    prompt = (*seed_prompt, *generate_alone(model, seed_prompt, 20), *seed_prompt)
    plain, drafting = Bench(model), Bench(model, draft_tokens=3)

    expected = plain.add(prompt, 20)
    sequence = drafting.add(prompt, 20)
    plain.run()
    drafting.run()

    counters = drafting.scheduler.counters
    assert ids_of(sequence) == ids_of(expected)
    assert counters.drafted >= counters.accepted
    assert counters.drafted == sum(len(d) for drafts in drafting.decoder.drafts for d in drafts.values())
    assert counters.steps == 19 - counters.accepted
    assert plain.scheduler.counters.drafted == 0


def test_no_more_is_guessed_than_may_be_said(model: LlamaForCausalLM) -> None:
    bench = Bench(model, SlotClass(64, 1), draft_tokens=3)
    prompt = (5, 6, 7) * 20

    sequence = bench.add(prompt, 4)
    bench.run()

    assert len(ids_of(sequence)) == 4
    said = 1
    for drafts in bench.decoder.drafts:
        assert all(said + len(draft) < 4 for draft in drafts.values())
        said += 1


def test_many_that_decode_together_are_not_drafted_for(model: LlamaForCausalLM) -> None:
    bench = Bench(model, SlotClass(100, 5), draft_tokens=3)
    if not bench.decoder.drafts_are_optional:
        pytest.skip("on this machine every step has its drafts")
    for seed in range(5):
        bench.add((*(5, 6, 7) * 10, seed + 8), 6)

    bench.turn(3)

    # Five slots with three drafts each are more rows than a CPU multiplies for the price of one.
    assert bench.decoder.drafts[-1] == {}
