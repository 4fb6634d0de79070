from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from codeherd_schema.errors import InvalidRequest
from codeherd_worker.engine.sampling import (
    LEAST_LOGPROB,
    Filters,
    Needs,
    Rows,
    Sampled,
    SlotSampler,
    are_sound,
    gumbel_noise,
    lowest_kept,
    mix,
    penalize,
    running_mass,
    streams_of,
)
from codeherd_worker.engine.sampling_params import SamplingParams

VOCAB_SIZE = 50
#: Far more than a CPU looks at first.
LARGE_VOCAB_SIZE = 3001
CPU = torch.device("cpu")
#: 0.999 quantile of chi-square with 11 degrees of freedom.
CHI2_LIMIT_11 = 31.26


def random_logits(
    *shape: int, vocab_size: int = VOCAB_SIZE, seed: int = 0, spread: float = 3
) -> torch.Tensor:
    return torch.randn(*shape, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def make_sampler(
    *params: SamplingParams, prompts: tuple[tuple[int, ...], ...] = (), vocab_size: int = VOCAB_SIZE
) -> SlotSampler:
    sampler = SlotSampler(rows=len(params), vocab_size=vocab_size, device=CPU)
    for row, row_params in enumerate(params):
        sampler.assign(row, row_params, prompts[row] if prompts else ())
    return sampler


def column(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


def integers(*values: int) -> torch.Tensor:
    return column(*values, dtype=torch.int64)


def noise_of(seed: int, position: int, token_ids: torch.Tensor) -> torch.Tensor:
    return gumbel_noise(streams_of(mix(integers(seed)), integers(position)), token_ids)


def filters_of(*params: SamplingParams) -> Filters:
    return Filters(
        top_k=integers(*(row.top_k for row in params)),
        top_p=column(*(row.top_p for row in params), dtype=torch.float64),
        log_min_p=column(*(math.log(row.min_p) if row.min_p else -math.inf for row in params)),
    )


def filtered(scores: torch.Tensor, *params: SamplingParams) -> torch.Tensor:
    highest, ids = scores.sort(dim=-1, descending=True)
    lowest = lowest_kept(highest, running_mass(scores, ids), filters_of(*params))
    return scores.masked_fill(scores < lowest, -math.inf)


def transformers_rules(params: SamplingParams) -> LogitsProcessorList:
    """The rules of `generate`, in its order: GenerationMixin._get_logits_processor."""
    rules = LogitsProcessorList()
    if params.repetition_penalty != 1:
        rules.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    rules.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        rules.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        rules.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        rules.append(MinPLogitsWarper(params.min_p))
    return rules


def is_close_call(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Tokens that stay or go with the last bits of a float32 sum: those at which the mass equals top_p."""
    if params.top_p == 1:
        return torch.zeros_like(scores, dtype=torch.bool)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    descending, order = scores.double().softmax(-1).sort(dim=-1, descending=True)
    mass_before = descending.cumsum(-1) - descending
    is_close = (mass_before - params.top_p).abs() < 5e-7
    return torch.zeros_like(is_close).scatter_(1, order, is_close & (descending > 0))


def fields_of(sampled: Sampled) -> dict[str, torch.Tensor]:
    found = {field.name: getattr(sampled, field.name) for field in dataclasses.fields(sampled)}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("seed", range(20))
def test_the_penalty_equals_the_one_of_transformers(seed: int) -> None:
    scores = random_logits(3, seed=seed)
    seen_ids = torch.randint(0, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros(3, VOCAB_SIZE, dtype=torch.bool).scatter_(1, seen_ids, True)

    ours = penalize(scores, seen, column(1.3, 1.3, 1.3))

    assert torch.equal(ours, RepetitionPenaltyLogitsProcessor(1.3)(seen_ids, scores))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, LARGE_VOCAB_SIZE])
@pytest.mark.parametrize(
    "params",
    [
        *(SamplingParams(1.0, top_k=k) for k in (1, 7, VOCAB_SIZE, 1000, 5000)),
        *(SamplingParams(1.0, top_p=p) for p in (0.01, 0.5, 0.9, 0.999)),
        *(SamplingParams(1.0, min_p=p) for p in (1e-6, 0.01, 0.3, 1.0)),
        SamplingParams(1.0, top_k=20, top_p=0.8),
        SamplingParams(1.0, top_p=0.95, min_p=0.02),
        SamplingParams(1.0, top_k=30, top_p=0.9, min_p=0.05),
        SamplingParams(1.0, top_k=1000, top_p=0.99, min_p=0.0001),
    ],
    ids=str,
)
def test_filters_equal_those_of_transformers(seed: int, vocab_size: int, params: SamplingParams) -> None:
    scores = random_logits(3, vocab_size=vocab_size, seed=seed)

    ours = filtered(scores, params, params, params)
    theirs = transformers_rules(params)(torch.zeros(3, 1, dtype=torch.int64), scores)

    assert torch.equal(ours[~is_close_call(scores, params)], theirs[~is_close_call(scores, params)])
    assert is_close_call(scores, params).sum() <= 3


def test_a_rule_leaves_rows_alone_that_do_not_ask_for_it() -> None:
    scores = random_logits(2)
    # Far below the rest: its probability is exactly 0 in float32, and still it must stay.
    scores[:, 5] = -1000.0
    seen = torch.ones(2, VOCAB_SIZE, dtype=torch.bool)

    assert torch.equal(penalize(scores, seen, column(1.0, 1.5))[0], scores[0])
    for asking in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}):
        ours = filtered(scores, SamplingParams(1.0), SamplingParams(1.0, **asking))
        assert torch.equal(ours[0], scores[0])
        assert ours[1].isinf().any()


@pytest.mark.parametrize("asking", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 1.0}, {"top_k": 2, "top_p": 0.9}])
def test_ties_with_the_last_kept_score_stay(asking: dict[str, Any]) -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]])

    kept = filtered(scores, SamplingParams(1.0, **asking))

    assert kept.tolist() == [[-math.inf, 2.0, 2.0, -math.inf, 2.0]]


def test_greedy_takes_the_likeliest_and_the_lowest_id_on_ties() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [7, 31]] = 2.0

    sampled = make_sampler(SamplingParams()).sample(logits, integers(4), slice(0, 1))

    assert sampled.tokens.tolist() == [7]
    assert list(fields_of(sampled)) == ["tokens"]


def test_greedy_honours_the_repetition_penalty() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7], logits[0, 31] = 2.0, 1.9
    sampler = make_sampler(SamplingParams(repetition_penalty=1.5), prompts=((7, 7, 9),))

    sampled = sampler.sample(logits, integers(4), slice(0, 1))

    assert sampled.tokens.tolist() == [31]


def test_tokens_said_since_the_prompt_are_penalized_too() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7], logits[0, 31] = 2.0, 1.9
    sampler = make_sampler(SamplingParams(repetition_penalty=1.5), prompts=((9,),))

    sampler.observe(torch.tensor([[7]]))
    sampled = sampler.sample(logits, integers(4), slice(0, 1))

    assert sampled.tokens.tolist() == [31]


def test_what_the_last_sequence_said_is_forgotten() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7], logits[0, 31] = 2.0, 1.9
    params = SamplingParams(repetition_penalty=1.5)
    sampler = make_sampler(params, prompts=((7,),))

    sampler.release(0)
    sampler.assign(0, params, (9,))

    assert sampler.sample(logits, integers(4), slice(0, 1)).tokens.tolist() == [7]


def test_tokens_that_do_not_count_are_not_remembered() -> None:
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, 7], logits[:, 31] = 2.0, 1.9
    sampler = make_sampler(*[SamplingParams(repetition_penalty=1.5)] * 2)
    said = torch.tensor([[9, 7], [7, 9]])

    sampler.observe(said, torch.tensor([[True, False], [True, False]]))

    assert sampler.sample(logits, integers(4, 4), slice(0, 2)).tokens.tolist() == [7, 31]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.5, top_p=0.8),
        SamplingParams(temperature=1.5, min_p=0.1),
        SamplingParams(temperature=0.9, top_k=8, top_p=0.9, repetition_penalty=1.2),
    ],
    ids=str,
)
@pytest.mark.parametrize("varied", ["seed", "position"])
def test_samples_follow_the_distribution_of_transformers(params: SamplingParams, varied: str) -> None:
    count, vocab_size = 60_000, 12
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(3)) * 1.5
    scores = transformers_rules(params)(torch.tensor([[1, 4, 4]]), logits)

    numbers = torch.arange(count)[:, None]
    fixed = torch.full_like(numbers, 11)
    seeds, positions = (numbers, fixed) if varied == "seed" else (fixed, numbers)
    noise = gumbel_noise(streams_of(mix(seeds.clone()), positions), torch.arange(vocab_size))
    observed = (scores.double() + noise).argmax(-1).bincount(minlength=vocab_size)

    expected = scores[0].double().softmax(-1) * count
    possible = expected > 0
    assert not observed[~possible].any()
    chi2 = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi2 < CHI2_LIMIT_11


PARAMS = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.2, logprobs=1),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.8, top_p=0.95, seed=2, logprobs=5),
    SamplingParams(temperature=1.9, top_p=0.999, seed=-3),
    SamplingParams(temperature=1.2, top_k=20, seed=4),
    SamplingParams(temperature=1.2, top_k=127, top_p=0.99, seed=5),
    SamplingParams(temperature=1.2, top_k=2000, top_p=0.7, seed=6),
    SamplingParams(temperature=1.1, min_p=0.02, seed=7, logprobs=2),
    SamplingParams(temperature=1.5, min_p=1e-9, seed=8),
    SamplingParams(temperature=2.0, top_p=0.3, min_p=0.01, seed=9),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.1, repetition_penalty=1.3, seed=2**63 - 1),
]


def as_on_an_accelerator(sampler: SlotSampler) -> SlotSampler:
    """Make it take the kernels of fixed shape that devices other than the CPU run."""
    sampler._is_cpu = False
    sampler._forget_plans()
    return sampler


@pytest.fixture(params=["cpu", "accelerator"])
def sampler_for(request: pytest.FixtureRequest) -> Any:
    def make(*params: SamplingParams, **options: Any) -> SlotSampler:
        sampler = make_sampler(*params, **options)
        return sampler if request.param == "cpu" else as_on_an_accelerator(sampler)

    return make


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, LARGE_VOCAB_SIZE])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_the_sampler_draws_what_rules_and_noise_say(
    sampler_for: Any, params: SamplingParams, vocab_size: int, spread: float
) -> None:
    logits = random_logits(1, vocab_size=vocab_size, spread=spread)
    prompt = (1, 4, 4)
    sampler = sampler_for(params, prompts=(prompt,), vocab_size=vocab_size)
    untempered = dataclasses.replace(params, temperature=params.temperature or 1.0)
    scores = transformers_rules(untempered)(torch.tensor([prompt]), logits).double()

    for position in range(30):
        sampled = sampler.sample(logits, integers(position), slice(0, 1))

        noise = noise_of(params.seed, position, torch.arange(vocab_size))
        expected = (scores if params.is_greedy else scores + noise).argmax(-1)
        assert torch.equal(sampled.tokens, expected)


@settings(max_examples=60, deadline=None)
@given(params=st.sampled_from(PARAMS), seed=st.integers(0, 10**6), levels=st.sampled_from([0.02, 0.5, 4]))
def test_a_cpu_draws_what_an_accelerator_draws_even_among_equals(
    params: SamplingParams, seed: int, levels: float
) -> None:
    # Scores on few levels, as those of a bfloat16 model: the filters end among equals.
    logits = (
        random_logits(4, vocab_size=LARGE_VOCAB_SIZE, seed=seed, spread=levels * 2)
        .div(levels)
        .round()
        .mul(levels)
    )
    positions = torch.arange(4)[:, None] + seed
    samplers = [
        make_sampler(*[params] * 4, prompts=((1,),) * 4, vocab_size=LARGE_VOCAB_SIZE) for _ in range(2)
    ]
    as_on_an_accelerator(samplers[1])

    cpu, accelerator = (sampler.sample(logits, positions, slice(0, 4)) for sampler in samplers)

    assert torch.equal(cpu.tokens, accelerator.tokens)


rows_of_params = st.lists(st.sampled_from(PARAMS), min_size=1, max_size=6)


@pytest.mark.parametrize("path", ["cpu", "accelerator"])
@settings(max_examples=40, deadline=None)
@given(
    params=rows_of_params,
    steps=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.3, 4]),
)
def test_no_bit_of_a_row_depends_on_its_neighbours(
    path: str, params: list[SamplingParams], steps: int, seed: int, spread: float
) -> None:
    rows = len(params)
    logits = random_logits(rows, steps, vocab_size=LARGE_VOCAB_SIZE, seed=seed, spread=spread)
    positions = torch.arange(rows * steps).reshape(rows, steps) + seed
    drafts = torch.arange(rows * (steps - 1)).reshape(rows, steps - 1) if steps > 1 else None
    prompts = tuple((row, row + 9) for row in range(rows))
    sampler = make_sampler(*params, prompts=prompts, vocab_size=LARGE_VOCAB_SIZE)
    if path == "accelerator":
        as_on_an_accelerator(sampler)

    together = fields_of(sampler.sample(logits, positions, slice(0, rows), drafts))

    for row in range(rows):
        lone = make_sampler(params[row], prompts=prompts[row : row + 1], vocab_size=LARGE_VOCAB_SIZE)
        mine = slice(row, row + 1)
        alone = fields_of(
            lone.sample(logits[mine], positions[mine], slice(0, 1), None if drafts is None else drafts[mine])
        )
        part = fields_of(
            sampler.sample(logits[mine], positions[mine], mine, None if drafts is None else drafts[mine])
        )
        assert list(alone) == (list(together) if params[row].logprobs else ["tokens"])
        for name, value in alone.items():
            assert torch.equal(together[name][mine], value)
            assert torch.equal(part[name], value)


@pytest.mark.parametrize("numbers", [[2, 0], [1], [0, 1, 2, 3]])
def test_rows_may_be_a_tensor_of_numbers(sampler_for: Any, numbers: list[int]) -> None:
    sampler = sampler_for(*PARAMS[1:5], prompts=((1,), (2,), (3,), (4,)))
    logits, positions = random_logits(4), integers(5, 6, 7, 8)
    rows: Rows = torch.tensor(numbers)

    together = fields_of(sampler.sample(logits, positions, slice(0, 4)))
    some = fields_of(sampler.sample(logits[rows], positions[rows], rows))

    assert torch.equal(some["tokens"], together["tokens"][rows])
    for place, row in enumerate(numbers):
        if PARAMS[1 + row].logprobs:
            assert torch.equal(some["top_logprobs"][place], together["top_logprobs"][row])


# Drafts.


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_tokens_after_drafts_are_those_of_single_steps(sampler_for: Any, params: SamplingParams) -> None:
    logits = random_logits(2, 4, seed=3)
    # Tokens that are likely, so that the penalty matters.
    drafts = logits[:, 1:].argmax(-1)
    positions = torch.tensor([[20], [50]]) + torch.arange(4)
    prompts = ((1, 2), (3, 4))
    single = sampler_for(params, params, prompts=prompts)

    at_once = fields_of(
        sampler_for(params, params, prompts=prompts).sample(logits, positions, slice(0, 2), drafts)
    )

    for step in range(4):
        expected = fields_of(single.sample(logits[:, step], positions[:, step, None], slice(0, 2)))
        for name, value in expected.items():
            assert torch.equal(at_once[name][:, step], value)
        if step < 3:
            single.observe(drafts[:, step, None])


def test_drafts_are_not_remembered(sampler_for: Any) -> None:
    params = SamplingParams(repetition_penalty=2.0)
    logits, positions = random_logits(1, 3, seed=1), torch.arange(3)[None]
    drafts = logits[:, 1:].argmax(-1)
    sampler = sampler_for(params)

    first, again = (sampler.sample(logits, positions, slice(0, 1), drafts).tokens for _ in range(2))

    assert torch.equal(first, again)
    assert first.tolist() != logits.argmax(-1).tolist(), "the drafts had no effect: nothing was tested"


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_no_drafts_is_a_single_step(sampler_for: Any, params: SamplingParams) -> None:
    logits, positions = random_logits(3, seed=2), integers(5, 6, 7)
    sampler = sampler_for(params, SamplingParams(), params)

    step = fields_of(sampler.sample(logits, positions, slice(0, 3)))
    verified = fields_of(sampler.sample(logits[:, None], positions, slice(0, 3)))

    assert list(step) == list(verified)
    assert all(torch.equal(value, verified[name][:, 0]) for name, value in step.items())


# Log-probabilities.


@pytest.mark.parametrize("params", [p for p in PARAMS if p.logprobs], ids=str)
def test_logprobs_are_the_models_own(sampler_for: Any, params: SamplingParams) -> None:
    logits = random_logits(2)
    sampler = sampler_for(params, SamplingParams(), prompts=((1, 4, 4), ()))

    sampled = fields_of(sampler.sample(logits, integers(9, 9), slice(0, 2)))

    logs = logits[0].log_softmax(-1)
    values, ids = logs.sort(descending=True)
    assert sampled["chosen_logprob"][0] == logs[sampled["tokens"][0]]
    assert torch.equal(sampled["top_ids"][0], ids[:5])
    assert torch.equal(sampled["top_logprobs"][0], values[:5])


def test_logprobs_end_with_who_asked(sampler_for: Any) -> None:
    sampler = sampler_for(SamplingParams(), SamplingParams(logprobs=1))
    assert sampler.needs_logprobs

    sampler.release(1)

    assert not sampler.needs_logprobs
    assert list(fields_of(sampler.sample(random_logits(2), integers(1, 1), slice(0, 2)))) == ["tokens"]


def test_a_logprob_is_never_infinite(sampler_for: Any) -> None:
    logits = torch.full((1, VOCAB_SIZE), -math.inf)
    logits[0, 3] = 1.0

    sampled = fields_of(sampler_for(SamplingParams(logprobs=5)).sample(logits, integers(1), slice(0, 1)))

    assert sampled["top_logprobs"].tolist() == [[0.0, *[LEAST_LOGPROB] * 4]]


def test_a_vocabulary_may_be_smaller_than_the_list(sampler_for: Any) -> None:
    sampler = sampler_for(SamplingParams(logprobs=5), vocab_size=3)

    sampled = fields_of(sampler.sample(random_logits(1, vocab_size=3), integers(1), slice(0, 1)))

    assert sampled["top_ids"].shape == (1, 3)


# What the device is asked to do.


@pytest.mark.parametrize("params", [PARAMS[:1], PARAMS[1:2], PARAMS[5:6], PARAMS[8:9], PARAMS], ids=len)
@pytest.mark.parametrize("steps", [1, 4])
def test_no_step_waits_for_an_accelerator(params: list[SamplingParams], steps: int) -> None:
    # A meta tensor has a shape and no values: whoever looks at one, or makes a shape from one, raises.
    meta, rows = torch.device("meta"), len(params)
    sampler = SlotSampler(rows=rows, vocab_size=LARGE_VOCAB_SIZE, device=meta)
    for row, row_params in enumerate(params):
        sampler.assign(row, row_params, (1, 2))
    logits = torch.empty(rows, steps, LARGE_VOCAB_SIZE, device=meta)
    positions, said = (torch.zeros(rows, steps, dtype=torch.int64, device=meta) for _ in range(2))

    sampler.observe(said, torch.ones(rows, steps, dtype=torch.bool, device=meta))
    sampled = sampler.sample(logits, positions, slice(0, rows), said[:, 1:])

    assert sampled.tokens.shape == (rows, steps)
    assert sampled.tokens.device == meta


def test_needs_change_only_with_what_is_asked() -> None:
    sampler = make_sampler(*[SamplingParams()] * 2)
    assert sampler.needs == Needs()

    sampler.assign(0, SamplingParams(temperature=0.5, top_k=40, seed=1), (1,))
    needs = sampler.needs
    sampler.assign(1, SamplingParams(temperature=1.5, top_k=33, seed=2), (2,))

    assert needs == sampler.needs == Needs(draws=True, width=VOCAB_SIZE)
    sampler.assign(1, SamplingParams(temperature=0.0, top_p=0.5), (2,))
    assert sampler.needs == needs, "filters of a greedy row change nothing"


def test_parameters_keep_their_addresses() -> None:
    sampler = as_on_an_accelerator(make_sampler(*PARAMS[2:4]))
    before = [value.data_ptr() for draw in sampler._plan_of(slice(0, 2)).draws for value in draw.filters]

    sampler.assign(0, SamplingParams(temperature=0.3, top_k=4), ())

    after = [value.data_ptr() for draw in sampler._plan_of(slice(0, 2)).draws for value in draw.filters]
    assert before == after


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_logits_are_left_as_they_were(sampler_for: Any, params: SamplingParams) -> None:
    logits = random_logits(2)

    sampler_for(params, params, prompts=((1,), (2,))).sample(logits, integers(1, 2), slice(0, 2))

    assert torch.equal(logits, random_logits(2))


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_give_a_valid_id(
    sampler_for: Any, params: SamplingParams, value: float
) -> None:
    logits = random_logits(2, vocab_size=LARGE_VOCAB_SIZE)
    healthy = fields_of(
        sampler_for(params, params, vocab_size=LARGE_VOCAB_SIZE).sample(logits, integers(1, 2), slice(0, 2))
    )
    logits[0] = value

    sampled = fields_of(
        sampler_for(params, params, vocab_size=LARGE_VOCAB_SIZE).sample(logits, integers(1, 2), slice(0, 2))
    )

    assert 0 <= int(sampled["tokens"][0]) < LARGE_VOCAB_SIZE
    assert all(torch.equal(sampled[name][1], healthy[name][1]) for name in sampled)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, 2**70 + 3, -(2**63)])
def test_any_integer_is_a_seed(seed: int) -> None:
    sampler = make_sampler(SamplingParams(temperature=1.0, seed=seed))

    token = sampler.sample(random_logits(1), integers(1), slice(0, 1)).tokens

    assert 0 <= int(token) < VOCAB_SIZE


def test_seeds_beyond_64_bits_wrap_around() -> None:
    positions, logits = integers(1), random_logits(1)
    low = make_sampler(SamplingParams(temperature=1.0, seed=3))
    high = make_sampler(SamplingParams(temperature=1.0, seed=2**64 + 3))

    tokens = [sampler.sample(logits, positions, slice(0, 1)).tokens for sampler in (low, high)]

    assert torch.equal(*tokens)


def test_noise_is_finite() -> None:
    noise = gumbel_noise(streams_of(mix(torch.arange(2000)[:, None]), integers(3)), torch.arange(500))

    assert noise.isfinite().all()
    # Mean of a standard Gumbel: Euler's constant.
    assert abs(noise.mean().item() - 0.5772) < 0.01


def test_a_vanishing_temperature_is_greedy() -> None:
    sampler = make_sampler(SamplingParams(temperature=1e-30))

    token = sampler.sample(random_logits(1), integers(1), slice(0, 1)).tokens

    assert torch.equal(token, random_logits(1).argmax(-1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"logprobs": -1},
        {"logprobs": 6},
    ],
)
def test_impossible_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_sound_without_nan_and_plus_infinity(dtype: torch.dtype) -> None:
    logits = torch.zeros(5, 2, 40, dtype=dtype)
    logits[1, 0, 7] = -math.inf
    logits[2, 1, 39] = math.inf
    logits[3, 0, 0] = math.nan
    logits[4, 1] = -math.inf

    assert are_sound(logits).tolist() == [
        [True, True], [True, True], [True, False], [False, True], [True, False],
    ]  # fmt: skip
