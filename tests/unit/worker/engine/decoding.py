"""Drive a decoder by hand: prompts in, tokens with their log-probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import LlamaForCausalLM

from codeherd_worker.engine.decode import SlotDecoder
from codeherd_worker.engine.layouts import Piece
from codeherd_worker.engine.sampling_params import SamplingParams
from codeherd_worker.engine.slot_classes import SlotClass
from codeherd_worker.engine.tokens import Token

#: Tokens of a prefill pass.
CHUNK = 128
#: Log-probabilities are exact numbers that depend on every logit: equal ones mean equal bits.
LOGGED = SamplingParams(logprobs=5)


def make_decoder(
    model: LlamaForCausalLM, *, slots: int = 3, max_len: int = 700, chunk: int = CHUNK, **options: Any
) -> SlotDecoder:
    options.setdefault("classes", (SlotClass(max_len, slots),))
    return SlotDecoder(model, prefill_chunk=chunk, **options)


def start(
    decoder: SlotDecoder,
    slot: int,
    prompt: Sequence[int],
    sampling: SamplingParams = LOGGED,
    *,
    reused: int = 0,
) -> Token:
    """Prefill a prompt chunk by chunk, each in a pass of its own; return the first token."""
    decoder.assign(slot, sampling, prompt)
    for first in range(reused, len(prompt), decoder.prefill_chunk):
        part = prompt[first : first + decoder.prefill_chunk]
        pending = decoder.prefill([Piece(slot, part, first, ends=first + len(part) == len(prompt))])
    assert pending is not None
    (token,) = pending.read()[slot]
    return token


def step(decoder: SlotDecoder, slot: int) -> Token:
    """Decode one token without drafts."""
    (token,) = decoder.step().read()[slot]
    return token


def say(
    decoder: SlotDecoder, slot: int, prompt: Sequence[int], count: int, sampling: SamplingParams = LOGGED
) -> list[Token]:
    """Answer a prompt in a slot with `count` tokens, and release the slot."""
    tokens = [start(decoder, slot, prompt, sampling)]
    tokens += [step(decoder, slot) for _ in range(count - 1)]
    decoder.release(slot)
    return tokens


def ids(tokens: Sequence[Token]) -> list[int | None]:
    return [token.id for token in tokens]
