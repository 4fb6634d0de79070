"""The word for how likely a token was: passed from the decoder through the engine to a sequence's `Stopper`.

Knows nothing of tensors (`sampling.py` computes the numbers) or of text (`runner.py` adds the pieces).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token of a sequence, and what else the model would have said in its place."""

    token_id: int
    #: Natural logarithm of the probability that the model itself gave the token, at most 0.
    logprob: float
    #: The likeliest tokens with theirs, likeliest first, as many as were asked for.
    top: tuple[tuple[int, float], ...]
