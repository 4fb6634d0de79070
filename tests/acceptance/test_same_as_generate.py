"""Greedy tokens are those of transformers' `generate`, whatever runs beside and in whichever slot.

The reference is a second copy of the weights in transformers' own code, one request at a time. Two programs
add in different orders, so where a model holds two tokens for all but equally likely either may come first:
such a tie is looked up in the reference's own logits, and one in 500 requests may have one.
"""

from __future__ import annotations

import random
import textwrap
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from codeherd_schema.models import TINY
from codeherd_schema.requests import GenerateRequest, InfillRequest
from codeherd_worker.engine.engine import Engine, EngineSettings
from codeherd_worker.engine.prompts import build_prompt
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.sequences import SequenceOutcome, SequenceRequest
from codeherd_worker.engine.stopping import CancelToken, Stopper
from tests.acceptance.engine_jobs import (
    PATIENCE_S,
    THREADS,
    VOCABULARY,
    first_difference,
    load,
    model_folder,
    warm,
)

#: Per model and precision: 504 in all.
REQUESTS = 84
SLOTS, SUBMITTERS = 16, 4
MOST_PROMPT, MOST_NEW = 400, 64
#: Logits closer than this are a tie: float32 sums of some hundred terms of this size differ by up to 1e-5.
TIE = 1e-4
MOST_TIES = 1
SOURCE = Path(textwrap.__file__).read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt and how many tokens may follow it."""

    prompt_ids: tuple[int, ...]
    stop_ids: frozenset[int]
    max_new_tokens: int


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ties() -> list[str]:
    """Ties of all models together."""
    return []


def random_asks(rng: random.Random, name: str) -> list[Ask]:
    """Return requests: source code for the trained model, any tokens for those that mean nothing."""
    prompt = code_prompt if name == "tiny" else random_prompt
    # The lesser of two: short answers are as good a check, and the reference takes its time.
    return [
        Ask(*prompt(rng), min(rng.randint(1, MOST_NEW), rng.randint(1, MOST_NEW))) for _ in range(REQUESTS)
    ]


def random_prompt(rng: random.Random) -> tuple[tuple[int, ...], frozenset[int]]:
    ids = tuple(rng.randrange(3, VOCABULARY.size) for _ in range(rng.randint(1, MOST_PROMPT)))
    return ids, frozenset({VOCABULARY.specials.eos})


def code_prompt(rng: random.Random) -> tuple[tuple[int, ...], frozenset[int]]:
    """Return the beginning of a text, or a text with a hole, which the model often ends by itself."""
    # A character is a token at most, and few tokens are one character.
    length = rng.randint(1, 2 * MOST_PROMPT)
    start = rng.randrange(len(SOURCE) - length)
    text, middle = SOURCE[start : start + length], rng.randrange(length + 1)
    request: GenerateRequest | InfillRequest = GenerateRequest(prompt=text)
    if rng.random() < 0.5:
        request = InfillRequest(prefix=text[:middle], suffix=text[middle:], suffix_first=rng.random() < 0.5)
    prompt = build_prompt(request, VOCABULARY, TINY)
    return prompt.token_ids[:MOST_PROMPT], prompt.stop_ids


def submit_from_threads(engine: Engine, asks: Sequence[Ask], rng: random.Random) -> list[tuple[int, ...]]:
    """Let several threads submit their share in random order; return all tokens in the order of `asks`."""
    futures: dict[int, Future[SequenceOutcome]] = {}
    order = list(enumerate(asks))
    rng.shuffle(order)

    def submit(share: Sequence[tuple[int, Ask]]) -> None:
        for number, ask in share:
            stopper = Stopper(
                stop_ids=ask.stop_ids,
                stop_strings=(),
                max_new_tokens=ask.max_new_tokens,
                detokenizer=None,
            )
            futures[number] = engine.submit(
                SequenceRequest(ask.prompt_ids, SamplingParams(), stopper, CancelToken())
            )

    threads = [threading.Thread(target=submit, args=(order[part::SUBMITTERS],)) for part in range(SUBMITTERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [futures[number].result(PATIENCE_S).token_ids for number in range(len(asks))]


def generate(reference: LlamaForCausalLM, ask: Ask) -> tuple[tuple[int, ...], tuple[torch.Tensor, ...]]:
    """Return transformers' own greedy tokens without the stop id, and the logits of each step."""
    output = reference.generate(
        torch.tensor([ask.prompt_ids]),
        attention_mask=torch.ones(1, len(ask.prompt_ids), dtype=torch.int64),
        max_new_tokens=ask.max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(ask.stop_ids),
        pad_token_id=VOCABULARY.specials.eos,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[0, len(ask.prompt_ids) :].tolist()
    return tuple(tokens[:-1] if tokens[-1] in ask.stop_ids else tokens), output.logits


@pytest.mark.parametrize("precision", ["float32", "nf4"])
@pytest.mark.parametrize("name", ["tiny", "mha", "gqa"])
def test_greedy_tokens_are_those_of_generate(
    name: str, precision: str, ties: list[str], tmp_path: Path
) -> None:
    folder, rng = model_folder(name, tmp_path), random.Random(f"{name} {precision}")
    asks = random_asks(rng, name)

    engine = warm(
        load(folder, precision), EngineSettings.uniform(slots=SLOTS, max_len=MOST_PROMPT + MOST_NEW)
    )
    engine.start()
    answers = submit_from_threads(engine, asks, rng)
    engine.close()

    # Else the ids that end a text would prove nothing.
    ends_early = sum(len(answer) < ask.max_new_tokens for ask, answer in zip(asks, answers, strict=True))
    assert ends_early > 5 or name != "tiny"

    reference = load(folder, precision)
    different: list[str] = []
    for number, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
        expected, logits = generate(reference, ask)
        if answer == expected:
            continue
        place = first_difference(answer, expected)
        highest = logits[place][0].topk(2).values
        gap = float(highest[0] - highest[1])
        report = f"request {number} differs at token {place}, where generate's top two are {gap:.2e} apart"
        (ties if gap < TIE else different).append(f"{name} {precision}: {report}")
    assert different == []
    assert len(ties) <= MOST_TIES, ties
