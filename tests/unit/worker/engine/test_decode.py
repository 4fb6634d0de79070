from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from codeherd_worker.engine.cache import KV_BLOCK
from codeherd_worker.engine.decode import SlotDecoder
from codeherd_worker.engine.layouts import Piece
from codeherd_worker.engine.loading import load_model
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.slot_classes import SlotClass
from codeherd_worker.engine.tokens import Token
from tests.unit.worker.engine.decoding import CHUNK, LOGGED, ids, make_decoder, say, start, step
from tests.unit.worker.engine.misrounding import NUDGE, disturb_attention, disturb_linears
from tests.unit.worker.engine.tiny_llama import generate_alone, random_prompt, tiny_llama

GRANULE = 32
SAMPLINGS = {
    "greedy": LOGGED,
    "sampled": SamplingParams(temperature=1.0, seed=7, logprobs=5),
    "filtered": SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=-3, logprobs=2),
    "penalized": SamplingParams(temperature=0.7, repetition_penalty=1.5, seed=11, logprobs=5),
    "greedy and penalized": SamplingParams(repetition_penalty=1.3, logprobs=1),
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    # Threads that wait for each other are slow on a busy machine: two only where they matter.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def _two_threads(_inference: None) -> None:
    # With one thread, all rows round alike without our doing.
    torch.set_num_threads(2)


def record_shapes(decoder: SlotDecoder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Keep the tokens and the logits' rows of every pass."""
    shapes: list[tuple[int, int]] = []
    forward = decoder.passes._forward

    def recording(token_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        logits = forward(token_ids, *args)
        shapes.append((len(token_ids), len(logits)))
        return logits

    monkeypatch.setattr(decoder.passes, "_forward", recording)
    return shapes


def record_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Keep how many slots each attention call reads together, and how far."""
    reads: list[tuple[int, int]] = []
    disturb_attention(monkeypatch, lambda _output, keys: reads.append((keys.shape[0], keys.shape[2])))
    return reads


# The answer


@pytest.mark.usefixtures("each_attention")
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_every_slot_says_what_generate_says(kv_heads: int) -> None:
    model = tiny_llama(num_key_value_heads=kv_heads)
    decoder = make_decoder(model)
    prompt = random_prompt(CHUNK + 5)
    expected = generate_alone(model, prompt, 12)

    for slot in range(3):
        assert ids(say(decoder, slot, prompt, 12)) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 32},
        # No whole fours: a CPU has no kernels of its own for these.
        {"head_dim": 6},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96},
        {"num_attention_heads": 1, "num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ],
    ids=["own head size", "odd head size", "tied", "biased", "odd group", "one head", "linear rope"],
)
def test_unusual_configurations_decode_like_generate(changes: dict[str, Any]) -> None:
    model = tiny_llama(**changes)
    prompt = random_prompt(40)

    assert ids(say(make_decoder(model), 0, prompt, 6)) == generate_alone(model, prompt, 6)


@pytest.mark.usefixtures("_two_threads", "each_attention")
@pytest.mark.parametrize("lengths", [(150, 400, 1000), (256, 512, 1024), (512, 700, 1000)])
def test_slots_of_every_class_answer_with_the_same_bits(
    model: LlamaForCausalLM, lengths: tuple[int, int, int]
) -> None:
    classes = tuple(SlotClass(length, slots) for length, slots in zip(lengths, (2, 1, 2), strict=True))
    decoder = make_decoder(model, classes=classes)
    decoder.warm_up()
    prompt = random_prompt(lengths[0] - 8)

    answers = [say(decoder, slot, prompt, 8) for part in decoder.slots_of_class for slot in part]

    assert [len(part) for part in decoder.slots_of_class] == [2, 1, 2]
    assert all(answer == answers[0] for answer in answers)
    assert ids(answers[0]) == generate_alone(model, prompt, 8)


def test_a_sequence_may_fill_its_slot_to_the_last_token(model: LlamaForCausalLM) -> None:
    decoder = make_decoder(model, max_len=150)
    prompt = random_prompt(145)

    assert ids(say(decoder, 1, prompt, 6)) == generate_alone(model, prompt, 6)


# Bits that depend on nothing


@pytest.mark.usefixtures("_two_threads", "each_attention")
@pytest.mark.parametrize(
    ("slots", "kv_heads", "dtype"),
    [
        (3, 4, torch.float32),
        (5, 4, torch.float32),
        (6, 2, torch.float32),
        (3, 4, torch.bfloat16),
        (5, 2, torch.bfloat16),
        (3, 4, torch.float16),
    ],
)
def test_bits_are_the_same_in_every_slot_beside_any_neighbour(
    slots: int, kv_heads: int, dtype: torch.dtype
) -> None:
    decoder = make_decoder(tiny_llama(num_key_value_heads=kv_heads).to(dtype), slots=slots)
    prompt = random_prompt(70)
    expected = say(decoder, 0, prompt, 4)

    for slot in range(slots):
        neighbours = [(slot + 1) % slots, (slot + 2) % slots]
        for place, neighbour in enumerate(neighbours):
            start(decoder, neighbour, random_prompt(1 + 90 * place + 20 * slot))
        assert say(decoder, slot, prompt, 4) == expected
        for neighbour in neighbours:
            decoder.release(neighbour)


@pytest.mark.usefixtures("_two_threads", "each_attention")
@pytest.mark.parametrize("shape", [(128, 2, 1), (64, 4, 4)])
def test_a_long_neighbour_changes_no_bit(shape: tuple[int, int, int]) -> None:
    hidden, heads, kv_heads = shape
    model = tiny_llama(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads)
    decoder = make_decoder(model)
    decoder.warm_up()
    prompt = random_prompt(300)
    alone = say(decoder, 0, prompt, 3)

    start(decoder, 1, random_prompt(KV_BLOCK + 100))

    assert say(decoder, 0, prompt, 3) == alone


@pytest.mark.usefixtures("_two_threads", "each_attention")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "grouped", "nf4"])
def test_any_mix_of_pieces_that_share_passes_gives_the_bits_of_each_alone(
    kind: str, rng: random.Random, tmp_path: Any
) -> None:
    if kind == "nf4":
        tiny_llama().save_pretrained(tmp_path)
        model = load_model(str(tmp_path), quantization="nf4", device="cpu", slots=4).model
    else:
        model = tiny_llama(num_key_value_heads=1 if kind == "grouped" else 4)
        model = model.bfloat16() if kind == "bfloat16" else model
    decoder = make_decoder(model, slots=4)
    decoder.warm_up()
    if not decoder.can_share_passes:
        pytest.skip("no granule holds on this machine: prompts share no pass")
    prompts = [random_prompt(length) for length in (1, 33, 95, 260)]
    expected = [say(decoder, slot, prompt, 3) for slot, prompt in enumerate(prompts)]

    for _ in range(4):
        slots = rng.sample(range(4), 4)
        firsts = prefill_in_random_passes(decoder, dict(zip(slots, prompts, strict=True)), rng)
        answers = {slot: [firsts[slot]] for slot in slots}
        for _ in range(2):
            for slot, new in decoder.step().read().items():
                answers[slot] += new
        for slot in slots:
            decoder.release(slot)

        assert [answers[slot] for slot in slots] == expected


def prefill_in_random_passes(
    decoder: SlotDecoder, prompts: Mapping[int, Sequence[int]], rng: random.Random
) -> dict[int, Token]:
    """Prefill all prompts, each pass with some granules of some of them; return the first tokens."""
    granule = decoder.granule
    done = dict.fromkeys(prompts, 0)
    firsts: dict[int, Token] = {}
    for slot, prompt in prompts.items():
        decoder.assign(slot, LOGGED, prompt)
    while len(firsts) < len(prompts):
        budget, pieces = decoder.prefill_chunk // granule, []
        left = [slot for slot in prompts if slot not in firsts]
        for slot in rng.sample(left, rng.randint(1, len(left))):
            if budget == 0:
                break
            first, prompt = done[slot], prompts[slot]
            wanted = rng.randint(1, budget)
            part = prompt[first : first + wanted * granule]
            done[slot] += len(part)
            budget -= -(-len(part) // granule)
            pieces.append(Piece(slot, part, first, ends=done[slot] == len(prompt)))
        pending = decoder.prefill(pieces)
        assert (pending is not None) == any(piece.ends for piece in pieces)
        if pending is not None:
            firsts |= {slot: tokens[0] for slot, tokens in pending.read().items()}
    return firsts


@pytest.mark.usefixtures("_two_threads", "each_attention")
@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 4), (4, 0), (2, 2)])
def test_a_copied_prefix_gives_the_bits_of_a_computed_one(
    model: LlamaForCausalLM, source: int, target: int
) -> None:
    decoder = make_decoder(model, classes=(SlotClass(300, 4), SlotClass(600, 1)))
    prompt = random_prompt(200)
    expected = say(decoder, 3, prompt, 4)
    # Another prompt with the same beginning stands in the source.
    say(decoder, source, prompt[:160] + random_prompt(90), 5)

    decoder.copy_prefix(source, target, 160)
    first = start(decoder, target, prompt, reused=160)

    assert [first, *(step(decoder, target) for _ in range(3))] == expected


def test_decoding_beside_a_prefill_leaves_it_untouched(model: LlamaForCausalLM) -> None:
    decoder = make_decoder(model)
    prompt = random_prompt(3 * CHUNK)
    sampling = SamplingParams(temperature=1.0, repetition_penalty=1.5, seed=3, logprobs=5)
    expected = say(decoder, 1, prompt, 6, sampling)

    start(decoder, 0, random_prompt(20), SamplingParams(temperature=1.0, repetition_penalty=1.5))
    decoder.assign(1, sampling, prompt)
    for first in range(0, len(prompt), CHUNK):
        decoder.step()
        piece = Piece(1, prompt[first : first + CHUNK], first, ends=first + CHUNK == len(prompt))
        pending = decoder.prefill([piece])
    assert pending is not None
    tokens = pending.read()[1]
    tokens += [step(decoder, 1) for _ in range(5)]

    assert tokens == expected


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_what_neighbours_ask_for_changes_nothing(model: LlamaForCausalLM, sampling: SamplingParams) -> None:
    decoder = make_decoder(model)
    prompt = random_prompt(50)
    expected = say(decoder, 0, prompt, 8, sampling)

    start(decoder, 1, random_prompt(20), SamplingParams(temperature=1.2, top_k=5, repetition_penalty=2.0))
    start(decoder, 2, random_prompt(21))

    assert say(decoder, 0, prompt, 8, sampling) == expected


# Shapes


def test_every_pass_has_one_of_few_shapes(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(model)
    shapes = record_shapes(decoder, monkeypatch)

    for length in (1, 31, 32, 33, 63, 64, 65, 100, 128, 129):
        say(decoder, 0, random_prompt(length), 2)

    passes = decoder.passes
    assert {tokens for tokens, _ in shapes} <= {*passes.pass_lengths, *passes.row_counts}
    assert {rows for _, rows in shapes} <= {*passes.row_counts}
    assert passes.pass_lengths[-1] == CHUNK


def test_a_step_has_the_fewest_rows_that_hold_all_live_slots(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(model, slots=6)
    for live, slot in enumerate((5, 0, 3), start=1):
        start(decoder, slot, random_prompt(5))
        with monkeypatch.context() as patch:
            shapes = record_shapes(decoder, patch)
            answers = decoder.step().read()

        fewest = min(count for count in decoder.passes.row_counts if count >= live)
        assert shapes == [(fewest, fewest)]
        assert answers.keys() == set([5, 0, 3][:live])
    decoder.rest(0)

    assert decoder.step().read().keys() == {3, 5}


@pytest.mark.usefixtures("torch_attention")
def test_slots_are_read_as_far_as_their_longest_neighbour_needs(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(model, classes=(SlotClass(600, 2), SlotClass(1000, 1)))
    reads = record_reads(monkeypatch)

    assert decoder.passes.kv_lengths[:2] == ((512, 1024), (512, 1024))
    start(decoder, 0, random_prompt(511))
    start(decoder, 1, random_prompt(10))
    start(decoder, decoder.slots_of_class[1][0], random_prompt(20))
    for expected in (512, 1024):
        reads.clear()
        decoder.step()
        assert set(reads) == {(2, expected), (1, 512)}


@pytest.mark.usefixtures("torch_attention")
def test_all_rows_live_or_idle_are_attended_in_as_few_calls_as_classes(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(model, classes=(SlotClass(100, 2), SlotClass(600, 2)))
    for slot in (0, 1, *decoder.slots_of_class[1]):
        start(decoder, slot, random_prompt(20))
    reads = record_reads(monkeypatch)

    decoder.step()

    layers = 2
    assert len(reads) == 2 * layers


def test_a_matrix_whose_rows_disagree_gets_idle_rows_that_say_nothing(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturb(output: torch.Tensor) -> None:
        if len(output) == 3:
            output[-1] += NUDGE

    disturb_linears(monkeypatch, disturb)
    decoder = make_decoder(model, max_len=KV_BLOCK + 1)
    prompts = [random_prompt(20, seed) for seed in range(3)]

    for slot, prompt in enumerate(prompts):
        start(decoder, slot, prompt)
    answers = decoder.step().read()

    assert decoder.passes.rows == 4
    assert decoder.cache.slots == 4
    assert decoder.slots_of_class == ((0, 1, 2),)
    # An idle row holds nothing, and is as short as a slot can be.
    assert [room.readable_len for room in decoder.cache.rooms] == [2 * KV_BLOCK, KV_BLOCK]
    assert 3 not in decoder.passes.row_counts
    assert [answers[slot][0].id for slot in range(3)] == [generate_alone(model, p, 2)[1] for p in prompts]


@pytest.mark.parametrize(("way", "query_rows"), [("compiled", 0), ("torch", 6)])
def test_the_facts_are_those_of_the_shapes(
    model: LlamaForCausalLM, way: str, query_rows: int, request: pytest.FixtureRequest
) -> None:
    if way == "torch":
        request.getfixturevalue("torch_attention")
    decoder = make_decoder(model, chunk=100, draft_tokens=2)

    assert decoder.facts == {
        "rows": decoder.passes.rows,
        "prefill_chunk": 128,
        "granule": decoder.granule,
        # Two query heads share a key head: a token and its two drafts. Compiled loops have no such shape.
        "query_rows": query_rows,
        "draft_tokens": 0,
    }


# Drafts


def say_with_drafts(
    decoder: SlotDecoder,
    slot: int,
    prompt: Sequence[int],
    expected: Sequence[Token],
    rng: random.Random,
    sampling: SamplingParams,
) -> tuple[list[Token], int]:
    """Answer with drafts that are right, wrong, short or missing at random; also count the steps."""
    tokens = [start(decoder, slot, prompt, sampling)]
    steps = 0
    while len(tokens) < len(expected):
        known = [token.id for token in expected[len(tokens) :]]
        count = rng.randint(0, min(decoder.draft_tokens, len(known) - 1))
        draft = [guess if guess is not None and rng.random() < 0.7 else rng.randrange(300) for guess in known]
        tokens += decoder.step({slot: draft[:count]} if count else None).read()[slot]
        steps += 1
    decoder.release(slot)
    return tokens, steps


@pytest.mark.usefixtures("_two_threads")
def test_room_for_drafts_changes_no_bit_of_a_cpus_own_kernels(model: LlamaForCausalLM) -> None:
    prompt = random_prompt(70)

    answers = [say(make_decoder(model, draft_tokens=drafts), 0, prompt, 6) for drafts in (0, 1, 4)]

    assert answers[1:] == answers[:1] * 2


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("way", ["compiled", "torch", "always"])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_drafts_never_change_a_bit(
    sampling: SamplingParams, way: str, request: pytest.FixtureRequest, rng: random.Random
) -> None:
    is_optional = way != "always"
    if way != "compiled":
        request.getfixturevalue("torch_attention")
    if not is_optional:
        # A machine on which a step with drafts rounds otherwise: without the fallback, bits would differ.
        disturb_attention(request.getfixturevalue("monkeypatch"), lambda output, _keys: nudge_drafted(output))
    model = tiny_llama()
    decoder = make_decoder(model, draft_tokens=3)
    checks = decoder.warm_up()
    prompt = random_prompt(70)
    expected = say(decoder, 1, prompt, 20, sampling)

    assert checks.drafts_agree == decoder.drafts_are_optional == is_optional
    for slot in (0, 2):
        tokens, steps = say_with_drafts(decoder, slot, prompt, expected, rng, sampling)
        assert tokens == expected
        assert steps < 19
    assert decoder.facts["draft_tokens"] == (0 if is_optional else 3)


def nudge_drafted(output: torch.Tensor) -> None:
    # Two query heads share a key head: a token and its three drafts are 8 rows, a granule 64.
    if output.shape[2] == 8:
        output += NUDGE


@pytest.mark.usefixtures("_two_threads")
def test_drafts_of_one_slot_change_nothing_for_its_neighbours(
    model: LlamaForCausalLM, rng: random.Random
) -> None:
    decoder = make_decoder(model, draft_tokens=3)
    decoder.warm_up()
    prompts = [random_prompt(70), random_prompt(71), random_prompt(200)]
    expected = [say(decoder, slot, prompt, 16) for slot, prompt in enumerate(prompts)]

    answers = {slot: [start(decoder, slot, prompt)] for slot, prompt in enumerate(prompts)}
    while any(len(answer) < 16 for answer in answers.values()):
        drafts = {}
        for slot in rng.sample(range(3), rng.randint(0, 2)):
            known = ids(expected[slot][len(answers[slot]) : len(answers[slot]) + 3])
            drafts[slot] = [guess if guess is not None and rng.random() < 0.6 else 5 for guess in known]
        drafts = {slot: draft for slot, draft in drafts.items() if draft}
        for slot, new in decoder.step(drafts).read().items():
            answers[slot] += new

    for slot in range(3):
        assert answers[slot][:16] == expected[slot]


def test_as_many_drafts_are_taken_as_were_right(model: LlamaForCausalLM) -> None:
    decoder = make_decoder(model, draft_tokens=3)
    prompt = random_prompt(20)
    expected = say(decoder, 0, prompt, 9)
    first, second, third, fourth, fifth, *_ = [token.id or 0 for token in expected[1:]]
    wrong = (fifth + 1) % 300

    start(decoder, 0, prompt)
    all_right = decoder.step({0: [first, second, third]}).read()[0]
    half_right = decoder.step({0: [fifth, wrong + 1, wrong]}).read()[0]
    none_right = decoder.step({0: [(expected[7].id or 0) + 1]}).read()[0]

    assert ids(all_right) == [first, second, third, fourth]
    assert half_right == expected[5:7]
    assert none_right == expected[7:8]


# Numbers that are not finite


def model_with_bad_token(bad_id: int = 9) -> LlamaForCausalLM:
    model = tiny_llama()
    model.model.embed_tokens.weight[bad_id] = torch.nan
    return model


def good_prompt(length: int, bad_id: int = 9) -> tuple[int, ...]:
    return tuple(bad_id + 1 if token == bad_id else token for token in random_prompt(length))


@pytest.mark.usefixtures("each_attention")
def test_a_bad_prompt_in_the_same_pass_stays_in_its_slot() -> None:
    model = model_with_bad_token()
    decoder = make_decoder(model)
    good = good_prompt(40)
    decoder.assign(0, SamplingParams(), good)
    decoder.assign(1, SamplingParams(), (5, 9, 6))

    pending = decoder.prefill([Piece(1, (5, 9, 6), 0, ends=True), Piece(0, good, 0, ends=True)])
    assert pending is not None
    answers = pending.read()
    tokens = [*answers[0], *(step(decoder, 0) for _ in range(2))]

    assert ids(answers[1]) == [None]
    assert ids(tokens) == generate_alone(model, good, 3)


@pytest.mark.usefixtures("each_attention")
def test_a_slot_is_clean_again_after_wipe() -> None:
    model = model_with_bad_token()
    decoder = make_decoder(model)
    good = good_prompt(40)
    bad = (*good[:20], 9, *good, *good)
    assert start(decoder, 0, bad, SamplingParams()).id is None
    decoder.release(0)

    decoder.wipe(0)

    assert ids(say(decoder, 0, good, 3)) == generate_alone(model, good, 3)


@pytest.mark.usefixtures("each_attention")
@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_a_step_says_which_slot_has_no_token(draft_tokens: int) -> None:
    model = tiny_llama()
    decoder = make_decoder(model, draft_tokens=draft_tokens)
    start(decoder, 0, random_prompt(5))
    token = start(decoder, 2, random_prompt(6))
    assert token.id is not None
    model.model.embed_tokens.weight[token.id] = torch.nan

    answers = decoder.step({0: [7]} if draft_tokens else None).read()

    assert answers.keys() == {0, 2}
    assert ids(answers[2]) == [None]
    assert answers[0][0].id is not None


def test_infinite_logits_are_no_tokens_either() -> None:
    model = tiny_llama()
    decoder = make_decoder(model)
    start(decoder, 0, random_prompt(5))
    model.model.norm.weight.fill_(torch.inf)

    assert step(decoder, 0).id is None


# Places


@pytest.mark.usefixtures("each_attention")
def test_a_slot_that_rests_says_nothing_and_writes_nothing(model: LlamaForCausalLM) -> None:
    decoder = make_decoder(model)
    start(decoder, 0, random_prompt(20))
    start(decoder, 1, random_prompt(21))
    decoder.rest(1)
    before = [part.clone() for part in decoder.cache.read(0, 1, 1, decoder.cache.rooms[0].readable_len)]

    assert decoder.step().read().keys() == {0}

    after = decoder.cache.read(0, 1, 1, decoder.cache.rooms[0].readable_len)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    decoder.rest(0)
    assert not decoder.is_live


def test_logprobs_come_for_those_who_asked(model: LlamaForCausalLM) -> None:
    decoder = make_decoder(model)
    start(decoder, 0, random_prompt(20), SamplingParams(logprobs=3))
    start(decoder, 1, random_prompt(20), SamplingParams())

    answers = decoder.step().read()
    decoder.release(0)
    start(decoder, 0, random_prompt(20), SamplingParams())

    asked = answers[0][0].logprobs
    assert asked is not None
    assert asked.token_id == answers[0][0].id == asked.top[0][0]
    assert len(asked.top) == 3
    assert answers[1][0].logprobs is None
    assert decoder.step().read()[0][0].logprobs is None


def test_nothing_is_allocated_after_the_start(model: LlamaForCausalLM) -> None:
    decoder = make_decoder(model, draft_tokens=2)
    before = decoder.cache.addresses

    decoder.warm_up()
    say(decoder, 0, random_prompt(200), 5)
    decoder.wipe(0)

    assert decoder.cache.addresses == before
