from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from codeherd_schema.errors import InvalidRequest
from codeherd_worker.engine.sampling import (
    SamplingParams,
    SlotSampler,
    drop_tail,
    gumbel_noise,
    keep_top_k,
    penalize,
)

VOCAB_SIZE = 50
CPU = torch.device("cpu")
#: 0.999 quantile of chi-square with 11 degrees of freedom.
CHI2_LIMIT_11 = 31.26


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def make_sampler(*params: SamplingParams, prompts: tuple[tuple[int, ...], ...] = ()) -> SlotSampler:
    sampler = SlotSampler(rows=len(params), vocab_size=VOCAB_SIZE, device=CPU)
    for row, row_params in enumerate(params):
        sampler.assign(row, row_params, prompts[row] if prompts else ())
    return sampler


def column(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


@pytest.mark.parametrize("seed", range(20))
def test_each_rule_equals_the_one_of_transformers(seed: int) -> None:
    scores = random_logits(3, seed)
    seen_ids = torch.randint(0, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros(3, VOCAB_SIZE, dtype=torch.bool).scatter_(1, seen_ids, True)

    assert torch.equal(
        penalize(scores, seen, column(1.3, 1.3, 1.3)),
        RepetitionPenaltyLogitsProcessor(1.3)(seen_ids, scores),
    )
    for top_k in (1, 7, VOCAB_SIZE, 1000):
        ours = keep_top_k(scores, column(*[top_k] * 3, dtype=torch.int64), min(top_k, VOCAB_SIZE))
        assert torch.equal(ours, TopKLogitsWarper(top_k)(seen_ids, scores))
    for top_p in (0.01, 0.5, 0.9, 0.999):
        assert torch.equal(
            drop_tail(scores, column(*[1 - top_p] * 3)), TopPLogitsWarper(top_p)(seen_ids, scores)
        )


def test_a_rule_leaves_rows_alone_that_do_not_ask_for_it() -> None:
    scores = random_logits(2)
    # Far below the rest: its probability is exactly 0 in float32, and still it must stay.
    scores[:, 5] = -1000.0
    seen = torch.ones(2, VOCAB_SIZE, dtype=torch.bool)

    assert torch.equal(penalize(scores, seen, column(1.0, 1.5))[0], scores[0])
    assert torch.equal(keep_top_k(scores, column(0, 3, dtype=torch.int64), 3)[0], scores[0])
    assert torch.equal(drop_tail(scores, column(0.0, 0.5))[0], scores[0])


def test_ties_with_the_last_kept_score_stay() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0]])

    kept = keep_top_k(scores, column(1, dtype=torch.int64), 1)

    assert kept.tolist() == [[-math.inf, 2.0, 2.0, -math.inf]]


def test_greedy_takes_the_likeliest_and_the_lowest_id_on_ties() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [7, 31]] = 2.0

    token = make_sampler(SamplingParams()).sample(logits, column(4, dtype=torch.int64), slice(0, 1))

    assert token.tolist() == [7]


def test_greedy_honours_the_repetition_penalty() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7], logits[0, 31] = 2.0, 1.9
    sampler = make_sampler(SamplingParams(repetition_penalty=1.5), prompts=((7, 7, 9),))

    token = sampler.sample(logits, column(4, dtype=torch.int64), slice(0, 1))

    assert token.tolist() == [31]


def test_tokens_said_since_the_prompt_are_penalized_too() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7], logits[0, 31] = 2.0, 1.9
    sampler = make_sampler(SamplingParams(repetition_penalty=1.5), prompts=((9,),))

    sampler.observe(torch.tensor([[7]]))
    token = sampler.sample(logits, column(4, dtype=torch.int64), slice(0, 1))

    assert token.tolist() == [31]


def test_what_the_last_sequence_said_is_forgotten() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7], logits[0, 31] = 2.0, 1.9
    params = SamplingParams(repetition_penalty=1.5)
    sampler = make_sampler(params, prompts=((7,),))

    sampler.release(0)
    sampler.assign(0, params, (9,))

    assert sampler.sample(logits, column(4, dtype=torch.int64), slice(0, 1)).tolist() == [7]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.5, top_p=0.8),
        SamplingParams(temperature=0.9, top_k=8, top_p=0.9, repetition_penalty=1.2),
    ],
)
@pytest.mark.parametrize("varied", ["seed", "position"])
def test_samples_follow_the_distribution_of_transformers(params: SamplingParams, varied: str) -> None:
    count, vocab_size = 60_000, 12
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(3)) * 1.5
    prompt = torch.tensor([[1, 4, 4]])
    rules = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.repetition_penalty)])
    rules.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        rules.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        rules.append(TopPLogitsWarper(params.top_p))
    scores = rules(prompt, logits)

    numbers = torch.arange(count)[:, None]
    fixed = torch.full_like(numbers, 11)
    seeds, positions = (numbers, fixed) if varied == "seed" else (fixed, numbers)
    noise = gumbel_noise(seeds, positions, torch.arange(vocab_size))
    observed = (scores.double() + noise).argmax(-1).bincount(minlength=vocab_size)

    expected = scores[0].double().softmax(-1) * count
    possible = expected > 0
    assert not observed[~possible].any()
    chi2 = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi2 < CHI2_LIMIT_11


def test_the_sampler_draws_what_rules_and_noise_say() -> None:
    params = SamplingParams(temperature=0.9, top_k=8, top_p=0.9, repetition_penalty=1.2, seed=5)
    logits = random_logits(1)
    prompt = (1, 4, 4)
    rules = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.9),
            TopKLogitsWarper(8),
            TopPLogitsWarper(0.9),
        ]
    )
    sampler = make_sampler(params, prompts=(prompt,))

    for position in range(200):
        place = column(position, dtype=torch.int64)
        token = sampler.sample(logits, place, slice(0, 1))

        noise = gumbel_noise(column(5, dtype=torch.int64), place, torch.arange(VOCAB_SIZE))
        expected = (rules(torch.tensor([prompt]), logits).double() + noise).argmax(-1)
        assert torch.equal(token, expected)


def test_a_draw_depends_on_no_neighbour_and_no_row() -> None:
    mine = SamplingParams(temperature=0.8, top_p=0.95, seed=77)
    logits = random_logits(4)
    positions = column(9, 30, 9, 2, dtype=torch.int64)
    alone = make_sampler(mine).sample(logits[:1], positions[:1], slice(0, 1))
    neighbours = [
        SamplingParams(),
        SamplingParams(temperature=1.2, top_k=3, seed=1),
        SamplingParams(temperature=0.5, top_p=0.3, repetition_penalty=1.4, seed=77),
    ]

    for row in range(4):
        params = [*neighbours[:row], mine, *neighbours[row:]]
        shuffled = torch.cat([logits[1 : row + 1], logits[:1], logits[row + 1 :]])
        places = torch.cat([positions[1 : row + 1], positions[:1], positions[row + 1 :]])
        tokens = make_sampler(*params).sample(shuffled, places, slice(0, 4))

        assert tokens[row] == alone[0]


def test_one_row_is_sampled_like_all_rows() -> None:
    sampler = make_sampler(*(SamplingParams(temperature=1.0, seed=seed) for seed in range(3)))
    logits, positions = random_logits(3), column(5, 6, 7, dtype=torch.int64)

    together = sampler.sample(logits, positions, slice(0, 3))
    single = sampler.sample(logits[1:2], positions[1:2], slice(1, 2))

    assert together[1] == single[0]


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, 2**70 + 3, -(2**63)])
def test_any_integer_is_a_seed(seed: int) -> None:
    sampler = make_sampler(SamplingParams(temperature=1.0, seed=seed))

    token = sampler.sample(random_logits(1), column(1, dtype=torch.int64), slice(0, 1))

    assert 0 <= int(token) < VOCAB_SIZE


def test_seeds_beyond_64_bits_wrap_around() -> None:
    positions, logits = column(1, dtype=torch.int64), random_logits(1)
    low = make_sampler(SamplingParams(temperature=1.0, seed=3))
    high = make_sampler(SamplingParams(temperature=1.0, seed=2**64 + 3))

    tokens = [sampler.sample(logits, positions, slice(0, 1)) for sampler in (low, high)]

    assert torch.equal(*tokens)


def test_noise_is_finite() -> None:
    noise = gumbel_noise(torch.arange(2000)[:, None], column(3, dtype=torch.int64), torch.arange(500))

    assert noise.isfinite().all()
    # Mean of a standard Gumbel: Euler's constant.
    assert abs(noise.mean().item() - 0.5772) < 0.01


def test_a_vanishing_temperature_is_greedy() -> None:
    sampler = make_sampler(SamplingParams(temperature=1e-30))

    token = sampler.sample(random_logits(1), column(1, dtype=torch.int64), slice(0, 1))

    assert torch.equal(token, random_logits(1).argmax(-1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
    ],
)
def test_impossible_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        SamplingParams(**wrong)
